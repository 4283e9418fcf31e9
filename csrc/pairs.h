// Products of bf16 numbers, two at a time, summed in fp32: for rows that are kept as bf16.
#pragma once

#include "memory.h"

#if defined(__AVX512BF16__)

namespace sparsifiner::SPARSIFINER_ISA {

constexpr int PAIR_LANES = 2 * LANES;

// Numbers of a row: PAIR_LANES of them, or LANES and then zeros.
struct Pairs {
    __m512i bits;

    static Pairs whole(const Bfloat16* from) { return {_mm512_loadu_si512(from)}; }
    static Pairs half(const Bfloat16* from) {
        return {_mm512_maskz_loadu_epi16((1u << LANES) - 1, from)};
    }
    // Two neighbours, over and over.
    static Pairs two(const Bfloat16* from) {
        int32_t both;
        std::memcpy(&both, from, sizeof both);
        return {_mm512_set1_epi32(both)};
    }
};

// Lane i is sum[i] + x[2i] * y[2i] + x[2i + 1] * y[2i + 1].
inline Floats add_products(Floats sum, Pairs x, Pairs y) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x.bits, (__m512bh)y.bits);
}

// x and y in turns, of the first and of the second four in every eight.
inline Pairs mix_first(Pairs x, Pairs y) { return {_mm512_unpacklo_epi16(x.bits, y.bits)}; }
inline Pairs mix_second(Pairs x, Pairs y) { return {_mm512_unpackhi_epi16(x.bits, y.bits)}; }

// From sums of the first and the second four in every eight: those of 0 to 15, and of 16 to 31.
inline Floats first_half(Floats first, Floats second) {
    return __builtin_shufflevector(first, second, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
}
inline Floats second_half(Floats first, Floats second) {
    return __builtin_shufflevector(
        first, second, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
}

}  // namespace sparsifiner::SPARSIFINER_ISA

#endif
