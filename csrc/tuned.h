// Values that were tuned on one machine, an x86-64 CPU with AVX-512; `python benchmarks/tune.py` builds the kernels
// with others and measures them. How many sums registers hold is no such value and stands beside the sums.
#pragma once

#include <cstdint>

namespace sparsifiner::tuned {

// Heads of this many bytes of packed keys and values are attended to at once, and of keys scored by impact.
constexpr int64_t ATTEND_BYTES = 8 << 20;
constexpr int64_t IMPACT_BYTES = 8 << 20;
// Queries of a tile that one task attends for; larger tiles are divided.
constexpr int64_t TILE_QUERIES = 64;
// Single queries that are worked on together: their lists have keys in common, which the nearest cache then holds.
constexpr int QUERY_BLOCK = 16;
// Rows of a selection that a thread takes at a time.
constexpr int ROWS_AT_ONCE = 32;

}  // namespace sparsifiner::tuned
