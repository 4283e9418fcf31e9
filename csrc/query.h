// Attention of a single query over its own list.
#pragma once

#include <utility>

#include "attention.h"

namespace sparsifiner::SPARSIFINER_ISA {

// Even, then odd lanes of two vectors, added: each half holds neighbours' sums of one of them.
template <int... Lane>
inline Floats add_neighbours(Floats x, Floats y, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(x, y, 2 * Lane...) + __builtin_shufflevector(x, y, 2 * Lane + 1 ...);
}

// Lane i is the sum of rows[i].
inline Floats sum_each(Floats (&rows)[LANES]) {
#pragma GCC unroll 4
    for (int count = LANES; count > 1; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count / 2; ++i)
            rows[i] = add_neighbours(rows[2 * i], rows[2 * i + 1], std::make_integer_sequence<int, LANES>());
    return rows[0];
}

// Sums of values by weights: dims from `offset` on.
template <int Vectors>
inline void sum_of_values(
    const float* weights, const float* const* values, int64_t offset, int64_t count, Floats (&sums)[Vectors]) {
    // two sums of each, since an addition must wait for the one before it
    Floats even[Vectors] = {}, odd[Vectors] = {};
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
        const Floats first = all(weights[j]), second = all(weights[j + 1]);
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) {
            even[c] += first * load(values[j] + offset + c * LANES);
            odd[c] += second * load(values[j + 1] + offset + c * LANES);
        }
    }
    if (j < count) {
        const Floats last = all(weights[j]);
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) even[c] += last * load(values[j] + offset + c * LANES);
    }
#pragma GCC unroll 4
    for (int c = 0; c < Vectors; ++c) sums[c] = even[c] + odd[c];
}

// The query of a token over the keys that were collected; `weights` holds one number per key and spare key.
template <class Element>
void attend_query(const Place& at, int64_t token, const Keys& keys, float* query, float* weights) {
    const int64_t size = at.a.head_dim;
    copy_row(query, row_of<const Element>(at.a.q, at.batch, at.head, token), size);
    const float scale = at.a.scale * LOG2_E;
    Floats best = all(-__builtin_inff());
    for (int64_t j = 0; j < keys.count; j += LANES) {
        Floats rows[LANES] = {};
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats part = load(query + i);
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; ++lane) rows[lane] += part * load(keys.key[j + lane] + i);
        }
        const Floats all_logits = sum_each(rows) * scale + load(keys.bias + j);
        // spare keys may hold anything, NaN too
        const Ints spare = iota() + static_cast<int32_t>(j) >= static_cast<int32_t>(keys.count);
        const Floats logits = spare ? all(-__builtin_inff()) : all_logits;
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
    const float inverse = keys.count ? 1.0f / sum_of(total) : 0.0f;
    Element* out = row_of<Element>(at.a.out, at.batch, at.head, token);
    int64_t offset = 0;
    for (; offset + 4 * LANES <= size; offset += 4 * LANES) {
        Floats sums[4];
        sum_of_values(weights, keys.value, offset, keys.count, sums);
        for (int c = 0; c < 4; ++c) store(out + offset + c * LANES, sums[c] * inverse);
    }
    for (; offset < size; offset += LANES) {
        Floats sums[1];
        sum_of_values(weights, keys.value, offset, keys.count, sums);
        store(out + offset, sums[0] * inverse);
    }
}

}  // namespace sparsifiner::SPARSIFINER_ISA
