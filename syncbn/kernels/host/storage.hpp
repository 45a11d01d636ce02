// SPDX-License-Identifier: BSD-3-Clause
// The four storage types, and one native vector of an instruction set read from them and written to them.
//
// Internal linkage throughout, and no header of the standard library: see steps.hpp. Narrowing rounds to nearest, ties
// to even, as torch does; a NaN stays one.
#pragma once
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "steps.hpp"

namespace {
namespace lanes {

#if defined(__AVX512F__)
#define SYNCBN_BYTES 64
#elif defined(__AVX2__)
#define SYNCBN_BYTES 32
#else
#define SYNCBN_BYTES 16
#endif

constexpr int NF = SYNCBN_BYTES / 4, ND = SYNCBN_BYTES / 8;
typedef float VF __attribute__((vector_size(SYNCBN_BYTES)));
typedef double VD __attribute__((vector_size(SYNCBN_BYTES)));
typedef uint32_t VU __attribute__((vector_size(SYNCBN_BYTES)));
typedef uint16_t VS __attribute__((vector_size(SYNCBN_BYTES / 2)));    // as many as floats in VF
typedef float HF __attribute__((vector_size(SYNCBN_BYTES / 2)));       // as many as doubles in VD
typedef uint32_t HU __attribute__((vector_size(SYNCBN_BYTES / 2)));
typedef uint16_t HS __attribute__((vector_size(SYNCBN_BYTES / 4)));

struct half { uint16_t bits; };
struct bfloat { uint16_t bits; };

template <class To, class From> inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}
template <class To> inline To read(const void* p) {
    To to;
    __builtin_memcpy(&to, p, sizeof(to));
    return to;
}

// ---- one element
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat x) { return bits<float>(uint32_t(x.bits) << 16); }
inline float widen(half x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
    uint32_t scaled = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f);  // exact, also for subnormals
    if (magnitude >= 0x0f800000) scaled = magnitude | 0x7f800000;         // infinity and NaN
    return bits<float>(scaled | uint32_t(x.bits & 0x8000) << 16);
}
inline void narrow(float x, float* p) { *p = x; }
inline void narrow(double x, double* p) { *p = x; }
inline void narrow(float x, bfloat* p) {  // to nearest, ties to even
    const uint32_t u = bits<uint32_t>(x);
    p->bits = x == x ? uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}
inline void narrow(float x, half* p) {
    const uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    uint32_t h = 0x7c00;
    if (a > 0x7f800000) h = 0x7e00;
    else if (a < 0x38800000) h = bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3f000000;  // 2^-24 is one ulp of 0.5
    else if (a < 0x47800000) h = ((a + 0xfff + (a >> 13 & 1)) >> 13) - (112 << 10);
    p->bits = uint16_t(sign | h);
}

// ---- one native vector
// Conversions by intrinsics: gcc 12 compiles the general __builtin_convertvector to two halves that it joins again, at half
// the speed.
#if defined(__AVX512F__)
inline VD to_double(HF v) { return (VD)_mm512_cvtps_pd((__m256)v); }
inline VU to_wide(VS v) { return (VU)_mm512_cvtepu16_epi32((__m256i)v); }
inline HU to_wide(HS v) { return (HU)_mm256_cvtepu16_epi32((__m128i)v); }
inline VS to_short(VU v) { return (VS)_mm512_cvtepi32_epi16((__m512i)v); }
#elif defined(__AVX2__)
inline VD to_double(HF v) { return (VD)_mm256_cvtps_pd((__m128)v); }
inline VU to_wide(VS v) { return (VU)_mm256_cvtepu16_epi32((__m128i)v); }
inline HU to_wide(HS v) { return (HU)_mm_cvtepu16_epi32(_mm_cvtsi64_si128(bits<int64_t>(v))); }
inline VS to_short(VU v) { return __builtin_convertvector(v, VS); }
#else
inline VD to_double(HF v) { return __builtin_convertvector(v, VD); }
inline VU to_wide(VS v) { return __builtin_convertvector(v, VU); }
inline HU to_wide(HS v) { return __builtin_convertvector(v, HU); }
inline VS to_short(VU v) { return __builtin_convertvector(v, VS); }
#endif
inline VF load_native(const float* p, VF) { return read<VF>(p); }
inline VF load_native(const bfloat* p, VF) { return bits<VF>(to_wide(read<VS>(p)) << 16); }
inline VD load_native(const double* p, VD) { return read<VD>(p); }
inline VD load_native(const float* p, VD) { return to_double(read<HF>(p)); }
inline VD load_native(const bfloat* p, VD) { return to_double(bits<HF>(to_wide(read<HS>(p)) << 16)); }
inline void store_native(float* p, VF v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline void store_native(double* p, VD v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline void store_native(bfloat* p, VF v) {
    const VU u = bits<VU>(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, nan = VU{} + 0x7fc0;
    const VS s = to_short((VU)(v == v) ? rounded : nan);
    __builtin_memcpy(p, &s, sizeof(s));
}
#if defined(__AVX512F__)
inline VF load_native(const half* p, VF) { return (VF)_mm512_cvtph_ps(read<__m256i>(p)); }
inline VD load_native(const half* p, VD) { return (VD)_mm512_cvtps_pd(_mm256_cvtph_ps(read<__m128i>(p))); }
inline void store_native(half* p, VF v) {
    const __m256i s = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &s, sizeof(s));
}
#elif defined(__AVX2__)
inline VF load_native(const half* p, VF) { return (VF)_mm256_cvtph_ps(read<__m128i>(p)); }
inline VD load_native(const half* p, VD) {
    return (VD)_mm256_cvtps_pd(_mm_cvtph_ps(_mm_cvtsi64_si128(read<int64_t>(p))));
}
inline void store_native(half* p, VF v) {
    const __m128i s = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &s, sizeof(s));
}
#else
inline VF load_native(const half* p, VF v) {
    for (int i = 0; i < NF; ++i) v[i] = widen(p[i]);
    return v;
}
inline VD load_native(const half* p, VD v) {
    for (int i = 0; i < ND; ++i) v[i] = widen(p[i]);
    return v;
}
inline void store_native(half* p, VF v) {
    for (int i = 0; i < NF; ++i) narrow(v[i], p + i);
}
#endif

// Stores past the caches, to an address that is a multiple of the vector's size; a plain store if there is no such one.
#if defined(__AVX512F__)
inline void stream_native(float* p, VF v) { _mm512_stream_ps(p, (__m512)v); }
inline void stream_native(double* p, VD v) { _mm512_stream_pd(p, (__m512d)v); }
template <class T> inline void stream_native(T* p, VF v) {
    __m256i s;
    store_native(reinterpret_cast<T*>(&s), v);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), s);
}
#elif defined(__AVX2__)
inline void stream_native(float* p, VF v) { _mm256_stream_ps(p, (__m256)v); }
inline void stream_native(double* p, VD v) { _mm256_stream_pd(p, (__m256d)v); }
template <class T> inline void stream_native(T* p, VF v) {
    __m128i s;
    store_native(reinterpret_cast<T*>(&s), v);
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), s);
}
#elif defined(__x86_64__)
inline void stream_native(float* p, VF v) { _mm_stream_ps(p, (__m128)v); }
inline void stream_native(double* p, VD v) { _mm_stream_pd(p, (__m128d)v); }
template <class T> inline void stream_native(T* p, VF v) {
    long long s;
    store_native(reinterpret_cast<T*>(&s), v);
    _mm_stream_si64(reinterpret_cast<long long*>(p), s);
}
#else
template <class T, class V> inline void stream_native(T* p, V v) { store_native(p, v); }
#endif

// Moves n < 16 elements between a tensor and a block of sixteen. The compiler keeps the block in registers where the
// move is one masked instruction; element by element, it would be read before its parts have reached the cache.
#if defined(__AVX512F__)
inline void fetch(const uint16_t* p, int64_t n, uint16_t* block) {
    const __m256i v = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
    __builtin_memcpy(block, &v, sizeof(v));
}
inline void put(const uint16_t* block, int64_t n, uint16_t* p) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), read<__m256i>(block));
}
inline void fetch(const float* p, int64_t n, float* block) {
    const __m512 v = _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
    __builtin_memcpy(block, &v, sizeof(v));
}
inline void put(const float* block, int64_t n, float* p) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), read<__m512>(block));
}
inline void fetch(const double* p, int64_t n, double* block) {
    const __m512d v = _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
    const __m512d w = _mm512_maskz_loadu_pd(__mmask8(((1u << n) - 1) >> 8), p + 8);
    __builtin_memcpy(block, &v, sizeof(v));
    __builtin_memcpy(block + 8, &w, sizeof(w));
}
inline void put(const double* block, int64_t n, double* p) {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), read<__m512d>(block));
    _mm512_mask_storeu_pd(p + 8, __mmask8(((1u << n) - 1) >> 8), read<__m512d>(block + 8));
}
inline void fetch(const half* p, int64_t n, half* block) { fetch(&p->bits, n, &block->bits); }
inline void fetch(const bfloat* p, int64_t n, bfloat* block) { fetch(&p->bits, n, &block->bits); }
inline void put(const half* block, int64_t n, half* p) { put(&block->bits, n, &p->bits); }
inline void put(const bfloat* block, int64_t n, bfloat* p) { put(&block->bits, n, &p->bits); }
#else
template <class T> inline void fetch(const T* p, int64_t n, T* block) {
    __builtin_memset(block, 0, 16 * sizeof(T));
    for (int64_t i = 0; i < n; ++i) block[i] = p[i];
}
template <class T> inline void put(const T* block, int64_t n, T* p) {
    for (int64_t i = 0; i < n; ++i) p[i] = block[i];
}
#endif

}  // namespace lanes
}  // namespace
