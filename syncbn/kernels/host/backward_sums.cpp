// SPDX-License-Identifier: BSD-3-Clause
// backward_sums: sum_grad_y = sum over n, s of grad_y;  sum_grad_y_xhat = sum over n, s of grad_y * (x - mean) * invstd.
//
// float64 x: grad_y * (x - mean) is summed. Other x: grad_y * x, an exact product in float64, and mean * sum_grad_y is
// taken off at the end, which loses mean / std * 1e-16, less than the variance did. The caller multiplies by invstd.
// In: grad_y and x, both planes or both rows, of one dtype; mean, float64 (C,). Out: sums, float64 [2, padded(C)],
// zeroed by the caller. All arithmetic in float64.
// Order: as in local_moments.cpp, with four rows together, or one where x is far away.
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

template <int group, class T, class... Length>
inline void add_rows(const T* const (&g)[group], const T* const (&p)[group], const double* mean, int64_t c,
                     double* first, double* second, Length... length) {
    const D m = load<D>(mean + c, length...);
    D a = load<D>(g[0] + c, length...), b = a * centered<T>(load<D>(p[0] + c, length...), m);
    for (int i = 1; i < group; ++i) {
        const D v = load<D>(g[i] + c, length...);
        a = a + v;
        b = add_product<T>(v, centered<T>(load<D>(p[i] + c, length...), m), b);
    }
    store(first + c, load<D>(first + c) + a);
    store(second + c, load<D>(second + c) + b);
}

template <int group, class T>
void some_rows(const Shape& shape, const Elements& grad_y, const Elements& x, const double* mean, const Part& part,
               int64_t r, double* sums) {
    double *first = sums, *second = sums + syncbn::padded(shape.C);
    const T *g[group], *p[group];
    for (int i = 0; i < group; ++i) {
        g[i] = row<T>(grad_y, shape, r + i);
        p[i] = row<T>(x, shape, r + i);
    }
    int64_t c = part.c_first;
    for (; c + LANES <= part.c_last; c += LANES) add_rows<group>(g, p, mean, c, first, second);
    if (c < part.c_last) add_rows<group>(g, p, mean, c, first, second, part.c_last - c);
}

template <class T>
void rows(const Shape& shape, const Elements& grad_y, const Elements& x, const double* mean, const Part& part,
          double* sums) {
    int64_t r = part.first;
    if (!shape.far)
        for (; r + 4 <= part.last; r += 4) some_rows<4, T>(shape, grad_y, x, mean, part, r, sums);
    for (; r < part.last; ++r) some_rows<1, T>(shape, grad_y, x, mean, part, r, sums);
}
}  // namespace

namespace syncbn::SYNCBN_ISA {
void backward_sums(const Shape& shape, const Elements& grad_y, const Elements& x, const double* mean, const Part& part,
                   double* sums) {
    with_type(shape.dtype, [&](auto storage) {
        using T = typename decltype(storage)::Type;
        shape.rows ? rows<T>(shape, grad_y, x, mean, part, sums) : planes<T>(shape, grad_y, x, mean, part, sums);
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
