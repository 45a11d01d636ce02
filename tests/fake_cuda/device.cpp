// SPDX-License-Identifier: BSD-3-Clause
// A CUDA device made of host memory, for a torch without CUDA. Tests load it, see __init__.py.
//
// Tensors of the device are tensors for all of torch: dispatch key, allocator, guard, generator, a thread in autograd. An
// operator runs as that of the CPU, on CPU tensors that share the memory: a stand-in for the time of one call. What a
// GPU refuses is refused here too: an operator that meets tensors of two devices, a generator of another one.
//
// Every block is in a list, so that a launch can tell a pointer into the device from one into the host. There is one
// stream, and nothing is asynchronous: what is missing between two streams is not found here.
#include <ATen/EmptyTensor.h>
#include <ATen/core/op_registration/adaption.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include "memory.hpp"
#include "random.hpp"
#include "stand_ins.hpp"

namespace {
// ---- Streams and events: there is one stream, and what was asked for is done.

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::kCUDA; }
    c10::Device exchangeDevice(c10::Device d) const override {
        setDevice(d);
        return DEVICE;
    }
    c10::Device getDevice() const override { return DEVICE; }
    void setDevice(c10::Device d) const override {
        TORCH_CHECK(d.is_cuda() && d.index() <= 0, "CUDA error: invalid device ordinal");
    }
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
    c10::Stream getNewStream(c10::Device d, int) const override { return getStream(d); }
    c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getStream(d); }
    c10::Stream exchangeStream(c10::Stream s) const override { return s; }
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
    void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream&) const override {}
    void synchronizeEvent(void*) const override {}
    void synchronizeDevice(c10::DeviceIndex) const override {}
    void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// ---- What torch asks of CUDA as a whole.

struct Hooks final : at::CUDAHooksInterface {
    void init() const override {}
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasCUDA() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    int getNumGPUs() const override { return 1; }
    c10::DeviceIndex current_device() const override { return 0; }
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
    void setCurrentDevice(c10::DeviceIndex) const override {}
    void deviceSynchronize(c10::DeviceIndex) const override {}
    const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_random(); }
    at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Random>(); }
    c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
    c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
    bool isPinnedPtr(const void* p) const override { return blocks<c10::kCPU>().hold(uintptr_t(p)); }
    c10::Device getDeviceFromPtr(void*) const override { return DEVICE; }
};

// torch has asked, and been given its own answers, while it was imported: they are exchanged where they lie.
[[maybe_unused]] const auto* hooks = [] {
    static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
    return new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
}();

// ---- Operators: those of the CPU, on stand-ins, and those that make tensors.

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    TORCH_CHECK(!device || device->index() <= 0, "CUDA error: invalid device ordinal");
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_allocator,
                                     c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                             &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                             c10::dtype_or_default(dtype));
}
}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
    m.impl("empty.memory_format", &empty);
    m.impl("empty_strided", &empty_strided);
    m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&on_cpu>());  // torch has one for all devices it knows
}
// torch.distributed: a build without CUDA has gloo for CPU tensors only, and these share the memory.
TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
    struct Silence final : c10::WarningHandler {
        void process(const c10::Warning&) override {}
    } silence;
    const c10::WarningUtils::WarningHandlerGuard guard(&silence);  // torch tells that these take the place of its own
    for (const char* name : {"allreduce_", "broadcast_", "allgather_", "_allgather_base_", "allreduce_coalesced_",
                             "reduce_", "gather_", "scatter_", "send", "recv_", "barrier"})
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

// DistributedDataParallel wants a clock for each kind of device.
struct Clock final : c10d::Timer {
    explicit Clock(c10::Device) {}
    std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};
namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, ::Clock);
}

// For Python: whether a kernel may touch an address, and the generator that operators take where none is given.
TORCH_LIBRARY(fake_cuda, m) {
    m.def("reaches(int address) -> bool", [](int64_t address) {
        return blocks<c10::kCUDA>().hold(uintptr_t(address)) || blocks<c10::kCPU>().hold(uintptr_t(address));
    });
    m.def("default_generator() -> Generator?", []() -> std::optional<at::Generator> { return default_random(); });
}
