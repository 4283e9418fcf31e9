// The C interface: every call goes to the kernels of the instruction set that it names.
//
// Compiled for the plain machine, as it runs before the instruction set is known.
#include <cstdlib>

#include "kernels.h"

// `sparsifiner.ops.native` declares these structures again, and its test compares the sizes.
static_assert(sizeof(SparsifinerLists) == 64);
static_assert(sizeof(SparsifinerTensor) == 32);
static_assert(sizeof(SparsifinerAttention) == 248);
static_assert(sizeof(SparsifinerPredictor) == 184);
static_assert(sizeof(SparsifinerImpact) == 208);

// To return without a result would leave memory unwritten.
#define SPARSIFINER_DISPATCH(isa, call)                                      \
    switch (isa) {                                                           \
        case SPARSIFINER_AVX2: return sparsifiner::avx2::call;               \
        case SPARSIFINER_AVX512: return sparsifiner::avx512::call;           \
        case SPARSIFINER_AVX512_BF16: return sparsifiner::avx512_bf16::call; \
        default: std::abort();                                               \
    }

extern "C" {

int32_t sparsifiner_best_isa() {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!avx2) return SPARSIFINER_NONE;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512) return SPARSIFINER_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? SPARSIFINER_AVX512_BF16 : SPARSIFINER_AVX512;
}

void sparsifiner_coefficients(int32_t isa, int32_t threads, const SparsifinerPredictor* predictor) {
    SPARSIFINER_DISPATCH(isa, coefficients(threads, *predictor))
}

void sparsifiner_select_topk(int32_t isa, int32_t threads, const SparsifinerLists* lists, const float* scores) {
    SPARSIFINER_DISPATCH(isa, select_topk(threads, *lists, scores))
}

void sparsifiner_select_lowrank(
    int32_t isa, int32_t threads, const SparsifinerLists* lists, const float* coefficients, const float* basis,
    int64_t basis_size, int64_t kept) {
    SPARSIFINER_DISPATCH(isa, select_lowrank(threads, *lists, coefficients, basis, basis_size, kept))
}

void sparsifiner_select_impact(
    int32_t isa, int32_t threads, const SparsifinerLists* lists, const SparsifinerImpact* impact) {
    SPARSIFINER_DISPATCH(isa, select_impact(threads, *lists, *impact))
}

void sparsifiner_attend(int32_t isa, int32_t threads, const SparsifinerAttention* attention) {
    SPARSIFINER_DISPATCH(isa, attend(threads, *attention))
}
}
