// A thin vector of floats, as wide as the instruction set that a file is compiled for.
//
// Arithmetic is the compiler's own on vector types (a * b + c becomes one FMA); only what it has no operator
// for is written with intrinsics.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

namespace sparsifiner::SPARSIFINER_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

constexpr float INFINITE = __builtin_inff();
constexpr float LOG2_E = 1.44269504f;

using Floats = float __attribute__((vector_size(LANES * 4)));
using Ints = int32_t __attribute__((vector_size(LANES * 4)));

template <class Vector, class Element>
inline Vector load_as(const Element* from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline Floats load(const float* from) { return load_as<Floats>(from); }
inline Ints load(const int32_t* from) { return load_as<Ints>(from); }
inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
inline void store(int32_t* to, Ints x) { std::memcpy(to, &x, sizeof x); }

inline Floats all(float x) { return Floats{} + x; }
inline Ints all(int32_t x) { return Ints{} + x; }

// 0, 1, 2, ...
inline Ints iota() {
    Ints x;
    for (int lane = 0; lane < LANES; ++lane) x[lane] = lane;
    return x;
}

// Lanes of a comparison as bits.
inline uint32_t bits_of(Ints comparison) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)comparison);
#else
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)comparison));
#endif
}

// NaN in the first argument is kept.
inline Floats larger(Floats x, Floats y) { return x < y ? y : x; }

using Lanes = std::make_integer_sequence<int, LANES>;

template <int BY, class Vector, int... Lane>
inline Vector rotate(Vector x, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(x, x, ((Lane + BY) % LANES)...);
}

// Over all lanes, by halves: shorter chains than lane by lane.
template <int HALF = LANES / 2, class Vector, class Combine>
inline auto reduce(Vector x, Combine combine) {
    if constexpr (HALF == 0)
        return x[0];
    else
        return reduce<HALF / 2>(combine(x, rotate<HALF>(x, Lanes())), combine);
}

template <class Vector>
inline auto sum_of(Vector x) {
    return reduce(x, [](Vector a, Vector b) { return a + b; });
}

inline float max_of(Floats x) {
    return reduce(x, [](Floats a, Floats b) { return a < b ? b : a; });
}

template <int... Lane>
inline Floats add_neighbours(Floats x, Floats y, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(x, y, 2 * Lane...) + __builtin_shufflevector(x, y, 2 * Lane + 1 ...);
}

// Lane i is the sum of rows[i], which are overwritten.
inline Floats sum_each(Floats (&rows)[LANES]) {
    // each half of a sum of neighbours holds those of one of the two
#pragma GCC unroll 4
    for (int count = LANES; count > 1; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count / 2; ++i) rows[i] = add_neighbours(rows[2 * i], rows[2 * i + 1], Lanes());
    return rows[0];
}

// Lanes of two vectors in turns, from lane FIRST on.
template <int FIRST, int... Lane>
inline Floats interleave(Floats x, Floats y, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(x, y, (FIRST + Lane / 2 + (Lane % 2) * LANES)...);
}

// Rows become columns: as often as LANES can be halved, rows are interleaved with those half the way down.
inline void transpose(Floats (&rows)[LANES]) {
#pragma GCC unroll 4
    for (int count = LANES; count > 1; count /= 2) {
        Floats mixed[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; ++i) {
            mixed[2 * i] = interleave<0>(rows[i], rows[i + LANES / 2], Lanes());
            mixed[2 * i + 1] = interleave<LANES / 2>(rows[i], rows[i + LANES / 2], Lanes());
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) rows[i] = mixed[i];
    }
}

// 2 ** x for x <= 0, to 2e-7; below -126 it is 2 ** -126.
inline Floats exp2(Floats x) {
    x = x < -126.0f ? all(-126.0f) : x;
    const float round = 12582912.0f;  // 1.5 * 2 ** 23: adding it leaves the nearest integer in the low bits
    const Floats shifted = x + round;
    const Floats f = x - (shifted - round);
    Floats p = all(1.535336188e-4f);
    p = p * f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472028e-1f;
    p = p * f + 1.0f;
    const Ints exponent = ((Ints)shifted - 0x4B400000 + 127) << 23;
    return p * (Floats)exponent;
}

// Lanes with x >= y as bits; shorter than `bits_of` a comparison, which goes through a vector.
inline uint32_t at_least(Floats x, Floats y) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GE_OQ);
#else
    return bits_of(x >= y);
#endif
}

inline uint32_t at_least(Ints x, Ints y) {
#if defined(__AVX512F__)
    return _mm512_cmpge_epi32_mask((__m512i)x, (__m512i)y);
#else
    return bits_of(x >= y);
#endif
}

#if !defined(__AVX512F__)
// For each set of 8 lanes: their numbers, one a byte, in order.
struct LanesOfBits {
    uint64_t lanes[256] = {};
    constexpr LanesOfBits() {
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, place = 0; lane < 8; ++lane)
                if (bits >> lane & 1) lanes[bits] |= static_cast<uint64_t>(lane) << 8 * place++;
    }
};
inline constexpr LanesOfBits LANES_OF_BITS;
#endif

// Packs the lanes whose bit is set to the front and stores all LANES; returns how many they are.
inline int pack(int32_t* to, Ints x, uint32_t bits) {
#if defined(__AVX512F__)
    // not the storing form, which is slow on some machines
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), (__m512i)x));
    return __builtin_popcount(bits);
#else
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&LANES_OF_BITS.lanes[bits]));
    store(to, (Ints)_mm256_permutevar8x32_epi32((__m256i)x, _mm256_cvtepu8_epi32(bytes)));
    return __builtin_popcount(bits);
#endif
}

}  // namespace sparsifiner::SPARSIFINER_ISA
