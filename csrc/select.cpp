// Selection from scores: a search for each row's threshold among the keys that a guess lets pass.
#include "select.h"

#include <cfloat>
#include <cmath>

#include "kernels.h"

namespace sparsifiner::SPARSIFINER_ISA {

namespace {

// The code of -inf, which is never selected.
constexpr int32_t LOWEST = -2139095041;
// Keys that are ranked one by one, in two vectors.
constexpr int64_t RANKED = 2 * LANES;
// Fewer keys than these pass without a guess.
constexpr int64_t GUESSED = 4 * LANES;

// Integers in the order of scores.
Ints codes_of(Floats scores) {
    const Ints bits = (Ints)(scores + 0.0f);  // -0.0 becomes 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

int32_t code_of(float score) { return codes_of(all(score))[0]; }

float score_of(int32_t code) {
    const int32_t bits = code ^ ((code >> 31) & 0x7FFFFFFF);
    float score;
    std::memcpy(&score, &bits, sizeof score);
    return score;
}

Ints smaller(Ints x, Ints y) { return x < y ? x : y; }

Ints larger(Ints x, Ints y) { return x < y ? y : x; }

int32_t smallest_of(Ints x) { return reduce(x, [](Ints a, Ints b) { return smaller(a, b); }); }

int32_t largest_of(Ints x) { return reduce(x, [](Ints a, Ints b) { return larger(a, b); }); }

double share_above(double deviations) { return 0.5 * std::erfc(deviations * 0.70710678118654752); }

// How many standard deviations above the mean the best `budget` of so many normal scores begin.
float normal_quantile(int64_t keys, int64_t budget) {
    const double n = static_cast<double>(keys);
    const double share = std::fmin(std::fmax(static_cast<double>(budget) / n, 0.5 / n), 1 - 0.5 / n);
    double low = -9, high = 9;
    for (int step = 0; step < 40; ++step) {
        const double middle = (low + high) / 2;
        (share_above(middle) > share ? low : high) = middle;
    }
    return static_cast<float>(low);
}

// How far from the quantile the threshold of normal scores lies on average.
float quantile_error(int64_t keys, float quantile) {
    const double n = static_cast<double>(keys), share = share_above(quantile);
    const double density = 0.39894228 * std::exp(-0.5 * quantile * quantile);
    return static_cast<float>(0.8 * std::sqrt(share * (1 - share) / n) / density);
}

struct Pivots {
    int32_t first, second, third;  // ascending
};

// The codes at the quarters of a range.
Pivots quarters(int32_t low, int32_t high) {
    const int64_t span = static_cast<int64_t>(high) - low;
    // rounded up, so that the least code always lies below
    const auto at = [=](int part) { return static_cast<int32_t>(low + (span * part + 3) / 4); };
    return {at(1), at(2), at(3)};
}

// Codes that hold the threshold: it is the `wanted`-th largest of them.
struct Codes {
    const int32_t* codes;  // a multiple of LANES can be read: the rest is below LOWEST
    int64_t size, wanted;
};

void pad(int32_t* codes, int64_t size) {
    for (int part = 0; part < RANKED / LANES; ++part) store(codes + size + part * LANES, all(INT32_MIN));
}

// Packs those codes to `to` that share the threshold's place among the pivots.
Codes narrow(const Codes& from, const Pivots& pivots, int32_t* to) {
    const Ints first = all(pivots.first), second = all(pivots.second), third = all(pivots.third);
    int64_t from_first = 0, from_second = 0, from_third = 0;
    for (int64_t at = 0; at < from.size; at += LANES) {
        const Ints code = load(from.codes + at);
        from_first += __builtin_popcount(at_least(code, first));
        from_second += __builtin_popcount(at_least(code, second));
        from_third += __builtin_popcount(at_least(code, third));
    }
    int32_t low = LOWEST, high = pivots.first;
    int64_t beyond = from_first;
    if (from_first >= from.wanted) low = pivots.first, high = pivots.second, beyond = from_second;
    if (from_second >= from.wanted) low = pivots.second, high = pivots.third, beyond = from_third;
    if (from_third >= from.wanted) low = pivots.third, high = INT32_MAX, beyond = 0;
    int64_t size = 0;
    for (int64_t at = 0; at < from.size; at += LANES) {
        const Ints code = load(from.codes + at);
        size += pack(to + size, code, at_least(code, all(low)) & ~at_least(code, all(high)));
    }
    pad(to, size);
    return {to, size, from.wanted - beyond};
}

// The lowest `count` of more bits.
uint32_t lowest_bits(uint32_t bits, int64_t count) {
    uint32_t others = bits;
    for (; count > 0; --count) others &= others - 1;
    return bits & ~others;
}

// The selected keys are those of larger codes and the first `room` that are equal to it.
struct Threshold {
    int32_t code;
    int64_t room;
};

// Of at most RANKED codes.
Threshold rank(const Codes& among) {
    const Ints one = load(among.codes), other = load(among.codes + LANES);
    Ints above_one{}, above_other{};  // minus the number of larger codes
    for (int64_t at = 0; at < among.size; ++at) {
        const Ints code = all(among.codes[at]);
        above_one += code > one;
        above_other += code > other;
    }
    // the wanted codes and equal ones are those below fewer than `wanted`
    const Ints limit = all(-static_cast<int32_t>(among.wanted)), none = all(INT32_MAX);
    const Ints wanted = smaller(above_one > limit ? one : none, above_other > limit ? other : none);
    const int32_t code = smallest_of(wanted);
    const Ints next = all(code + 1);
    const int above = __builtin_popcount(at_least(one, next)) + __builtin_popcount(at_least(other, next));
    return {code, among.wanted - above};
}

Threshold threshold_of(Codes among, Pivots pivots, int32_t* scratch) {
    while (among.size > RANKED) {
        among = narrow(among, pivots, scratch);
        if (among.size <= RANKED) break;
        Ints least = load(among.codes), most = least;
        for (int64_t at = LANES; at + LANES <= among.size; at += LANES) {
            const Ints code = load(among.codes + at);
            least = smaller(least, code);
            most = larger(most, code);
        }
        const Ints last = load(among.codes + among.size - LANES);
        const int32_t low = smallest_of(smaller(least, last)), high = largest_of(larger(most, last));
        if (low == high) return {low, among.wanted};
        pivots = quarters(low, high);
    }
    return rank(among);
}

}  // namespace

RowSelector::RowSelector(const SparsifinerLists& lists)
    : lists_(lists),
      keys_(lists.tokens - lists.forced),
      budget_(lists.budget - lists.forced),
      // packing stores whole vectors behind what it has packed, and so does the padding
      scratch_(4 * (round_up(keys_, LANES) + RANKED)),
      quantile_(normal_quantile(keys_, budget_)),
      error_(quantile_error(keys_, quantile_)),
      least_error_(error_ / 8) {
    const int64_t part = round_up(keys_, LANES) + RANKED;
    scores_ = reinterpret_cast<float*>(static_cast<int32_t*>(scratch_));
    codes_ = scratch_ + part;
    indices_ = codes_ + part;
    uncertain_ = indices_ + part;
}

void RowSelector::select(int64_t row, const Moments& moments) {
    if (budget_ == 0) return write(row, 0);
    Guess guess{0, 0};
    int64_t passed = -1;
    if (keys_ >= GUESSED && budget_ < keys_) {
        guess = guess_from(moments);
        // three average errors are rarely not enough
        for (float errors = 3; errors < 30 && passed < budget_; errors *= 4) {
            const float low = guess.mean + (quantile_ - errors * error_) * guess.deviation;
            passed = pack_above(low > -FLT_MAX ? low : -FLT_MAX);
        }
    }
    if (passed < budget_) passed = pack_above(-FLT_MAX);
    write(row, passed > budget_ ? keep_largest(passed, guess) : passed);
}

RowSelector::Guess RowSelector::guess_from(const Moments& moments) const {
    float count = static_cast<float>(moments.count);
    float sum = sum_of(moments.sum), squares = sum_of(moments.squares);
    if (!(squares < INFINITE)) {
        // NaN or an infinity; -0x1p60 .. 0x1p60 have squares
        Moments finite;
        Ints counts{};
        for (int64_t key = 0; key < keys_; key += LANES) {
            const Floats score = load(scores_ + key);
            const Ints is_finite = (score > all(-0x1p60f)) & (score < all(0x1p60f));
            finite.add((Floats)((Ints)score & is_finite));
            counts -= is_finite;
        }
        count = std::fmax(static_cast<float>(sum_of(counts)), 1.0f);
        sum = sum_of(finite.sum);
        squares = sum_of(finite.squares);
    }
    const float mean = sum / count;
    const float variance = squares / count - mean * mean;
    return {mean, variance > 0 ? std::sqrt(variance) : 0};
}

// Packs codes and indices of the keys with scores of at least `low` > -inf; returns how many they are.
int64_t RowSelector::pack_above(float low) {
    const Floats lows = all(low);
    int32_t *const codes = codes_, *const indices = indices_;
    Ints index = iota() + static_cast<int32_t>(lists_.forced);
    int64_t passed = 0;
    for (int64_t key = 0; key < keys_; key += LANES) {
        const Floats score = load(scores_ + key);
        const uint32_t passes = at_least(score, lows);  // NaN does not
        pack(codes + passed, (Ints)score, passes);
        passed += pack(indices + passed, index, passes);
        index += LANES;
    }
    for (int64_t at = 0; at < passed; at += LANES) store(codes + at, codes_of((Floats)load(codes + at)));
    pad(codes, passed);
    return passed;
}

// Keeps the `budget_` best of more keys that passed, lowest index first where they are equal.
int64_t RowSelector::keep_largest(int64_t size, const Guess& guess) {
    const auto pivot = [&](float errors) {
        return code_of(guess.mean + (quantile_ + errors * error_) * guess.deviation);
    };
    const Pivots pivots{pivot(-0.5f), pivot(0), pivot(0.5f)};
    auto [code, room] = threshold_of({codes_, size, budget_}, pivots, uncertain_);

    int32_t* const indices = indices_;
    int64_t kept = 0;
    for (int64_t at = 0; at < size; at += LANES) {
        const Ints codes = load(codes_ + at);
        const uint32_t above = at_least(codes, all(code + 1));
        uint32_t equal = at_least(codes, all(code)) & ~above;
        if (__builtin_popcount(equal) > room) equal = lowest_bits(equal, room);
        room -= __builtin_popcount(equal);
        // in place: what is overwritten has been read
        kept += pack(indices + kept, load(indices + at), above | equal);
    }

    const float needed = (score_of(code) - guess.mean) / guess.deviation;
    const float off = needed - quantile_;
    if (std::fabs(off) < 100.0f) {  // not NaN
        quantile_ += off / 8;
        error_ += (std::fabs(off) - error_) / 16;
        error_ = error_ > least_error_ ? error_ : least_error_;
    }
    return kept;
}

void RowSelector::write(int64_t row, int64_t selected) const {
    int32_t* list = lists_.indices + row * lists_.budget;
    for (int64_t key = 0; key < lists_.forced; ++key) list[key] = static_cast<int32_t>(key);
    list += lists_.forced;
    const int32_t* from = indices_;
    if (selected == 0) {
        from = lists_.own + row % lists_.rows * lists_.own_size;
        selected = lists_.own_size < budget_ ? lists_.own_size : budget_;
    }
    if (selected) std::memcpy(list, from, static_cast<std::size_t>(selected) * sizeof *list);
    for (int64_t slot = selected; slot < budget_; ++slot) list[slot] = -1;
}

void select_topk(int threads, const SparsifinerLists& lists, const float* scores) {
    const PerThread<RowSelector> selectors(threads, lists);
#pragma omp parallel num_threads(threads)
    {
        RowSelector& selector = selectors.mine();
        const int64_t keys = selector.keys();
#pragma omp for schedule(dynamic, ROWS_AT_ONCE)
        for (int64_t row = 0; row < lists.total; ++row) {
            const float* from = scores + row * lists.tokens + lists.forced;
            float* to = selector.scores();
            constexpr int SUMS = 4;  // side by side, as each waits for its last addition
            Moments moments[SUMS];
            int64_t key = 0;
            for (; key + SUMS * LANES <= keys; key += SUMS * LANES) {
                for (int part = 0; part < SUMS; ++part) {
                    const Floats score = load(from + key + part * LANES);
                    store(to + key + part * LANES, score);
                    moments[part].add(score);
                }
            }
            for (int part = 1; part < SUMS; ++part) moments[0].add(moments[part]);
            // the rest is not worth a place in the sums
            for (; key + LANES <= keys; key += LANES) store(to + key, load(from + key));
            store(to + key, all(-INFINITE));
            std::memcpy(to + key, from + key, static_cast<std::size_t>(keys - key) * sizeof *to);
            selector.select(row, moments[0]);
        }
    }
}

}  // namespace sparsifiner::SPARSIFINER_ISA
