// Attention of single queries, each over its own list.
#pragma once

#include "attention.h"

namespace sparsifiner::SPARSIFINER_ISA {

// Queries that are worked on together: their lists have keys in common, which the nearest cache then holds.
constexpr int QUERY_BLOCK = 16;

struct QueryScratch {
    QueryScratch(int64_t head_dim, int64_t longest)
        : query(head_dim), stride(round_up(longest + SPARE_KEYS, LANES)), weights(QUERY_BLOCK * stride) {}
    const Buffer<float> query;
    const int64_t stride;
    const Buffer<float> weights;  // [QUERY_BLOCK, stride]
};

// Softmax weights of the keys, not yet divided by their sum, which is returned.
inline float weigh(const Place& at, const float* query, const Keys& keys, float* weights) {
    const int64_t size = at.a.head_dim;
    const float scale = at.a.scale * LOG2_E;
    Floats best = all(-__builtin_inff());
    for (int64_t j = 0; j < keys.count; j += LANES) {
        const float* key[LANES];
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; ++lane) key[lane] = at.packed.key(keys.row[j + lane], size);
        Floats rows[LANES] = {};
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats part = load(query + i);
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; ++lane) rows[lane] += part * load(key[lane] + i);
        }
        const Floats sums = sum_each(rows) * scale + load(keys.bias + j);
        // spare keys may hold anything, NaN too
        const Ints spare = iota() + static_cast<int32_t>(j) >= static_cast<int32_t>(keys.count);
        const Floats logits = spare ? all(-__builtin_inff()) : sums;
        store(weights + j, logits);
        best = larger(logits, best);
    }
    const float shift = max_of(best);
    Floats total{};
    for (int64_t j = 0; j < keys.count; j += LANES) {
        const Floats logits = load(weights + j);
        const Floats weight = logits == -__builtin_inff() ? Floats{} : exp2(logits - shift);
        store(weights + j, weight);
        total += weight;
    }
    return sum_of(total);
}

// Sums of values by weights: dims from `offset` on.
template <int Vectors>
inline void sum_of_values(
    const Place& at, const Keys& keys, const float* weights, int64_t offset, Floats (&sums)[Vectors]) {
    // two sums of each, since an addition must wait for the one before it
    Floats even[Vectors] = {}, odd[Vectors] = {};
    int64_t j = 0;
    for (; j + 2 <= keys.count; j += 2) {
        const Floats first = all(weights[j]), second = all(weights[j + 1]);
        const float* here = at.packed.value(keys.row[j], at.a.head_dim) + offset;
        const float* next = at.packed.value(keys.row[j + 1], at.a.head_dim) + offset;
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) {
            even[c] += first * load(here + c * LANES);
            odd[c] += second * load(next + c * LANES);
        }
    }
    if (j < keys.count) {
        const Floats last = all(weights[j]);
        const float* here = at.packed.value(keys.row[j], at.a.head_dim) + offset;
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) even[c] += last * load(here + c * LANES);
    }
#pragma GCC unroll 4
    for (int c = 0; c < Vectors; ++c) sums[c] = even[c] + odd[c];
}

template <int Vectors, class Element>
inline void write_values(
    const Place& at, const Keys& keys, const float* weights, float inverse, Element* out, int64_t offset) {
    Floats sums[Vectors];
    sum_of_values(at, keys, weights, offset, sums);
    for (int c = 0; c < Vectors; ++c) store(out + offset + c * LANES, sums[c] * inverse);
}

// Up to QUERY_BLOCK queries, by their tokens, each over its own keys: all products first, then all sums.
template <class Element>
void attend_queries(
    const Place& at, const int32_t* tokens, int64_t queries, const Keys* keys, const QueryScratch& scratch) {
    float inverse[QUERY_BLOCK];
    for (int64_t u = 0; u < queries; ++u) {
        copy_row(scratch.query, row_of<const Element>(at.a.q, at.batch, at.head, tokens[u]), at.a.head_dim);
        const float total = weigh(at, scratch.query, keys[u], scratch.weights + u * scratch.stride);
        // queries without any key get zeros
        inverse[u] = keys[u].count ? 1.0f / total : 0.0f;
    }
    for (int64_t u = 0; u < queries; ++u) {
        Element* out = row_of<Element>(at.a.out, at.batch, at.head, tokens[u]);
        const float* weights = scratch.weights + u * scratch.stride;
        int64_t offset = 0;
        for (; offset + 4 * LANES <= at.a.head_dim; offset += 4 * LANES)
            write_values<4>(at, keys[u], weights, inverse[u], out, offset);
        for (; offset < at.a.head_dim; offset += LANES)
            write_values<1>(at, keys[u], weights, inverse[u], out, offset);
    }
}

}  // namespace sparsifiner::SPARSIFINER_ISA
