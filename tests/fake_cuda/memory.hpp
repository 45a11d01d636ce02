// SPDX-License-Identifier: BSD-3-Clause
// Memory of the device, and pinned memory of the host, which the device reads too. A part of device.cpp.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Device.h>
#include <c10/core/Storage.h>

#include <map>
#include <mutex>

namespace {

const c10::Device DEVICE(c10::kCUDA, 0);

struct Blocks {
    std::mutex mutex;
    std::map<uintptr_t, size_t> sizes;  // first byte, bytes
    void add(void* p, size_t bytes) {
        if (p == nullptr) return;
        const std::lock_guard<std::mutex> lock(mutex);
        sizes[uintptr_t(p)] = bytes;
    }
    void remove(void* p) {
        const std::lock_guard<std::mutex> lock(mutex);
        sizes.erase(uintptr_t(p));
    }
    bool hold(uintptr_t p) {
        const std::lock_guard<std::mutex> lock(mutex);
        const auto next = sizes.upper_bound(p);
        return next != sizes.begin() && p < std::prev(next)->first + std::prev(next)->second;
    }
};

template <c10::DeviceType type> Blocks& blocks() {
    static auto* all = new Blocks;  // never destroyed: tensors outlive the end of main
    return *all;
}

// A block: CPU memory, and what keeps it.
struct Owner {
    c10::DataPtr data;
    c10::Storage storage;
};

template <c10::DeviceType type> c10::DataPtr own(void* p, size_t bytes, Owner* owner) {
    blocks<type>().add(p, bytes);
    const auto release = [](void* context) {
        auto* o = static_cast<Owner*>(context);
        blocks<type>().remove(o->storage ? o->storage.mutable_data() : o->data.get());
        delete o;
    };
    return {p, owner, release, c10::Device(type, type == c10::kCPU ? -1 : 0)};
}

template <c10::DeviceType type> struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        auto data = c10::GetCPUAllocator()->allocate(bytes);
        void* p = data.get();
        return own<type>(p, bytes, new Owner{std::move(data), {}});
    }
    c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Allocator<c10::kCUDA> device_allocator;
Allocator<c10::kCPU> pinned_allocator;
REGISTER_ALLOCATOR(c10::kCUDA, &device_allocator);

}  // namespace
