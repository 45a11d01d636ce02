// SPDX-License-Identifier: BSD-3-Clause
// backward_sums: sum_grad_y = sum over n, s of grad_y;  sum_grad_y_xhat = sum over n, s of grad_y * (x - mean) * invstd.
//
// float64 x: grad_y * (x - mean) is summed. Other x: grad_y * x, an exact product in float64, and mean * sum_grad_y is
// taken off at the end, which loses mean / std * 1e-16, less than the variance did. The caller multiplies by invstd.
// In: grad_y and x, both planes or both rows, of one dtype; mean, float64 (C,). Out: sums, float64 [2, padded(C)],
// zeroed by the caller. All arithmetic in float64.
// Order: as in local_moments.cpp.
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

template <class T>
void planes(const Shape& shape, const Elements& grad_y, const Elements& x, const double* mean, const Part& part,
            double* sums) {
    const int64_t per_plane = syncbn::segments(shape.S);
    for (int64_t j = part.first; j < part.last; ++j) {
        const int64_t n = j / per_plane, s = j % per_plane * syncbn::SEGMENT;
        const int64_t length = shape.S - s < syncbn::SEGMENT ? shape.S - s : syncbn::SEGMENT;
        for (int64_t c = part.c_first; c < part.c_last; ++c) {
            const T *g = at<T>(grad_y, n, c, s), *p = at<T>(x, n, c, s);
            const D m = all<D>(mean[c]);
            D a[2] = {all<D>(0), all<D>(0)}, b[2] = {all<D>(0), all<D>(0)};
            const auto add = [&](int k, D v, D w) {
                a[k] = a[k] + v;
                b[k] = add_product<T>(v, centered<T>(w, m), b[k]);
            };
            int64_t i = 0;
            for (; i + 2 * LANES <= length; i += 2 * LANES) {
                add(0, load<D>(g + i), load<D>(p + i));
                add(1, load<D>(g + i + LANES), load<D>(p + i + LANES));
            }
            if (i + LANES <= length) {
                add(0, load<D>(g + i), load<D>(p + i));
                i += LANES;
            }
            if (i < length) add(1, load<D>(g + i, length - i), load<D>(p + i, length - i));  // beyond: grad_y = 0
            add_sums(a[0] + a[1], b[0] + b[1], sums + c, sums + syncbn::padded(shape.C) + c);
        }
    }
}

// Adds rows [r, r + count) to one column of blocks of 16 channels from c on.
template <bool far, int blocks, class T, class... Length>
inline void column(const Elements& grad_y, const Elements& x, const double* mean, double* first, double* second, Row r,
                   int64_t count, int64_t c, Length... length) {
    D a[blocks], b[blocks], m[blocks];
    for (int k = 0; k < blocks; ++k) {
        a[k] = load<D>(first + c + k * LANES), b[k] = load<D>(second + c + k * LANES);
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
    for (int k = 0; k < blocks; ++k) store(first + c + k * LANES, a[k]), store(second + c + k * LANES, b[k]);
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
