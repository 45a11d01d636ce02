// SPDX-License-Identifier: BSD-3-Clause
// A running sum that loses no more than float64 does, in two arithmetics; cuda_launch.py says which one a GPU gets.
//
// Float64: one addition, or one fma, a number. For GPUs with half as many float64 units as float32 units.
// Expansion: three float32, each the rounding errors of the one before, some 70 bits together; 13 to 22 float32 operations
// a number. For GPUs with a 32nd or a 64th of the float64 units, where one float64 operation costs as much as those.
//     two_sum: Knuth, The Art of Computer Programming 2, 4.2.2, theorem B. The sum and what it lost are exact.
//     A product of two half-precision numbers is exact in float32; of two float32 it loses fma(x, y, -product).
//     Numbers beyond 2^90 (infinities and NaN too) and products below 2^-90, of which a part could be lost, go to float64.
// Needs a compiler that neither contracts nor reorders: --fmad=false, and no fast math.
#pragma once
#include "walk.cuh"

template <class T> struct Float64 {
    typedef typename Compute<T>::Type Number;
    double total = 0;
    __device__ void add(Number x) { total += x; }
    __device__ void add_product(Number x, Number y) { total = fma(double(x), double(y), total); }
    __device__ double value() const { return total; }
};

template <class T> struct Expansion {
    static_assert(sizeof(T) <= sizeof(float), "float64 numbers are summed in float64");
    float high = 0, middle = 0, low = 0;
    double outside = 0;
    __device__ void add(float x) {
        if (fabsf(x) < LARGE)
            low += two_sum(middle, two_sum(high, x));
        else
            outside += x;
    }
    __device__ void add_product(float x, float y) {
        const float product = x * y, size = fabsf(product);
        if ((size > SMALL && size < LARGE) || x == 0 || y == 0) {
            low += two_sum(middle, two_sum(high, product));
            if (sizeof(T) == sizeof(float)) low += two_sum(middle, fmaf(x, y, -product));
        } else {
            outside = fma(double(x), double(y), outside);
        }
    }
    __device__ double value() const { return outside + (double(high) + (double(middle) + low)); }

private:
    static constexpr float LARGE = 1.2379400392853803e27f, SMALL = 8.077935669463161e-28f;  // 2^90, 2^-90
    // Adds x to `to` and returns what the rounding of that sum lost.
    __device__ static float two_sum(float& to, float x) {
        const float sum = to + x, of_x = sum - to;
        const float lost = (to - (sum - of_x)) + (x - of_x);
        to = sum;
        return lost;
    }
};

// Blocks that a multiprocessor shall hold: an expansion needs more registers, and eight of them a block of their own.
template <class Walk, class Sum>
constexpr int RESIDENT = sizeof(Sum) == sizeof(double) ? Walk::RESIDENT : Walk::CHANNELS < 8 ? 2 : 1;
