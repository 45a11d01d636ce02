// SPDX-License-Identifier: BSD-3-Clause
// The fibres behind cuda.hpp, and the launch that tests call through ctypes.
#include "cuda.hpp"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "kernels.hpp"

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_destroy_fiber(void*) {}
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif
#define UNSEEN __attribute__((no_sanitize("thread"), noinline))  // bookkeeping is no part of what is tested

namespace cuda_on_cpu {
namespace {
constexpr size_t STACK = 128 << 10;
constexpr unsigned UNORDERED = 1;  // a switch by itself orders nothing

struct Fibre {
    ucontext_t context;
    void* stack = nullptr;
    dim3 index;
    void* sanitizer;
    bool done;
};

struct Machine {
    dim3 grid, block, place;
    ucontext_t scheduler;
    void* scheduler_sanitizer;
    Fibre* running;
    const std::function<void()>* kernel;
    std::vector<uint64_t> barriers;  // addresses that stand for an order: one a block,
    uint64_t fence, end;             // one for all fences, one for the end of the launch
};
Machine* machine;

UNSEEN void leave() {
    Fibre* me = machine->running;
    __tsan_switch_to_fiber(machine->scheduler_sanitizer, UNORDERED);
    swapcontext(&me->context, &machine->scheduler);
}

UNSEEN void body() {
    (*machine->kernel)();
    __tsan_release(&machine->end);
    machine->running->done = true;
    leave();
}

UNSEEN void resume(Fibre& fibre) {
    machine->running = &fibre;
    __tsan_switch_to_fiber(fibre.sanitizer, UNORDERED);
    swapcontext(&machine->scheduler, &fibre.context);
}

UNSEEN void prepare(Fibre& fibre) {
#ifdef __SANITIZE_THREAD__
    if (fibre.stack != nullptr) munmap(fibre.stack, STACK);  // memory that the sanitizer takes for new
    fibre.stack = nullptr;
#endif
    if (fibre.stack == nullptr)
        fibre.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = STACK;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, body, 0);
    fibre.sanitizer = __tsan_create_fiber(0);
    fibre.done = false;
}

// Runs the threads of one block; false where some end while others wait.
UNSEEN bool run_block(std::mt19937& random) {
    static std::vector<Fibre> fibres(256);
    const size_t threads = machine->block.x * machine->block.y;
    machine->scheduler_sanitizer = __tsan_get_current_fiber();
    std::vector<size_t> order(threads);
    for (size_t i = 0; i < threads; ++i) {
        prepare(fibres[i]);
        fibres[i].index = dim3{unsigned(i % machine->block.x), unsigned(i / machine->block.x), 0};
        order[i] = i;
    }
    size_t done = 0;
    bool sound = true;
    while (sound && done == 0) {
        std::shuffle(order.begin(), order.end(), random);
        for (size_t i : order) {
            resume(fibres[i]);
            done += fibres[i].done;
        }
        sound = done == 0 || done == threads;
    }
    for (size_t i = 0; i < threads; ++i) __tsan_destroy_fiber(fibres[i].sanitizer);
    return sound;
}
}  // namespace

UNSEEN dim3 thread_index() { return machine->running->index; }
UNSEEN dim3 block_index() { return machine->place; }
UNSEEN dim3 block_size() { return machine->block; }
UNSEEN dim3 grid_size() { return machine->grid; }

UNSEEN void synchronise() {
    uint64_t* barrier = &machine->barriers[machine->place.x];
    __tsan_release(barrier);
    leave();
    __tsan_acquire(barrier);
}

UNSEEN void fence() {
    __tsan_release(&machine->fence);
    __tsan_acquire(&machine->fence);
}
}  // namespace cuda_on_cpu

// 0: done; 1: no kernel of that name; 2: a barrier that not all threads reached; 3: a block or grid that is no GPU's.
extern "C" UNSEEN int launch(const char* name, unsigned grid, unsigned x, unsigned y, const void* arguments,
                             unsigned seed) {
    using namespace cuda_on_cpu;
    const auto found = kernels().find(name);
    if (found == kernels().end()) return 1;
    if (grid == 0 || x * y == 0 || x * y > 256) return 3;
    const std::function<void()> kernel = [&] { found->second(arguments); };
    Machine now{};
    now.grid = dim3{grid, 1, 1};
    now.block = dim3{x, y, 1};
    now.kernel = &kernel;
    now.barriers.resize(grid);
    machine = &now;
    std::mt19937 random(seed);
    std::vector<unsigned> order(grid);
    for (unsigned i = 0; i < grid; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    bool sound = true;
    for (unsigned i : order) {
        now.place = dim3{i, 0, 0};
#ifdef __SANITIZE_THREAD__
        std::thread([&] { sound = run_block(random) && sound; }).join();
#else
        sound = run_block(random) && sound;
#endif
        if (!sound) return 2;
    }
    __tsan_acquire(&now.end);
    return 0;
}
