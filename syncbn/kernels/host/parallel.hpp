// SPDX-License-Identifier: BSD-3-Clause
// Threads for the steps: a small pool of our own.
//
// Not OpenMP: torch brings its own runtime, and a second one in a process is a known source of hangs.
#pragma once
#include <stdint.h>

namespace syncbn {

// Calls task(context, i) once for each i in [0, count), on at most `threads` threads, and returns when all are done.
// Any thread may take any i. With one thread the pool is never started. A caller that finds the pool busy works alone. A
// forked child starts without a pool.
void parallel(int64_t threads, int64_t count, void (*task)(void*, int64_t), void* context);

template <class Call> void parallel_for(int64_t threads, int64_t count, Call call) {
    parallel(threads, count, [](void* context, int64_t i) { (*static_cast<Call*>(context))(i); }, &call);
}

}  // namespace syncbn
