// SPDX-License-Identifier: BSD-3-Clause
// The Python module syncbn.kernels._host: arguments in, checks, one step, out. See host_ops.py and _host.pyi.
//
// Written against Python's stable C interface, so one build serves every Python from 3.11 and every torch; a call costs
// some tens of nanoseconds. The steps release the GIL where they take long enough for another thread to gain.
#include "run.hpp"
#include "tensors.hpp"

namespace {
using namespace syncbn;

constexpr int64_t STATUS = 7;             // counters in the tail of the forward wire, see moments.py
constexpr int64_t LONG_ENOUGH = 1 << 15;  // elements

class WithoutGil {
public:
    explicit WithoutGil(const Shape& k) : state_(k.N * k.C * k.S < LONG_ENOUGH ? nullptr : PyEval_SaveThread()) {}
    ~WithoutGil() {
        if (state_ != nullptr) PyEval_RestoreThread(state_);
    }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

private:
    PyThreadState* state_;
};

bool expect(Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected) return true;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, received %zd", expected, given);
    return false;
}

bool number(PyObject* object, double* out) { return *out = PyFloat_AsDouble(object), !PyErr_Occurred(); }

bool integer(PyObject* object, int64_t* out) { return *out = PyLong_AsLongLong(object), !PyErr_Occurred(); }

PyObject* learn_torch(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (!expect(n, 2) || !learn(args[0], args[1])) return nullptr;
    Py_RETURN_NONE;
}

PyObject* available(PyObject*, PyObject*) {
    PyObject* list = PyList_New(0);
    for (const std::string& name : instruction_sets()) {
        PyObject* item = PyUnicode_FromString(name.c_str());
        if (item == nullptr || PyList_Append(list, item) != 0) return Py_XDECREF(item), Py_DECREF(list), nullptr;
        Py_DECREF(item);
    }
    return list;
}

PyObject* selected(PyObject*, PyObject*) { return PyUnicode_FromString(instruction_set()); }

PyObject* select(PyObject*, PyObject* name) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(name, &size);
    if (text == nullptr) return nullptr;
    if (use_instruction_set(text)) Py_RETURN_NONE;
    return PyErr_Format(PyExc_ValueError, "this machine does not run %s", text);
}

// local_moments(x, wire, status, threads)
PyObject* local_moments(PyObject*, PyObject* const* args, Py_ssize_t n) {
    const char* const names[] = {"x"};
    Shape k;
    Elements x;
    bool fits;
    double* wire;
    int64_t threads;
    if (!expect(n, 4) || !arrange(args, names, 1, &k, &x, &fits)) return nullptr;
    if (!fits) Py_RETURN_FALSE;
    if (!doubles(args[1], "wire", 2 * k.C + 1 + STATUS, &wire) || !integer(args[3], &threads)) return nullptr;
    if (!PyTuple_Check(args[2]) || PyTuple_Size(args[2]) != STATUS)
        return PyErr_Format(PyExc_TypeError, "status must be a tuple of %d numbers", int(STATUS));
    for (int64_t i = 0; i < STATUS; ++i)
        if (!number(PyTuple_GetItem(args[2], i), wire + 1 + 2 * k.C + i)) return nullptr;
    WithoutGil released(k);
    wire[0] = double(k.N * k.S);
    run_local_moments(k, x, threads, wire + 1, wire + 1 + k.C);
    Py_RETURN_TRUE;
}

// read_status(wire): (count_global, *status)
PyObject* read_status(PyObject*, PyObject* object) {
    dlpack::Tensor t{};
    DType dtype;
    if (!borrow(object, "wire", &t, &dtype)) return nullptr;
    if (dtype != DType::float64 || t.ndim != 1 || t.shape[0] <= STATUS || t.strides[0] != 1)
        return PyErr_Format(PyExc_ValueError, "wire must be contiguous float64 (2C + %d,)", int(1 + STATUS));
    const double *wire = static_cast<double*>(t.data), *tail = wire + t.shape[0] - STATUS;
    PyObject* tuple = PyTuple_New(1 + STATUS);
    for (int64_t i = 0; tuple != nullptr && i <= STATUS; ++i)
        PyTuple_SetItem(tuple, i, PyFloat_FromDouble(i == 0 ? wire[0] : tail[i - 1]));
    return tuple;
}

// Counts the batch and finds how far the running statistics move; None averages over all batches counted.
bool read_momentum(PyObject* given, int64_t* tracked, double* momentum) {
    if (given != Py_None && !number(given, momentum)) return false;
    if (tracked != nullptr) ++*tracked;
    if (given == Py_None) *momentum = tracked == nullptr ? 0.0 : 1.0 / double(*tracked);
    return true;
}

// normalize(x, y, wire, weight, bias, stats, running_mean, running_var, num_batches_tracked, momentum, eps,
//           count_global, threads)
PyObject* normalize(PyObject*, PyObject* const* args, Py_ssize_t n) {
    const char* const names[] = {"x", "y"};
    Shape k;
    Elements e[2];
    bool fits;
    Finalize f{};
    double* wire;
    int64_t *tracked, threads;
    if (!expect(n, 13) || !arrange(args, names, 2, &k, e, &fits)) return nullptr;
    if (!fits) Py_RETURN_FALSE;
    if (!doubles(args[2], "wire", 2 * k.C + 1 + STATUS, &wire) || !values(args[3], "weight", k.C, &f.weight) ||
        !values(args[4], "bias", k.C, &f.bias) || !doubles(args[5], "stats", 2 * k.C, &f.mean) ||
        !values(args[6], "running_mean", k.C, &f.running.mean) || !values(args[7], "running_var", k.C, &f.running.var) ||
        !counter(args[8], "num_batches_tracked", &tracked) || !number(args[10], &f.eps) ||
        !number(args[11], &f.running.count_global) || !integer(args[12], &threads))
        return nullptr;
    if ((f.running.mean.data == nullptr) != (f.running.var.data == nullptr))
        return PyErr_Format(PyExc_ValueError, "running_mean and running_var must both be tensors or both be None");
    if (f.running.mean.data != nullptr && !read_momentum(args[9], tracked, &f.running.momentum)) return nullptr;
    f.wire = wire, f.invstd = f.mean + k.C;
    WithoutGil released(k);
    run_normalize(k, e[0], e[1], k.C, f, threads);
    Py_RETURN_TRUE;
}

// backward_sums(grad_y, x, stats, wire, threads)
PyObject* backward_sums(PyObject*, PyObject* const* args, Py_ssize_t n) {
    PyObject* const tensors[] = {n == 5 ? args[1] : nullptr, n == 5 ? args[0] : nullptr};
    const char* const names[] = {"x", "grad_y"};
    Shape k;
    Elements e[2];
    bool fits;
    double *stats, *wire;
    int64_t threads;
    if (!expect(n, 5) || !arrange(tensors, names, 2, &k, e, &fits)) return nullptr;
    if (!fits) Py_RETURN_FALSE;
    if (!doubles(args[2], "stats", 2 * k.C, &stats) || !doubles(args[3], "wire", 2 * k.C, &wire) ||
        !integer(args[4], &threads))
        return nullptr;
    WithoutGil released(k);
    run_backward_sums(k, e[1], e[0], stats, stats + k.C, threads, wire);
    Py_RETURN_TRUE;
}

// parameter_gradients(wire, grad_weight, grad_bias)
PyObject* parameter_gradients(PyObject*, PyObject* const* args, Py_ssize_t n) {
    dlpack::Tensor t{};
    DType dtype;
    double* wire;
    Values weight, bias;
    if (!expect(n, 3) || !borrow(args[0], "wire", &t, &dtype)) return nullptr;
    const int64_t C = t.ndim == 1 ? t.shape[0] / 2 : 0;
    if (!doubles(args[0], "wire", 2 * C, &wire) || !values(args[1], "grad_weight", C, &weight) ||
        !values(args[2], "grad_bias", C, &bias))
        return nullptr;
    run_narrow(C, wire, bias);
    run_narrow(C, wire + C, weight);
    Py_RETURN_NONE;
}

// backward_input(grad_y, x, grad_x, wire, weight, stats, count_global, threads)
PyObject* backward_input(PyObject*, PyObject* const* args, Py_ssize_t n) {
    PyObject* const tensors[] = {n == 8 ? args[1] : nullptr, n == 8 ? args[0] : nullptr, n == 8 ? args[2] : nullptr};
    const char* const names[] = {"x", "grad_y", "grad_x"};
    Shape k;
    Elements e[3];
    bool fits;
    Global g{};
    double *wire, *stats;
    int64_t threads;
    if (!expect(n, 8) || !arrange(tensors, names, 3, &k, e, &fits)) return nullptr;
    if (!fits) Py_RETURN_FALSE;
    if (!doubles(args[3], "wire", 2 * k.C, &wire) || !values(args[4], "weight", k.C, &g.weight) ||
        !doubles(args[5], "stats", 2 * k.C, &stats) || !number(args[6], &g.count_global) ||
        !integer(args[7], &threads))
        return nullptr;
    g.wire = wire, g.mean = stats, g.invstd = stats + k.C;
    WithoutGil released(k);
    run_backward_input(k, e[1], e[0], e[2], g, threads);
    Py_RETURN_TRUE;
}

template <class Function> PyCFunction method(Function f) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)); }

PyMethodDef METHODS[] = {
    {"learn_torch", method(learn_torch), METH_FASTCALL, "Learns how torch describes tensors."},
    {"instruction_sets", available, METH_NOARGS, "Lists what this machine can run, the fastest first."},
    {"instruction_set", selected, METH_NOARGS, "Names the instruction set in use."},
    {"use_instruction_set", select, METH_O, "Selects another one, for tests and measurements."},
    {"local_moments", method(local_moments), METH_FASTCALL, "Writes the forward wire."},
    {"read_status", read_status, METH_O, "Reads the count and the counters of a forward wire."},
    {"normalize", method(normalize), METH_FASTCALL, "Finalises, moves the running statistics, writes y."},
    {"backward_sums", method(backward_sums), METH_FASTCALL, "Writes the backward wire."},
    {"parameter_gradients", method(parameter_gradients), METH_FASTCALL, "Rounds a backward wire to gradients."},
    {"backward_input", method(backward_input), METH_FASTCALL, "Writes grad_x."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_host", "The compiled host kernels.", -1, METHODS, nullptr, nullptr,
                      nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__host() { return PyModule_Create(&MODULE); }
