// SPDX-License-Identifier: BSD-3-Clause
// The checks and the layout search of tensors.hpp.
#include "tensors.hpp"

#include <algorithm>
#include <memory>

namespace syncbn {
namespace {

constexpr int MAX_DIMS = 32;

dlpack::Borrow borrow_tensor = nullptr;
PyTypeObject* tensor_type = nullptr;

bool borrow_any(PyObject* object, const char* name, dlpack::Tensor* tensor) {
    if (borrow_tensor == nullptr) return PyErr_SetString(PyExc_RuntimeError, "learn() must be called first"), false;
    PyTypeObject* type = Py_TYPE(object);
    if (type != tensor_type && !PyType_IsSubtype(type, tensor_type))
        return PyErr_Format(PyExc_TypeError, "%s must be a torch.Tensor", name), false;
    const bool refused = borrow_tensor(object, tensor) != 0;  // torch's own error is a C++ stack trace
    if (refused) PyErr_Clear();
    if (refused || tensor->device.type != dlpack::CPU || tensor->ndim > MAX_DIMS || tensor->dtype.lanes != 1 ||
        (tensor->ndim > 0 && tensor->strides == nullptr))
        return PyErr_Format(PyExc_ValueError, "%s must be a strided CPU tensor of at most %d dims", name, MAX_DIMS),
               false;
    int64_t numel = 1;
    for (int d = 0; d < tensor->ndim; ++d) numel *= tensor->shape[d];
    if (numel > 0 && tensor->data == nullptr)
        return PyErr_Format(PyExc_ValueError, "%s must have memory of its own", name), false;
    tensor->data = static_cast<char*>(tensor->data) + tensor->byte_offset;
    return true;
}

bool one_value(const dlpack::Tensor& t) {
    return std::all_of(t.shape, t.shape + t.ndim, [](int64_t size) { return size == 1; });
}

// Whether an address is so low that it may be an offset into memory that has been given back: the checks in Python decide.
// The heap of a program at a fixed place begins low, too.
bool low(const dlpack::Tensor& t) {
    static const uintptr_t lowest = std::min(reinterpret_cast<uintptr_t>(&*std::make_unique<char>()) / 2, uintptr_t(1) << 32);
    return t.data != nullptr && reinterpret_cast<uintptr_t>(t.data) < lowest;
}

bool same_shape(const dlpack::Tensor& a, const dlpack::Tensor& b) {
    return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// Merges the spatial dims, in the given order from outer to inner, into one: its stride, or -1.
int64_t merged_stride(const dlpack::Tensor& t, const int* dims, int count) {
    for (int i = 0; i + 1 < count; ++i)
        if (t.strides[dims[i]] != t.strides[dims[i + 1]] * t.shape[dims[i + 1]]) return -1;
    return count > 0 ? t.strides[dims[count - 1]] : 0;
}

template <class Test> bool all(const Elements* elements, int count, Test test) {
    return std::all_of(elements, elements + count, test);
}

// Merges N and S if they are contiguous, and decides between planes and rows. S is at least 1 here.
bool lay_out(Shape* shape, Elements* e, int count) {
    Shape& k = *shape;
    if (k.S == 1) {  // then N takes the place of S, which has no stride
        std::swap(k.N, k.S);
        for (int i = 0; i < count; ++i) e[i].stride_s = e[i].stride_n;
    } else if (all(e, count, [&](const Elements& t) { return k.N == 1 || t.stride_n == k.S * t.stride_s; })) {
        k.S *= k.N;
        k.N = 1;
    }
    const bool planes = k.S == 1 || all(e, count, [](const Elements& t) { return t.stride_s == 1; });
    const bool rows = k.C == 1 || all(e, count, [](const Elements& t) { return t.stride_c == 1; });
    k.rows = rows && (k.S == 1 || !planes);
    return planes || rows;
}

bool float_dtype(const dlpack::Tensor& t, DType* dtype) {
    if (t.dtype.code == dlpack::BFLOAT && t.dtype.bits == 16) return *dtype = DType::bfloat16, true;
    if (t.dtype.code != dlpack::FLOAT) return false;
    switch (t.dtype.bits) {
        case 16: return *dtype = DType::float16, true;
        case 32: return *dtype = DType::float32, true;
        case 64: return *dtype = DType::float64, true;
    }
    return false;
}

}  // namespace

bool learn(PyObject* capsule, PyObject* tensor_class) {
    auto* api = static_cast<dlpack::Exchange*>(PyCapsule_GetPointer(capsule, dlpack::CAPSULE));
    if (api == nullptr) return false;
    while (api != nullptr && api->version.major != dlpack::MAJOR) api = api->older;
    if (api == nullptr || api->borrow == nullptr)
        return PyErr_SetString(PyExc_RuntimeError, "torch must offer DLPack 1 with borrowed tensors"), false;
    if (!PyType_Check(tensor_class)) return PyErr_SetString(PyExc_TypeError, "learn() needs the class Tensor"), false;
    borrow_tensor = api->borrow;
    tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(tensor_class));
    return true;
}

bool borrow(PyObject* object, const char* name, dlpack::Tensor* tensor, DType* dtype) {
    if (!borrow_any(object, name, tensor)) return false;
    if (float_dtype(*tensor, dtype)) return true;
    return PyErr_Format(PyExc_TypeError, "%s must be float16, bfloat16, float32 or float64", name), false;
}

bool arrange(PyObject* const* objects, const char* const* names, int count, Shape* shape, Elements* elements,
             bool* fits) {
    dlpack::Tensor first{};
    int dims[MAX_DIMS], spatial = 0;
    *fits = true;
    for (int i = 0; i < count; ++i) {
        dlpack::Tensor t{};
        DType dtype;
        if (!borrow(objects[i], names[i], &t, &dtype)) return false;
        if (i == 0) {
            if (t.ndim < 2) return PyErr_Format(PyExc_ValueError, "%s must have at least 2 dims", names[0]), false;
            *shape = Shape{t.shape[0], t.shape[1], 1, false, dtype, false};
            for (int d = 2; d < t.ndim; ++d) {
                shape->S *= t.shape[d];
                if (t.shape[d] != 1) dims[spatial++] = d;
            }
            std::sort(dims, dims + spatial, [&](int a, int b) {
                return t.strides[a] != t.strides[b] ? t.strides[a] > t.strides[b] : a < b;
            });
            first = t;
        }
        if (dtype != shape->dtype || !same_shape(first, t))
            return PyErr_Format(PyExc_ValueError, "%s must have the shape and dtype of %s", names[i], names[0]), false;
        const int64_t stride_s = merged_stride(t, dims, spatial);
        if (stride_s < 0) *fits = false;
        elements[i] = Elements{static_cast<char*>(t.data), t.strides[0], t.strides[1], stride_s};
    }
    if (shape->C < 1) return PyErr_Format(PyExc_ValueError, "%s must have at least 1 channel", names[0]), false;
    if (shape->N * shape->S == 0) return *fits = true;  // no element is accessed
    *fits = *fits && lay_out(shape, elements, count);
    return true;
}

bool doubles(PyObject* object, const char* name, int64_t length, double** data) {
    dlpack::Tensor t{};
    DType dtype;
    if (!borrow(object, name, &t, &dtype)) return false;
    if (dtype != DType::float64 || t.ndim != 1 || t.shape[0] != length || (length > 1 && t.strides[0] != 1))
        return PyErr_Format(PyExc_ValueError, "%s must be contiguous float64 (%lld,)", name, (long long)length), false;
    *data = static_cast<double*>(t.data);
    return true;
}

bool values(PyObject* object, const char* name, int64_t C, Values* out) {
    *out = Values{nullptr, 0, DType::float32};
    if (object == Py_None) return true;
    dlpack::Tensor t{};
    if (!borrow(object, name, &t, &out->dtype)) return false;
    if (t.ndim != 1 || t.shape[0] != C)
        return PyErr_Format(PyExc_ValueError, "%s must have shape (%lld,)", name, (long long)C), false;
    out->data = static_cast<char*>(t.data);
    out->stride = t.strides[0];
    return true;
}

bool counter(PyObject* object, const char* name, int64_t** data) {
    *data = nullptr;
    if (object == Py_None) return true;
    dlpack::Tensor t{};
    if (!borrow_any(object, name, &t)) return false;
    if (t.dtype.code != dlpack::INT || t.dtype.bits != 64 || !one_value(t))
        return PyErr_Format(PyExc_ValueError, "%s must be int64 and hold one value", name), false;
    *data = static_cast<int64_t*>(t.data);
    return true;
}

bool sound(PyObject* const* objects, int64_t C) {
    dlpack::Tensor t{};
    DType dtype;
    if (!borrow(objects[0], "x", &t, &dtype) || t.ndim < 2 || C < 1 || t.shape[1] != C || low(t)) return false;
    for (int i = 1; i <= 4; ++i) {
        if (objects[i] == Py_None) continue;
        if (!borrow(objects[i], "a vector", &t, &dtype) || t.ndim != 1 || t.shape[0] != C || low(t)) return false;
    }
    if ((objects[3] == Py_None) != (objects[4] == Py_None)) return false;
    if (objects[5] == Py_None) return true;
    return borrow_any(objects[5], "a counter", &t) && t.dtype.code == dlpack::INT && t.dtype.bits == 64 &&
           one_value(t) && !low(t);
}

}  // namespace syncbn
