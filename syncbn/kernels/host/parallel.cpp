// SPDX-License-Identifier: BSD-3-Clause
// The pool behind parallel.hpp: workers sleep on a condition variable and take task numbers from a counter.
#include "parallel.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace syncbn {
namespace {

class Pool {
public:
    // False if another caller is using the pool.
    bool run(int64_t helpers, int64_t count, void (*task)(void*, int64_t), void* context) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        grow(helpers);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = task;
            context_ = context;
            count_ = count;
            next_.store(0, std::memory_order_relaxed);
            invited_ = std::min(helpers, workers_);
            busy_ = invited_;
            ++round_;
        }
        wake_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
        return true;
    }

private:
    void grow(int64_t helpers) {
        for (; workers_ < helpers; ++workers_) {
            try {  // detached: the pool lives as long as the process
                std::thread(&Pool::stay, this, workers_, round_).detach();
            } catch (const std::system_error&) {
                return;  // no more threads from the system: fewer do the work
            }
        }
    }

    void stay(int64_t index, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            if (index >= invited_) continue;
            lock.unlock();
            work();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    void work() {
        for (int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) task_(context_, i);
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    std::atomic<int64_t> next_{0};
    void (*task_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
    int64_t count_ = 0, workers_ = 0, invited_ = 0, busy_ = 0;
    uint64_t round_ = 0;
};

std::atomic<Pool*> pool{nullptr};

// A child has no threads of its parent, and its copy of the mutex may be locked: it abandons the old pool.
void forget_pool() { pool.store(nullptr); }

Pool* the_pool() {
    static std::mutex first;
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
    Pool* found = pool.load();
    if (found != nullptr) return found;
    std::unique_lock<std::mutex> lock(first, std::try_to_lock);  // try: a fork may have copied it locked
    if (!lock.owns_lock()) return nullptr;
    if (pool.load() == nullptr) pool.store(new Pool);
    return pool.load();
}

}  // namespace

void parallel(int64_t threads, int64_t count, void (*task)(void*, int64_t), void* context) {
    const int64_t helpers = std::min(threads, count) - 1;
    if (helpers > 0) {
        Pool* shared = the_pool();
        if (shared != nullptr && shared->run(helpers, count, task, context)) return;
    }
    for (int64_t i = 0; i < count; ++i) task(context, i);
}

}  // namespace syncbn
