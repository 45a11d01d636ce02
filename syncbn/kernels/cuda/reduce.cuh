// SPDX-License-Identifier: BSD-3-Clause
// Two float64 sums a channel: over the lanes of a block, then over the blocks of a group, always in the same order.
//
// Over lanes: a binary tree in shared memory. Over blocks: each writes its sums to `partials`, float64
// [blocks, 2, C], and takes a ticket; the block with the last ticket adds them up, lane l those of blocks l, l + lanes,
// ..., and then the lanes as before. The result does not depend on which block is last. That block sets the ticket back to 0
// for the next launch on the stream, or the next replay of a graph. No sum is atomic: deterministic.
#pragma once
#include "sum.cuh"
#include "wire.cuh"

struct Reduction {
    double* partials;   // [blocks, 2, C], unused if a group has one block
    unsigned* tickets;  // [groups], 0 before and after every launch
};

// Adds up the lanes; the sums of lane 0 are then complete. lanes is a power of two.
template <class Walk> __device__ inline void over_lanes(const Walk& walk, double (&sums)[2][Walk::CHANNELS], double* shared) {
    constexpr int threads = MAX_THREADS;  // a constant: one address for all channels
    const int me = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 2 * Walk::CHANNELS; ++i) shared[i * threads + me] = sums[i / Walk::CHANNELS][i % Walk::CHANNELS];
    for (int half = walk.lanes / 2; half > 0; half /= 2) {
        __syncthreads();
        if (walk.lane < half)
#pragma unroll
            for (int i = 0; i < 2 * Walk::CHANNELS; ++i)
                shared[i * threads + me] += shared[i * threads + me + half * walk.apart];
    }
    // Lane 0 reads what it wrote itself.
#pragma unroll
    for (int i = 0; i < 2 * Walk::CHANNELS; ++i) sums[i / Walk::CHANNELS][i % Walk::CHANNELS] = shared[i * threads + me];
}

// Calls finish(c, first, second) once for each channel of the group, in the block that comes last.
template <class Walk, class Sum, class Finish>
__device__ inline void reduce(const Shape& k, const Place& place, const Walk& walk, const Reduction& r,
                              const Sum (&of_thread)[2][Walk::CHANNELS], Finish finish) {
    __shared__ double shared[2 * Walk::CHANNELS * MAX_THREADS];
    __shared__ bool last;
    double sums[2][Walk::CHANNELS];
#pragma unroll
    for (int i = 0; i < Walk::CHANNELS; ++i)
        sums[0][i] = of_thread[0][i].value(), sums[1][i] = of_thread[1][i].value();
    over_lanes(walk, sums, shared);
    const bool leader = walk.lane == 0;
    if (k.blocks > 1) {
        double* mine = r.partials + place.block * 2 * k.C + walk.c;
        if (leader)
#pragma unroll
            for (int i = 0; i < Walk::CHANNELS; ++i)
                if (i < walk.used()) mine[i] = sums[0][i], mine[k.C + i] = sums[1][i];
        __syncthreads();
        if (threadIdx.x == 0 && threadIdx.y == 0) {  // with the barriers, its fences hold for the whole block
            __threadfence();  // the sums are in memory before the ticket
            const unsigned ticket = atomicAdd(r.tickets + place.group, 1u);
            last = ticket == unsigned(k.blocks - 1);
            if (last) r.tickets[place.group] = 0;
            if (last) __threadfence();  // no load after the next barrier is older than the ticket
        }
        __syncthreads();
        if (!last) return;
#pragma unroll
        for (int i = 0; i < Walk::CHANNELS; ++i) sums[0][i] = sums[1][i] = 0;
#pragma unroll(Walk::CHANNELS > 1 ? 1 : 4)
        for (Int b = walk.lane; b < k.blocks; b += walk.lanes) {  // the loads of all channels are issued together
            const double* theirs = r.partials + b * 2 * k.C + walk.c;
#pragma unroll
            for (int i = 0; i < Walk::CHANNELS; ++i)
                if (i < walk.used()) sums[0][i] += theirs[i], sums[1][i] += theirs[k.C + i];
        }
        over_lanes(walk, sums, shared);
    }
    if (leader)
#pragma unroll
        for (int i = 0; i < Walk::CHANNELS; ++i)
            if (i < walk.used()) finish(walk.c + i, sums[0][i], sums[1][i]);
}
