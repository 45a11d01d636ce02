// SPDX-License-Identifier: BSD-3-Clause
// The Python module syncbn.transports._segment: segment.hpp for shared_memory.py, see there and in _segment.pyi.
//
// Uses Python's stable C interface. A call that has to wait releases the GIL after some microseconds.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>
#include <sys/mman.h>

#include <new>

#include "../kernels/host/dlpack.hpp"
#include "segment.hpp"

namespace {
using namespace syncbn;

constexpr const char* NAME = "syncbn.segment";
constexpr uint64_t LONG_ENOUGH = 1 << 16;  // bytes whose sum takes longer than letting another thread run
constexpr double TICK = 0.1;               // seconds after which a call that waits lets Python look around
enum Answer { ELSEWHERE = 3, EARLIER };    // beside those of Progress

std::atomic<uint32_t> forks{0};  // in this process and those it was forked from

struct Opened {
    Segment segment;
    void* memory;
    std::size_t bytes;
    uint32_t ranks, forks_then;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
};

void unmap(PyObject* capsule) {
    auto* opened = static_cast<Opened*>(PyCapsule_GetPointer(capsule, NAME));
    munmap(opened->memory, opened->bytes);
    delete opened;
}

Opened* opened_of(PyObject* capsule) { return static_cast<Opened*>(PyCapsule_GetPointer(capsule, NAME)); }

bool expect(Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected) return true;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, received %zd", expected, given);
    return false;
}

bool natural(PyObject* object, uint64_t* out) {
    *out = PyLong_AsUnsignedLongLong(object);
    return !PyErr_Occurred();
}

// map(file, rank, ranks, slot): a capsule
PyObject* map(PyObject*, PyObject* const* args, Py_ssize_t n) {
    uint64_t file, rank, ranks, slot;
    if (!expect(n, 4) || !natural(args[0], &file) || !natural(args[1], &rank) || !natural(args[2], &ranks) ||
        !natural(args[3], &slot))
        return nullptr;
    if (rank >= ranks || ranks > UINT32_MAX || slot == 0 || slot % LINE != 0)
        return PyErr_SetString(PyExc_ValueError, "needs rank < ranks, and a slot of whole cache lines"), nullptr;
    const std::size_t bytes = Segment::size(uint32_t(ranks), slot);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, int(file), 0);
    if (memory == MAP_FAILED) return PyErr_SetFromErrno(PyExc_OSError);
    auto* opened = new (std::nothrow) Opened{Segment(memory, uint32_t(rank), uint32_t(ranks), slot), memory, bytes,
                                             uint32_t(ranks), forks.load()};
    PyObject* capsule = opened == nullptr ? PyErr_NoMemory() : PyCapsule_New(opened, NAME, unmap);
    if (capsule == nullptr) munmap(memory, bytes), delete opened;
    return capsule;
}

// size(ranks, slot): bytes
PyObject* size(PyObject*, PyObject* const* args, Py_ssize_t n) {
    uint64_t ranks, slot;
    if (!expect(n, 2) || !natural(args[0], &ranks) || !natural(args[1], &slot)) return nullptr;
    return PyLong_FromSize_t(Segment::size(uint32_t(ranks), slot));
}

PyObject* key(PyObject*, PyObject* capsule) {
    Opened* opened = opened_of(capsule);
    return opened == nullptr ? nullptr : PyLong_FromUnsignedLongLong(opened->segment.key().load());
}

PyObject* set_key(PyObject*, PyObject* const* args, Py_ssize_t n) {
    uint64_t number;
    if (!expect(n, 2) || !natural(args[1], &number)) return nullptr;
    Opened* opened = opened_of(args[0]);
    if (opened == nullptr) return nullptr;
    opened->segment.key().store(number);
    Py_RETURN_NONE;
}

// One thread at a time, and none in a forked process, whose epochs would go on beside those of its parent.
class Turn {
public:
    explicit Turn(Opened* opened) : opened_(opened) {
        if (opened_->forks_then != forks.load())
            refuse("Shared memory serves the process that has joined the group; received a call in a forked one. "
                   "Start processes that train with the spawn method, or by a launcher.");
        else if (opened_->busy.test_and_set(std::memory_order_acquire))
            refuse("A group can be in one call at a time; received one from another thread. Give each thread a group "
                   "of its own, by World.subgroup(world.size).");
        else
            taken_ = true;
    }
    ~Turn() {
        if (taken_) opened_->busy.clear(std::memory_order_release);
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    bool taken() const { return taken_; }

private:
    static void refuse(const char* why) { PyErr_SetString(PyExc_RuntimeError, why); }
    Opened* opened_;
    bool taken_ = false;
};

PyObject* go_on(Segment& segment, bool is_long) {
    Progress progress = is_long ? Progress::waits : segment.advance(0.0, false);
    if (progress == Progress::waits) {
        PyThreadState* state = PyEval_SaveThread();
        progress = segment.advance(TICK);
        PyEval_RestoreThread(state);
    }
    return PyLong_FromLong(long(progress));
}

dlpack::Borrow borrow = nullptr;
PyTypeObject* tensor_class = nullptr;

// learn_torch(capsule, class): how torch describes tensors, see dlpack.hpp
PyObject* learn_torch(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (!expect(n, 2)) return nullptr;
    auto* api = static_cast<dlpack::Exchange*>(PyCapsule_GetPointer(args[0], dlpack::CAPSULE));
    if (api == nullptr) return nullptr;
    while (api != nullptr && api->version.major != dlpack::MAJOR) api = api->older;
    if (api == nullptr || api->borrow == nullptr || !PyType_Check(args[1]))
        return PyErr_SetString(PyExc_RuntimeError, "torch must offer DLPack 1 with borrowed tensors"), nullptr;
    borrow = api->borrow;
    tensor_class = reinterpret_cast<PyTypeObject*>(Py_NewRef(args[1]));
    Py_RETURN_NONE;
}

bool contiguous(const dlpack::Tensor& t) {
    int64_t step = 1;
    for (int d = t.ndim - 1; d >= 0; step *= t.shape[d--])
        if (t.shape[d] != 1 && t.strides[d] != step) return false;
    return true;
}

// Describes a call on a tensor: a copy from a root, or, with root = -1, a sum.
bool describe(PyObject* object, int64_t root, Call* call, void** data, bool* elsewhere) {
    if (borrow == nullptr || !PyObject_TypeCheck(object, tensor_class))
        return PyErr_SetString(PyExc_TypeError, "needs a torch.Tensor, and learn_torch() first"), false;
    dlpack::Tensor t{};
    if (borrow(object, &t) != 0) return false;
    *elsewhere = t.device.type != dlpack::CPU;
    if (*elsewhere) return true;
    call->length = 1;
    for (int d = 0; d < t.ndim; ++d) call->length *= uint64_t(t.shape[d]);
    if (call->length > 0 && (t.data == nullptr || !contiguous(t)))
        return PyErr_SetString(PyExc_ValueError, "needs a contiguous tensor with memory of its own"), false;
    *data = static_cast<char*>(t.data) + t.byte_offset;
    if (root >= 0) {
        call->kind = Kind::copy, call->root = uint32_t(root), call->length *= (t.dtype.bits + 7) / 8 * t.dtype.lanes;
        return true;
    }
    if (t.dtype.code != dlpack::FLOAT || t.dtype.lanes != 1 || (t.dtype.bits != 64 && t.dtype.bits != 32))
        return PyErr_SetString(PyExc_TypeError, "sums are of float64 or float32"), false;
    call->kind = t.dtype.bits == 64 ? Kind::float64_sum : Kind::float32_sum;
    return true;
}

// begin(segment, tensor or None for a barrier, root or -1 for a sum, numbers): progress, ELSEWHERE or EARLIER
PyObject* begin(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (!expect(n, 4)) return nullptr;
    Opened* opened = opened_of(args[0]);
    const int64_t root = PyLong_AsLongLong(args[2]);
    if (opened == nullptr || PyErr_Occurred()) return nullptr;
    if (root < -1 || root >= int64_t(opened->ranks))
        return PyErr_SetString(PyExc_ValueError, "needs the rank of the root in the group, or -1"), nullptr;
    char nothing;  // a barrier has no memory
    void* data = &nothing;
    bool elsewhere = false;
    Call call{0, 0, Kind::barrier, 0, 0, {}};
    if (args[1] != Py_None && !describe(args[1], root, &call, &data, &elsewhere)) return nullptr;
    if (elsewhere) return PyLong_FromLong(ELSEWHERE);
    if (!PyTuple_Check(args[3]) || PyTuple_Size(args[3]) != NUMBERS_OF_CALL)
        return PyErr_SetString(PyExc_TypeError, "numbers must be a tuple of 4 integers"), nullptr;
    for (int i = 0; i < NUMBERS_OF_CALL; ++i) call.numbers[i] = PyFloat_AsDouble(PyTuple_GetItem(args[3], i));
    if (PyErr_Occurred()) return nullptr;
    Turn turn(opened);
    if (!turn.taken()) return nullptr;
    if (opened->segment.in_call()) return PyLong_FromLong(EARLIER);
    opened->segment.begin(call, call.length == 0 ? &nothing : data);
    return go_on(opened->segment, call.length >= LONG_ENOUGH / sizeof(double));
}

// advance(segment): progress
PyObject* advance(PyObject*, PyObject* capsule) {
    Opened* opened = opened_of(capsule);
    if (opened == nullptr) return nullptr;
    Turn turn(opened);
    if (!turn.taken()) return nullptr;
    if (!opened->segment.in_call()) return PyLong_FromLong(long(Progress::done));
    return go_on(opened->segment, true);
}

PyObject* abandon(PyObject*, PyObject* capsule) {
    Opened* opened = opened_of(capsule);
    if (opened == nullptr) return nullptr;
    opened->segment.abandon();
    Py_RETURN_NONE;
}

// missing(segment): ranks that have not come to the current call
PyObject* missing(PyObject*, PyObject* capsule) {
    Opened* opened = opened_of(capsule);
    PyObject* list = opened == nullptr ? nullptr : PyList_New(0);
    if (list == nullptr) return nullptr;
    for (uint32_t r = opened->segment.missing(0); r < opened->ranks; r = opened->segment.missing(r + 1)) {
        PyObject* number = PyLong_FromUnsignedLong(r);
        if (number == nullptr || PyList_Append(list, number) != 0) return Py_XDECREF(number), Py_DECREF(list), nullptr;
        Py_DECREF(number);
    }
    return list;
}

// say_farewell(segment, rank, text)
PyObject* say_farewell(PyObject*, PyObject* const* args, Py_ssize_t n) {
    uint64_t rank;
    Py_ssize_t length;
    if (!expect(n, 3) || !natural(args[1], &rank)) return nullptr;
    Opened* opened = opened_of(args[0]);
    const char* text = opened == nullptr ? nullptr : PyUnicode_AsUTF8AndSize(args[2], &length);
    if (text == nullptr) return nullptr;
    if (rank >= opened->ranks) return PyErr_SetString(PyExc_ValueError, "no such rank"), nullptr;
    Farewell& farewell = opened->segment.farewell(uint32_t(rank));
    const auto fits = std::min(std::size_t(length), sizeof farewell.text);
    std::memcpy(farewell.text, text, fits);
    farewell.length.store(uint32_t(fits), std::memory_order_release);
    Py_RETURN_NONE;
}

// farewell(segment, rank): text, empty if it has not ended
PyObject* farewell(PyObject*, PyObject* const* args, Py_ssize_t n) {
    uint64_t rank;
    if (!expect(n, 2) || !natural(args[1], &rank)) return nullptr;
    Opened* opened = opened_of(args[0]);
    if (opened == nullptr) return nullptr;
    if (rank >= opened->ranks) return PyErr_SetString(PyExc_ValueError, "no such rank"), nullptr;
    const Farewell& said = opened->segment.farewell(uint32_t(rank));
    const auto length = std::min(std::size_t(said.length.load(std::memory_order_acquire)), sizeof said.text);
    return PyUnicode_DecodeUTF8(said.text, Py_ssize_t(length), "ignore");
}

template <class Function> PyCFunction method(Function f) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)); }

PyMethodDef METHODS[] = {
    {"learn_torch", method(learn_torch), METH_FASTCALL, "Learns how torch describes tensors."},
    {"size", method(size), METH_FASTCALL, "Returns the bytes of a segment."},
    {"map", method(map), METH_FASTCALL, "Maps a file that holds a segment."},
    {"key", key, METH_O, "Returns the number by which ranks prove that they see one segment."},
    {"set_key", method(set_key), METH_FASTCALL, "Writes it."},
    {"begin", method(begin), METH_FASTCALL, "Begins a call."},
    {"advance", advance, METH_O, "Goes on with it."},
    {"abandon", abandon, METH_O, "Forgets the memory of the call."},
    {"missing", missing, METH_O, "Lists the ranks that have not come."},
    {"say_farewell", method(say_farewell), METH_FASTCALL, "Says how a rank has ended."},
    {"farewell", method(farewell), METH_FASTCALL, "Returns what it has said."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_segment", "Sums and copies through shared memory.", -1, METHODS, nullptr,
                      nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__segment() {
    pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
    return PyModule_Create(&MODULE);
}
