// Attention of the queries of a tile over the list that they share.
#pragma once

#include "attention.h"
#include "tuned.h"

namespace sparsifiner::SPARSIFINER_ISA {

using tuned::TILE_QUERIES;
// Sums that the registers hold beside their factors.
constexpr int SUMS = LANES == 16 ? 24 : 12;
constexpr int QUERY_VECTORS = LANES == 16 ? 4 : 2;
constexpr int SUM_QUERIES = 6;
constexpr int SUM_VECTORS = SUMS / SUM_QUERIES;
static_assert(SUMS <= SPARE_KEYS);

struct TileScratch {
    TileScratch(int64_t head_dim, int64_t longest)
        : queries(head_dim * TILE_QUERIES), weights((longest + SPARE_KEYS + 1) * TILE_QUERIES) {}
    Buffer<float> queries;  // [d, queries]
    Buffer<float> weights;  // [keys, queries]
};

template <int Vectors, int Count>
inline void multiply_block(
    const float* queries, int64_t stride, const Place<float>& at, const int32_t* rows, float* products) {
    const float* keys[Count];
    for (int j = 0; j < Count; ++j) keys[j] = at.key(rows[j]);
    Floats sums[Count][Vectors] = {};
    for (int64_t i = 0; i < at.a.head_dim; ++i) {
        Floats query[Vectors];
#pragma GCC unroll 4
        for (int u = 0; u < Vectors; ++u) query[u] = load(queries + i * stride + u * LANES);
#pragma GCC unroll 24
        for (int j = 0; j < Count; ++j) {
            const Floats key = all(keys[j][i]);
#pragma GCC unroll 4
            for (int u = 0; u < Vectors; ++u) sums[j][u] += key * query[u];
        }
    }
#pragma GCC unroll 24
    for (int j = 0; j < Count; ++j)
#pragma GCC unroll 4
        for (int u = 0; u < Vectors; ++u) store(products + j * stride + u * LANES, sums[j][u]);
}

template <int Vectors>
inline void multiply_columns(
    const float* queries, int64_t stride, const Place<float>& at, const Keys& keys, float* products) {
    constexpr int at_once = SUMS / Vectors;
    for (int64_t j = 0; j < keys.count; j += at_once)
        multiply_block<Vectors, at_once>(queries, stride, at, keys.row + j, products + j * stride);
}

// Products of keys and queries [d, stride], a whole number of vectors wide: [count, stride].
inline void multiply(const float* queries, int64_t stride, const Place<float>& at, const Keys& keys, float* products) {
    int64_t u = 0;
    for (; u + QUERY_VECTORS * LANES <= stride; u += QUERY_VECTORS * LANES)
        multiply_columns<QUERY_VECTORS>(queries + u, stride, at, keys, products + u);
    for (; u + 2 * LANES <= stride; u += 2 * LANES)
        multiply_columns<2>(queries + u, stride, at, keys, products + u);
    for (; u < stride; u += LANES) multiply_columns<1>(queries + u, stride, at, keys, products + u);
}

// Turns a column of products into weights, in place, and returns their sums.
inline Floats soften(float* products, int64_t stride, const float* bias, int64_t count, float scale) {
    Floats best = all(-INFINITE);
    for (int64_t j = 0; j < count; ++j) {
        const Floats logit = load(products + j * stride) * scale + bias[j];
        store(products + j * stride, logit);
        best = larger(logit, best);
    }
    Floats total{};
    for (int64_t j = 0; j < count; ++j) {
        const Floats weight = exp2(load(products + j * stride) - best);
        store(products + j * stride, weight);
        total += weight;
    }
    return total;
}

// Weighted sums of values for SUM_QUERIES queries: dims from `offset` on.
template <int Vectors>
inline void sum_values(
    const float* weights, int64_t stride, const Place<float>& at, const Keys& keys, int64_t offset,
    Floats (&sums)[SUM_QUERIES][Vectors]) {
    Floats total[SUM_QUERIES][Vectors] = {};
    for (int64_t j = 0; j < keys.count; ++j) {
        const float* from = at.value(keys.row[j]) + offset;
        Floats value[Vectors];
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) value[c] = load(from + c * LANES);
#pragma GCC unroll 6
        for (int u = 0; u < SUM_QUERIES; ++u) {
            const Floats weight = all(weights[j * stride + u]);
#pragma GCC unroll 4
            for (int c = 0; c < Vectors; ++c) total[u][c] += weight * value[c];
        }
    }
#pragma GCC unroll 6
    for (int u = 0; u < SUM_QUERIES; ++u)
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) sums[u][c] = total[u][c];
}

template <int Vectors, class Element>
void write_dims(
    const Place<float>& at, const int32_t* tokens, int64_t queries, const float* weights, int64_t stride,
    const float* inverse, const Keys& keys, int64_t offset) {
    for (int64_t first = 0; first < queries; first += SUM_QUERIES) {
        Floats sums[SUM_QUERIES][Vectors];
        sum_values(weights + first, stride, at, keys, offset, sums);
        for (int64_t u = first; u < smaller(queries, first + SUM_QUERIES); ++u) {
            Element* out = row_of<Element>(at.a.out, at.batch, at.head, tokens[u]) + offset;
            for (int c = 0; c < Vectors; ++c) store(out + c * LANES, sums[u - first][c] * inverse[u]);
        }
    }
}

// At most TILE_QUERIES queries, by their tokens, over the keys that were collected.
template <class Element>
void attend_tile(
    const Place<float>& at, const int32_t* tokens, int64_t queries, const Keys& keys, const TileScratch& scratch) {
    const int64_t size = at.a.head_dim, stride = round_up(queries, LANES);
    for (int64_t u = 0; u < stride; u += LANES) {
        const Element* query[LANES];
        // queries that are not there repeat the last one
        for (int lane = 0; lane < LANES; ++lane)
            query[lane] = row_of<const Element>(
                at.a.q, at.batch, at.head, tokens[smaller(u + lane, queries - 1)]);
        for (int64_t i = 0; i < size; i += LANES) {
            Floats rows[LANES];
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; ++lane) rows[lane] = load(query[lane] + i);
            transpose(rows);
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; ++lane)
                store(scratch.queries + (i + lane) * stride + u, rows[lane]);
        }
    }
    multiply(scratch.queries, stride, at, keys, scratch.weights);
    float inverse[TILE_QUERIES];
    for (int64_t u = 0; u < stride; u += LANES) {
        const Floats total =
            soften(scratch.weights + u, stride, keys.bias, keys.count, at.a.scale * LOG2_E);
        // queries without any key get zeros
        store(inverse + u, keys.count ? 1.0f / total : Floats{});
    }
    int64_t offset = 0;
    for (; offset + SUM_VECTORS * LANES <= size; offset += SUM_VECTORS * LANES)
        write_dims<SUM_VECTORS, Element>(
            at, tokens, queries, scratch.weights, stride, inverse, keys, offset);
    for (; offset < size; offset += LANES)
        write_dims<1, Element>(at, tokens, queries, scratch.weights, stride, inverse, keys, offset);
}

}  // namespace sparsifiner::SPARSIFINER_ISA
