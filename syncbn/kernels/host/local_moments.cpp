// SPDX-License-Identifier: BSD-3-Clause
// local_moments: sum_x = sum over n, s of x;  sum_x2 = sum over n, s of x * x.
//
// In: x, planes or rows, float16, bfloat16, float32, float64. Out: sums, float64 [2, padded(C)], zeroed by the caller.
// Accumulated in float64: a square of a float32 is exact there.
// Order: planes: eight segments of a channel, each of at most SEGMENT elements, go one after the other to 32 lanes, as
// many as hide the latency of an addition, which are then summed as a tree; the sums are added in order. Of a far tensor
// each segment has a sum of its own, so that memory is read in order. Rows: those of a tile are added in order, then
// the tiles. A channel's order does not depend on [c_first, c_last), so threads may share out channels freely; the
// caller's chunks fix [first, last).
// Reads each element once: 2, 4 or 8 bytes per element. Limits: none.
#include "vector.hpp"

namespace {
using namespace lanes;
using syncbn::Elements;
using syncbn::LANES;
using syncbn::Part;
using syncbn::Shape;

template <class T, class P> inline void add(P v, P& a, P& b) {
    a = a + v;
    b = add_product<T>(v, v, b);
}

// Adds `count` segments of one channel, the first of them j.
template <bool far, class T>
inline void channel(const Shape& shape, const Elements& x, Stretch j, int64_t count, int64_t c, double* sums) {
    D a = all<D>(0), b = a, a2 = a, b2 = a;
    for (; count > 0; --count, j.step()) {
        const T* p = at<T>(x, j.n, c, j.s);
        const int64_t length = j.length();
        int64_t i = 0;
        while (i + 2 * LANES <= length) {
            const int64_t end = i + least(NEAR, (length - i) / (2 * LANES) * (2 * LANES));
            few_lanes(a, b, a2, b2, [&](int64_t lane, auto& first, auto& second, auto& first2, auto& second2) {
                auto u = first, v = second, u2 = first2, v2 = second2;
                typedef decltype(u) P;
                const T* next = p + i + AHEAD_BYTES / sizeof(T) + (end - i) / LANES * lane;
                for (const T *q = p + i + lane, *last = p + end; q < last; q += 2 * LANES) {
                    if (far) __builtin_prefetch(next), next += 2 * int64_t(sizeof(P) / sizeof(double));
                    add<T>(load<P>(q), u, v);
                    add<T>(load<P>(q + LANES), u2, v2);
                }
                first = u, second = v, first2 = u2, second2 = v2;
            });
            i = end;
        }
        if (i + LANES <= length) {
            add<T>(load<D>(p + i), a, b);
            i += LANES;
        }
        if (i < length) add<T>(load<D>(p + i, length - i), a2, b2);
    }
    add_sums(a + a2, b + b2, sums + c, sums + syncbn::padded(shape.C) + c);
}

template <class T> void planes(const Shape& shape, const Elements& x, const Part& part, double* sums) {
    each_stretch(shape, part, shape.far ? 1 : 8, [&](Stretch j, int64_t count, int64_t c) {
        shape.far ? channel<true, T>(shape, x, j, count, c, sums) : channel<false, T>(shape, x, j, count, c, sums);
    });
}

// Adds rows [r, r + count) to one column of blocks of 16 channels from c on.
template <bool far, int blocks, class T, class... Length>
inline void column(const Elements& x, TileSums& sums, Row r, int64_t count, int64_t c, Length... length) {
    D a[blocks], b[blocks];
    for (int k = 0; k < blocks; ++k) sums.start(c + k * LANES, a[k], b[k]);
    const int64_t ahead = count * x.stride_s;
    each_run(r, count, [&](int64_t n, int64_t s, int64_t run) {
        const T* p = at<T>(x, n, c, s);
        for (; run > 0; --run, p += x.stride_s)
            for (int k = 0; k < blocks; ++k) {
                if (far) __builtin_prefetch(p + k * LANES + ahead);
                add<T>(load<D>(p + k * LANES, length...), a[k], b[k]);
            }
    });
    for (int k = 0; k < blocks; ++k) sums.finish(c + k * LANES, a[k], b[k]);
}

template <bool far, class T> void rows(const Shape& shape, const Elements& x, const Part& part, double* sums) {
    each_tile<(WIDE + 1) / 2>(
        shape.C * sizeof(T), shape, part, sums,
        [&](auto wide, TileSums& t, Row r, int64_t count, int64_t c) { column<far, wide.count, T>(x, t, r, count, c); },
        [&](TileSums& t, Row r, int64_t count, int64_t c, int64_t n) { column<far, 1, T>(x, t, r, count, c, n); });
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
