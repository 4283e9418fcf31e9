// The kernels, once per instruction set: each of their sources is compiled for every SPARSIFINER_ISA.
#pragma once

#include <cstdint>

#include "sparsifiner.h"

#define SPARSIFINER_DECLARE(isa)                                                                            \
    namespace sparsifiner::isa {                                                                            \
    void coefficients(int threads, const SparsifinerPredictor& predictor);                                  \
    void select_topk(int threads, const SparsifinerLists& lists, const float* scores);                      \
    void select_lowrank(                                                                                    \
        int threads, const SparsifinerLists& lists, const float* coefficients, const float* basis,          \
        int64_t basis_size, int64_t kept);                                                                  \
    void select_impact(                                                                                     \
        int threads, const SparsifinerLists& lists, const SparsifinerImpact& impact);                       \
    void attend(int threads, const SparsifinerAttention& attention);                                        \
    }

SPARSIFINER_DECLARE(avx2)
SPARSIFINER_DECLARE(avx512)
SPARSIFINER_DECLARE(avx512_bf16)

#undef SPARSIFINER_DECLARE
