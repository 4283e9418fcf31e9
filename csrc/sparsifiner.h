// The library's C interface. It knows nothing of torch, so one build serves every version of it.
//
// Arrays are contiguous unless strides are given. `isa` is an instruction set up to `sparsifiner_best_isa`.
// Calls return a `SparsifinerStatus`, and where it is not DONE, what they write is undefined.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define SPARSIFINER_API __declspec(dllexport)
#else
#define SPARSIFINER_API __attribute__((visibility("default")))
#endif

extern "C" {

// Raised with every change of what is declared here, so that a library of another time is not called.
enum { SPARSIFINER_INTERFACE = 2 };

SPARSIFINER_API int32_t sparsifiner_interface();

enum SparsifinerStatus : int32_t { SPARSIFINER_DONE, SPARSIFINER_NO_MEMORY, SPARSIFINER_UNKNOWN_ISA };

// Instruction sets; each includes those before it.
enum SparsifinerIsa : int32_t {
    SPARSIFINER_NONE,
    SPARSIFINER_AVX2,
    SPARSIFINER_AVX512,
    SPARSIFINER_AVX512_BF16
};

// Element types of q, k, v and out.
enum SparsifinerDtype : int32_t { SPARSIFINER_FP32, SPARSIFINER_BF16 };

// The best instruction set of this machine.
SPARSIFINER_API int32_t sparsifiner_best_isa();

// [B, H, N, d]: strides of the first three axes in elements; d is contiguous.
struct SparsifinerTensor {
    void* data;
    int64_t batch, head, token;
};

// The low-rank predictor's coefficients softmax(temperature · q' k_downᵀ), with q' = W_q q + b_q and
// k_down = W_downᵀ (W_k k + b_k).
struct SparsifinerPredictor {
    SparsifinerTensor q, k;  // [B, H, rows, d] and [B, H, tokens, d]
    int32_t query_dtype, key_dtype;
    int64_t batch, heads, rows, tokens, head_dim;
    int64_t basis_size, reduced_dim;         // K, c
    const float* down;                       // [tokens, K]
    const float *query_weight, *query_bias;  // [c, d], [c]
    const float *key_weight, *key_bias;      // [c, d], [c]
    float* coefficients;                     // [B, H, rows, K], written
    float temperature;
};

SPARSIFINER_API int32_t sparsifiner_coefficients(
    int32_t isa, int32_t threads, const SparsifinerPredictor* predictor);

// Lists of the `budget` best keys of each row, exactly; the rules are those of `sparsifiner.ops.select_topk`.
struct SparsifinerLists {
    int64_t total;   // rows of all batch elements and heads
    int64_t rows;    // rows of one head: row r is row r % rows of its head
    int64_t tokens;  // N
    int64_t budget;
    int64_t forced;
    int64_t own_size;    // m
    const int32_t* own;  // [rows, m], ascending, -1 last
    int32_t* indices;    // [total, budget], written: ascending, -1 last
};

// scores [total, N].
SPARSIFINER_API int32_t sparsifiner_select_topk(
    int32_t isa, int32_t threads, const SparsifinerLists* lists, const float* scores);

// Scores are sums of basis rows [K, N] by the `kept` largest coefficients of each row [total, K].
SPARSIFINER_API int32_t sparsifiner_select_lowrank(
    int32_t isa, int32_t threads, const SparsifinerLists* lists, const float* coefficients, const float* basis,
    int64_t basis_size, int64_t kept);

// What impact scores are made of; tokens -1 come last in their rows.
struct SparsifinerImpact {
    SparsifinerTensor q, k, v;
    int32_t dtype;
    float scale;
    int64_t batch, heads, tokens, head_dim, prefix;
    int64_t squares, square_size;  // whose mean queries score
    const int32_t* square_tokens;  // [squares, square_size]
    int64_t members;               // squares of a tile
    const int32_t* tile_squares;   // [rows, members]
    int64_t windows, window_size;
    const int32_t* window_tokens;  // [windows, window_size]
};

SPARSIFINER_API int32_t sparsifiner_select_impact(
    int32_t isa, int32_t threads, const SparsifinerLists* lists, const SparsifinerImpact* impact);

// Attention over lists and summaries; the rules are those of `sparsifiner.ops.sparse_attention`.
struct SparsifinerAttention {
    SparsifinerTensor q, k, v, out;
    int32_t dtype;
    float scale;
    int64_t batch, heads, tokens, head_dim, prefix;
    int64_t tiles, tile_size;    // lists of a head, and queries of one
    const int32_t* tile_tokens;  // [tiles, tile_size], -1 last
    int64_t keys;                // length of a list
    const int32_t* indices;      // [B, H, tiles, keys], in any order; what names no token is an empty slot
    int64_t windows, window_size;  // 0 for no summaries
    const int32_t* window_tokens;  // [windows, window_size], -1 last
    const int32_t* window_of;      // [N], -1 for prefix tokens
};

SPARSIFINER_API int32_t sparsifiner_attend(int32_t isa, int32_t threads, const SparsifinerAttention* attention);
}
