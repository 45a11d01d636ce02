// SPDX-License-Identifier: BSD-3-Clause
// Turns Python tensors into the plain structures of steps.hpp, and makes every check before a pointer is used.
//
// A function that returns false has set a Python exception, unless it says otherwise.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dlpack.hpp"
#include "steps.hpp"

namespace syncbn {

// Learns how torch describes tensors: its exchange capsule and the class Tensor.
bool learn(PyObject* capsule, PyObject* tensor_class);

// Borrows a CPU tensor of one of the four dtypes.
bool borrow(PyObject* object, const char* name, dlpack::Tensor* tensor, DType* dtype);

// Finds one layout for tensors of one shape and dtype, the first of which gives the order of the spatial dims.
// `fits` is false, without an exception, if they have none in common and a copy is needed.
bool arrange(PyObject* const* objects, const char* const* names, int count, Shape* shape, Elements* elements,
             bool* fits);

// A contiguous float64 (length,) tensor.
bool doubles(PyObject* object, const char* name, int64_t length, double** data);

// Per-channel numbers (C,), or None.
bool values(PyObject* object, const char* name, int64_t C, Values* out);

// An int64 tensor of one value, or None: then null.
bool counter(PyObject* object, const char* name, int64_t** data);

// Whether the steps can take x (N, C, ...), weight, bias, running mean and var (C,) or None, and an int64 counter or
// None. False leaves a Python error set.
bool sound(PyObject* const* objects, int64_t C);

}  // namespace syncbn
