// SPDX-License-Identifier: BSD-3-Clause
// The four steps as plain C++ functions: what module.cpp calls and what the step files define.
//
// N batch, C channels, S product of the spatial dims.
//
// Each step file is compiled once per instruction set, with SYNCBN_ISA as its namespace, and run.cpp picks a set at
// run time. Nothing here or in vector.hpp may be an inline function with external linkage: the linker keeps one
// copy of such a function, and one compiled for AVX-512 would then run on a machine that has none.
//
// Two layouts cover contiguous, channels_last, and slices and transpositions of both:
//
//     planes   element (n, c, s) at n * stride_n + c * stride_c + s             S contiguous
//     rows     element (n, c, s) at n * stride_n + s * stride_s + c             C contiguous
#pragma once
#include <stdint.h>

namespace syncbn {

enum class DType { float16, bfloat16, float32, float64 };

struct Shape {
    int64_t N, C, S;
    bool rows;
    DType dtype;
    bool far;  // beyond the second-level cache: fetch ahead, and write past the caches
};

struct Elements {
    char* data;
    int64_t stride_n, stride_c, stride_s;  // in elements
};

// Per-channel numbers of any floating dtype; absent where data is null.
struct Values {
    char* data;
    int64_t stride;
    DType dtype;
};

constexpr int64_t BLOCK = 512;  // channels of a part of rows: their accumulators, 8 kB, stay in the first-level cache

// A part of the work. Sums: segments or rows [first, last) of channels [c_first, c_last).
struct Part {
    int64_t first, last, c_first, c_last;
};

struct Running {
    Values mean, var;
    double momentum;
    double count_global;
};

constexpr int64_t LANES = 16;          // elements handled together, on every instruction set
constexpr int64_t SEGMENT = 1 << 15;   // elements of a plane that one partial sum covers
constexpr int64_t MAX_CHUNKS = 64;     // partial sums per channel, at most

constexpr int64_t padded(int64_t C) { return (C + LANES - 1) / LANES * LANES; }
constexpr int64_t segments(int64_t S) { return (S + SEGMENT - 1) / SEGMENT; }

// What one instruction set offers. sums: zeroed float64 [2, padded(C)], the first sum and the second. coefficients:
// room for 4 rows of padded(C) float64. scratch: room for 4 C float64.
struct Steps {
    const char* name;
    void (*local_moments)(const Shape&, const Elements& x, const Part&, double* sums);
    void (*finalize)(int64_t C, const double* wire, double eps, double* mean, double* var, double* invstd);
    void (*update_running)(int64_t C, const double* mean, const double* var, const Running&);
    void (*normalize_coefficients)(const Shape&, const double* mean, const double* invstd, const Values& weight,
                                   const Values& bias, double* scratch, void* coefficients);
    void (*normalize)(const Shape&, const Elements& x, const Elements& y, void* coefficients, const Part&);
    void (*backward_sums)(const Shape&, const Elements& grad_y, const Elements& x, const double* mean, const Part&,
                          double* sums);
    void (*narrow_values)(int64_t C, const double* from, const Values& to);
    void (*backward_coefficients)(const Shape&, const double* wire, double count_global, const double* mean,
                                  const double* invstd, const Values& weight, double* scratch, void* coefficients);
    void (*backward_input)(const Shape&, const Elements& grad_y, const Elements& x, const Elements& grad_x,
                           void* coefficients, const Part&);
};

// One namespace per instruction set, defined by the four step files.
#define SYNCBN_DECLARE(isa)                                                                                            \
    namespace isa {                                                                                                    \
    void local_moments(const Shape&, const Elements&, const Part&, double*);                                           \
    void finalize(int64_t, const double*, double, double*, double*, double*);                                          \
    void update_running(int64_t, const double*, const double*, const Running&);                                        \
    void normalize_coefficients(const Shape&, const double*, const double*, const Values&, const Values&, double*,     \
                                void*);                                                                                \
    void normalize(const Shape&, const Elements&, const Elements&, void*, const Part&);                                \
    void backward_sums(const Shape&, const Elements&, const Elements&, const double*, const Part&, double*);           \
    void narrow_values(int64_t, const double*, const Values&);                                                         \
    void backward_coefficients(const Shape&, const double*, double, const double*, const double*, const Values&,       \
                               double*, void*);                                                                        \
    void backward_input(const Shape&, const Elements&, const Elements&, const Elements&, void*, const Part&);          \
    }
SYNCBN_DECLARE(baseline)
SYNCBN_DECLARE(avx2)
SYNCBN_DECLARE(avx512)

}  // namespace syncbn
