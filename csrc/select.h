// Exact selection of the best keys of a row, for kernels that make scores row by row.
#pragma once

#include "memory.h"
#include "sparsifiner.h"
#include "tuned.h"
#include "vector.h"

namespace sparsifiner::SPARSIFINER_ISA {

using tuned::ROWS_AT_ONCE;

// Sums over some of a row's scores, from which its threshold is guessed.
struct Moments {
    Floats sum{}, squares{};
    int64_t count = 0;

    void add(Floats scores) {
        sum += scores;
        squares += scores * scores;
        count += LANES;
    }
    void add(const Moments& others) {
        sum += others.sum;
        squares += others.squares;
        count += others.count;
    }
};

// Selects row by row: the caller fills `scores()`, then calls `select`. One for each thread.
//
// One pass packs the keys above a guess that should let a few more than k pass; the k-th largest is then
// searched among these. The guess is a number of standard deviations above the mean, learned from row to row.
// It only affects speed: where too few keys pass, it is lowered.
class RowSelector {
   public:
    explicit RowSelector(const SparsifinerLists& lists);

    // Keys behind the forced ones, which are in every list and need no scores.
    int64_t keys() const { return keys_; }
    // The row's scores of these keys, with room for whole vectors; all beyond `keys()` must be -inf.
    float* scores() { return scores_; }

    // Writes the list of a row.
    void select(int64_t row, const Moments& moments);
    // Writes the list of a row without any score.
    void select_nothing(int64_t row) { write(row, 0); }

   private:
    struct Guess {
        float mean, deviation;
    };
    Guess guess_from(const Moments& moments) const;
    int64_t pack_above(float low);
    int64_t keep_largest(int64_t size, const Guess& guess);
    void write(int64_t row, int64_t selected) const;

    const SparsifinerLists lists_;
    const int64_t keys_, budget_;
    const Buffer<int32_t> scratch_;
    float* scores_;
    int32_t *codes_, *indices_, *uncertain_;  // of the keys that passed
    float quantile_, error_;                  // of the threshold in deviations, and its average error
    const float least_error_;
};

}  // namespace sparsifiner::SPARSIFINER_ISA
