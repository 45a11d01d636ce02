// SPDX-License-Identifier: BSD-3-Clause
// A running sum that loses no more than float64 does, in two arithmetics. launch.py chooses by the GPU.
//
// Float64: one addition, or one fma, a number. For GPUs with half as many float64 units as float32 units.
// Expansion: three float32, each the rounding errors of the one before, together some 70 bits; 13 to 22 float32 operations
// per number. For GPUs with 1/32 or 1/64 as many float64 units, where one float64 operation costs as much as these.
//     two_sum: Knuth, The Art of Computer Programming 2, 4.2.2, theorem B. The sum and its rounding error are exact.
//     A product of two half-precision numbers is exact in float32; that of two float32 has the error fma(x, y, -product).
//     Numbers beyond 2^90 (also infinities and NaN) and products below 2^-90 could lose a part; they are added in float64.
#pragma once
#include "walk.cuh"

template <class T> struct Float64 {
    typedef double Number;
    double total = 0;
    __device__ static double number(T x) { return widen(x); }  // denormals may be 0; to_double() takes more registers
    __device__ void add(double x) { total += x; }
    __device__ void add_product(double x, double y) { total = fma(x, y, total); }
    __device__ double value() const { return total; }
};

template <class T> struct Expansion {
    static_assert(sizeof(T) <= sizeof(float), "float64 numbers are summed in float64");
    typedef float Number;
    float high = 0, middle = 0, low = 0;
    double outside = 0;
    __device__ static float number(T x) { return widen(x); }
    __device__ void add(float x) {
        if (fabsf(x) < LARGE)
            expand(x);
        else
            outside += to_double(x);
    }
    __device__ void add_product(float x, float y) {
        const float product = times(x, y), size = fabsf(product);
        if ((size > SMALL && size < LARGE) || is_zero(x) || is_zero(y)) {
            expand(product);
            if (sizeof(T) == sizeof(float)) low = plus(low, two_sum(middle, lost_in_product(x, y, product)));
        } else {
            outside = fma(to_double(x), to_double(y), outside);
        }
    }
    __device__ double value() const { return outside + (to_double(high) + (to_double(middle) + to_double(low))); }

private:
    static constexpr float LARGE = 1.2379400392853803e27f, SMALL = 8.077935669463161e-28f;  // 2^90, 2^-90
    __device__ void expand(float x) { low = plus(low, two_sum(middle, two_sum(high, x))); }
    // Adds x to `to` and returns the rounding error.
    __device__ static float two_sum(float& to, float x) {
        const float sum = plus(to, x), of_x = minus(sum, to);
        const float lost = plus(minus(to, minus(sum, of_x)), minus(x, of_x));
        to = sum;
        return lost;
    }
};

// How many blocks a multiprocessor should hold: an expansion needs more registers, and eight of them only one block.
template <class Walk, class Sum>
constexpr int RESIDENT = sizeof(Sum) == sizeof(double) ? Walk::RESIDENT : Walk::CHANNELS < 8 ? 2 : 1;
