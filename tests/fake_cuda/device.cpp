// SPDX-License-Identifier: BSD-3-Clause
// A CUDA device made of host memory, for a torch without CUDA. Tests load it, see __init__.py.
//
// Tensors of the device are tensors for all of torch: dispatch key, allocator, guard, generator, a thread in autograd. An
// operator runs as that of the CPU, on CPU tensors that share the memory: a stand-in for the time of one call. What a
// GPU refuses is refused here too: an operator that meets tensors of two devices, a generator of another one.
//
// Every block is in a list, so that a launch can tell a pointer into the device from one into the host. There is one
// stream, and nothing is asynchronous: what is missing between two streams is not found here.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/op_registration/adaption.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <map>
#include <mutex>

namespace {
const c10::Device DEVICE(c10::kCUDA, 0);

// ---- Memory: of the device, and pinned memory of the host, which the device reads too.

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

// ---- Random numbers: a generator of this device, which draws what one of the CPU draws.

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

// ---- Operators: those of the CPU, on stand-ins.

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
