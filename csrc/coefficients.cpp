// The low-rank predictor's coefficients: softmax over the basis of reduced queries times reduced keys.
//
// The projections are linear, so W_downᵀ k is formed from the keys as they are, then projected, then multiplied
// by the projection of the queries: each query meets K vectors of its own size and no query is projected.
#include "kernels.h"
#include "memory.h"

namespace sparsifiner::SPARSIFINER_ISA {
namespace {

// Sums that one task holds in registers: basis vectors times vectors of dims.
constexpr int BASES = LANES == 16 ? 8 : 4;
constexpr int DIM_VECTORS = 2;
// Queries that share the loads of what they are multiplied with.
constexpr int QUERIES = 4;

// sums[base][dim] of some basis vectors and dims: Σ_n down[n][base] k[n][dim].
template <int Bases, int Vectors, class Element>
void sum_keys(const SparsifinerPredictor& p, const Element* key, int64_t base, int64_t dim, float* sums) {
    Floats total[Bases][Vectors] = {};
    const float* down = p.down + base;
    for (int64_t token = 0; token < p.tokens; ++token) {
        const Element* from = key + token * p.k.token + dim;
        Floats part[Vectors];
#pragma GCC unroll 2
        for (int c = 0; c < Vectors; ++c) part[c] = load(from + c * LANES);
#pragma GCC unroll 8
        for (int b = 0; b < Bases; ++b)
#pragma GCC unroll 2
            for (int c = 0; c < Vectors; ++c) total[b][c] += all(down[token * p.basis_size + b]) * part[c];
    }
    for (int b = 0; b < Bases; ++b)
        for (int c = 0; c < Vectors; ++c)
            store(sums + (base + b) * p.head_dim + dim + c * LANES, total[b][c]);
}

template <int Bases, class Element>
void sum_keys_of(const SparsifinerPredictor& p, const Element* key, int64_t base, float* sums) {
    int64_t dim = 0;
    for (; dim + DIM_VECTORS * LANES <= p.head_dim; dim += DIM_VECTORS * LANES)
        sum_keys<Bases, DIM_VECTORS>(p, key, base, dim, sums);
    for (; dim < p.head_dim; dim += LANES) sum_keys<Bases, 1>(p, key, base, dim, sums);
}

// What queries of a head are multiplied with, a column for each basis vector; columns of none have no weight.
struct Folded {
    float* factors;  // [head_dim, columns]
    float* offset;   // [columns]
};

// Projects the sums of a head and folds in the projection of the queries.
void fold(
    const SparsifinerPredictor& p, const float* sums, const float* share, int64_t columns, float* row,
    const Folded& to) {
    std::memset(to.factors, 0, static_cast<std::size_t>(p.head_dim * columns) * sizeof(float));
    for (int64_t column = 0; column < columns; ++column)
        to.offset[column] = column < p.basis_size ? 0.0f : -INFINITE;
    for (int64_t base = 0; base < p.basis_size; ++base) {
        const float* sum = sums + base * p.head_dim;
        std::memset(row, 0, static_cast<std::size_t>(p.head_dim) * sizeof(float));
        for (int64_t r = 0; r < p.reduced_dim; ++r) {
            const float* key_weight = p.key_weight + r * p.head_dim;
            const float* query_weight = p.query_weight + r * p.head_dim;
            Floats product{};
            for (int64_t i = 0; i < p.head_dim; i += LANES) product += load(sum + i) * load(key_weight + i);
            const float reduced = (sum_of(product) + share[base] * p.key_bias[r]) * p.temperature;
            to.offset[base] += reduced * p.query_bias[r];
            for (int64_t i = 0; i < p.head_dim; i += LANES)
                store(row + i, load(row + i) + reduced * load(query_weight + i));
        }
        for (int64_t i = 0; i < p.head_dim; ++i) to.factors[i * columns + base] = row[i];
    }
}

// Products of some queries with LANES columns at a time: [QUERIES, columns].
template <class Element>
void multiply(
    const SparsifinerPredictor& p, const Element* const (&query)[QUERIES], int64_t columns, const Folded& folded,
    float* rows, float* logits) {
    for (int u = 0; u < QUERIES; ++u) copy_row(rows + u * p.head_dim, query[u], p.head_dim);
    for (int64_t column = 0; column < columns; column += LANES) {
        Floats sums[QUERIES];
        for (int u = 0; u < QUERIES; ++u) sums[u] = load(folded.offset + column);
        for (int64_t i = 0; i < p.head_dim; ++i) {
            const Floats factor = load(folded.factors + i * columns + column);
#pragma GCC unroll 4
            for (int u = 0; u < QUERIES; ++u) sums[u] += all(rows[u * p.head_dim + i]) * factor;
        }
        for (int u = 0; u < QUERIES; ++u) store(logits + u * columns + column, sums[u]);
    }
}

void soften(float* logits, int64_t columns, int64_t count, float* to) {
    Floats best = load(logits);
    for (int64_t at = LANES; at < columns; at += LANES) best = larger(load(logits + at), best);
    const float shift = max_of(best) * LOG2_E;
    Floats total{};
    for (int64_t at = 0; at < columns; at += LANES) {
        const Floats logit = load(logits + at) * LOG2_E;
        const Floats weight = logit == -INFINITE ? Floats{} : exp2(logit - shift);
        store(logits + at, weight);
        total += weight;
    }
    const float inverse = 1.0f / sum_of(total);
    for (int64_t at = 0; at < columns; at += LANES) store(logits + at, load(logits + at) * inverse);
    std::memcpy(to, logits, static_cast<std::size_t>(count) * sizeof *to);
}

template <class QueryElement, class KeyElement>
void coefficients_as(int threads, const SparsifinerPredictor& p) {
    const int64_t pairs = p.batch * p.heads, columns = round_up(p.basis_size, LANES);
    const int64_t groups = round_up(p.basis_size, BASES) / BASES, blocks = round_up(p.rows, QUERIES) / QUERIES;
    const int64_t sums_size = p.basis_size * p.head_dim, factors_size = p.head_dim * columns;
    const Buffer<float> sums(pairs * sums_size), factors(pairs * factors_size), offsets(pairs * columns);
    const Buffer<float> share(p.basis_size);
    std::memset(share, 0, static_cast<std::size_t>(p.basis_size) * sizeof(float));
    for (int64_t token = 0; token < p.tokens; ++token)
        for (int64_t base = 0; base < p.basis_size; ++base) share[base] += p.down[token * p.basis_size + base];
    const PerThread<Buffer<float>> rows_of(threads, QUERIES * p.head_dim);
    const PerThread<Buffer<float>> logits_of(threads, QUERIES * columns);
#pragma omp parallel num_threads(threads)
    {
        const Buffer<float>&rows = rows_of.mine(), &logits = logits_of.mine();
#pragma omp for schedule(static) collapse(2)
        for (int64_t pair = 0; pair < pairs; ++pair)
            for (int64_t group = 0; group < groups; ++group) {
                const KeyElement* key = row_of<const KeyElement>(p.k, pair / p.heads, pair % p.heads, 0);
                float* to = sums + pair * sums_size;
                int64_t base = group * BASES;
                if (base + BASES <= p.basis_size) {
                    sum_keys_of<BASES>(p, key, base, to);
                } else {
                    for (; base < p.basis_size; ++base) sum_keys_of<1>(p, key, base, to);
                }
            }
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < pairs; ++pair)
            fold(
                p, sums + pair * sums_size, share, columns, rows,
                {factors + pair * factors_size, offsets + pair * columns});
#pragma omp for schedule(static) collapse(2)
        for (int64_t pair = 0; pair < pairs; ++pair)
            for (int64_t block = 0; block < blocks; ++block) {
                const Folded folded{factors + pair * factors_size, offsets + pair * columns};
                const int64_t first = block * QUERIES, count = smaller(QUERIES, p.rows - first);
                const QueryElement* query[QUERIES];
                // queries that are not there repeat the last one
                for (int64_t u = 0; u < QUERIES; ++u)
                    query[u] = row_of<const QueryElement>(
                        p.q, pair / p.heads, pair % p.heads, first + smaller(u, count - 1));
                multiply(p, query, columns, folded, rows, logits);
                float* to = p.coefficients + (pair * p.rows + first) * p.basis_size;
                for (int64_t u = 0; u < count; ++u)
                    soften(logits + u * columns, columns, p.basis_size, to + u * p.basis_size);
            }
    }
}

}  // namespace

void coefficients(int threads, const SparsifinerPredictor& p) {
    const bool fp32_queries = p.query_dtype == SPARSIFINER_FP32, fp32_keys = p.key_dtype == SPARSIFINER_FP32;
    if (fp32_queries && fp32_keys) return coefficients_as<float, float>(threads, p);
    if (fp32_queries) return coefficients_as<float, Bfloat16>(threads, p);
    if (fp32_keys) return coefficients_as<Bfloat16, float>(threads, p);
    coefficients_as<Bfloat16, Bfloat16>(threads, p);
}

}  // namespace sparsifiner::SPARSIFINER_ISA
