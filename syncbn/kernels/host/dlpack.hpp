// SPDX-License-Identifier: BSD-3-Clause
// Our own declaration of the part of DLPack's C exchange interface that we use. It tells where the data of a tensor object
// is, in tens of nanoseconds and without its framework's headers.
//
// Source: DLPack 1.3, "C Exchange API", dmlc.github.io/dlpack. The layout below is that of major version 1.
#pragma once
#include <stdint.h>

namespace dlpack {

constexpr uint32_t MAJOR = 1;
constexpr int32_t CPU = 1;
constexpr uint8_t INT = 0, FLOAT = 2, BFLOAT = 4;
constexpr const char* CAPSULE = "dlpack_exchange_api";

struct Tensor {
    void* data;
    struct { int32_t type, id; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

// Fills a Tensor that borrows from the object; 0, or -1 with a Python exception set.
typedef int (*Borrow)(void* object, Tensor* out);

struct Exchange {
    struct { uint32_t major, minor; } version;
    Exchange* older;
    void (*allocate)(), (*own)(), (*wrap)();  // not used here
    Borrow borrow;
    void (*current_stream)();
};

}  // namespace dlpack
