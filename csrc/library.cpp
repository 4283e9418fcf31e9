// The C interface: every call goes to the kernels of the instruction set that it names.
//
// Compiled for the plain machine, as it runs before the instruction set is known.
#include <new>

#include "kernels.h"

// `sparsifiner.ops.native` declares these structures again, and its test compares the sizes.
static_assert(sizeof(SparsifinerLists) == 64);
static_assert(sizeof(SparsifinerTensor) == 32);
static_assert(sizeof(SparsifinerAttention) == 248);
static_assert(sizeof(SparsifinerPredictor) == 184);
static_assert(sizeof(SparsifinerImpact) == 208);

// An exception must not reach the caller, who need not know C++.
#define SPARSIFINER_DISPATCH(isa, call)                                             \
    try {                                                                           \
        switch (isa) {                                                              \
            case SPARSIFINER_AVX2: sparsifiner::avx2::call; break;                  \
            case SPARSIFINER_AVX512: sparsifiner::avx512::call; break;              \
            case SPARSIFINER_AVX512_BF16: sparsifiner::avx512_bf16::call; break;    \
            default: return SPARSIFINER_UNKNOWN_ISA;                                \
        }                                                                           \
    } catch (const std::bad_alloc&) {                                               \
        return SPARSIFINER_NO_MEMORY;                                               \
    }                                                                               \
    return SPARSIFINER_DONE;

extern "C" {

int32_t sparsifiner_interface() { return SPARSIFINER_INTERFACE; }

int32_t sparsifiner_best_isa() {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!avx2) return SPARSIFINER_NONE;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512) return SPARSIFINER_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? SPARSIFINER_AVX512_BF16 : SPARSIFINER_AVX512;
}

int32_t sparsifiner_coefficients(int32_t isa, int32_t threads, const SparsifinerPredictor* predictor) {
    SPARSIFINER_DISPATCH(isa, coefficients(threads, *predictor))
}

int32_t sparsifiner_select_topk(int32_t isa, int32_t threads, const SparsifinerLists* lists, const float* scores) {
    SPARSIFINER_DISPATCH(isa, select_topk(threads, *lists, scores))
}

int32_t sparsifiner_select_lowrank(
    int32_t isa, int32_t threads, const SparsifinerLists* lists, const float* coefficients, const float* basis,
    int64_t basis_size, int64_t kept) {
    SPARSIFINER_DISPATCH(isa, select_lowrank(threads, *lists, coefficients, basis, basis_size, kept))
}

int32_t sparsifiner_select_impact(
    int32_t isa, int32_t threads, const SparsifinerLists* lists, const SparsifinerImpact* impact) {
    SPARSIFINER_DISPATCH(isa, select_impact(threads, *lists, *impact))
}

int32_t sparsifiner_attend(int32_t isa, int32_t threads, const SparsifinerAttention* attention) {
    SPARSIFINER_DISPATCH(isa, attend(threads, *attention))
}
}
