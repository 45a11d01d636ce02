// SPDX-License-Identifier: BSD-3-Clause
// Which thread works on which elements. N batch, C channels, S product of the spatial dims, V elements in a pack of 16 bytes.
//
// Planes: x is (N, C, S), contiguous. A pack lies in one channel. A channel has N * ceil(S / V) pieces; its lanes are
// the threads of one row of the block (x), and a block has one channel for each of its rows (y).
// Rows: x is (N, C), contiguous (channels_last: N stands for N * S, and S is 1). A pack holds V channels. A piece is a
// row; the lanes of a pack are the threads of one column of the block (y), and a block has V channels for each column.
//
// A group of channels is divided among `blocks` blocks, `per_block` pieces each, in order. Lane l of a block takes its
// pieces l, l + lanes, .... So the order of all sums depends on shape and dtype alone.
#pragma once
#include "storage.cuh"

struct Shape {
    Int N, C, S;
    Int groups;     // groups of channels
    Int blocks;     // blocks a group
    Int per_block;  // pieces a block
    Int width;      // bytes an access, see with_access()
};

// A block's place: groups run fastest, so that neighbouring blocks read neighbouring memory.
struct Place {
    int group, block;
    __device__ Place(const Shape& k, unsigned id) : group(id % unsigned(k.groups)), block(id / unsigned(k.groups)) {}
};

// From which end a thread walks through its pieces.
enum class From { START, END };

// How many of `pieces` a lane has: from `first` on, every `lanes`-th. `lanes` is a power of two.
__device__ inline int count_steps(Int first, Int end, int lanes) {
    return first < end ? int((end - first + lanes - 1) >> (31 - __clz(lanes))) : 0;
}

template <class T> struct Planes {
    static constexpr int V = Pack<T>::V, CHANNELS = 1;  // of a pack
    static constexpr int RESIDENT = 4;                  // blocks that a multiprocessor should hold
    Int offset = 0;                                     // of this thread's pack, in elements
    int c;                                              // its first channel
    int lane, lanes, apart;                             // apart: from one lane to the next, in threads of the block
    int steps;                                          // packs it has
    __device__ Planes(const Shape& k, const Place& place, From from = From::START)
        : c(place.group * blockDim.y + threadIdx.y), lane(threadIdx.x), lanes(blockDim.x), apart(1), S(int(k.S)),
          tiles((S + V - 1) / V), there(c < k.C) {
        const Int first = place.block * k.per_block + lane, behind = (place.block + 1) * k.per_block;
        const Int pieces = k.N * tiles, end = behind < pieces ? behind : pieces;
        steps = there ? count_steps(first, end, lanes) : 0;
        const unsigned planes = lanes < tiles ? 0 : unsigned(lanes) / unsigned(tiles);  // from a piece to the next
        step_t = lanes - int(planes) * tiles;
        stride = planes * (k.C * k.S) + step_t * V;
        wrapping = stride + k.C * k.S - Int(tiles) * V;
        if (steps > 0) go_to(k, from == From::START ? first : first + Int(steps - 1) * lanes);
    }
    __device__ static int channels() { return blockDim.y; }  // of a block
    __device__ static int slot() { return threadIdx.y; }     // this thread's first among them
    __device__ int used() const { return there; }            // how many of the pack's channels there are
    // Elements of the pack. All V, if whole packs can be accessed: S is then a multiple of V.
    template <class A> __device__ int length() const {
        return A::COUNT == V || S - t * V > V ? V : S - t * V;
    }
    __device__ void next() {
        t += step_t;
        const bool wraps = t >= tiles;
        offset += wraps ? wrapping : stride;
        if (wraps) t -= tiles;
    }
    __device__ void back() {
        t -= step_t;
        const bool wraps = t < 0;
        offset -= wraps ? wrapping : stride;
        if (wraps) t += tiles;
    }

private:
    int S, tiles, there, t = 0, step_t;
    Int stride, wrapping;
    __device__ void go_to(const Shape& k, Int piece) {
        const Int plane = piece / tiles;
        t = int(piece - plane * tiles);
        offset = (plane * k.C + c) * k.S + t * V;
    }
};

template <class T> struct Rows {
    static constexpr int V = Pack<T>::V, CHANNELS = V, RESIDENT = 3;
    Int offset;
    int c, lane, lanes, apart, steps;
    __device__ Rows(const Shape& k, const Place& place, From from = From::START)
        : c((place.group * blockDim.x + threadIdx.x) * V), lane(threadIdx.y), lanes(blockDim.y), apart(blockDim.x),
          there(c >= k.C ? 0 : k.C - c < V ? int(k.C - c) : V), stride(lanes * k.C) {
        const Int first = place.block * k.per_block + lane, behind = (place.block + 1) * k.per_block;
        steps = there > 0 ? count_steps(first, behind < k.N ? behind : k.N, lanes) : 0;
        offset = (from == From::START ? first : first + Int(steps - 1) * lanes) * k.C + c;
    }
    __device__ static int channels() { return blockDim.x * V; }
    __device__ static int slot() { return threadIdx.x * V; }
    __device__ int used() const { return there; }
    template <class A> __device__ int length() const { return A::COUNT == V ? V : there; }
    __device__ void next() { offset += stride; }
    __device__ void back() { offset -= stride; }

private:
    int there;
    Int stride;
};
