// Vectors of 16 numbers or fewer for passes.cpp and attention.cpp: read and written in bf16 or fp32, computed in fp32.
//
// They are GCC's, of any processor; where AVX-512 has an instruction for several of theirs, it is named.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// Numbers of a vector: wider ones than the processor's are compared and chosen from one by one.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using floats = float __attribute__((vector_size(4 * LANES)));
using ints = int32_t __attribute__((vector_size(4 * LANES)));
using words = uint32_t __attribute__((vector_size(4 * LANES)));
using halves = uint16_t __attribute__((vector_size(2 * LANES)));
using doubles = double __attribute__((vector_size(8 * LANES)));

struct bf16 {
    uint16_t bits;
};

// -- vectors, read and written whole or in part

inline floats widened(floats x) { return x; }
inline floats widened(halves x) {
#ifdef __AVX512F__
    words bits = (words)_mm512_cvtepu16_epi32((__m256i)x);
#else
    words bits = __builtin_convertvector(x, words);
#endif
    return (floats)(bits << 16);
}

inline void round_to(floats &to, floats x) { to = x; }
inline void round_to(halves &to, floats x) {  // to the nearest, halves to even; NaN stays NaN
#ifdef __AVX512BF16__
    to = (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    words bits = (words)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 | words{} : rounded, halves);
#endif
}

template <class T>
struct Packed;
template <>
struct Packed<float> {
    using type = floats;
};
template <>
struct Packed<bf16> {
    using type = halves;
};

template <class T>
inline floats load(const T *from, int count = LANES) {
    typename Packed<T>::type x{};
    if (count == LANES)
        std::memcpy(&x, from, sizeof x);
    else
        std::memcpy(&x, from, count * sizeof(T));
    return widened(x);
}

template <class T>
inline void store(T *to, floats value, int count = LANES) {
    typename Packed<T>::type x;
    round_to(x, value);
    if (count == LANES)
        std::memcpy(to, &x, sizeof x);
    else
        std::memcpy(to, &x, count * sizeof(T));
}

// As it would be read again after it was written.
template <class T>
inline floats rounded(floats x) {
    typename Packed<T>::type kept;
    round_to(kept, x);
    return widened(kept);
}

// Calls body(i, how many numbers from i on) for whole vectors, and once for the rest.
template <class Body>
inline __attribute__((always_inline)) void each_vector(long first, long last, Body body) {
    long i = first;
    for (; i + LANES <= last; i += LANES) body(i, LANES);
    if (i < last) body(i, int(last - i));
}

inline ints counted_from(int first) {  // first, first + 1, ...
    constexpr int32_t COUNTED[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ints x;
    std::memcpy(&x, COUNTED, sizeof x);
    return x + first;
}

inline floats larger(floats x, floats y) {  // y where one is no number
#ifdef __AVX512F__
    return (floats)_mm512_max_ps((__m512)x, (__m512)y);
#else
    return x > y ? x : y;
#endif
}

// x where first <= i + lane < last, -inf elsewhere.
inline floats only(floats x, int i, int first, int last) {
    if (i >= first && i + LANES <= last) return x;
    ints place = counted_from(i);
    return (place >= first) & (place < last) ? x : -INFINITY + floats{};
}

inline float sum_of(floats x) {
    for (int apart = LANES / 2; apart; apart /= 2) x += __builtin_shuffle(x, counted_from(apart));
    return x[0];
}

inline double sum_of(doubles x) {
    double sum = x[0];
    for (int lane = 1; lane < LANES; lane++) sum += x[lane];
    return sum;
}

inline float most_of(floats x) {
    for (int apart = LANES / 2; apart; apart /= 2) x = larger(x, __builtin_shuffle(x, counted_from(apart)));
    return x[0];
}

// -- functions of vectors

// exp(x), 0 below -87, NaN of NaN: within 2 units of the last place by the polynomial of Cephes (Moshier), or
// within 2^-18 where what comes of it is rounded to the 8 bits of bf16.
template <class T>
inline floats exp_of(floats x) {
    constexpr bool FINE = sizeof(T) == sizeof(float);
    constexpr float PER_LOG2 = 1.44269504f, LOG2_HIGH = 0.693359375f, LOG2_LOW = -2.12194440e-4f;
#ifdef __AVX512F__
    floats n = (floats)_mm512_roundscale_ps((__m512)(x * PER_LOG2), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    constexpr float SHIFT = 0x1.8p23f;  // beside which the last place of a float is a one
    floats bounded = x < -87.0f ? -87.0f + floats{} : (x > 88.0f ? 88.0f + floats{} : x);
    floats given = x, shifted = bounded * PER_LOG2 + SHIFT, n = shifted - SHIFT;
    x = bounded;
#endif
    floats p;
    if (FINE) {
        floats r = x - n * LOG2_HIGH - n * LOG2_LOW;
        p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * (r * r) + r + 1.0f;
    } else {  // the least relative error that four powers can have
        floats r = x - n * (LOG2_HIGH + LOG2_LOW);
        p = r * 4.145840081e-2f + 1.679103074e-1f;
        p = p * r + 5.000436737e-1f;
        p = p * r + 9.999633325e-1f;
        p = p * r + 9.999992592e-1f;
    }
#ifdef __AVX512F__
    // Masked, and not left to underflow: a number below the normal ones costs as much as a hundred others.
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    return (floats)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
    p *= (floats)(((words)shifted + 127) << 23);
    return given < -87.0f ? floats{} : (given > 88.0f ? INFINITY + floats{} : p);
#endif
}

// 1 / (1 + exp(-x))
template <class T>
inline floats sigmoid(floats x) {
    floats y = 1.0f + exp_of<T>(-x);
#ifdef __AVX512F__
    floats share = (floats)_mm512_rcp14_ps((__m512)y);
    // One step of Newton's: from 14 bits to the last or the one before.
    if (sizeof(T) == sizeof(float)) share *= 2.0f - y * share;
#else
    floats share = 1.0f / y;
#endif
    return x < -85.0f ? floats{} : share;
}

}  // namespace
