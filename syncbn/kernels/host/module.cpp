// SPDX-License-Identifier: BSD-3-Clause
// The Python module syncbn.kernels.host._host: arguments in, checks, one step, out. See ops.py and _host.pyi.
//
// Uses Python's stable C interface, so one build works for every Python from 3.11 and every torch. A call costs some tens
// of nanoseconds. A step releases the GIL if it is long enough for that to pay.
#include "run.hpp"
#include "tensors.hpp"

namespace {
using namespace syncbn;

// The wires, see moments.py: [call, count, sums (2C), status] forward, [call, sums (2C)] backward.
constexpr int64_t NUMBERS = 3, CALL = 1 + 2 * NUMBERS, STATUS = 7;
constexpr int64_t wire_length(int64_t C) { return CALL + 1 + 2 * C + STATUS; }
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

// 1 and three integers that identify a call, or four zeros.
bool call_numbers(PyObject* tuple, double* out) {
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != 1 + NUMBERS)
        return PyErr_Format(PyExc_TypeError, "numbers must be a tuple of %d integers", int(1 + NUMBERS)), false;
    for (int64_t i = 0; i <= NUMBERS; ++i)
        if (!number(PyTuple_GetItem(tuple, i), out + i)) return false;
    return true;
}

bool write_call(PyObject* tuple, double* wire) {
    if (!call_numbers(tuple, wire)) return false;
    for (int64_t i = 1; i <= NUMBERS; ++i) wire[NUMBERS + i] = wire[i] * wire[i];
    return true;
}

// Whether all ranks that do not abstain sent the same numbers, see moments.same_call. All sums are exact.
bool same_call(const double* wire, const double* numbers) {
    bool same = true;
    for (int64_t i = 1; i <= NUMBERS; ++i) {
        const double v = numbers[i], sum = wire[i], squares = wire[NUMBERS + i], n = wire[0];
        if (numbers[0] != 0)
            same = same && sum == n * v && squares == n * (v * v);
        else  // n * squares and sum * sum may exceed 2^53: compare high parts and remainders
            same = same && n * squares == sum * sum && __builtin_fma(n, squares, -(n * squares)) == __builtin_fma(sum, sum, -(sum * sum));
    }
    return same;
}

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

// sound(x, weight, bias, running_mean, running_var, num_batches_tracked, C)
PyObject* sound(PyObject*, PyObject* const* args, Py_ssize_t n) {
    int64_t C;
    if (!expect(n, 7) || !integer(args[6], &C)) return nullptr;
    if (syncbn::sound(args, C)) Py_RETURN_TRUE;
    PyErr_Clear();
    Py_RETURN_FALSE;
}

// local_moments(x, wire, numbers, status, threads)
PyObject* local_moments(PyObject*, PyObject* const* args, Py_ssize_t n) {
    const char* const names[] = {"x"};
    Shape k;
    Elements x;
    bool fits;
    double* wire;
    int64_t threads;
    if (!expect(n, 5) || !arrange(args, names, 1, &k, &x, &fits)) return nullptr;
    if (!fits) Py_RETURN_FALSE;
    if (!doubles(args[1], "wire", wire_length(k.C), &wire) || !write_call(args[2], wire) || !integer(args[4], &threads))
        return nullptr;
    if (!PyTuple_Check(args[3]) || PyTuple_Size(args[3]) != STATUS)
        return PyErr_Format(PyExc_TypeError, "status must be a tuple of %d numbers", int(STATUS));
    double *count = wire + CALL, *sums = count + 1, *status = sums + 2 * k.C;
    for (int64_t i = 0; i < STATUS; ++i)
        if (!number(PyTuple_GetItem(args[3], i), status + i)) return nullptr;
    WithoutGil released(k);
    *count = double(k.N * k.S);
    run_local_moments(k, x, threads, sums, sums + k.C);
    Py_RETURN_TRUE;
}

// A wire of either direction, by its least length.
bool borrow_wire(PyObject* object, int64_t least, double** wire, int64_t* length) {
    dlpack::Tensor t{};
    DType dtype;
    if (!borrow(object, "wire", &t, &dtype)) return false;
    if (dtype != DType::float64 || t.ndim != 1 || t.shape[0] < least || t.strides[0] != 1)
        return PyErr_Format(PyExc_ValueError, "wire must be contiguous float64, of %d values or more", int(least)), false;
    *wire = static_cast<double*>(t.data), *length = t.shape[0];
    return true;
}

// read_counters(wire, numbers): (same_call, samples, status)
PyObject* read_counters(PyObject*, PyObject* const* args, Py_ssize_t n) {
    double *wire, numbers[1 + NUMBERS];
    int64_t length;
    if (!expect(n, 2) || !borrow_wire(args[0], wire_length(0), &wire, &length) || !call_numbers(args[1], numbers))
        return nullptr;
    PyObject *tuple = PyTuple_New(3), *counters = PyTuple_New(STATUS);
    if (tuple == nullptr || counters == nullptr) return Py_XDECREF(tuple), Py_XDECREF(counters), nullptr;
    const double* status = wire + length - STATUS;
    for (int64_t i = 0; i < STATUS; ++i) PyTuple_SetItem(counters, i, PyFloat_FromDouble(status[i]));
    PyTuple_SetItem(tuple, 0, PyBool_FromLong(same_call(wire, numbers)));
    PyTuple_SetItem(tuple, 1, PyFloat_FromDouble(wire[CALL]));
    PyTuple_SetItem(tuple, 2, counters);
    return tuple;
}

// agreement(wire, numbers, ranks): -1 if the counters show an error (see Counters.problem in moments.py), else 1 if
// autograd records, plus 2 if a rank needs a gradient
PyObject* agreement(PyObject*, PyObject* const* args, Py_ssize_t n) {
    double *wire, numbers[1 + NUMBERS], ranks;
    int64_t length;
    if (!expect(n, 3) || !borrow_wire(args[0], wire_length(0), &wire, &length) || !call_numbers(args[1], numbers) ||
        !number(args[2], &ranks))
        return nullptr;
    const double *s = wire + length - STATUS, count = wire[CALL];
    const int dtypes = (s[3] > 0) + (s[4] > 0) + (s[5] > 0) + (s[6] > 0);
    const bool problem = !same_call(wire, numbers) || s[0] != 0 || dtypes > 1 || (s[1] > 0 && s[1] < ranks) ||
                         (count > 0 && count <= 1);
    return PyLong_FromLong(problem ? -1 : (s[1] > 0) + 2 * (s[2] > 0));
}

// check_sums(wire, numbers): same_call
PyObject* check_sums(PyObject*, PyObject* const* args, Py_ssize_t n) {
    double *wire, numbers[1 + NUMBERS];
    int64_t length;
    if (!expect(n, 2) || !borrow_wire(args[0], CALL, &wire, &length) || !call_numbers(args[1], numbers)) return nullptr;
    return PyBool_FromLong(same_call(wire, numbers));
}

// Counts the batch and returns the momentum; None averages over all batches counted.
bool read_momentum(PyObject* given, int64_t* tracked, double* momentum) {
    if (given != Py_None && !number(given, momentum)) return false;
    if (tracked != nullptr) ++*tracked;
    if (given == Py_None) *momentum = tracked == nullptr ? 0.0 : 1.0 / (*tracked < 1 ? 1.0 : double(*tracked));
    return true;
}

// normalize(x, y, wire, weight, bias, stats, running_mean, running_var, num_batches_tracked, momentum, eps, threads)
PyObject* normalize(PyObject*, PyObject* const* args, Py_ssize_t n) {
    const char* const names[] = {"x", "y"};
    Shape k;
    Elements e[2];
    bool fits;
    Finalize f{};
    double* wire;
    int64_t *tracked, threads;
    if (!expect(n, 12) || !arrange(args, names, 2, &k, e, &fits)) return nullptr;
    if (!fits) Py_RETURN_FALSE;
    if (!doubles(args[2], "wire", wire_length(k.C), &wire) || !values(args[3], "weight", k.C, &f.weight) ||
        !values(args[4], "bias", k.C, &f.bias) || !doubles(args[5], "stats", 2 * k.C + 1, &f.mean) ||
        !values(args[6], "running_mean", k.C, &f.running.mean) || !values(args[7], "running_var", k.C, &f.running.var) ||
        !counter(args[8], "num_batches_tracked", &tracked) || !number(args[10], &f.eps) ||
        !integer(args[11], &threads))
        return nullptr;
    if ((f.running.mean.data == nullptr) != (f.running.var.data == nullptr))
        return PyErr_Format(PyExc_ValueError, "running_mean and running_var must both be tensors or both be None");
    if (f.running.mean.data != nullptr && !read_momentum(args[9], tracked, &f.running.momentum)) return nullptr;
    f.wire = wire + CALL, f.invstd = f.mean + k.C;
    f.running.count_global = f.mean[2 * k.C] = wire[CALL];
    WithoutGil released(k);
    run_normalize(k, e[0], e[1], k.C, f, threads);
    Py_RETURN_TRUE;
}

// backward_sums(grad_y, x, stats, wire, numbers, threads)
PyObject* backward_sums(PyObject*, PyObject* const* args, Py_ssize_t n) {
    PyObject* const tensors[] = {n == 6 ? args[1] : nullptr, n == 6 ? args[0] : nullptr};
    const char* const names[] = {"x", "grad_y"};
    Shape k;
    Elements e[2];
    bool fits;
    double *stats, *wire;
    int64_t threads;
    if (!expect(n, 6) || !arrange(tensors, names, 2, &k, e, &fits)) return nullptr;
    if (!fits) Py_RETURN_FALSE;
    if (!doubles(args[2], "stats", 2 * k.C + 1, &stats) || !doubles(args[3], "wire", CALL + 2 * k.C, &wire) ||
        !write_call(args[4], wire) || !integer(args[5], &threads))
        return nullptr;
    WithoutGil released(k);
    run_backward_sums(k, e[1], e[0], stats, stats + k.C, threads, wire + CALL);
    Py_RETURN_TRUE;
}

// parameter_gradients(wire, grad_weight, grad_bias)
PyObject* parameter_gradients(PyObject*, PyObject* const* args, Py_ssize_t n) {
    double* wire;
    int64_t length;
    Values weight, bias;
    if (!expect(n, 3) || !borrow_wire(args[0], CALL, &wire, &length)) return nullptr;
    const int64_t C = (length - CALL) / 2;
    if (!values(args[1], "grad_weight", C, &weight) || !values(args[2], "grad_bias", C, &bias)) return nullptr;
    run_narrow(C, wire + CALL, bias);
    run_narrow(C, wire + CALL + C, weight);
    Py_RETURN_NONE;
}

// backward_input(grad_y, x, grad_x, wire, weight, stats, threads)
PyObject* backward_input(PyObject*, PyObject* const* args, Py_ssize_t n) {
    PyObject* const tensors[] = {n == 7 ? args[1] : nullptr, n == 7 ? args[0] : nullptr, n == 7 ? args[2] : nullptr};
    const char* const names[] = {"x", "grad_y", "grad_x"};
    Shape k;
    Elements e[3];
    bool fits;
    Global g{};
    double *wire, *stats;
    int64_t threads;
    if (!expect(n, 7) || !arrange(tensors, names, 3, &k, e, &fits)) return nullptr;
    if (!fits) Py_RETURN_FALSE;
    if (!doubles(args[3], "wire", CALL + 2 * k.C, &wire) || !values(args[4], "weight", k.C, &g.weight) ||
        !doubles(args[5], "stats", 2 * k.C + 1, &stats) || !integer(args[6], &threads))
        return nullptr;
    g.wire = wire + CALL, g.mean = stats, g.invstd = stats + k.C, g.count_global = stats[2 * k.C];
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
    {"sound", method(sound), METH_FASTCALL, "Whether the steps can take the tensors of a call."},
    {"local_moments", method(local_moments), METH_FASTCALL, "Writes the forward wire."},
    {"read_counters", method(read_counters), METH_FASTCALL, "Compares the call of a forward wire; reads its counters."},
    {"agreement", method(agreement), METH_FASTCALL, "Returns a summary of the counters of a forward wire."},
    {"check_sums", method(check_sums), METH_FASTCALL, "Compares the call of a backward wire."},
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
