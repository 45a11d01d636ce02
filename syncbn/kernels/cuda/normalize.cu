// SPDX-License-Identifier: BSD-3-Clause
// normalize: y = (x - mean) * (invstd * weight) + bias, and the numbers per channel that this needs.
//
// mean = sum_x / count;  var = sum_x2 / count - mean * mean, not below 0;  invstd = 1 / sqrt(var + eps).
// running = (1 - momentum) * running + momentum * batch, with the unbiased variance var * count / (count - 1).
// A global batch without samples is counted in num_batches_tracked, as in torch, and moves no statistic.
// In: x, planes or rows; wire, the forward wire of wire.cuh, float64 (2C + 15,), summed over the ranks; weight, bias,
// running mean and var of any floating dtype and stride. Out: y, of x's dtype; mean, invstd, float64 (C,);
// count, float64 (1,); and the running statistics, in place.
// The first `stats_blocks` blocks, the stats blocks, own the numbers per channel and write them. Block 0 owns
// num_batches_tracked; if momentum depends on it, block 0 is the only stats block. Every other block owns a group of channels
// and some of its pieces. It computes the coefficients of its channels itself, in float64, rounded once.
// The blocks read x from the end, which local_moments has left in the second-level cache.
// If ranks sent another call (wire.cuh), or the counters of the wire show an error (Counters.problem in moments.py), y, mean
// and invstd are NaN, no running statistic moves, no batch is counted, and block 0 writes a deferred error for the host. The
// next call of any layer raises it.
// No reduction. Reads and writes each element once: 4, 8 or 16 bytes per element. Limits: none.
#include "walk.cuh"
#include "wire.cuh"

struct Normalize {
    Shape shape;
    const void* x;
    void* y;
    const double* wire;
    Values weight, bias;
    double *mean, *invstd, *count;
    Values running_mean, running_var;
    void* num_batches_tracked;  // int64, or float64 where num_batches_tracked has another dtype
    Int counts_in_float64;
    Int stats_blocks;
    double momentum;  // negative: averages over all batches counted
    double eps;
    Numbers numbers;
    double ranks;
    DeferredError error;
};

// The call and counters of the wire; the same for every block.
struct Counters {
    double count;
    const double* status;
    bool same, refused;
    __device__ Counters(const Normalize& a)
        : count(a.wire[COUNT]), status(a.wire + SUMS + 2 * a.shape.C), same(same_call(a.wire, a.numbers)) {
        const int dtypes = (status[3] > 0) + (status[4] > 0) + (status[5] > 0) + (status[6] > 0);
        // No ||: all counters are read at once.
        refused = !same | (status[0] > 0) | (dtypes > 1) | ((status[1] > 0) & (status[1] < a.ranks)) |
                  ((count > 0) & (count <= 1));  // a sum of weights, if another rank has a mask
    }
};

// The sums of a channel. Both are read before anything is computed.
struct Sums {
    double x, x2;
    __device__ Sums(const Normalize& a, Int c) : x(a.wire[SUMS + c]), x2(a.wire[SUMS + a.shape.C + c]) {}
};

struct Finalized {
    double mean, var, invstd;
    __device__ Finalized(const Sums& sums, const Counters& counters, double eps) {
        const double count = counters.count < 1 ? 1 : counters.count;
        mean = sums.x / count;
        var = sums.x2 / count - mean * mean;
        if (var < 0) var = 0;  // NaN stays NaN
        invstd = 1 / sqrt(var + eps);
        if (counters.refused) mean = invstd = nan("");
    }
};

// The work of the stats blocks.
__device__ inline void finalize(const Normalize& a, const Counters& counters) {
    const int threads = blockDim.x * blockDim.y, me = threadIdx.y * blockDim.x + threadIdx.x;
    const bool moves = a.running_mean.data != nullptr && counters.count > 0 && !counters.refused;
    const bool counts = blockIdx.x == 0 && a.num_batches_tracked != nullptr;
    Int* const integer = static_cast<Int*>(a.num_batches_tracked);
    double* const real = static_cast<double*>(a.num_batches_tracked);
    double seen = 0;
    if (counts) seen = 1 + (a.counts_in_float64 ? *real : double(*integer));
    double momentum = a.momentum;
    if (momentum < 0) momentum = counts ? 1 / (seen < 1 ? 1 : seen) : 0;
    for (Int c = Int(blockIdx.x) * threads + me; c < a.shape.C; c += a.stats_blocks * threads) {
        const Sums sums(a, c);
        const Value old_mean = fetch(a.running_mean, c), old_var = fetch(a.running_var, c);
        const Finalized f(sums, counters, a.eps);
        a.mean[c] = f.mean;
        a.invstd[c] = f.invstd;
        if (!moves) continue;
        const double unbiased = f.var * (counters.count / (counters.count - 1));
        write(a.running_mean, c, read(a.running_mean, old_mean, 0) * (1 - momentum) + f.mean * momentum);
        write(a.running_var, c, read(a.running_var, old_var, 0) * (1 - momentum) + unbiased * momentum);
    }
    __syncthreads();  // all have read num_batches_tracked
    if (blockIdx.x != 0 || me != 0) return;
    *a.count = counters.count;
    mark(a.error);
    if (counters.refused) return defer(a.error, a.ranks, counters.same, counters.count, counters.status);
    if (!counts) return;
    if (a.counts_in_float64) *real = seen;
    else *integer = Int(seen);
}

template <class T, template <class> class Layout>
__global__ void __launch_bounds__(MAX_THREADS, ELEMENTWISE_RESIDENT) normalize(const Normalize a) {
    typedef Layout<T> Walk;
    typedef typename Compute<T>::Type Number;
    __shared__ Number coefficients[3][MAX_THREADS];
    if (blockIdx.x < a.stats_blocks) return finalize(a, Counters(a));
    const Place place(a.shape, gridDim.x - 1 - blockIdx.x);
    Walk walk(a.shape, place, From::END);
    Number mean[Walk::CHANNELS], scale[Walk::CHANNELS], bias[Walk::CHANNELS];
    const auto prepare = [&] {
        const Counters counters(a);
        const int threads = blockDim.x * blockDim.y, me = threadIdx.y * blockDim.x + threadIdx.x;
        const int first = place.group * Walk::channels();
        for (int i = me; i < Walk::channels() && first + i < a.shape.C; i += threads) {
            const Sums sums(a, first + i);
            const Value weight = fetch(a.weight, first + i), bias = fetch(a.bias, first + i);
            const Finalized f(sums, counters, a.eps);
            round_to(&coefficients[0][i], f.mean);
            round_to(&coefficients[1][i], f.invstd * read(a.weight, weight, 1));
            round_to(&coefficients[2][i], read(a.bias, bias, 0));
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Walk::CHANNELS; ++i) {
            mean[i] = i < walk.used() ? coefficients[0][Walk::slot() + i] : 0;
            scale[i] = i < walk.used() ? coefficients[1][Walk::slot() + i] : 0;
            bias[i] = i < walk.used() ? coefficients[2][Walk::slot() + i] : 0;
        }
    };
    const T* const tensors[] = {static_cast<const T*>(a.x)};
    T* y = static_cast<T*>(a.y);
    in_batches<4, From::END>(walk, tensors, a.shape.width, prepare, [&](auto& batch) {
#pragma unroll
        for (int u = 0; u < batch.PACKS; ++u) {
            Pack<T> result;
#pragma unroll
            for (int i = 0; i < Walk::V; ++i) {
                const int j = i % Walk::CHANNELS;
                const Number centered = minus(widen(batch.packs[0][u].at[i]), mean[j]);
                narrow(plus(times(centered, scale[j]), bias[j]), result.at + i);
            }
            batch.write(y, u, result);
        }
    });
}
