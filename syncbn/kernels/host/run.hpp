// SPDX-License-Identifier: BSD-3-Clause
// The steps over whole tensors: work divided among threads, partial sums combined in a fixed order.
#pragma once
#include <string>
#include <vector>

#include "steps.hpp"

namespace syncbn {

// The instruction sets that this machine can run, the fastest first, and the one in use.
std::vector<std::string> instruction_sets();
const char* instruction_set();
// False if the machine does not have it.
bool use_instruction_set(const std::string& name);

// Writes sum_x and sum_x2, each float64 (C,).
void run_local_moments(const Shape&, const Elements& x, int64_t threads, double* sum_x, double* sum_x2);

// Finalises, moves the running statistics unless their data is null, and normalises.
struct Finalize {
    const double* wire;
    double eps;
    Values weight, bias;
    double *mean, *invstd;
    Running running;
};
void run_normalize(Shape, const Elements& x, const Elements& y, int64_t C, const Finalize&, int64_t threads);

// Writes [sum_grad_y (C), sum_grad_y_xhat (C)].
void run_backward_sums(const Shape&, const Elements& grad_y, const Elements& x, const double* mean,
                       const double* invstd, int64_t threads, double* wire);

struct Global {
    const double *wire, *mean, *invstd;
    double count_global;
    Values weight;
};
void run_backward_input(Shape, const Elements& grad_y, const Elements& x, const Elements& grad_x, const Global&,
                        int64_t threads);

// Rounds per-channel numbers to another dtype; does nothing if `to` is absent.
void run_narrow(int64_t C, const double* from, const Values& to);

}  // namespace syncbn
