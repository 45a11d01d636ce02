// SPDX-License-Identifier: BSD-3-Clause
// local_moments: sum_x = sum over n, s of x;  sum_x2 = sum over n, s of x * x.
//
// In: x, planes or rows, float16, bfloat16, float32, float64. Out: sums, float64 [2, padded(C)], zeroed by the caller.
// Accumulated in float64: a square of a float32 is exact there.
// Order: planes: a segment of at most SEGMENT elements goes to 32 lanes, as many as hide the latency of an addition,
// which are then summed as a tree; segments are added in order. Rows: eight rows are summed, then added to the channel (where x is far away, one: fewer streams of
// memory). A channel's order does not depend on [c_first, c_last), so threads may share out channels freely; the
// caller's chunks fix [first, last).
// Reads each element once: 2, 4 or 8 bytes per element. Limits: none.
#include "vector.hpp"

namespace {
using namespace lanes;
using syncbn::Elements;
using syncbn::LANES;
using syncbn::Part;
using syncbn::Shape;

template <class T> void planes(const Shape& shape, const Elements& x, const Part& part, double* sums) {
    const int64_t per_plane = syncbn::segments(shape.S);
    for (int64_t j = part.first; j < part.last; ++j) {
        const int64_t n = j / per_plane, s = j % per_plane * syncbn::SEGMENT;
        const int64_t length = shape.S - s < syncbn::SEGMENT ? shape.S - s : syncbn::SEGMENT;
        for (int64_t c = part.c_first; c < part.c_last; ++c) {
            const T* p = at<T>(x, n, c, s);
            D a[2] = {all<D>(0), all<D>(0)}, b[2] = {all<D>(0), all<D>(0)};
            const auto add = [&](int k, D v) {
                a[k] = a[k] + v;
                b[k] = add_product<T>(v, v, b[k]);
            };
            int64_t i = 0;
            for (; i + 2 * LANES <= length; i += 2 * LANES) {
                add(0, load<D>(p + i));
                add(1, load<D>(p + i + LANES));
            }
            if (i + LANES <= length) {
                add(0, load<D>(p + i));
                i += LANES;
            }
            if (i < length) add(1, load<D>(p + i, length - i));
            add_sums(a[0] + a[1], b[0] + b[1], sums + c, sums + syncbn::padded(shape.C) + c);
        }
    }
}

// Adds `group` rows to 16 channels; the accumulators are read and written once for all of them.
template <int group, class... Length, class T>
inline void add_rows(const T* const (&p)[group], int64_t c, double* first, double* second, Length... length) {
    D a = load<D>(p[0] + c, length...), b = a * a;
    for (int g = 1; g < group; ++g) {
        const D v = load<D>(p[g] + c, length...);
        a = a + v;
        b = add_product<T>(v, v, b);
    }
    store(first + c, load<D>(first + c) + a);
    store(second + c, load<D>(second + c) + b);
}

template <int group, class T>
void some_rows(const Shape& shape, const Elements& x, const Part& part, int64_t r, double* sums) {
    double *first = sums, *second = sums + syncbn::padded(shape.C);
    const T* p[group];
    for (int g = 0; g < group; ++g) p[g] = row<T>(x, shape, r + g);
    int64_t c = part.c_first;
    for (; c + LANES <= part.c_last; c += LANES) add_rows<group>(p, c, first, second);
    if (c < part.c_last) add_rows<group>(p, c, first, second, part.c_last - c);
}

template <class T> void rows(const Shape& shape, const Elements& x, const Part& part, double* sums) {
    int64_t r = part.first;
    if (!shape.far || shape.C < 128)
        for (; r + 8 <= part.last; r += 8) some_rows<8, T>(shape, x, part, r, sums);
    for (; r < part.last; ++r) some_rows<1, T>(shape, x, part, r, sums);
}
}  // namespace

namespace syncbn::SYNCBN_ISA {
void local_moments(const Shape& shape, const Elements& x, const Part& part, double* sums) {
    with_type(shape.dtype, [&](auto storage) {
        using T = typename decltype(storage)::Type;
        shape.rows ? rows<T>(shape, x, part, sums) : planes<T>(shape, x, part, sums);
    });
}
}  // namespace syncbn::SYNCBN_ISA
