// Sixteen floats at a time, in the compiler's own vectors: one register where the machine has such, several elsewhere.
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "numbers.h"

constexpr int LANES = 16;
using Lanes = float __attribute__((vector_size(4 * LANES), aligned(4)));
using WideBits = uint32_t __attribute__((vector_size(4 * LANES)));
using Bits = uint16_t __attribute__((vector_size(2 * LANES), aligned(2)));

inline void fetch(Lanes& to, const float* from) { to = *(const Lanes*)from; }

inline void fetch(Lanes& to, const bf16* from) {
    to = (Lanes)(__builtin_convertvector(*(const Bits*)from, WideBits) << 16);
}

inline void put(float* to, const Lanes& from) { *(Lanes*)to = from; }

inline void put(bf16* to, const Lanes& from) {
    WideBits wide = (WideBits)from;
    WideBits rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    rounded = from != from ? WideBits{} + 0x7fc0u : rounded;
    *(Bits*)to = __builtin_convertvector(rounded, Bits);
}

// The same for one number, so that a loop over lanes and its remainder are one template.
template <class T>
inline void fetch(float& to, const T* from) {
    to = load(*from);
}

template <class T>
inline void put(T* to, float from) {
    store(*to, from);
}

// left . right, still spread over the lanes, of whole lanes (`size` is a multiple of 32).
template <class T>
inline Lanes partial_dot(const T* left, const T* right, int64_t size) {
    Lanes sum = {};
    for (int64_t k = 0; k < size; k += LANES) {
        Lanes a, b;
        fetch(a, left + k);
        fetch(b, right + k);
        sum += a * b;
    }
    return sum;
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)
template <>
inline Lanes partial_dot(const bf16* left, const bf16* right, int64_t size) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < size; k += 32)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(left + k),
                               (__m512bh)_mm512_loadu_si512(right + k));
    return (Lanes)sum;
}
#endif

inline float sum_lanes(const Lanes& lanes) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += lanes[i];
    return sum;
}

template <class T>
float dot(const T* left, const T* right, int64_t size) {
    int64_t whole = size / 32 * 32;
    float sum = sum_lanes(partial_dot(left, right, whole));
    for (int64_t k = whole; k < size; ++k) sum += load(left[k]) * load(right[k]);
    return sum;
}
