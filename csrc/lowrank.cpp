// Selection from low-rank scores: sums of a few basis rows, row by row.
#include "kernels.h"
#include "memory.h"
#include "select.h"

namespace sparsifiner::SPARSIFINER_ISA {

namespace {

// Basis rows that are summed in one pass.
constexpr int SUMMED = 8;

// Basis rows without the forced keys, each in whole vectors, and a row of zeros behind the last.
class Basis {
   public:
    Basis(const SparsifinerLists& lists, const float* basis, int64_t size)
        : size_(size),
          stride_(round_up(lists.tokens - lists.forced, LANES)),
          numbers_((size + 1) * stride_) {
        const int64_t keys = lists.tokens - lists.forced;
        std::memset(numbers_, 0, bytes((size + 1) * stride_));
        for (int64_t base = 0; base < size; ++base)
            std::memcpy(numbers_ + base * stride_, basis + base * lists.tokens + lists.forced, bytes(keys));
    }

    const float* row(int64_t base) const { return numbers_ + base * stride_; }
    const float* zeros() const { return row(size_); }

   private:
    static std::size_t bytes(int64_t numbers) { return static_cast<std::size_t>(numbers) * sizeof(float); }

    const int64_t size_, stride_;
    const Buffer<float> numbers_;
};

// A part of a row's sum.
struct Term {
    float coefficient;
    const float* basis;
};

// Finds the largest coefficients of a row.
class LargestTerms {
   public:
    LargestTerms(int64_t size, int64_t kept)
        : size_(size),
          padded_(round_up(size, LANES)),
          kept_(kept),
          coefficients_(padded_),
          places_(3 * padded_),
          terms_(round_up(kept, SUMMED)) {}

    // In descending order, lowest index first where they are equal, then zeros; null for a row with NaN.
    const Term* find(const float* coefficients, const Basis& basis) {
        store(coefficients_ + padded_ - LANES, all(-INFINITE));
        std::memcpy(coefficients_, coefficients, static_cast<std::size_t>(size_) * sizeof(float));
        int32_t *last = places_, *used = last + padded_, *order = used + padded_;
        for (int64_t at = 0; at < padded_; at += LANES) {
            const Floats value = load(coefficients_ + at);
            if (bits_of(value != value)) return nullptr;
            store(last + at, last_place(value));
            store(used + at, Ints{});
        }
        // equal ones share their last place, which therefore goes to the highest index
        for (int64_t base = size_ - 1; base >= 0; --base)
            order[last[base] - used[last[base]]++] = static_cast<int32_t>(base);
        for (int64_t place = 0; place < kept_; ++place)
            terms_[place] = {coefficients_[order[place]], basis.row(order[place])};
        const int64_t end = round_up(kept_, SUMMED);
        for (int64_t place = kept_; place < end; ++place) terms_[place] = {0, basis.zeros()};
        return terms_;
    }

   private:
    // Places of these coefficients in descending order, of equal ones the last.
    Ints last_place(Floats coefficients) const {
        Ints others{};  // minus the number of those as large, itself among them
        for (int64_t at = 0; at < size_; ++at) others += all(coefficients_[at]) >= coefficients;
        return -others - 1;
    }

    const int64_t size_, padded_, kept_;
    const Buffer<float> coefficients_;
    const Buffer<int32_t> places_;
    const Buffer<Term> terms_;
};

// Scores of some keys, from those of earlier terms; a template so that its loop is unrolled.
template <int COUNT>
Floats add_terms(Floats scores, const Term* terms, int64_t key) {
    for (int term = 0; term < COUNT; ++term)
        scores = all(terms[term].coefficient) * load(terms[term].basis + key) + scores;
    return scores;
}

// Fills the scores of a row.
Moments sum_terms(const Term* terms, int64_t count, float* scores, int64_t keys) {
    const Term* end = terms + round_up(count, SUMMED);
    Moments of_all;
    for (const Term* some = terms; some < end; some += SUMMED) {
        Term local[SUMMED];  // for registers: stores to `scores` might change `terms`
        for (int term = 0; term < SUMMED; ++term) local[term] = some[term];
        Moments moments;
        for (int64_t key = 0; key < keys; key += LANES) {
            const Floats before = some == terms ? Floats{} : load(scores + key);
            const Floats score = add_terms<SUMMED>(before, local, key);
            store(scores + key, score);
            moments.add(score);
        }
        of_all = moments;
    }
    return of_all;
}

}  // namespace

void select_lowrank(
    int threads, const SparsifinerLists& lists, const float* coefficients, const float* basis,
    int64_t basis_size, int64_t kept) {
    const Basis rows(lists, basis, basis_size);
    const PerThread<RowSelector> selectors(threads, lists);
    const PerThread<LargestTerms> finders(threads, basis_size, kept);
#pragma omp parallel num_threads(threads)
    {
        RowSelector& selector = selectors.mine();
        LargestTerms& largest = finders.mine();
        const int64_t keys = selector.keys();
#pragma omp for schedule(dynamic, ROWS_AT_ONCE)
        for (int64_t row = 0; row < lists.total; ++row) {
            const Term* terms = largest.find(coefficients + row * basis_size, rows);
            if (!terms) {
                selector.select_nothing(row);
                continue;
            }
            const Moments moments = sum_terms(terms, kept, selector.scores(), keys);
            for (int64_t key = keys; key < round_up(keys, LANES); ++key) selector.scores()[key] = -INFINITE;
            selector.select(row, moments);
        }
    }
}

}  // namespace sparsifiner::SPARSIFINER_ISA
