// Lists by impact: the attention that the mean queries of parts of a tile give a key, times the distance of its
// value from its window's mean. The formula stands in `sparsifiner.scorers.ImpactScorer`.
#include "kernels.h"
#include "memory.h"
#include "select.h"
#include "tuned.h"

namespace sparsifiner::SPARSIFINER_ISA {
namespace {

// Queries that share the loads of keys, and vectors of keys that are multiplied at a time.
constexpr int QUERIES = 4;
constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr int KEYS = VECTORS * LANES;

// What the scores of one head are made of.
struct Head {
    float* keys;           // [blocks, head_dim, KEYS], without the forced ones, zeros behind the last
    float* log_deviation;  // [blocks * KEYS]
    float* queries;        // [squares, head_dim]
    float* log_mass;       // [squares]
};

// Mean of some rows of a head.
template <class Element>
void average(
    const SparsifinerTensor& x, int64_t batch, int64_t head, const int32_t* tokens, int64_t count, int64_t size,
    float* mean) {
    for (int64_t i = 0; i < size; i += LANES) {
        Floats sum{};
        for (int64_t j = 0; j < count; ++j) sum += load(row_of<const Element>(x, batch, head, tokens[j]) + i);
        store(mean + i, sum / static_cast<float>(count));
    }
}

template <class Element>
float product_of(const float* query, const Element* key, int64_t size) {
    Floats product{};
    for (int64_t i = 0; i < size; i += LANES) product += load(query + i) * load(key + i);
    return sum_of(product);
}

// Distances of a window's values from their mean.
template <class Element>
void measure_values(
    const SparsifinerImpact& a, int64_t batch, int64_t head, int64_t window, float* mean, float* to) {
    const int32_t* tokens = a.window_tokens + window * a.window_size;
    const int64_t count = filled(tokens, a.window_size);
    average<Element>(a.v, batch, head, tokens, count, a.head_dim, mean);
    for (int64_t j = 0; j < count; ++j) {
        const Element* value = row_of<const Element>(a.v, batch, head, tokens[j]);
        Floats squares{};
        for (int64_t i = 0; i < a.head_dim; i += LANES) {
            const Floats distance = load(value + i) - load(mean + i);
            squares += distance * distance;
        }
        to[tokens[j]] = 0.5f * __builtin_logf(sum_of(squares));
    }
}

// Log-sum-exp of `count` logits, which are overwritten; there is room for whole vectors.
float log_sum_exp(float* logits, int64_t count) {
    for (int64_t at = count; at < round_up(count, LANES); ++at) logits[at] = -INFINITE;
    float best = -INFINITE;
    for (int64_t at = 0; at < count; ++at) best = logits[at] < best ? best : logits[at];
    Floats total{};
    for (int64_t at = 0; at < count; at += LANES) {
        const Floats logit = load(logits + at);
        total += logit == -INFINITE ? Floats{} : exp2((logit - best) * LOG2_E);
    }
    return best + __builtin_logf(sum_of(total));
}

// Log of each mean query's softmax denominator, windows standing for their keys.
template <class Element>
void measure_mass(
    const SparsifinerImpact& a, int64_t batch, int64_t head, float* mean_keys, float* logits, const Head& to) {
    for (int64_t window = 0; window < a.windows; ++window) {
        const int32_t* tokens = a.window_tokens + window * a.window_size;
        average<Element>(
            a.k, batch, head, tokens, filled(tokens, a.window_size), a.head_dim, mean_keys + window * a.head_dim);
    }
    for (int64_t square = 0; square < a.squares; ++square) {
        const float* query = to.queries + square * a.head_dim;
        for (int64_t token = 0; token < a.prefix; ++token)
            logits[token] =
                a.scale * product_of(query, row_of<const Element>(a.k, batch, head, token), a.head_dim);
        for (int64_t window = 0; window < a.windows; ++window) {
            const int64_t count = filled(a.window_tokens + window * a.window_size, a.window_size);
            logits[a.prefix + window] =
                a.scale * product_of(query, mean_keys + window * a.head_dim, a.head_dim) +
                __builtin_logf(static_cast<float>(count));
        }
        to.log_mass[square] = log_sum_exp(logits, a.prefix + a.windows);
    }
}

// Keys behind the forced ones, KEYS of them side by side, zeros behind the last.
template <class Element>
void pack_keys(
    const SparsifinerImpact& a, int64_t batch, int64_t head, int64_t block, int64_t forced, float* to) {
    to += block * a.head_dim * KEYS;
    for (int v = 0; v < VECTORS; ++v) {
        const int64_t token = forced + block * KEYS + v * LANES;
        for (int64_t i = 0; i < a.head_dim; i += LANES) {
            Floats rows[LANES];
            for (int lane = 0; lane < LANES; ++lane)
                rows[lane] = token + lane < a.tokens
                                 ? load(row_of<const Element>(a.k, batch, head, token + lane) + i)
                                 : Floats{};
            transpose(rows);
            for (int part = 0; part < LANES; ++part) store(to + (i + part) * KEYS + v * LANES, rows[part]);
        }
    }
}

// The larger one, or NaN if one is.
inline Floats largest(Floats x, Floats y) { return y != y ? y : larger(x, y); }

// Scores of one tile for a block of keys: the largest over its mean queries, `Queries` at a time.
template <int Queries>
void score_block(
    const SparsifinerImpact& a, const Head& from, const int32_t* squares, int64_t block, Floats (&best)[VECTORS]) {
    const float* keys = from.keys + block * a.head_dim * KEYS;
    for (int v = 0; v < VECTORS; ++v) best[v] = all(-INFINITE);
    for (int64_t first = 0; first < a.members; first += Queries) {
        const float* query[Queries];
        float mass[Queries];
        for (int64_t u = 0; u < Queries; ++u) {
            // queries that are not there repeat the last one
            const int64_t square = squares[smaller(first + u, a.members - 1)];
            query[u] = from.queries + square * a.head_dim;
            mass[u] = a.members > 1 ? from.log_mass[square] : 0.0f;
        }
        Floats sums[Queries][VECTORS] = {};
        for (int64_t i = 0; i < a.head_dim; ++i) {
            Floats key[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) key[v] = load(keys + i * KEYS + v * LANES);
#pragma GCC unroll 4
            for (int u = 0; u < Queries; ++u) {
                const Floats factor = all(query[u][i]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) sums[u][v] += factor * key[v];
            }
        }
        for (int u = 0; u < Queries; ++u)
            for (int v = 0; v < VECTORS; ++v) best[v] = largest(sums[u][v] * a.scale - mass[u], best[v]);
    }
}

template <class Element>
void select_impact_as(int threads, const SparsifinerLists& lists, const SparsifinerImpact& a) {
    const int64_t pairs = a.batch * a.heads, tiles = lists.rows;
    const int64_t blocks = round_up(a.tokens - lists.forced, KEYS) / KEYS, keys_size = blocks * a.head_dim * KEYS;
    const int64_t group = smaller(pairs, 1 + tuned::IMPACT_BYTES / (4 * keys_size + 1));
    const int64_t deviations_size = lists.forced + blocks * KEYS, queries_size = a.squares * a.head_dim;
    const Buffer<float> keys(group * keys_size), deviations(group * deviations_size);
    const Buffer<float> queries(group * queries_size), masses(group * a.squares);
    const auto head_of = [&](int64_t at) {
        return Head{
            keys + at * keys_size, deviations + at * deviations_size, queries + at * queries_size,
            masses + at * a.squares};
    };
    const PerThread<RowSelector> selectors(threads, lists);
    const PerThread<Buffer<float>> mean_of(threads, a.head_dim), mean_keys_of(threads, a.windows * a.head_dim);
    const PerThread<Buffer<float>> logits_of(threads, round_up(a.prefix + a.windows, LANES));
#pragma omp parallel num_threads(threads)
    {
        RowSelector& selector = selectors.mine();
        const Buffer<float>&mean = mean_of.mine(), &mean_keys = mean_keys_of.mine();
        const Buffer<float>& logits = logits_of.mine();
        for (int64_t first = 0; first < pairs; first += group) {
            const int64_t count = smaller(group, pairs - first);
#pragma omp for schedule(static) collapse(2)
            for (int64_t at = 0; at < count; ++at)
                for (int64_t block = 0; block < blocks; ++block)
                    pack_keys<Element>(
                        a, (first + at) / a.heads, (first + at) % a.heads, block, lists.forced, head_of(at).keys);
#pragma omp for schedule(static) collapse(2)
            for (int64_t at = 0; at < count; ++at)
                for (int64_t window = 0; window < a.windows; ++window)
                    measure_values<Element>(
                        a, (first + at) / a.heads, (first + at) % a.heads, window, mean,
                        head_of(at).log_deviation);
#pragma omp for schedule(dynamic, 1)
            for (int64_t at = 0; at < count; ++at) {
                const Head to = head_of(at);
                const int64_t batch = (first + at) / a.heads, head = (first + at) % a.heads;
                for (int64_t token = 0; token < a.prefix; ++token) to.log_deviation[token] = 0.0f;
                for (int64_t square = 0; square < a.squares; ++square) {
                    const int32_t* tokens = a.square_tokens + square * a.square_size;
                    average<Element>(
                        a.q, batch, head, tokens, filled(tokens, a.square_size), a.head_dim,
                        to.queries + square * a.head_dim);
                }
                if (a.members > 1) measure_mass<Element>(a, batch, head, mean_keys, logits, to);
            }
#pragma omp for schedule(dynamic, 1) collapse(2)
            for (int64_t at = 0; at < count; ++at)
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const Head from = head_of(at);
                    float* scores = selector.scores();
                    const int64_t count_keys = selector.keys();
                    Moments moments;
                    for (int64_t block = 0; block < blocks; ++block) {
                        Floats best[VECTORS];
                        const int32_t* squares = a.tile_squares + tile * a.members;
                        if (a.members == 1)
                            score_block<1>(a, from, squares, block, best);
                        else
                            score_block<QUERIES>(a, from, squares, block, best);
                        for (int v = 0; v < VECTORS; ++v) {
                            const int64_t key = block * KEYS + v * LANES;
                            if (key >= count_keys) break;
                            const Floats score = best[v] + load(from.log_deviation + lists.forced + key);
                            store(scores + key, score);
                            if (key + LANES <= count_keys) moments.add(score);
                        }
                    }
                    for (int64_t key = count_keys; key < round_up(count_keys, LANES); ++key)
                        scores[key] = -INFINITE;
                    selector.select((first + at) * tiles + tile, moments);
                }
        }
    }
}

}  // namespace

void select_impact(int threads, const SparsifinerLists& lists, const SparsifinerImpact& a) {
    if (a.dtype == SPARSIFINER_FP32) return select_impact_as<float>(threads, lists, a);
    select_impact_as<Bfloat16>(threads, lists, a);
}

}  // namespace sparsifiner::SPARSIFINER_ISA
