// SPDX-License-Identifier: BSD-3-Clause
// The wires of moments.py, the comparison of their calls, and the error that a kernel writes for the host.
//
//     forward    [call (7), count, sum_x (C), sum_x2 (C), status (7)]     float64, 2C + 15 values
//     backward   [call (7), sum_grad_y (C), sum_grad_y_xhat (C)]          float64, 2C + 7 values
//
// The call slots are 1, three integers v and their squares; a rank that abstains sends zeros. n ranks sent one number v iff
// the sums are n * v and n * v * v. They sent one number, whichever it is, iff n * sum(v * v) = sum(v)^2. Every rank gets
// the same answer. Limits: v < 2^18 and W <= 2^16, so that all sums are exact.
#pragma once
#include "storage.cuh"

constexpr int NUMBERS = 3, CALL = 1 + 2 * NUMBERS;
constexpr int STATUS = 7;  // faults, grad_enabled, needs_grad, one for each of four dtypes
constexpr int COUNT = CALL, SUMS = CALL + 1;

// Which call this rank is in: 1 and three integers, or zeros.
struct Numbers {
    double at[1 + NUMBERS];
};

__device__ inline void write_call(double* wire, const Numbers& numbers) {
    wire[0] = numbers.at[0];
#pragma unroll
    for (int i = 1; i <= NUMBERS; ++i) wire[i] = numbers.at[i], wire[NUMBERS + i] = numbers.at[i] * numbers.at[i];
}

__device__ inline bool same_call(const double* wire, const Numbers& numbers) {
    const double n = wire[0];
    bool same = true;
#pragma unroll
    for (int i = 1; i <= NUMBERS; ++i) {  // no &&, so that all slots are read together
        const double v = numbers.at[i], sum = wire[i], squares = wire[NUMBERS + i];
        // n * squares and sum * sum may exceed 2^53: compare their rounded values and their rounding errors.
        const bool one = (n * squares == sum * sum) & (fma(n, squares, -(n * squares)) == fma(sum, sum, -(sum * sum)));
        same = same & (numbers.at[0] != 0 ? (sum == n * v) & (squares == n * (v * v)) : one);
    }
    return same;
}

constexpr int ERROR_SLOTS = 4 + STATUS, MARKS = 512;

// Host memory, see kernels/cuda/errors.py: [number, ranks, same_call, count, status (7), marks (MARKS)]; number is 0 while it
// is empty.
struct DeferredError {
    volatile double* memory;  // null if the host compares the calls
    double number;            // of this launch; below 0 in a CUDA graph, which may run any number of times
};

// One thread of a launch calls this once it has read the wire: the host sees that the all-reduce has ended.
__device__ inline void mark(const DeferredError& error) {
    if (error.memory == nullptr || error.number < 0) return;
    error.memory[ERROR_SLOTS + static_cast<unsigned long long>(error.number) % MARKS] = error.number;
}

// One thread of a launch calls this. The first error stays until the host has read it: later ones follow from it.
__device__ inline void defer(const DeferredError& error, double ranks, bool same, double count, const double* status) {
    if (error.memory == nullptr || error.memory[0] != 0) return;
    error.memory[1] = ranks;
    error.memory[2] = same;
    error.memory[3] = count;
    for (int i = 0; i < STATUS; ++i) error.memory[4 + i] = status == nullptr ? 0 : status[i];
    __threadfence_system();  // all values arrive before the number
    error.memory[0] = fabs(error.number);
}
