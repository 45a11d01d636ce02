// SPDX-License-Identifier: BSD-3-Clause
// backward_sums: the backward wire of wire.cuh, the sums over n, s of grad_y and of grad_y * xhat,
//     xhat = (x - mean) * invstd; and, of this rank alone, grad_bias = sum_grad_y, grad_weight = sum_grad_y_xhat.
//
// float64 x: grad_y * (x - mean) is summed. Other x: grad_y * x, an exact product in float64, and mean * sum_grad_y is
// subtracted at the end, which loses mean / std * 1e-16, less than the variance lost.
// In: grad_y and x, both planes or both rows, of one dtype; mean, invstd, float64 (C,); the numbers of the call. Out:
// wire, float64 (2C + 7,); grad_weight and grad_bias of any floating dtype, or null.
// Ownership and order: as in local_moments.cu. Deterministic. Reads each element of both once: 4, 8 or 16 bytes per
// element. Limits: none.
#include "reduce.cuh"

struct BackwardSums {
    Shape shape;
    const void *grad_y, *x;
    const double *mean, *invstd;
    double* wire;
    Numbers numbers;
    Values grad_weight, grad_bias;
    Reduction reduction;
};

template <class T, template <class> class Layout, template <class> class Sum>
__global__ void __launch_bounds__(MAX_THREADS, (RESIDENT<Layout<T>, Sum<T>>)) backward_sums(const BackwardSums a) {
    typedef Layout<T> Walk;
    typedef typename Sum<T>::Number Number;
    constexpr bool CENTERED = sizeof(T) == sizeof(double);
    const Int C = a.shape.C;
    const Place place(a.shape, blockIdx.x);
    Walk walk(a.shape, place);
    const T* const tensors[] = {static_cast<const T*>(a.grad_y), static_cast<const T*>(a.x)};
    Sum<T> sums[2][Walk::CHANNELS];
    Number mean[Walk::CHANNELS];
    const auto prepare = [&] {
#pragma unroll
        for (int i = 0; i < Walk::CHANNELS; ++i) mean[i] = CENTERED && i < walk.used() ? a.mean[walk.c + i] : 0;
    };
    in_batches<2, From::START>(walk, tensors, a.shape.width, prepare, [&](auto& batch) {
#pragma unroll
        for (int u = 0; u < batch.PACKS; ++u) {
#pragma unroll
            for (int i = 0; i < Walk::V; ++i) {  // past the end grad_y is 0
                const Number g = Sum<T>::number(batch.packs[0][u].at[i]), v = Sum<T>::number(batch.packs[1][u].at[i]);
                const int j = i % Walk::CHANNELS;
                sums[0][j].add(g);
                sums[1][j].add_product(g, CENTERED ? v - mean[j] : v);
            }
            batch.next();
        }
    });
    reduce(a.shape, place, walk, a.reduction, sums, [&](Int c, double sum_grad_y, double sum_product) {
        const double centered = CENTERED ? sum_product : sum_product - a.mean[c] * sum_grad_y;
        const double sum_grad_y_xhat = centered * a.invstd[c];
        a.wire[CALL + c] = sum_grad_y;
        a.wire[CALL + C + c] = sum_grad_y_xhat;
        write(a.grad_bias, c, sum_grad_y);
        write(a.grad_weight, c, sum_grad_y_xhat);
    });
    if (blockIdx.x == 0 && threadIdx.x == 0 && threadIdx.y == 0) write_call(a.wire, a.numbers);
}
