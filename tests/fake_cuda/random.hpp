// SPDX-License-Identifier: BSD-3-Clause
// Random numbers: a generator of the device, which draws what one of the CPU draws. A part of device.cpp.
#pragma once

#include <ATen/CPUGeneratorImpl.h>

#include "memory.hpp"

namespace {

struct Random final : c10::GeneratorImpl {
    at::Generator cpu = at::detail::createCPUGenerator();
    Random() : c10::GeneratorImpl(DEVICE, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
    void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
    void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
    uint64_t get_offset() const override { return cpu.get_offset(); }
    uint64_t current_seed() const override { return cpu.current_seed(); }
    uint64_t seed() override { return cpu.seed(); }
    void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
    c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
    Random* clone_impl() const override {
        auto* copy = new Random;
        copy->cpu = cpu.clone();
        return copy;
    }
};

const at::Generator& default_random() {
    static const auto* one = new at::Generator(at::make_generator<Random>());
    return *one;
}

}  // namespace
