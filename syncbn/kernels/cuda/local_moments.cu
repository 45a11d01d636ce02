// SPDX-License-Identifier: BSD-3-Clause
// local_moments: the forward wire of wire.cuh, sum_x = sum over n, s of x; sum_x2 = of x * x; count = N * S.
//
// In: x, planes or rows (walk.cuh), float16, bfloat16, float32 or float64; N and C may be 0; the numbers of the call and
// the status of this rank. Out: wire, float64 (2C + 15,).
// A block owns a group of channels and some of its pieces; a thread every lanes-th piece, one pack at a time.
// Accumulated in float64, where the square of a float32 is exact, or in an arithmetic that loses no more (sum.cuh).
// Order: a thread's pieces in order, then reduce.cuh. Deterministic. Reads each element once: 2, 4 or 8 bytes per
// element. Limits: none.
#include "reduce.cuh"

struct LocalMoments {
    Shape shape;
    const void* x;
    double* wire;
    Numbers numbers;
    double count;
    double status[STATUS];
    Reduction reduction;
};

template <class T, template <class> class Layout, template <class> class Sum>
__global__ void __launch_bounds__(MAX_THREADS, (RESIDENT<Layout<T>, Sum<T>>)) local_moments(const LocalMoments a) {
    typedef Layout<T> Walk;
    const Int C = a.shape.C;
    const Place place(a.shape, blockIdx.x);
    Walk walk(a.shape, place);
    const T* const tensors[] = {static_cast<const T*>(a.x)};
    Sum<T> sums[2][Walk::CHANNELS];
    in_batches<4, From::START>(walk, tensors, a.shape.width, [] {}, [&](auto& batch) {
#pragma unroll
        for (int u = 0; u < batch.PACKS; ++u) {
#pragma unroll
            for (int i = 0; i < Walk::V; ++i) {
                const auto v = Sum<T>::number(batch.packs[0][u].at[i]);
                const int j = i % Walk::CHANNELS;
                sums[0][j].add(v);
                sums[1][j].add_product(v, v);
            }
            batch.next();
        }
    });
    reduce(a.shape, place, walk, a.reduction, sums, [&](Int c, double sum_x, double sum_x2) {
        a.wire[SUMS + c] = sum_x;
        a.wire[SUMS + C + c] = sum_x2;
    });
    if (blockIdx.x == 0 && threadIdx.x == 0 && threadIdx.y == 0) {
        write_call(a.wire, a.numbers);
        a.wire[COUNT] = a.count;
        for (int i = 0; i < STATUS; ++i) a.wire[SUMS + 2 * C + i] = a.status[i];
    }
}
