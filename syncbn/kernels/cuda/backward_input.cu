// SPDX-License-Identifier: BSD-3-Clause
// backward_input: grad_x = ((x - mean) * -slope + grad_y - offset) * scale, where
//     slope = invstd * sum_grad_y_xhat / count;  offset = sum_grad_y / count;  scale = invstd * weight.
//
// In: grad_y and x, both planes or both rows, of one dtype; wire, the backward wire of wire.cuh, float64 (2C + 7,), summed
// over the ranks; mean, invstd, float64 (C,); count, float64 (1,); weight of any floating dtype. Out: grad_x, of x's dtype.
// If ranks sent sums of another call (wire.cuh), grad_x is NaN and block 0 writes a deferred error for the host. If x is
// empty, one block is still launched, for that comparison.
// A block owns a group of channels and some of its pieces, and forms the coefficients of its channels in float64,
// rounded once to the type of elementwise arithmetic. It reads x from the end, as normalize.cu does, for the same reason.
// No reduction. Reads two elements and writes one: 6, 12 or 24 bytes per element. Limits: none.
#include "walk.cuh"
#include "wire.cuh"

struct BackwardInput {
    Shape shape;
    const void *grad_y, *x;
    void* grad_x;
    const double *wire, *mean, *invstd, *count;
    Values weight;
    Numbers numbers;
    double ranks;
    DeferredError error;
};

template <class T, template <class> class Layout>
__global__ void __launch_bounds__(MAX_THREADS, ELEMENTWISE_RESIDENT) backward_input(const BackwardInput a) {
    typedef Layout<T> Walk;
    typedef typename Compute<T>::Type Number;
    __shared__ Number coefficients[4][MAX_THREADS];
    const Place place(a.shape, gridDim.x - 1 - blockIdx.x);
    Walk walk(a.shape, place, From::END);
    Number k[4][Walk::CHANNELS];
    const auto prepare = [&] {
        const int threads = blockDim.x * blockDim.y, me = threadIdx.y * blockDim.x + threadIdx.x;
        const Int first = place.group * Walk::channels();
        const bool same = same_call(a.wire, a.numbers);
        if (blockIdx.x == 0 && me == 0) {
            mark(a.error);
            if (!same) defer(a.error, a.ranks, same, 0, nullptr);
        }
        const double count = *a.count < 1 ? 1 : *a.count;
        for (int i = me; i < Walk::channels() && first + i < a.shape.C; i += threads) {
            const Int c = first + i;
            const double mean = a.mean[c], invstd = a.invstd[c];
            const double sum = a.wire[CALL + c], sum_xhat = a.wire[CALL + a.shape.C + c];
            const Value weight = fetch(a.weight, c);
            round_to(&coefficients[0][i], mean);
            round_to(&coefficients[1][i], -(invstd * sum_xhat / count));
            round_to(&coefficients[2][i], sum / count);
            round_to(&coefficients[3][i], same ? invstd * read(a.weight, weight, 1) : nan(""));
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4 * Walk::CHANNELS; ++i) {
            const int which = i / Walk::CHANNELS, j = i % Walk::CHANNELS;
            k[which][j] = j < walk.used() ? coefficients[which][Walk::slot() + j] : 0;
        }
    };
    const T* const tensors[] = {static_cast<const T*>(a.grad_y), static_cast<const T*>(a.x)};
    T* grad_x = static_cast<T*>(a.grad_x);
    in_batches<2, From::END>(walk, tensors, a.shape.width, prepare, [&](auto& batch) {
#pragma unroll
        for (int u = 0; u < batch.PACKS; ++u) {
            Pack<T> result;
#pragma unroll
            for (int i = 0; i < Walk::V; ++i) {
                const int j = i % Walk::CHANNELS;
                const Number v = times(minus(widen(batch.packs[1][u].at[i]), k[0][j]), k[1][j]);
                narrow(times(minus(plus(v, widen(batch.packs[0][u].at[i])), k[2][j]), k[3][j]), result.at + i);
            }
            batch.write(grad_x, u, result);
        }
    });
}
