// Attention over key lists and summaries: the work of a call, divided among threads.
#include "kernels.h"
#include "query.h"
#include "tile.h"

namespace sparsifiner::SPARSIFINER_ISA {
namespace {

template <class Element, class Stored>
void pack_row(const Place<Stored>& at, int64_t token) {
    const int64_t size = at.a.head_dim, to = token * size;
    copy_row(at.packed.keys + to, row_of<const Element>(at.a.k, at.batch, at.head, token), size);
    copy_row(at.packed.values + to, row_of<const Element>(at.a.v, at.batch, at.head, token), size);
}

// The mean of a window's rows, rounded as the inputs are.
template <class Element, class Stored>
void average(
    const SparsifinerAttention& a, const SparsifinerTensor& x, int64_t batch, int64_t head, int64_t window,
    int64_t count, Stored* mean) {
    const int32_t* tokens = a.window_tokens + window * a.window_size;
    for (int64_t i = 0; i < a.head_dim; i += LANES) {
        Floats sum{};
        for (int64_t j = 0; j < count; ++j) sum += load(row_of<const Element>(x, batch, head, tokens[j]) + i);
        Element rounded[LANES];
        store(rounded, sum / static_cast<float>(count));
        store(mean + i, load(rounded));
    }
}

// Keys and values are read from rows of `Stored`: as wide as the inputs, or fp32.
template <class Element, class Stored>
void attend_as(int threads, const SparsifinerAttention& a) {
    const int64_t pairs = a.batch * a.heads, rows = a.tokens + a.windows;
    const int64_t group = smaller(pairs, 1 + tuned::ATTEND_BYTES / (8 * rows * a.head_dim));
    const Buffer<Stored> packed_keys(group * rows * a.head_dim), packed_values(group * rows * a.head_dim);
    const Buffer<int32_t> every(a.tokens), sizes(a.windows);
    for (int64_t token = 0; token < a.tokens; ++token) every[token] = static_cast<int32_t>(token);
    for (int64_t w = 0; w < a.windows; ++w)
        sizes[w] = static_cast<int32_t>(filled(a.window_tokens + w * a.window_size, a.window_size));

    const bool single = a.tile_size == 1;
    constexpr bool is_fp32 = sizeof(Element) == sizeof(float);
    constexpr bool can_tile = sizeof(Stored) == sizeof(float);
    // tiles of fp32 inputs read the inputs themselves, single queries and the prefix read packed rows
    const bool packs = single || a.prefix || !is_fp32;
    const int64_t parts = round_up(a.tile_size, TILE_QUERIES) / TILE_QUERIES;
    const int64_t tasks =
        a.prefix + (single ? round_up(a.tiles, QUERY_BLOCK) / QUERY_BLOCK : a.tiles * parts);
    const int64_t longest = a.keys + a.windows;
    const int64_t most_weights = larger(a.prefix ? a.tokens : 0, single ? longest : 0);

    const PerThread<KeyScratch> lists_of(threads, single ? QUERY_BLOCK : 1, longest, a.windows);
    const PerThread<KeyScratch> whole_list_of(threads, 1, a.prefix ? a.tokens : 0, 0);
    const PerThread<TileScratch> tile_scratch_of(threads, a.head_dim, single ? 0 : longest);
    const PerThread<QueryScratch<Stored>> query_scratch_of(threads, a.head_dim, most_weights);
    for (int64_t first = 0; first < pairs; first += group) {
        const int64_t count = smaller(group, pairs - first);
        const auto place = [&](int64_t at) {
            const int64_t batch = (first + at) / a.heads, head = (first + at) % a.heads;
            const int64_t to = at * rows * a.head_dim;
            const Packed<Stored> packed{packed_keys + to, packed_values + to};
            if constexpr (is_fp32) {
                const float* k = row_of<const float>(a.k, batch, head, 0);
                const float* v = row_of<const float>(a.v, batch, head, 0);
                return Place<Stored>{a, packed, batch, head, k, v, a.k.token, a.v.token};
            } else {
                const int64_t stride = a.head_dim;
                return Place<Stored>{a, packed, batch, head, packed.keys, packed.values, stride, stride};
            }
        };
#pragma omp parallel num_threads(threads)
        {
            const KeyScratch &lists = lists_of.mine(), &whole_list = whole_list_of.mine();
            const TileScratch& tile_scratch = tile_scratch_of.mine();
            const QueryScratch<Stored>& query_scratch = query_scratch_of.mine();
#pragma omp for schedule(static) collapse(2)
            for (int64_t at = 0; at < count; ++at)
                for (int64_t token = 0; token < (packs ? a.tokens : 0); ++token)
                    pack_row<Element>(place(at), token);
#pragma omp for schedule(static) collapse(2)
            for (int64_t at = 0; at < count; ++at)
                for (int64_t window = 0; window < a.windows; ++window) {
                    const Place<Stored> here = place(at);
                    const int64_t to = (a.tokens + window) * a.head_dim;
                    average<Element>(
                        a, a.k, here.batch, here.head, window, sizes[window], here.packed.keys + to);
                    average<Element>(
                        a, a.v, here.batch, here.head, window, sizes[window], here.packed.values + to);
                }
#pragma omp for schedule(dynamic, 1) collapse(2)
            for (int64_t at = 0; at < count; ++at)
                for (int64_t task = 0; task < tasks; ++task) {
                    const Place<Stored> here = place(at);
                    if (task < a.prefix) {
                        const Keys keys = whole_list.collect(0, a, every, a.tokens, false, sizes);
                        attend_queries<Element>(here, every + task, 1, &keys, query_scratch);
                        continue;
                    }
                    const int32_t* indices = a.indices + (first + at) * a.tiles * a.keys;
                    const int64_t work = task - a.prefix;
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
                    if constexpr (can_tile)
                        attend_tile<Element>(
                            here, tokens + start, smaller(queries, TILE_QUERIES), keys, tile_scratch);
                }
        }
    }
}

}  // namespace

void attend(int threads, const SparsifinerAttention& a) {
    if (a.dtype == SPARSIFINER_FP32) return attend_as<float, float>(threads, a);
#if defined(__AVX512BF16__)
    if (a.tile_size == 1) return attend_as<Bfloat16, Bfloat16>(threads, a);
#endif
    attend_as<Bfloat16, float>(threads, a);
}

}  // namespace sparsifiner::SPARSIFINER_ISA
