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
    Int width;      // bytes an access, see in_batches()
};

// A block's place: groups run fastest, so that neighbouring blocks read neighbouring memory.
struct Place {
    int group, block;
    __device__ Place(const Shape& k, unsigned id) : group(id % unsigned(k.groups)), block(id / unsigned(k.groups)) {}
};

// How many blocks of an elementwise kernel a multiprocessor should hold: a fourth would leave too few registers for packs
// that are loaded while the coefficients are formed.
constexpr int ELEMENTWISE_RESIDENT = 3;

// From which end a thread walks through its pieces.
enum class From { START, END };

// How many of `pieces` a lane has: from `first` on, every `lanes`-th. `lanes` is a power of two.
__device__ inline int count_steps(Int first, Int end, int lanes) {
    return first < end ? int((end - first + lanes - 1) >> (31 - __clz(lanes))) : 0;
}

template <class T> struct Planes {
    static constexpr int V = Pack<T>::V, CHANNELS = 1;  // of a pack
    static constexpr int RESIDENT = 4;                  // blocks of sums that a multiprocessor should hold
    Int offset = 0;                                     // of this thread's pack, in elements
    int c;                                              // its first channel
    int lanes;
    int steps;                                          // packs it has
    __device__ Planes(const Shape& k, const Place& place, From from = From::START)
        : c(place.group * blockDim.y + threadIdx.y), lanes(blockDim.x), S(int(k.S)),
          tiles((S + V - 1) / V), there(c < k.C) {
        const Int first = place.block * k.per_block + threadIdx.x, behind = (place.block + 1) * k.per_block;
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
    // To add up lanes in parts, item i of channels() * parts has a channel and a part; so neighbours read neighbouring memory.
    __device__ static int channel(int i, int parts) { return i / parts; }
    __device__ static int part(int i, int parts) { return i % parts; }
    __device__ static int thread(int channel, int lane) { return channel * blockDim.x + lane; }  // of the block
    __device__ int used() const { return there; }            // how many of the pack's channels there are
    // Elements of the pack. All V, if whole packs can be accessed: S is then a multiple of V.
    template <class A> __device__ int length() const {
        return A::COUNT == V || S - t * V > V ? V : S - t * V;
    }
    template <From FROM> __device__ void next() {
        t += FROM == From::START ? step_t : -step_t;
        const bool wraps = FROM == From::START ? t >= tiles : t < 0;
        const Int by = wraps ? wrapping : stride;
        offset += FROM == From::START ? by : -by;
        if (wraps) t += FROM == From::START ? -tiles : tiles;
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
    int c, lanes, steps;
    __device__ Rows(const Shape& k, const Place& place, From from = From::START)
        : c((place.group * blockDim.x + threadIdx.x) * V), lanes(blockDim.y),
          there(c >= k.C ? 0 : k.C - c < V ? int(k.C - c) : V), stride(lanes * k.C) {
        const Int first = place.block * k.per_block + threadIdx.y, behind = (place.block + 1) * k.per_block;
        steps = there > 0 ? count_steps(first, behind < k.N ? behind : k.N, lanes) : 0;
        offset = (from == From::START ? first : first + Int(steps - 1) * lanes) * k.C + c;
    }
    __device__ static int channels() { return blockDim.x * V; }
    __device__ static int slot() { return threadIdx.x * V; }
    __device__ static int channel(int i, int parts) { return i % blockDim.x * V + i / (blockDim.x * parts); }
    __device__ static int part(int i, int parts) { return i / blockDim.x % parts; }
    __device__ static int thread(int channel, int lane) { return lane * blockDim.x + channel / V; }
    __device__ int used() const { return there; }
    template <class A> __device__ int length() const { return A::COUNT == V ? V : there; }
    template <From FROM> __device__ void next() { offset += FROM == From::START ? stride : -stride; }

private:
    int there;
    Int stride;
};

// Packs of some tensors of one shape that a thread has loaded. The walk stays where they begin until each is used.
template <class T, class A, From FROM, class Walk, int TENSORS> struct Batch {
    static constexpr int PACKS = A::PACKS;
    Pack<T> packs[TENSORS][PACKS];  // zeros past the end
    Walk& walk;
    int step = 0;

    __device__ Batch(Walk& walk) : walk(walk) {}
    __device__ int length(const Walk& at, int u) const { return step + u < at.steps ? at.template length<A>() : 0; }
    __device__ void read(const T* const (&tensors)[TENSORS]) {
        Walk ahead = walk;
#pragma unroll
        for (int u = 0; u < PACKS; ++u) {
#pragma unroll
            for (int i = 0; i < TENSORS; ++i) packs[i][u] = load<A>(tensors[i] + ahead.offset, length(ahead, u));
            ahead.template next<FROM>();
        }
    }
    // Store the result for pack u, and go on; u = 0, 1, ..., PACKS - 1.
    __device__ void write(T* to, int u, const Pack<T>& pack) { store<A>(to + walk.offset, pack, length(walk, u)); next(); }
    __device__ void next() { walk.template next<FROM>(); }
};

template <class A, From FROM, class T, int TENSORS, class Walk, class Prepare, class Use>
__device__ inline void each_batch(Walk& walk, const T* const (&tensors)[TENSORS], const Prepare& prepare, const Use& use) {
    Batch<T, A, FROM, Walk, TENSORS> batch(walk);
    if (A::COUNT > 1) batch.read(tensors);
    prepare();
    if (A::COUNT == 1) batch.read(tensors);  // single elements would take too many registers beside prepare()
    while (true) {
        use(batch);
        batch.step += A::PACKS;
        if (batch.step >= walk.steps) return;
        batch.read(tensors);
    }
}

// Reads a thread's packs in batches of PACKS and calls use(Batch) for each. prepare(), which may have a barrier, runs
// once, after the first loads: its own loads and those wait for memory together. The access width is the same for the
// whole launch, so that the loop has no branch. With single elements, which take a register each, a batch has half as many
// packs.
template <int PACKS, From FROM, class T, int TENSORS, class Walk, class Prepare, class Use>
__device__ inline void in_batches(Walk& walk, const T* const (&tensors)[TENSORS], Int width, const Prepare& prepare,
                                  const Use& use) {
    if (width == 16) return each_batch<Access<Pack<T>::V, PACKS>, FROM>(walk, tensors, prepare, use);
    if (width == 8) return each_batch<Access<8 / sizeof(T), PACKS>, FROM>(walk, tensors, prepare, use);
    each_batch<Access<1, PACKS / 2>, FROM>(walk, tensors, prepare, use);
}
