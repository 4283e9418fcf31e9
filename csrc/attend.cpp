// Attention over key lists and summaries: the work of a call, divided among threads.
#include "kernels.h"
#include "query.h"
#include "tile.h"

namespace sparsifiner::SPARSIFINER_ISA {
namespace {

// Heads of this many bytes of keys and values are worked on at once.
constexpr int64_t GROUP_BYTES = 8 << 20;

template <class Element>
void fill_row(const Place& at, int64_t token) {
    const int64_t size = at.a.head_dim, to = token * size;
    copy_row(at.table.keys + to, row_of<const Element>(at.a.k, at.batch, at.head, token), size);
    copy_row(at.table.values + to, row_of<const Element>(at.a.v, at.batch, at.head, token), size);
}

// The mean of a window's rows, rounded as the inputs are.
template <class Element>
void fill_mean(const SparsifinerAttention& a, float* rows, int64_t window, int64_t count) {
    const int32_t* tokens = a.window_tokens + window * a.window_size;
    float* mean = rows + (a.tokens + window) * a.head_dim;
    for (int64_t i = 0; i < a.head_dim; i += LANES) {
        Floats sum{};
        for (int64_t j = 0; j < count; ++j) sum += load(rows + tokens[j] * a.head_dim + i);
        Element rounded[LANES];
        store(rounded, sum / static_cast<float>(count));
        store(mean + i, load(rounded));
    }
}

template <class Element>
void attend_as(int threads, const SparsifinerAttention& a) {
    const int64_t pairs = a.batch * a.heads, rows = a.tokens + a.windows;
    const int64_t group = smaller(pairs, 1 + GROUP_BYTES / (8 * rows * a.head_dim));
    const Buffer<float> keys(group * rows * a.head_dim), values(group * rows * a.head_dim);
    const Buffer<int32_t> every(a.tokens), sizes(a.windows);
    for (int64_t token = 0; token < a.tokens; ++token) every[token] = static_cast<int32_t>(token);
    for (int64_t w = 0; w < a.windows; ++w)
        sizes[w] = static_cast<int32_t>(filled(a.window_tokens + w * a.window_size, a.window_size));

    const bool single = a.tile_size == 1;
    const int64_t parts = round_up(a.tile_size, TILE_QUERIES) / TILE_QUERIES;
    const int64_t prefix_tasks = round_up(a.prefix, TILE_QUERIES) / TILE_QUERIES;
    const int64_t tasks =
        prefix_tasks + (single ? round_up(a.tiles, QUERY_BLOCK) / QUERY_BLOCK : a.tiles * parts);
    const int64_t longest = a.prefix ? rows : smaller(rows, a.keys + a.windows);

    for (int64_t first = 0; first < pairs; first += group) {
        const int64_t count = smaller(group, pairs - first);
        const auto place = [&](int64_t at) {
            const Table table{keys + at * rows * a.head_dim, values + at * rows * a.head_dim};
            return Place{a, table, (first + at) / a.heads, (first + at) % a.heads};
        };
#pragma omp parallel num_threads(threads)
        {
            const KeyScratch lists(single ? QUERY_BLOCK : 1, longest, a.windows);
            const TileScratch tile_scratch(a.head_dim, longest);
            const QueryScratch query_scratch(a.head_dim, single ? longest : 0);
#pragma omp for schedule(static) collapse(2)
            for (int64_t at = 0; at < count; ++at)
                for (int64_t token = 0; token < a.tokens; ++token) fill_row<Element>(place(at), token);
#pragma omp for schedule(static) collapse(2)
            for (int64_t at = 0; at < count; ++at)
                for (int64_t window = 0; window < a.windows; ++window) {
                    fill_mean<Element>(a, place(at).table.keys, window, sizes[window]);
                    fill_mean<Element>(a, place(at).table.values, window, sizes[window]);
                }
#pragma omp for schedule(dynamic, 1) collapse(2)
            for (int64_t at = 0; at < count; ++at)
                for (int64_t task = 0; task < tasks; ++task) {
                    const Place here = place(at);
                    if (task < prefix_tasks) {
                        const int64_t token = task * TILE_QUERIES;
                        const Keys keys = lists.collect(0, a, every, a.tokens, false, sizes);
                        attend_tile<Element>(
                            here, every + token, smaller(TILE_QUERIES, a.prefix - token), keys, tile_scratch);
                        continue;
                    }
                    const int32_t* indices = a.indices + (first + at) * a.tiles * a.keys;
                    const int64_t work = task - prefix_tasks;
                    if (single) {
                        const int64_t row = work * QUERY_BLOCK, queries = smaller(QUERY_BLOCK, a.tiles - row);
                        Keys keys[QUERY_BLOCK];
                        for (int64_t u = 0; u < queries; ++u)
                            keys[u] =
                                lists.collect(u, a, indices + (row + u) * a.keys, a.keys, true, sizes);
                        attend_queries<Element>(here, a.tile_tokens + row, queries, keys, query_scratch);
                        continue;
                    }
                    const int64_t tile = work / parts, start = work % parts * TILE_QUERIES;
                    const int32_t* tokens = a.tile_tokens + tile * a.tile_size;
                    const int64_t queries = filled(tokens, a.tile_size) - start;
                    if (queries <= 0) continue;
                    const Keys keys = lists.collect(0, a, indices + tile * a.keys, a.keys, true, sizes);
                    attend_tile<Element>(
                        here, tokens + start, smaller(queries, TILE_QUERIES), keys, tile_scratch);
                }
        }
    }
}

}  // namespace

void attend(int threads, const SparsifinerAttention& a) {
    a.dtype == SPARSIFINER_BF16 ? attend_as<Bfloat16>(threads, a) : attend_as<float>(threads, a);
}

}  // namespace sparsifiner::SPARSIFINER_ISA
