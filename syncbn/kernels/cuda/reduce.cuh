// SPDX-License-Identifier: BSD-3-Clause
// Two float64 sums a channel: over the lanes of a block, then over the blocks of a group, always in the same order.
//
// Over lanes: every thread leaves its sums in shared memory. Part p of a channel then adds up lanes p, p + parts, ..., and one
// thread the parts: two barriers, however many lanes there are. Over blocks: each writes its sums to `partials`, float64
// [blocks, 2, C], and takes a ticket; in the block with the last ticket, part p adds up those of blocks p, p + parts,
// ..., and one thread the parts. The result does not depend on which block is last. That block sets the ticket back to 0
// for the next launch on the stream, or the next replay of a graph. No sum is atomic: deterministic.
#pragma once
#include "sum.cuh"
#include "wire.cuh"

struct Reduction {
    double* partials;   // [blocks, 2, C], unused if a group has one block
    unsigned* tickets;  // [groups], 0 before and after every launch
};

constexpr int MOST_PARTS = 32;

struct Pair {
    double first = 0, second = 0;
    __device__ void add(const Pair& other) { first += other.first, second += other.second; }
};

// Adds up get(i) for i = first, first + step, ... below end, in four sums that take turns: no addition waits for the last.
template <class Get> __device__ inline Pair add_up(int first, int end, int step, const Get& get) {
    Pair sums[4];
    int i = first;
#pragma unroll 2
    for (; i + 3 * step < end; i += 4 * step)
#pragma unroll
        for (int turn = 0; turn < 4; ++turn) sums[turn].add(get(i + turn * step));
    for (; i < end; i += step) sums[0].add(get(i));
    sums[0].add(sums[1]);
    sums[2].add(sums[3]);
    sums[0].add(sums[2]);
    return sums[0];
}

// The sums of all parts of the channels of a block.
struct Parts {
    double* sums;  // shared, [2, parts, channels]
    int parts, channels;
    __device__ void set(int part, int channel, const Pair& pair) const {
        sums[part * channels + channel] = pair.first;
        sums[(parts + part) * channels + channel] = pair.second;
    }
    __device__ Pair total(int channel) const {
        const double *firsts = sums + channel, *seconds = firsts + parts * channels;
        return add_up(0, parts, 1, [&](int part) { return Pair{firsts[part * channels], seconds[part * channels]}; });
    }
};

// As many parts as wanted, a power of two, but no more than there are threads for, nor than one thread should add up.
__device__ inline int count_parts(int wanted, int threads, int channels) {
    const int most = threads > channels ? threads / channels : 1;
    const int parts = wanted < most ? wanted : most;
    return parts < MOST_PARTS ? parts : MOST_PARTS;
}
__device__ inline int power_of_two(int n) { return n > 1 ? 1 << (32 - __clz(n - 1)) : 1; }  // the smallest >= n

// Calls finish(c, first, second) once for each channel of the group, in the block that comes last.
template <class Walk, class Sum, class Finish>
__device__ inline void reduce(const Shape& k, const Place& place, const Walk& walk, const Reduction& r,
                              const Sum (&of_thread)[2][Walk::CHANNELS], Finish finish) {
    constexpr int CHANNELS = Walk::CHANNELS;
    __shared__ double of_threads[2 * CHANNELS][MAX_THREADS];
    __shared__ double of_parts[2 * MAX_THREADS];
    __shared__ bool last;
    const int threads = blockDim.x * blockDim.y, me = threadIdx.y * blockDim.x + threadIdx.x;
    const int channels = Walk::channels(), first = place.group * channels;
    const int there = k.C - first < channels ? int(k.C - first) : channels;
#pragma unroll
    for (int i = 0; i < 2 * CHANNELS; ++i) of_threads[i][me] = of_thread[i / CHANNELS][i % CHANNELS].value();
    __syncthreads();
    const int root = 1 << ((32 - __clz(walk.lanes)) / 2);  // about the square root of the lanes, a power of two
    Parts parts{of_parts, count_parts(root, threads, channels), channels};
    for (int i = me; i < channels * parts.parts; i += threads) {
        const int part = Walk::part(i, parts.parts), channel = Walk::channel(i, parts.parts);
        parts.set(part, channel, add_up(part, walk.lanes, parts.parts, [&](int lane) {
                      const int thread = Walk::thread(channel, lane), i = channel % CHANNELS;
                      return Pair{of_threads[i][thread], of_threads[CHANNELS + i][thread]};
                  }));
    }
    __syncthreads();
    if (k.blocks > 1) {
        double* mine = r.partials + place.block * 2 * k.C + first;
        for (int c = me; c < there; c += threads) {
            const Pair sums = parts.total(c);
            mine[c] = sums.first, mine[k.C + c] = sums.second;
        }
        __syncthreads();
        if (me == 0) {  // with the barriers, its fences hold for the whole block
            __threadfence();  // the sums are in memory before the ticket
            const unsigned ticket = atomicAdd(r.tickets + place.group, 1u);
            last = ticket == unsigned(k.blocks - 1);
            if (last) r.tickets[place.group] = 0;
            if (last) __threadfence();  // no load after the next barrier is older than the ticket
        }
        __syncthreads();
        if (!last) return;
        parts.parts = count_parts(power_of_two(int(k.blocks)), threads, channels);
        for (int i = me; i < channels * parts.parts; i += threads) {
            const int channel = i % channels, part = i / channels;
            const double* theirs = r.partials + first + channel;
            parts.set(part, channel, add_up(part, channel < there ? int(k.blocks) : 0, parts.parts, [&](int b) {
                          const double* sums = theirs + b * 2 * k.C;
                          return Pair{sums[0], sums[k.C]};
                      }));
        }
        __syncthreads();
    }
    for (int c = me; c < there; c += threads) {
        const Pair sums = parts.total(c);
        finish(first + c, sums.first, sums.second);
    }
}
