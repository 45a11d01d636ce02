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

template <class T> inline D centered(D x, D) { return x; }
template <> inline D centered<double>(D x, D mean) { return x - mean; }

template <class T> inline void add(D grad_y, D x, D mean, D& a, D& b) {
    a = a + grad_y;
    b = add_product<T>(grad_y, centered<T>(x, mean), b);
}

// Adds `count` segments of one channel, the first of them j.
template <class T>
inline void channel(const Shape& shape, const Elements& grad_y, const Elements& x, const double* mean, Stretch j,
                    int64_t count, int64_t c, double* sums) {
    const D m = all<D>(mean[c]);
    D a = all<D>(0), b = a, a2 = a, b2 = a;
    for (; count > 0; --count, j.step()) {
        const T *g = at<T>(grad_y, j.n, c, j.s), *p = at<T>(x, j.n, c, j.s);
        const int64_t length = j.length();
        int64_t i = 0;
        for (; i + 2 * LANES <= length; i += 2 * LANES) {
            add<T>(load<D>(g + i), load<D>(p + i), m, a, b);
            add<T>(load<D>(g + i + LANES), load<D>(p + i + LANES), m, a2, b2);
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
        channel<T>(shape, grad_y, x, mean, j, count, c, sums);
    });
}

// Adds rows [r, r + count) to one column of blocks of 16 channels from c on.
template <bool far, int blocks, class T, class... Length>
inline void column(const Elements& grad_y, const Elements& x, const double* mean, double* first, double* second, Row r,
                   int64_t count, int64_t c, Length... length) {
    D a[blocks], b[blocks], m[blocks];
    for (int k = 0; k < blocks; ++k) {
        a[k] = b[k] = all<D>(0);
        m[k] = load<D>(mean + c + k * LANES, length...);
    }
    const int64_t ahead = count * x.stride_s, ahead_y = count * grad_y.stride_s;
    for (; count > 0; --count, r.step()) {
        const T *g = at<T>(grad_y, r.n, c, r.s), *p = at<T>(x, r.n, c, r.s);
        for (int k = 0; k < blocks; ++k, g += LANES, p += LANES) {
            if (far) __builtin_prefetch(p + ahead), __builtin_prefetch(g + ahead_y);
            const D v = load<D>(g, length...);
            a[k] = a[k] + v;
            b[k] = add_product<T>(v, centered<T>(load<D>(p, length...), m[k]), b[k]);
        }
    }
    for (int k = 0; k < blocks; ++k, c += LANES) add_to(first + c, a[k]), add_to(second + c, b[k]);
}

template <bool far, class T>
void rows(const Shape& shape, const Elements& grad_y, const Elements& x, const double* mean, const Part& part,
          double* sums) {
    double *first = sums, *second = sums + syncbn::padded(shape.C);
    each_tile<WIDE>(
        2 * shape.C * sizeof(T), shape, part,
        [&](auto wide, Row r, int64_t count, int64_t c) {
            column<far, wide.count, T>(grad_y, x, mean, first, second, r, count, c);
        },
        [&](Row r, int64_t count, int64_t c, int64_t length) {
            column<far, 1, T>(grad_y, x, mean, first, second, r, count, c, length);
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
