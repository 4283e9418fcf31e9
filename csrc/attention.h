// What attention by tiles and attention by single queries share.
#pragma once

#include "memory.h"

namespace sparsifiner::SPARSIFINER_ISA {

constexpr float LOG2_E = 1.44269504f;
// Rows that products may read and write behind the last key.
constexpr int SPARE_KEYS = 32;

// Keys and values of one head in fp32: tokens first, then summaries.
struct Table {
    float* keys;
    float* values;
};

// Where queries of one head come from and where their results go.
struct Place {
    const SparsifinerAttention& a;
    Table table;
    int64_t batch, head;
};

// The keys of one list, ready to be multiplied.
struct Keys {
    explicit Keys(int64_t longest, int64_t windows)
        : key(longest + SPARE_KEYS), value(longest + SPARE_KEYS), bias(longest + SPARE_KEYS), missing(windows) {}

    // Takes the tokens of a list up to its first empty slot, then, if there are any, the summaries of what it
    // lacks; `sizes` are the tokens of each window.
    void collect(const Place& at, const int32_t* list, int64_t length, bool summaries, const int32_t* sizes) {
        const SparsifinerAttention& a = at.a;
        count = 0;
        for (int64_t j = 0; j < length && list[j] >= 0; ++j) add(at, list[j], 0.0f);
        const int64_t tokens = count;
        if (summaries && a.windows) {
            std::memcpy(missing, sizes, a.windows * sizeof(int32_t));
            for (int64_t j = 0; j < tokens; ++j)
                if (a.window_of[list[j]] >= 0) --missing[a.window_of[list[j]]];
            for (int64_t w = 0; w < a.windows; ++w)
                if (missing[w] > 0) add(at, a.tokens + w, __builtin_log2f(static_cast<float>(missing[w])));
        }
        for (int j = 0; j < SPARE_KEYS; ++j) {
            key[count + j] = at.table.keys;
            value[count + j] = at.table.values;
            bias[count + j] = 0.0f;
        }
    }

    int64_t count = 0;
    Buffer<const float*> key;
    Buffer<const float*> value;
    Buffer<float> bias;  // log2 of how many tokens a key stands for

   private:
    void add(const Place& at, int64_t row, float log_count) {
        key[count] = at.table.keys + row * at.a.head_dim;
        value[count] = at.table.values + row * at.a.head_dim;
        bias[count++] = log_count;
    }

    Buffer<int32_t> missing;
};

}  // namespace sparsifiner::SPARSIFINER_ISA
