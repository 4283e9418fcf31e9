// What attention by tiles and attention by single queries share.
#pragma once

#include "memory.h"

namespace sparsifiner::SPARSIFINER_ISA {

// Keys that products may read behind the last one.
constexpr int SPARE_KEYS = 32;

// Keys and values of one head as rows without gaps: tokens first, then summaries.
template <class Stored>
struct Packed {
    Stored* keys;
    Stored* values;

    const Stored* key(int32_t row, int64_t size) const { return keys + row * size; }
    const Stored* value(int32_t row, int64_t size) const { return values + row * size; }
};

// The head that is worked on.
template <class Stored>
struct Place {
    const SparsifinerAttention& a;
    Packed<Stored> packed;
    int64_t batch, head;
    // the inputs themselves where they are fp32, else the packed rows
    const Stored *keys, *values;
    int64_t key_stride, value_stride;

    // Tokens of fp32 inputs are read in place, all others and summaries from the packed rows.
    const Stored* key(int32_t row) const {
        return row < a.tokens ? keys + row * key_stride : packed.key(row, a.head_dim);
    }
    const Stored* value(int32_t row) const {
        return row < a.tokens ? values + row * value_stride : packed.value(row, a.head_dim);
    }
};

// The keys of one list, as rows of a table.
struct Keys {
    int32_t* row;
    float* bias;  // log2 of how many tokens a key stands for
    int64_t count;
};

// Memory for the keys of some lists.
class KeyScratch {
   public:
    KeyScratch(int64_t lists, int64_t longest, int64_t windows)
        : stride_(round_up(longest + SPARE_KEYS, LANES)),
          rows_(lists * stride_),
          bias_(lists * stride_),
          missing_(windows) {}

    // Takes the tokens of a list up to its first empty slot, then, if they are wanted, the summaries of what it
    // lacks; `sizes` are the tokens of each window.
    Keys collect(
        int64_t place, const SparsifinerAttention& a, const int32_t* list, int64_t length, bool summaries,
        const int32_t* sizes) const {
        Keys keys{rows_ + place * stride_, bias_ + place * stride_, filled(list, length)};
        // lists are not checked: what lies beyond the tokens must not be read
        const int32_t last = static_cast<int32_t>(a.tokens - 1);
        for (int64_t j = 0; j < keys.count; ++j) keys.row[j] = list[j] < last ? list[j] : last;
        std::memset(keys.bias, 0, (keys.count + LANES) * sizeof *keys.bias);
        if (summaries && a.windows) {
            std::memcpy(missing_, sizes, a.windows * sizeof *sizes);
            for (int64_t j = 0; j < keys.count; ++j)
                if (a.window_of[keys.row[j]] >= 0) --missing_[a.window_of[keys.row[j]]];
            for (int64_t w = 0; w < a.windows; ++w) {
                if (missing_[w] <= 0) continue;
                keys.bias[keys.count] = __builtin_log2f(static_cast<float>(missing_[w]));
                keys.row[keys.count++] = static_cast<int32_t>(a.tokens + w);
            }
        }
        std::memset(keys.row + keys.count, 0, SPARE_KEYS * sizeof *keys.row);
        return keys;
    }

   private:
    const int64_t stride_;
    const Buffer<int32_t> rows_;
    const Buffer<float> bias_;
    const Buffer<int32_t> missing_;
};

}  // namespace sparsifiner::SPARSIFINER_ISA
