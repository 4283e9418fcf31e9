// Scratch memory and elements in memory. Everything lives in the namespace of its instruction set: a function
// that two of them share would be linked from either.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "sparsifiner.h"
#include "vector.h"

namespace sparsifiner::SPARSIFINER_ISA {

inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
inline int64_t larger(int64_t x, int64_t y) { return x < y ? y : x; }
inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Uninitialised elements, aligned to cache lines.
template <class Element>
class Buffer {
   public:
    explicit Buffer(int64_t count)
        : data_(static_cast<Element*>(
              std::aligned_alloc(64, static_cast<size_t>(round_up(count * sizeof(Element) + 1, 64))))) {
        if (!data_) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator Element*() const { return data_; }

   private:
    Element* data_;
};

// One of each for every thread, made before they start: an exception must not leave a parallel region.
template <class Scratch>
class PerThread {
   public:
    template <class... Arguments>
    explicit PerThread(int threads, const Arguments&... arguments) {
        for (int thread = 0; thread < threads; ++thread)
            of_threads_.push_back(std::make_unique<Scratch>(arguments...));
    }
    Scratch& mine() const { return *of_threads_[static_cast<std::size_t>(omp_get_thread_num())]; }

   private:
    std::vector<std::unique_ptr<Scratch>> of_threads_;
};

using Bfloat16 = uint16_t;
using Halves = uint16_t __attribute__((vector_size(LANES * 2)));

inline Floats load(const Bfloat16* from) {
    return (Floats)(__builtin_convertvector(load_as<Halves>(from), Ints) << 16);
}

// To the nearest, ties to even.
inline void store(Bfloat16* to, Floats x) {
#if defined(__AVX512BF16__)
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
#else
    const Ints bits = (Ints)x;
    const Ints rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Ints quiet = (bits >> 16) | 0x40;
    const Halves halves = __builtin_convertvector(x != x ? quiet : rounded, Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
}

// Slots of a list before the empty ones at its end.
inline int64_t filled(const int32_t* list, int64_t size) {
    while (size && list[size - 1] < 0) --size;
    return size;
}

// A row of a head.
template <class Element>
inline Element* row_of(const SparsifinerTensor& x, int64_t batch, int64_t head, int64_t token) {
    return static_cast<Element*>(x.data) + batch * x.batch + head * x.head + token * x.token;
}

template <class Stored, class Element>
inline void copy_row(Stored* to, const Element* from, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) store(to + i, load(from + i));
}

inline void copy_row(Bfloat16* to, const Bfloat16* from, int64_t size) {
    std::memcpy(to, from, static_cast<std::size_t>(size) * sizeof *to);
}

}  // namespace sparsifiner::SPARSIFINER_ISA
