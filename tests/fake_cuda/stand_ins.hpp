// SPDX-License-Identifier: BSD-3-Clause
// Operators of the device: those of the CPU, on stand-ins for its tensors. A part of device.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "memory.hpp"
#include "random.hpp"

namespace {

// The stand-ins of one call.
class Call {
  public:
    // A CPU tensor with the memory of one of the device.
    at::Tensor stand_in(const at::Tensor& t) {
        for (const auto& [original, cpu] : tensors_)
            if (original.is_same(t)) return cpu;
        auto* impl = t.unsafeGetTensorImpl();
        auto cpu = at::detail::make_tensor<c10::TensorImpl>(
            storage_in(t.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
        describe(impl, cpu.unsafeGetTensorImpl());
        if (impl->is_wrapped_number()) cpu.unsafeGetTensorImpl()->set_wrapped_number(true);
        cpu._set_conj(t.is_conj());
        cpu._set_neg(t.is_neg());
        tensors_.emplace_back(t, cpu);
        return cpu;
    }

    c10::Storage storage_in(const c10::Storage& s) {
        for (const auto& [original, cpu] : storages_)
            if (original.is_alias_of(s)) return cpu;
        auto* keep = new c10::Storage(s);
        const auto drop = [](void* context) { delete static_cast<c10::Storage*>(context); };
        c10::Storage cpu(c10::Storage::use_byte_size_t(), s.nbytes(), c10::DataPtr(s.mutable_data(), keep, drop, c10::kCPU),
                         c10::GetCPUAllocator(), true);
        storages_.emplace_back(s, cpu);
        return cpu;
    }

    // A tensor of the device for what the operator returned: an argument, a view of one, or new.
    at::Tensor back(const at::Tensor& t) {
        for (const auto& [original, cpu] : tensors_)
            if (cpu.is_same(t)) return original;
        if (!t.has_storage()) return t;  // sparse tensors stay on the CPU: this device has none
        auto made = at::detail::make_tensor<c10::TensorImpl>(
            storage_back(t.storage()), c10::DispatchKeySet(c10::DispatchKey::CUDA), t.dtype());
        describe(t.unsafeGetTensorImpl(), made.unsafeGetTensorImpl());
        made._set_conj(t.is_conj());
        made._set_neg(t.is_neg());
        return made;
    }

    // What the operator did to its arguments beside writing to them: resize_, set_ and outputs that grow.
    void settle() {
        for (auto& [original, cpu] : storages_) {
            if (cpu.data() == original.data() && cpu.nbytes() == original.nbytes()) continue;
            auto data = cpu.set_data_ptr(c10::DataPtr());
            void* p = data.get();
            original.set_data_ptr_noswap(own<c10::kCUDA>(p, cpu.nbytes(), new Owner{std::move(data), {}}));
            original.set_nbytes(cpu.nbytes());
        }
        for (const auto& [original, cpu] : tensors_) {
            auto* impl = original.unsafeGetTensorImpl();
            const auto storage = storage_back(cpu.storage());
            if (!storage.is_alias_of(original.storage())) impl->set_storage_keep_dtype(storage);
            describe(cpu.unsafeGetTensorImpl(), impl);
        }
    }

  private:
    static void describe(const c10::TensorImpl* from, c10::TensorImpl* to) {
        to->set_sizes_and_strides(from->sizes(), from->strides(), from->storage_offset());
    }

    c10::Storage storage_back(const c10::Storage& s) {
        for (const auto& [original, cpu] : storages_)
            if (cpu.is_alias_of(s)) return original;
        void* p = s.mutable_data();
        c10::Storage made(c10::Storage::use_byte_size_t(), s.nbytes(),
                          own<c10::kCUDA>(p, s.nbytes(), new Owner{{}, s}), &device_allocator, true);
        storages_.emplace_back(made, s);
        return made;
    }

    std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;
    std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
};

// Whether an operator takes a CPU tensor beside one of the device: a number, as a GPU gets it, or an index.
bool may_mix(const c10::OperatorHandle& op, const c10::Argument& argument, const at::Tensor& t) {
    const auto& name = op.schema().name();
    if (name == "aten::copy_" || name == "aten::_copy_from") return true;
    if (argument.name() == "indices" && name.find("index") != std::string::npos) return true;
    const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    const bool fills = name.find("fill") != std::string::npos || name.find("index_put") != std::string::npos;
    return t.dim() == 0 && !written && (fills || op.hasTag(at::Tag::pointwise));
}

bool holds_tensors(const c10::IValue& value) {  // or lists of them
    if (!value.isList()) return false;
    return value.isTensorList() || value.isOptionalTensorList() ||
           value.toList().elementType()->kind() == c10::TypeKind::ListType;
}

c10::IValue to_cpu(const c10::OperatorHandle& op, const c10::Argument& argument, const c10::IValue& value, Call& call) {
    if (value.isTensor()) {
        const auto& t = value.toTensor();
        if (!t.defined() || t.is_meta()) return value;
        if (t.is_cuda()) return call.stand_in(t);
        TORCH_CHECK(may_mix(op, argument, t), "Expected all tensors to be on the same device, but found at least two "
                    "devices, cuda:0 and ", t.device(), "! (argument ", argument.name(), " of ", op.schema().name(), ")");
        return value;
    }
    if (holds_tensors(value)) {
        auto list = value.toList().copy();
        for (size_t i = 0; i < list.size(); ++i) list.set(i, to_cpu(op, argument, list.get(i), call));
        return list;
    }
    if (value.isStorage()) return call.storage_in(value.toStorage());
    if (value.isDevice()) return c10::Device(c10::kCPU);
    if (argument.name() == "generator") {
        const auto generator = value.isNone() ? default_random() : value.toGenerator();
        TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
        return static_cast<Random*>(generator.unsafeGetGeneratorImpl())->cpu;
    }
    return value;
}

c10::IValue to_device(const c10::IValue& value, Call& call) {
    if (value.isTensor() && value.toTensor().defined()) return call.back(value.toTensor());
    if (!holds_tensors(value)) return value;
    auto list = value.toList().copy();
    for (size_t i = 0; i < list.size(); ++i) list.set(i, to_device(list.get(i), call));
    return list;
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    Call call;
    const size_t first = stack->size() - schema.arguments().size();
    for (size_t i = 0; i < schema.arguments().size(); ++i)
        (*stack)[first + i] = to_cpu(op, schema.arguments()[i], (*stack)[first + i], call);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    call.settle();
    for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
        (*stack)[i] = to_device((*stack)[i], call);
}

}  // namespace
