// SPDX-License-Identifier: BSD-3-Clause
// Storage types, the type they are computed in, packs of 16 bytes, and vectors of C values of any dtype.
//
// Bits of a result never depend on the width of an access: a pack is the same V elements, in the same order, whether
// it comes by one load of 16 bytes, two of 8, or V of one element where the memory is not aligned.
#pragma once
#include "ptx.cuh"

typedef long long Int;  // 64 bits on every compiler

constexpr int MAX_THREADS = 256;  // in a block; the launcher keeps to it

struct Float16 {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

// Elementwise arithmetic: float32, float64 for float64. One rounding to it, one from it.
template <class T> struct Compute {
    typedef float Type;
};
template <> struct Compute<double> {
    typedef double Type;
};

__device__ inline float widen(Float16 x) { return half_to_float(x.bits); }
__device__ inline float widen(BFloat16 x) { return bfloat16_to_float(x.bits); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

__device__ inline void narrow(float x, Float16* to) { to->bits = float_to_half(x); }
__device__ inline void narrow(float x, BFloat16* to) { to->bits = float_to_bfloat16(x); }
__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(double x, double* to) { *to = x; }

template <class T> struct alignas(16) Pack {
    static constexpr int V = 16 / sizeof(T);
    T at[V];
};
template <class T> struct alignas(8) HalfPack {
    T at[8 / sizeof(T)];
};

// Reads `length` elements, zeros behind them. Whole packs in accesses of `width` bytes: 16, 8, or 0 for single elements.
template <class T> __device__ inline Pack<T> load(const T* p, int length, int width) {
    constexpr int V = Pack<T>::V;
    if (length == V && width == 16) return *reinterpret_cast<const Pack<T>*>(p);
    Pack<T> pack;
    if (length == V && width == 8) {
        const HalfPack<T>* halves = reinterpret_cast<const HalfPack<T>*>(p);
        const HalfPack<T> first = halves[0], second = halves[1];
#pragma unroll
        for (int i = 0; i < V; ++i) pack.at[i] = i < V / 2 ? first.at[i % (V / 2)] : second.at[i % (V / 2)];
        return pack;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) pack.at[i] = i < length ? p[i] : T{};
    return pack;
}

template <class T> __device__ inline void store(T* p, const Pack<T>& pack, int length, int width) {
    constexpr int V = Pack<T>::V;
    if (length == V && width == 16) {
        *reinterpret_cast<Pack<T>*>(p) = pack;
        return;
    }
    if (length == V && width == 8) {
        HalfPack<T> halves[2];
#pragma unroll
        for (int i = 0; i < V; ++i) halves[i / (V / 2)].at[i % (V / 2)] = pack.at[i];
        reinterpret_cast<HalfPack<T>*>(p)[0] = halves[0];
        reinterpret_cast<HalfPack<T>*>(p)[1] = halves[1];
        return;
    }
#pragma unroll
    for (int i = 0; i < V; ++i)
        if (i < length) p[i] = pack.at[i];
}

// C values of any dtype and stride: weight, bias, running statistics, their gradients. data is null where there are none.
struct Values {
    void* data;
    Int stride;  // elements
    Int dtype;   // the order of moments.DTYPES: float16, bfloat16, float32, float64
};

__device__ inline double read(const Values& v, Int c, double absent) {
    if (v.data == nullptr) return absent;
    const Int i = c * v.stride;
    switch (v.dtype) {
        case 0: return widen(static_cast<const Float16*>(v.data)[i]);
        case 1: return widen(static_cast<const BFloat16*>(v.data)[i]);
        case 2: return static_cast<const float*>(v.data)[i];
    }
    return static_cast<const double*>(v.data)[i];
}

__device__ inline void write(const Values& v, Int c, double value) {
    if (v.data == nullptr) return;
    const Int i = c * v.stride;
    switch (v.dtype) {
        case 0: return narrow(float(value), static_cast<Float16*>(v.data) + i);
        case 1: return narrow(float(value), static_cast<BFloat16*>(v.data) + i);
        case 2: return narrow(float(value), static_cast<float*>(v.data) + i);
    }
    static_cast<double*>(v.data)[i] = value;
}
