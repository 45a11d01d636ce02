// SPDX-License-Identifier: BSD-3-Clause
// Storage types, their types of computation, packs of 16 bytes, and vectors of C values of any dtype.
//
// Bits of a result never depend on the width of an access: a pack is the same V elements, in the same order, whether
// it comes by one load of 16 bytes, two of 8, or V of one element where the memory is not aligned.
#pragma once
#include "ptx.cuh"

typedef long long Int;  // 64 bits on every compiler

constexpr int MAX_THREADS = 256;  // in a block, see geometry.py

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

__device__ inline double plus(double a, double b) { return a + b; }
__device__ inline double minus(double a, double b) { return a - b; }
__device__ inline double times(double a, double b) { return a * b; }
__device__ inline double to_double(double value) { return value; }
__device__ inline void round_to(float* to, double value) { *to = to_float(value); }
__device__ inline void round_to(double* to, double value) { *to = value; }

__device__ inline float widen(Float16 x) { return half_to_float(x.bits); }
__device__ inline float widen(BFloat16 x) { return bfloat16_to_float(x.bits); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

__device__ inline void narrow(float x, Float16* to) { to->bits = float_to_half(x); }
__device__ inline void narrow(float x, BFloat16* to) { to->bits = float_to_bfloat16(x); }
__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(double x, double* to) { *to = x; }

// A load fills words. An element is extracted where it is used, so no load waits for another.
template <int N> struct alignas(4 * N) Words {
    unsigned at[N];
};
template <class T> union Pack {
    static constexpr int V = 16 / sizeof(T);
    Words<4> whole;
    Words<2> halves[2];
    T at[V];
};

// How memory is read: COUNT elements per access, PACKS packs before the first one is used.
template <int N, int M> struct Access {
    static constexpr int COUNT = N, PACKS = M;
};

// Reads `length` elements, a multiple of the access width, and fills the rest with zeros.
template <class A, class T> __device__ inline Pack<T> load(const T* p, int length) {
    constexpr int V = Pack<T>::V, E = A::COUNT;
    Pack<T> pack;
    pack.whole = Words<4>{};
    if (E == V) {
        if (length > 0) pack.whole = *reinterpret_cast<const Words<4>*>(p);
    } else if (E == V / 2) {
        const Words<2>* halves = reinterpret_cast<const Words<2>*>(p);
        if (length > 0) pack.halves[0] = halves[0];
        if (length > E) pack.halves[1] = halves[1];
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i)
            if (i < length) pack.at[i] = p[i];
    }
    return pack;
}

template <class A, class T> __device__ inline void store(T* p, const Pack<T>& pack, int length) {
    constexpr int V = Pack<T>::V, E = A::COUNT;
    const unsigned* words = pack.whole.at;
    if (E == V) {
        if (length > 0) store_words(p, words[0], words[1], words[2], words[3]);
    } else if (E == V / 2) {
        if (length > 0) store_words(p, words[0], words[1]);
        if (length > E) store_words(p + E, words[2], words[3]);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i)
            if (i < length) p[i] = pack.at[i];
    }
}

// C values of any dtype and stride: weight, bias, running statistics or gradients. data is null if there are none.
struct Values {
    void* data;
    Int stride;  // elements
    Int dtype;   // the order of moments.DTYPES: float16, bfloat16, float32, float64
};

// The bits of one value. Separate from read(), so that several loads are issued before the first is used.
union Value {
    double wide;
    float single;
    Float16 half;
    BFloat16 brain;
};

__device__ inline Value fetch(const Values& v, Int c) {
    Value value{0};
    if (v.data == nullptr) return value;
    const Int i = c * v.stride;
    if (v.dtype == 3) value.wide = static_cast<const double*>(v.data)[i];
    else if (v.dtype == 2) value.single = static_cast<const float*>(v.data)[i];
    else value.half = static_cast<const Float16*>(v.data)[i];
    return value;
}

__device__ inline double read(const Values& v, const Value& value, double absent) {
    if (v.data == nullptr) return absent;
    switch (v.dtype) {
        case 0: return to_double(widen(value.half));
        case 1: return to_double(widen(value.brain));
        case 2: return to_double(value.single);
    }
    return value.wide;
}

__device__ inline void write(const Values& v, Int c, double value) {
    if (v.data == nullptr) return;
    const Int i = c * v.stride;
    switch (v.dtype) {
        case 0: return narrow(to_float(value), static_cast<Float16*>(v.data) + i);
        case 1: return narrow(to_float(value), static_cast<BFloat16*>(v.data) + i);
        case 2: return narrow(to_float(value), static_cast<float*>(v.data) + i);
    }
    static_cast<double*>(v.data)[i] = value;
}
