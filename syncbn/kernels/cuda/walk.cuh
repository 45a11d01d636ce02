// SPDX-License-Identifier: BSD-3-Clause
// Who works on which elements. N batch, C channels, S product of the spatial dims, V elements in a pack of 16 bytes.
//
// Planes: x is (N, C, S), contiguous. A pack lies in one channel. A channel has N * ceil(S / V) pieces; its lanes are
// the threads of one row of the block (x), and a block has one channel for each of its rows (y).
// Rows: x is (N, C), contiguous (channels_last: N stands for N * S, and S is 1). A pack holds V channels. A piece is a
// row; the lanes of a pack are the threads of one column of the block (y), and a block has V channels for each column.
//
// A group of channels is shared out to `blocks` blocks, `per_block` pieces each, in order. Lane l of a block takes
// its pieces l, l + lanes, ...: which elements meet in which order depends on shape and dtype alone.
#pragma once
#include "storage.cuh"

struct Shape {
    Int N, C, S;
    Int groups;     // groups of channels
    Int blocks;     // blocks a group
    Int per_block;  // pieces a block
    Int width;      // bytes an access, see load()
};

// A block's place: groups run fastest, so that neighbouring blocks read neighbouring memory.
struct Place {
    Int group, block;
    __device__ Place(const Shape& k, Int id) : group(id % k.groups), block(id / k.groups) {}
};

template <class T> struct Planes {
    static constexpr int V = Pack<T>::V, CHANNELS = 1;  // of a pack
    Int c;                   // this thread's first channel
    Int offset = 0;          // of its pack, in elements
    int lane, lanes, apart;  // apart: from one lane to the next, in threads of the block
    int steps;               // packs it has
    __device__ Planes(const Shape& k, const Place& place)
        : c(place.group * blockDim.y + threadIdx.y), lane(threadIdx.x), lanes(blockDim.x), apart(1), S(int(k.S)),
          tiles((S + V - 1) / V), there(c < k.C), next_plane(k.C * k.S - Int(tiles) * V) {
        const Int first = place.block * k.per_block + lane, pieces = k.N * tiles;
        const Int end = (place.block + 1) * k.per_block < pieces ? (place.block + 1) * k.per_block : pieces;
        steps = there && first < end ? int((end - first + lanes - 1) / lanes) : 0;
        step_t = steps > 1 ? lanes % tiles : 0;
        stride = steps > 1 ? lanes / tiles * (k.C * k.S) + step_t * V : 0;
        go_to(k, first);
    }
    __device__ static int channels() { return blockDim.y; }  // of a block
    __device__ static int slot() { return threadIdx.y; }     // this thread's first among them
    __device__ int used() const { return there; }            // how many of the pack's channels there are
    __device__ int length() const { return S - t * V < V ? S - t * V : V; }
    __device__ void next() {
        offset += stride;
        t += step_t;
        if (t >= tiles) t -= tiles, offset += next_plane;
    }
    __device__ void back() {
        offset -= stride;
        t -= step_t;
        if (t < 0) t += tiles, offset -= next_plane;
    }
    __device__ void to_last(const Shape& k, const Place& place) {
        go_to(k, place.block * k.per_block + lane + Int(steps - 1) * lanes);
    }

private:
    int S, tiles, there, t = 0, step_t;
    Int next_plane, stride;
    __device__ void go_to(const Shape& k, Int piece) {
        if (steps == 0) return;
        t = int(piece % tiles);
        offset = (piece / tiles * k.C + c) * k.S + t * V;
    }
};

template <class T> struct Rows {
    static constexpr int V = Pack<T>::V, CHANNELS = V;
    Int c, offset;
    int lane, lanes, apart, steps;
    __device__ Rows(const Shape& k, const Place& place)
        : c((place.group * blockDim.x + threadIdx.x) * V), lane(threadIdx.y), lanes(blockDim.y), apart(blockDim.x),
          there(c >= k.C ? 0 : k.C - c < V ? int(k.C - c) : V), stride(lanes * k.C) {
        const Int first = place.block * k.per_block + lane;
        const Int end = (place.block + 1) * k.per_block < k.N ? (place.block + 1) * k.per_block : k.N;
        steps = there > 0 && first < end ? int((end - first + lanes - 1) / lanes) : 0;
        offset = first * k.C + c;
    }
    __device__ static int channels() { return blockDim.x * V; }
    __device__ static int slot() { return threadIdx.x * V; }
    __device__ int used() const { return there; }
    __device__ int length() const { return there; }
    __device__ void next() { offset += stride; }
    __device__ void back() { offset -= stride; }
    __device__ void to_last(const Shape&, const Place&) { offset += (steps - 1) * stride; }

private:
    int there;
    Int stride;
};
