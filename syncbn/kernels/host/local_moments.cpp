// SPDX-License-Identifier: BSD-3-Clause
// local_moments: sum_x = sum over n, s of x;  sum_x2 = sum over n, s of x * x.
//
// In: x, planes or rows, float16, bfloat16, float32, float64. Out: sums, float64 [2, padded(C)], zeroed by the caller.
// Accumulated in float64: a square of a float32 is exact there.
// Order: planes: a segment of at most SEGMENT elements goes to 32 lanes, as many as hide the latency of an addition,
// which are then summed as a tree; segments are added in order. Rows: added to the channel in order. A channel's order
// does not depend on [c_first, c_last), so threads may share out channels freely; the caller's chunks fix
// [first, last).
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

// Adds rows [r, r + count) to one column of blocks of 16 channels from c on.
template <bool far, int blocks, class T, class... Length>
inline void column(const Elements& x, double* first, double* second, Row r, int64_t count, int64_t c, Length... length) {
    D a[blocks], b[blocks];
    for (int k = 0; k < blocks; ++k) a[k] = load<D>(first + c + k * LANES), b[k] = load<D>(second + c + k * LANES);
    const int64_t ahead = count * x.stride_s;
    for (; count > 0; --count, r.step()) {
        const T* p = at<T>(x, r.n, c, r.s);
        for (int k = 0; k < blocks; ++k, p += LANES) {
            if (far) __builtin_prefetch(p + ahead);
            const D v = load<D>(p, length...);
            a[k] = a[k] + v;
            b[k] = add_product<T>(v, v, b[k]);
        }
    }
    for (int k = 0; k < blocks; ++k) store(first + c + k * LANES, a[k]), store(second + c + k * LANES, b[k]);
}

template <bool far, class T> void rows(const Shape& shape, const Elements& x, const Part& part, double* sums) {
    double *first = sums, *second = sums + syncbn::padded(shape.C);
    each_tile<(WIDE + 1) / 2>(
        shape.C * sizeof(T), shape, part,
        [&](auto wide, Row r, int64_t count, int64_t c) { column<far, wide.count, T>(x, first, second, r, count, c); },
        [&](Row r, int64_t count, int64_t c, int64_t n) { column<far, 1, T>(x, first, second, r, count, c, n); });
}
}  // namespace

namespace syncbn::SYNCBN_ISA {
void local_moments(const Shape& shape, const Elements& x, const Part& part, double* sums) {
    with_type(shape.dtype, [&](auto storage) {
        using T = typename decltype(storage)::Type;
        if (!shape.rows) return planes<T>(shape, x, part, sums);
        shape.far ? rows<true, T>(shape, x, part, sums) : rows<false, T>(shape, x, part, sums);
    });
}
}  // namespace syncbn::SYNCBN_ISA
