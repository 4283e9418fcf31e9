// Attention of single queries, each over its own list; keys and values are kept as fp32 or as bf16 rows.
#pragma once

#include "attention.h"
#include "pairs.h"
#include "tuned.h"

namespace sparsifiner::SPARSIFINER_ISA {

using tuned::QUERY_BLOCK;

template <class Stored>
struct QueryScratch {
    QueryScratch(int64_t head_dim, int64_t longest)
        : query(head_dim),
          stride(round_up(longest + SPARE_KEYS, LANES)),
          logits(stride),
          weights(QUERY_BLOCK * stride) {}
    const Buffer<Stored> query;
    const int64_t stride;
    const Buffer<float> logits;
    const Buffer<Stored> weights;  // [QUERY_BLOCK, stride]
};

// Products of a query with LANES keys.
inline Floats products_of(const float* query, const float* const (&key)[LANES], int64_t size) {
    Floats rows[LANES] = {};
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats part = load(query + i);
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; ++lane) rows[lane] += part * load(key[lane] + i);
    }
    return sum_each(rows);
}

// Sums of values by weights: dims from `offset` on.
template <int Vectors>
inline void sum_of_values(
    const Packed<float>& packed, int64_t size, const Keys& keys, const float* weights, int64_t offset,
    Floats (&sums)[Vectors]) {
    // two sums of each, since an addition must wait for the one before it
    Floats even[Vectors] = {}, odd[Vectors] = {};
    int64_t j = 0;
    for (; j + 2 <= keys.count; j += 2) {
        const Floats first = all(weights[j]), second = all(weights[j + 1]);
        const float* here = packed.value(keys.row[j], size) + offset;
        const float* next = packed.value(keys.row[j + 1], size) + offset;
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) {
            even[c] += first * load(here + c * LANES);
            odd[c] += second * load(next + c * LANES);
        }
    }
    if (j < keys.count) {
        const Floats last = all(weights[j]);
        const float* here = packed.value(keys.row[j], size) + offset;
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) even[c] += last * load(here + c * LANES);
    }
#pragma GCC unroll 4
    for (int c = 0; c < Vectors; ++c) sums[c] = even[c] + odd[c];
}

#if defined(__AVX512BF16__)

inline Floats products_of(const Bfloat16* query, const Bfloat16* const (&key)[LANES], int64_t size) {
    Floats rows[LANES] = {};
    int64_t i = 0;
    for (; i + PAIR_LANES <= size; i += PAIR_LANES) {
        const Pairs part = Pairs::whole(query + i);
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; ++lane)
            rows[lane] = add_products(rows[lane], part, Pairs::whole(key[lane] + i));
    }
    if (i < size) {
        const Pairs part = Pairs::half(query + i);
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; ++lane)
            rows[lane] = add_products(rows[lane], part, Pairs::half(key[lane] + i));
    }
    return sum_each(rows);
}

// Two keys at a time; `weights` has a zero behind the last one, which then goes with itself.
template <int Vectors>
inline void sum_of_values(
    const Packed<Bfloat16>& packed, int64_t size, const Keys& keys, const Bfloat16* weights, int64_t offset,
    Floats (&sums)[Vectors]) {
    static_assert(Vectors == 1 || Vectors % 2 == 0);
    constexpr int count = (Vectors + 1) / 2;
    const auto load_part = [](const Bfloat16* from) {
        return Vectors == 1 ? Pairs::half(from) : Pairs::whole(from);
    };
    Floats first[count] = {}, second[count] = {};
    for (int64_t j = 0; j < keys.count; j += 2) {
        const Pairs both = Pairs::two(weights + j);
        const Bfloat16* here = packed.value(keys.row[j], size) + offset;
        const Bfloat16* next = packed.value(keys.row[smaller(j + 1, keys.count - 1)], size) + offset;
#pragma GCC unroll 4
        for (int c = 0; c < count; ++c) {
            const Pairs x = load_part(here + c * PAIR_LANES), y = load_part(next + c * PAIR_LANES);
            first[c] = add_products(first[c], mix_first(x, y), both);
            second[c] = add_products(second[c], mix_second(x, y), both);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < count; ++c) {
        sums[2 * c] = first_half(first[c], second[c]);
        if (Vectors > 1) sums[2 * c + 1] = second_half(first[c], second[c]);
    }
}

#endif

// Softmax weights of the keys, not yet divided by their sum, which is returned.
template <class Stored>
inline float weigh(
    const Place<Stored>& at, const QueryScratch<Stored>& scratch, const Keys& keys, Stored* weights) {
    const int64_t size = at.a.head_dim;
    const float scale = at.a.scale * LOG2_E;
    float* all_logits = scratch.logits;
    Floats best = all(-INFINITE);
    for (int64_t j = 0; j < keys.count; j += LANES) {
        const Stored* key[LANES];
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; ++lane) key[lane] = at.packed.key(keys.row[j + lane], size);
        const Floats sums = products_of(scratch.query, key, size) * scale + load(keys.bias + j);
        // spare keys may hold anything, NaN too
        const Ints spare = iota() + static_cast<int32_t>(j) >= static_cast<int32_t>(keys.count);
        const Floats logits = spare ? all(-INFINITE) : sums;
        store(all_logits + j, logits);
        best = larger(logits, best);
    }
    const float shift = max_of(best);
    Floats total{};
    for (int64_t j = 0; j < keys.count; j += LANES) {
        const Floats logits = load(all_logits + j);
        store(weights + j, logits == -INFINITE ? Floats{} : exp2(logits - shift));
        total += load(weights + j);  // as they are stored
    }
    return sum_of(total);
}

template <int Vectors, class Stored, class Element>
inline void write_values(
    const Place<Stored>& at, const Keys& keys, const Stored* weights, float inverse, Element* out,
    int64_t offset) {
    Floats sums[Vectors];
    sum_of_values(at.packed, at.a.head_dim, keys, weights, offset, sums);
    for (int c = 0; c < Vectors; ++c) store(out + offset + c * LANES, sums[c] * inverse);
}

// Up to QUERY_BLOCK queries, by their tokens, each over its own keys: all products first, then all sums.
template <class Element, class Stored>
void attend_queries(
    const Place<Stored>& at, const int32_t* tokens, int64_t queries, const Keys* keys,
    const QueryScratch<Stored>& scratch) {
    float inverse[QUERY_BLOCK];
    for (int64_t u = 0; u < queries; ++u) {
        Stored* query = scratch.query;
        copy_row(query, row_of<const Element>(at.a.q, at.batch, at.head, tokens[u]), at.a.head_dim);
        const float total = weigh(at, scratch, keys[u], scratch.weights + u * scratch.stride);
        // queries without any key get zeros
        inverse[u] = keys[u].count ? 1.0f / total : 0.0f;
    }
    for (int64_t u = 0; u < queries; ++u) {
        Element* out = row_of<Element>(at.a.out, at.batch, at.head, tokens[u]);
        const Stored* weights = scratch.weights + u * scratch.stride;
        int64_t offset = 0;
        for (; offset + 4 * LANES <= at.a.head_dim; offset += 4 * LANES)
            write_values<4>(at, keys[u], weights, inverse[u], out, offset);
        for (; offset < at.a.head_dim; offset += LANES)
            write_values<1>(at, keys[u], weights, inverse[u], out, offset);
    }
}

}  // namespace sparsifiner::SPARSIFINER_ISA
