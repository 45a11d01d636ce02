// SPDX-License-Identifier: BSD-3-Clause
// Sixteen lanes of float (F) or double (D) on any instruction set, used by the step files.
//
// The lanes are 1, 2 or 4 native vectors (D: 2, 4 or 8), but lane i is always element i of a block, and lanes are
// summed in one fixed order: the same bits with AVX-512, AVX2 and plain code. Compile with -ffp-contract=off: a
// multiply and an add fused in one of them and not in another would break that. Internal linkage: see steps.hpp.
#pragma once
#include "storage.hpp"

namespace {
namespace lanes {

// A binary tree of native vectors: members, not an array, so that the compiler keeps all of it in registers.
template <class V, int n> struct Pack { Pack<V, n / 2> lo, hi; };
template <class V> struct Pack<V, 1> { V v; };
typedef Pack<VF, 16 / NF> F;
typedef Pack<VD, 16 / ND> D;

#define SYNCBN_OPERATOR(op)                                                                             \
    template <class V> inline Pack<V, 1> operator op(Pack<V, 1> a, Pack<V, 1> b) { return {a.v op b.v}; } \
    template <class V, int n> inline Pack<V, n> operator op(Pack<V, n> a, Pack<V, n> b) {                 \
        return {a.lo op b.lo, a.hi op b.hi};                                                            \
    }
SYNCBN_OPERATOR(+)
SYNCBN_OPERATOR(-)
SYNCBN_OPERATOR(*)
#undef SYNCBN_OPERATOR

template <class P> struct Of;
template <class V, int n> struct Of<Pack<V, n>> {
    typedef Pack<V, n> P;
    static constexpr int half_way = n / 2 * int(sizeof(V) / sizeof(V{}[0]));
    template <class T> static P load(const T* p) { return {Of<Pack<V, n / 2>>::load(p), Of<Pack<V, n / 2>>::load(p + half_way)}; }
    template <class T> static void store(T* p, P v) {
        Of<Pack<V, n / 2>>::store(p, v.lo);
        Of<Pack<V, n / 2>>::store(p + half_way, v.hi);
    }
    template <class T> static void stream(T* p, P v) {
        Of<Pack<V, n / 2>>::stream(p, v.lo);
        Of<Pack<V, n / 2>>::stream(p + half_way, v.hi);
    }
    static P all(double x) { return {Of<Pack<V, n / 2>>::all(x), Of<Pack<V, n / 2>>::all(x)}; }
};
template <class V> struct Of<Pack<V, 1>> {
    typedef Pack<V, 1> P;
    typedef __typeof__(V{}[0] + V{}[0]) Lane;
    template <class T> static P load(const T* p) { return {load_native(p, V{})}; }
    template <class T> static void store(T* p, P v) { store_native(p, v.v); }
    template <class T> static void stream(T* p, P v) { stream_native(p, v.v); }
    static P all(double x) { return {V{} + Lane(x)}; }
};

// Sixteen elements as lanes of P, which is F or D. Fewer than sixteen: the rest are zeros and are not touched.
template <class P, class T> inline P load(const T* p) { return Of<P>::load(p); }
template <class P, class T> inline P load(const T* p, int64_t n) {
    T block[16];
    fetch(p, n, block);
    return Of<P>::load(block);
}
template <class T, class P> inline void store(T* p, P v) { Of<P>::store(p, v); }
template <class T, class P> inline void store(T* p, P v, int64_t n) {
    T block[16];
    Of<P>::store(block, v);
    put(block, n, p);
}
// Stores sixteen elements past the caches, which keep data that is read again; p is aligned(p).
template <class T, class P> inline void stream(T* p, P v) { Of<P>::stream(p, v); }
template <class T> constexpr int64_t ALIGNMENT = sizeof(T) * 16 < 64 ? sizeof(T) * 16 : 64;
// Elements to the next address that can be streamed to; fewer than 16.
template <class T> inline int64_t to_aligned(const T* p) {
    return (0 - reinterpret_cast<uintptr_t>(p)) % ALIGNMENT<T> / sizeof(T);
}
// Whether every block of every row can be streamed to.
template <class T> inline bool rows_aligned(const syncbn::Elements& e) {
    const uintptr_t size = sizeof(T), all = reinterpret_cast<uintptr_t>(e.data) | e.stride_n * size | e.stride_s * size;
    return all % ALIGNMENT<T> == 0;
}
// After this call, another thread that is notified sees the streamed data.
inline void streams_done() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
inline void add_to(double* sums, D v) { store(sums, load<D>(sums) + v); }
template <class P> inline P all(double x) { return Of<P>::all(x); }

// sum + a * b with an exact product, as of two float32 numbers in float64: the fused instruction then gives the bits of
// the two plain ones. A product of float64 numbers is not exact, and is never fused.
inline VD fused(VD a, VD b, VD sum) {
#if defined(__AVX512F__)
    return (VD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif defined(__AVX2__)
    return (VD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
#else
    return sum + a * b;
#endif
}
inline Pack<VD, 1> fused(Pack<VD, 1> a, Pack<VD, 1> b, Pack<VD, 1> sum) { return {fused(a.v, b.v, sum.v)}; }
template <int n> inline Pack<VD, n> fused(Pack<VD, n> a, Pack<VD, n> b, Pack<VD, n> sum) {
    return {fused(a.lo, b.lo, sum.lo), fused(a.hi, b.hi, sum.hi)};
}
template <class T, class P> inline P add_product(P a, P b, P sum) {
    if constexpr (sizeof(T) < sizeof(double)) return fused(a, b, sum);
    else return sum + a * b;
}

// Calls loop(first lane, a, b, a2, b2) with so few lanes at a time that the four sums stay in registers: two native
// vectors each. Lanes do not mix, so their bits do not depend on it.
template <int n, class Loop>
inline void few_lanes(Pack<VD, n>& a, Pack<VD, n>& b, Pack<VD, n>& a2, Pack<VD, n>& b2, Loop loop, int64_t lane = 0) {
    if constexpr (n > 2) {
        few_lanes(a.lo, b.lo, a2.lo, b2.lo, loop, lane);
        few_lanes(a.hi, b.hi, a2.hi, b2.hi, loop, lane + n / 2 * ND);
    } else {
        loop(lane, a, b, a2, b2);
    }
}
// Elements that few_lanes reads again before the next ones, so few that the reads of both overlap, and how far ahead of
// them a far tensor is fetched.
constexpr int64_t NEAR = 128, AHEAD_BYTES = 1024;

// Lane l with l + 8, then with l + 4, l + 2, l + 1.
typedef double D2 __attribute__((vector_size(16)));
typedef double D4 __attribute__((vector_size(32)));
#if SYNCBN_BYTES < 64
inline double sum_native(D2 v) { return v[0] + v[1]; }
#endif
#if SYNCBN_BYTES == 32
inline double sum_native(D4 v) {
    return sum_native(__builtin_shufflevector(v, v, 0, 1) + __builtin_shufflevector(v, v, 2, 3));
}
#endif
inline Pack<VD, 1> folded(Pack<VD, 1> v) { return v; }
template <int n> inline Pack<VD, 1> folded(Pack<VD, n> v) { return folded(v.lo + v.hi); }

// Adds the sum of the lanes of a to *first and of b to *second.
inline void add_sums(D a, D b, double* first, double* second) {
    const VD u = folded(a).v, v = folded(b).v;
#if SYNCBN_BYTES == 64  // both sums in one vector: half the additions
    const VD half = __builtin_shufflevector(u, v, 0, 1, 2, 3, 8, 9, 10, 11) +
                    __builtin_shufflevector(u, v, 4, 5, 6, 7, 12, 13, 14, 15);
    const D4 quarter = __builtin_shufflevector(half, half, 0, 1, 4, 5) + __builtin_shufflevector(half, half, 2, 3, 6, 7);
    *first += quarter[0] + quarter[1];
    *second += quarter[2] + quarter[3];
#else
    *first += sum_native(u);
    *second += sum_native(v);
#endif
}

// The type of elementwise arithmetic: float, or double for double.
template <class T> struct Compute { typedef F Lanes; typedef float Scalar; };
template <> struct Compute<double> { typedef D Lanes; typedef double Scalar; };

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
template <class T> inline T* at(const syncbn::Elements& e, int64_t n, int64_t c, int64_t s) {
    return reinterpret_cast<T*>(e.data) + (n * e.stride_n + c * e.stride_c + s * e.stride_s);
}
template <int n> struct Blocks { static constexpr int count = n; };

// Row r of N * S. Steps without a division.
struct Row {
    const syncbn::Shape& shape;
    int64_t n, s;
    Row(const syncbn::Shape& k, int64_t r) : shape(k), n(r / k.S), s(r % k.S) {}
    void step() {
        if (++s == shape.S) s = 0, ++n;
    }
};

// Rows are worked through in tiles that stay in the first-level cache, and a tile in columns of blocks of sixteen
// channels, as many as have their numbers in registers. Steps on far tensors fetch the next tile meanwhile. Sums are
// made tile by tile, so the height of a tile depends on the shape alone, and a low tile loses less to rounding.
constexpr int WIDE = SYNCBN_BYTES < 64 ? 1 : 4;

// Calls run(n, s, count) for the rows [r, r + count) of one n after the other.
template <class Run> inline void each_run(Row r, int64_t count, Run run) {
    while (count > 0) {
        const int64_t length = least(count, r.shape.S - r.s);
        run(r.n, r.s, length);
        count -= length, r.s = 0, ++r.n;
    }
}

// The sums of a tile. A tile may be cut into strips of rows: the sums so far then wait in `partial`, so the order of the
// additions is that of the whole tile.
struct TileSums {
    double *first, *second;
    int64_t c_first;
    bool begins, ends;  // whether the strip is the first one or the last one of its tile
    alignas(64) double partial[2][syncbn::BLOCK];
    void start(int64_t c, D& a, D& b) const {
        a = begins ? all<D>(0) : load<D>(partial[0] + c - c_first);
        b = begins ? all<D>(0) : load<D>(partial[1] + c - c_first);
    }
    void finish(int64_t c, D a, D b) {
        if (ends) add_to(first + c, a), add_to(second + c, b);
        else store(partial[0] + c - c_first, a), store(partial[1] + c - c_first, b);
    }
};

// Rows of a strip. Strips of four rows read memory almost in order: up to 1.7 times as fast with AVX2 on far tensors. The
// plain build is slower with them, and AVX-512 has wide columns instead. A low tile of 16 kB is not worth cutting.
inline int64_t strip_rows(int64_t row_bytes, int64_t tile, bool far) {
    return !far || SYNCBN_BYTES != 32 || (tile == 8 && row_bytes <= 2048) ? tile : 4;
}

// row_bytes: of all tensors read. Calls column(Blocks, TileSums, Row, count, c) for every strip and its columns of whole
// blocks, and rest(TileSums, Row, count, c, length) for the fewer than sixteen channels that are left.
template <int wide, class Column, class Rest>
inline void each_tile(int64_t row_bytes, const syncbn::Shape& shape, const syncbn::Part& part, double* sums, Column column,
                      Rest rest) {
    const int64_t tile = row_bytes > 2048 ? 8 : least(32, 16384 / row_bytes);
    const int64_t strip = strip_rows(row_bytes, tile, shape.far);
    TileSums t;
    t.first = sums, t.second = sums + syncbn::padded(shape.C), t.c_first = part.c_first;
    for (int64_t first = part.first; first < part.last; first += tile) {
        const int64_t rows = least(tile, part.last - first);
        for (int64_t done = 0; done < rows; done += strip) {
            const Row r(shape, first + done);
            const int64_t count = least(strip, rows - done);
            t.begins = done == 0, t.ends = done + count == rows;
            int64_t c = part.c_first;
            for (; c + wide * syncbn::LANES <= part.c_last; c += wide * syncbn::LANES) column(Blocks<wide>{}, t, r, count, c);
            for (; c + syncbn::LANES <= part.c_last; c += syncbn::LANES) column(Blocks<1>{}, t, r, count, c);
            if (c < part.c_last) rest(t, r, count, c, part.c_last - c);
        }
    }
}

// A segment of a plane: segments of a plane in order, planes in the order of n, then c. Steps without a division.
struct Segment {
    const syncbn::Shape& shape;
    int64_t index, n, c, s;
    Segment(const syncbn::Shape& k, int64_t i) : shape(k), index(i) {
        const int64_t per_plane = syncbn::segments(k.S), plane = i / per_plane;
        n = plane / k.C, c = plane % k.C, s = i % per_plane * syncbn::SEGMENT;
    }
    int64_t length() const { return least(syncbn::SEGMENT, shape.S - s); }
    void step() {
        ++index;
        if ((s += syncbn::SEGMENT) < shape.S) return;
        s = 0;
        if (++c == shape.C) c = 0, ++n;
    }
};

// The segments of one channel, in order. Steps without a division.
struct Stretch {
    const syncbn::Shape& shape;
    int64_t n, s;
    Stretch(const syncbn::Shape& k, int64_t i)
        : shape(k), n(i / syncbn::segments(k.S)), s(i % syncbn::segments(k.S) * syncbn::SEGMENT) {}
    int64_t length() const { return least(syncbn::SEGMENT, shape.S - s); }
    void step() {
        if ((s += syncbn::SEGMENT) >= shape.S) s = 0, ++n;
    }
};

// Calls channel(Stretch, count, c) over segments [first, last) of channels [c_first, c_last), at most `together` segments
// of a channel at once.
template <class Channel>
inline void each_stretch(const syncbn::Shape& shape, const syncbn::Part& part, int64_t together, Channel channel) {
    for (int64_t i = part.first; i < part.last; i += together) {
        const Stretch j(shape, i);
        const int64_t count = least(together, part.last - i);
        for (int64_t c = part.c_first; c < part.c_last; ++c) channel(j, count, c);
    }
}

template <class T> struct Storage { typedef T Type; };
// Calls f with the storage type.
template <class Call> inline void with_type(syncbn::DType dtype, Call f) {
    switch (dtype) {
        case syncbn::DType::float16: return f(Storage<half>{});
        case syncbn::DType::bfloat16: return f(Storage<bfloat>{});
        case syncbn::DType::float32: return f(Storage<float>{});
        case syncbn::DType::float64: return f(Storage<double>{});
    }
}

// Reads per-channel numbers as float64; absent ones are `otherwise`.
inline void read_values(const syncbn::Values& values, int64_t C, double otherwise, double* out) {
    if (values.data == nullptr) {
        for (int64_t c = 0; c < C; ++c) out[c] = otherwise;
        return;
    }
    with_type(values.dtype, [&](auto storage) {
        auto* p = reinterpret_cast<typename decltype(storage)::Type*>(values.data);
        if (values.stride == 1)
            for (int64_t c = 0; c < C; ++c) out[c] = widen(p[c]);
        else
            for (int64_t c = 0; c < C; ++c) out[c] = widen(p[c * values.stride]);
    });
}

}  // namespace lanes
}  // namespace
