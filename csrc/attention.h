// What attention by tiles and attention by single queries share.
#pragma once

#include <algorithm>

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
          ordered_(windows ? longest : 0),
          missing_(windows) {}

    // Takes the tokens of a list, then, if they are wanted, the summaries of what it lacks; `sizes` are the
    // tokens of each window. Slots that name no token are empty wherever they are.
    Keys collect(
        int64_t place, const SparsifinerAttention& a, const int32_t* list, int64_t length, bool summaries,
        const int32_t* sizes) const {
        Keys keys{rows_ + place * stride_, bias_ + place * stride_, 0};
        keys.count = take_tokens(list, filled(list, length), a.tokens, keys.row);
        std::memset(keys.bias, 0, (keys.count + LANES) * sizeof *keys.bias);
        if (summaries && a.windows) {
            std::memcpy(missing_, sizes, a.windows * sizeof *sizes);
            int64_t count = keys.count;
            const int32_t* distinct = distinct_tokens(keys.row, &count);
            for (int64_t j = 0; j < count; ++j)
                if (a.window_of[distinct[j]] >= 0) --missing_[a.window_of[distinct[j]]];
            for (int64_t w = 0; w < a.windows; ++w) {
                if (missing_[w] == 0) continue;
                keys.bias[keys.count] = __builtin_log2f(static_cast<float>(missing_[w]));
                keys.row[keys.count++] = static_cast<int32_t>(a.tokens + w);
            }
        }
        std::memset(keys.row + keys.count, 0, SPARE_KEYS * sizeof *keys.row);
        return keys;
    }

   private:
    // Copies the tokens of a list and returns how many they are.
    static int64_t take_tokens(const int32_t* list, int64_t length, int64_t tokens, int32_t* to) {
        // as a number without sign a negative one is too large too
        const uint32_t end = static_cast<uint32_t>(tokens);
        uint32_t strange = 0;
        for (int64_t j = 0; j < length; ++j) {
            to[j] = list[j];
            strange |= static_cast<uint32_t>(list[j]) >= end;
        }
        if (!strange) return length;
        int64_t count = 0;
        for (int64_t j = 0; j < length; ++j) {
            to[count] = list[j];
            count += static_cast<uint32_t>(list[j]) < end;
        }
        return count;
    }

    // Each of some tokens once: as they are where they ascend, else in order and without the repeated ones.
    const int32_t* distinct_tokens(const int32_t* tokens, int64_t* count) const {
        bool ascending = true;
        for (int64_t j = 1; j < *count; ++j) ascending &= tokens[j - 1] < tokens[j];
        if (ascending) return tokens;
        int32_t* const ordered = ordered_;
        std::memcpy(ordered, tokens, *count * sizeof *tokens);
        std::sort(ordered, ordered + *count);
        *count = std::unique(ordered, ordered + *count) - ordered;
        return ordered;
    }

    const int64_t stride_;
    const Buffer<int32_t> rows_;
    const Buffer<float> bias_;
    const Buffer<int32_t> ordered_;
    const Buffer<int32_t> missing_;
};

}  // namespace sparsifiner::SPARSIFINER_ISA
