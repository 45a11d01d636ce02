// SPDX-License-Identifier: BSD-3-Clause
// backward_sums: sum_grad_y = sum over n, s of grad_y;  sum_grad_y_xhat = sum over n, s of grad_y * (x - mean) * invstd.
//
// float64 x: grad_y * (x - mean) is summed. Other x: grad_y * x, an exact product in float64, and mean * sum_grad_y is
// taken off at the end, which loses mean / std * 1e-16, less than the variance did. The caller multiplies by invstd.
// In: grad_y and x, both planes or both rows, of one dtype; mean, float64 (C,). Out: sums, float64 [2, padded(C)],
// zeroed by the caller. All arithmetic in float64.
// Order: as in local_moments.cpp, with a sum for every segment: two tensors are streams enough.
// Reads each element of both once: 4, 8 or 16 bytes per element. Limits: none.
#include "vector.hpp"

namespace {
using namespace lanes;
using syncbn::Elements;
using syncbn::LANES;
using syncbn::Part;
using syncbn::Shape;

template <class T, class P> inline P centered(P x, P mean) {
    if constexpr (sizeof(T) < sizeof(double)) return x;
    else return x - mean;
}

template <class T, class P> inline void add(P grad_y, P x, P mean, P& a, P& b) {
    a = a + grad_y;
    b = add_product<T>(grad_y, centered<T>(x, mean), b);
}

// Adds `count` segments of one channel, the first of them j.
template <bool far, class T>
inline void channel(const Shape& shape, const Elements& grad_y, const Elements& x, const double* mean, Stretch j,
                    int64_t count, int64_t c, double* sums) {
    const D m = all<D>(mean[c]);
    D a = all<D>(0), b = a, a2 = a, b2 = a;
    for (; count > 0; --count, j.step()) {
        const T *g = at<T>(grad_y, j.n, c, j.s), *p = at<T>(x, j.n, c, j.s);
        const int64_t length = j.length();
        int64_t i = 0;
        while (i + 2 * LANES <= length) {
            const int64_t end = i + least(NEAR, (length - i) / (2 * LANES) * (2 * LANES));
            few_lanes(a, b, a2, b2, [&](int64_t lane, auto& first, auto& second, auto& first2, auto& second2) {
                auto u = first, v = second, u2 = first2, v2 = second2;
                typedef decltype(u) P;
                const P few = all<P>(mean[c]);
                int64_t next = i + AHEAD_BYTES / 2 / int64_t(sizeof(T)) + (end - i) / LANES * lane;
                for (int64_t k = i + lane; k < end; k += 2 * LANES) {
                    if (far) {
                        __builtin_prefetch(g + next), __builtin_prefetch(p + next);
                        next += 2 * int64_t(sizeof(P) / sizeof(double));
                    }
                    add<T>(load<P>(g + k), load<P>(p + k), few, u, v);
                    add<T>(load<P>(g + k + LANES), load<P>(p + k + LANES), few, u2, v2);
                }
                first = u, second = v, first2 = u2, second2 = v2;
            });
            i = end;
        }
        if (i + LANES <= length) {
            add<T>(load<D>(g + i), load<D>(p + i), m, a, b);
            i += LANES;
        }
        if (i < length)  // the lanes beyond the end hold grad_y = 0
            add<T>(load<D>(g + i, length - i), load<D>(p + i, length - i), m, a2, b2);
    }
    add_sums(a + a2, b + b2, sums + c, sums + syncbn::padded(shape.C) + c);
}

template <class T>
void planes(const Shape& shape, const Elements& grad_y, const Elements& x, const double* mean, const Part& part,
            double* sums) {
    each_stretch(shape, part, 1, [&](Stretch j, int64_t count, int64_t c) {
        shape.far ? channel<true, T>(shape, grad_y, x, mean, j, count, c, sums)
                  : channel<false, T>(shape, grad_y, x, mean, j, count, c, sums);
    });
}

// Adds rows [r, r + count) to one column of blocks of 16 channels from c on.
template <bool far, int blocks, class T, class... Length>
inline void column(const Elements& grad_y, const Elements& x, const double* mean, TileSums& sums, Row r, int64_t count,
                    int64_t c, Length... length) {
    D a[blocks], b[blocks], m[blocks];
    for (int k = 0; k < blocks; ++k) {
        sums.start(c + k * LANES, a[k], b[k]);
        m[k] = load<D>(mean + c + k * LANES, length...);
    }
    const int64_t ahead = count * x.stride_s, ahead_y = count * grad_y.stride_s;
    each_run(r, count, [&](int64_t n, int64_t s, int64_t run) {
        const T *g = at<T>(grad_y, n, c, s), *p = at<T>(x, n, c, s);
        for (; run > 0; --run, g += grad_y.stride_s, p += x.stride_s)
            for (int k = 0; k < blocks; ++k) {
                if (far) __builtin_prefetch(p + k * LANES + ahead), __builtin_prefetch(g + k * LANES + ahead_y);
                add<T>(load<D>(g + k * LANES, length...), load<D>(p + k * LANES, length...), m[k], a[k], b[k]);
            }
    });
    for (int k = 0; k < blocks; ++k) sums.finish(c + k * LANES, a[k], b[k]);
}

template <bool far, class T>
void rows(const Shape& shape, const Elements& grad_y, const Elements& x, const double* mean, const Part& part,
          double* sums) {
    each_tile<WIDE>(
        2 * shape.C * sizeof(T), shape, part, sums,
        [&](auto wide, TileSums& t, Row r, int64_t count, int64_t c) {
            column<far, wide.count, T>(grad_y, x, mean, t, r, count, c);
        },
        [&](TileSums& t, Row r, int64_t count, int64_t c, int64_t length) {
            column<far, 1, T>(grad_y, x, mean, t, r, count, c, length);
        });
}
}  // namespace

namespace syncbn::SYNCBN_ISA {
void backward_sums(const Shape& shape, const Elements& grad_y, const Elements& x, const double* mean, const Part& part,
                   double* sums) {
    with_type(shape.dtype, [&](auto storage) {
        using T = typename decltype(storage)::Type;
        if (!shape.rows) return planes<T>(shape, grad_y, x, mean, part, sums);
        shape.far ? rows<true, T>(shape, grad_y, x, mean, part, sums) : rows<false, T>(shape, grad_y, x, mean, part, sums);
    });
}

// The local sums are the gradients of bias and weight; these want them in the dtype of the parameter.
void narrow_values(int64_t C, const double* from, const Values& to) {
    with_type(to.dtype, [&](auto storage) {
        using T = typename decltype(storage)::Type;
        T* p = reinterpret_cast<T*>(to.data);
        for (int64_t c = 0; c < C; ++c) narrow(typename Compute<T>::Scalar(from[c]), p + c * to.stride);
    });
}
}  // namespace syncbn::SYNCBN_ISA
