// SPDX-License-Identifier: BSD-3-Clause
// backward_input: grad_x = ((x - mean) * -slope + grad_y - offset) * scale, where
//     slope = invstd * sum_grad_y_xhat / count;  offset = sum_grad_y / count;  scale = invstd * weight.
//
// In: grad_y and x, both planes or both rows, of one dtype; wire, float64 [sum_grad_y (C), sum_grad_y_xhat (C)];
// mean, invstd, float64 (C,); weight of any floating dtype and stride. Out: grad_x, of x's dtype.
// Per channel in float64, rounded once to the type of elementwise arithmetic (float32; float64 for float64).
// No reduction: any split of the elements over threads gives the same bits.
// Reads two elements and writes one: 6, 12 or 24 bytes per element. Limits: none.
#include "vector.hpp"

namespace {
using namespace lanes;
using syncbn::Elements;
using syncbn::LANES;
using syncbn::Part;
using syncbn::Shape;

template <class T> struct Coefficients {
    typedef typename Compute<T>::Scalar Scalar;
    Scalar *mean, *slope, *offset, *scale;
    Coefficients(void* memory, int64_t C)
        : mean(static_cast<Scalar*>(memory)), slope(mean + syncbn::padded(C)), offset(slope + syncbn::padded(C)),
          scale(offset + syncbn::padded(C)) {}
};

template <class P> inline P formula(P x, P grad_y, P mean, P slope, P offset, P scale) {
    return ((x - mean) * slope + grad_y - offset) * scale;
}

template <class T>
void planes(const Shape& shape, const Elements& grad_y, const Elements& x, const Elements& grad_x, void* memory,
            const Part& part) {
    typedef typename Compute<T>::Lanes P;
    const Coefficients<T> k(memory, shape.C);
    for (Segment j(shape, part.first); j.index < part.last; j.step()) {
        const T *g = at<T>(grad_y, j.n, j.c, j.s), *in = at<T>(x, j.n, j.c, j.s);
        T* out = at<T>(grad_x, j.n, j.c, j.s);
        const P mean = all<P>(k.mean[j.c]), slope = all<P>(k.slope[j.c]);
        const P offset = all<P>(k.offset[j.c]), scale = all<P>(k.scale[j.c]);
        const auto result = [&](int64_t i, auto... n) {
            return formula(load<P>(in + i, n...), load<P>(g + i, n...), mean, slope, offset, scale);
        };
        const int64_t length = j.length();
        int64_t i = 0;
        if (shape.far) {
            i = least(to_aligned(out), length);
            if (i > 0) store(out, result(0, i), i);
            for (; i + LANES <= length; i += LANES) stream(out + i, result(i));
        }
        for (; i + LANES <= length; i += LANES) store(out + i, result(i));
        if (i < length) store(out + i, result(i, length - i), length - i);
    }
}

// Row by row: memory is read and written in order, and the numbers per channel stay in the first-level cache.
template <bool streamed, class T>
void rows(const Shape& shape, const Elements& grad_y, const Elements& x, const Elements& grad_x, void* memory,
          const Part& part) {
    typedef typename Compute<T>::Lanes P;
    const Coefficients<T> k(memory, shape.C);
    each_run(Row(shape, part.first), part.last - part.first, [&](int64_t n, int64_t s, int64_t count) {
        const T *g = at<T>(grad_y, n, 0, s), *in = at<T>(x, n, 0, s);
        T* out = at<T>(grad_x, n, 0, s);
        for (; count > 0; --count, g += grad_y.stride_s, in += x.stride_s, out += grad_x.stride_s) {
            const auto result = [&](int64_t c, auto... length) {
                return formula(load<P>(in + c, length...), load<P>(g + c, length...), load<P>(k.mean + c),
                               load<P>(k.slope + c), load<P>(k.offset + c), load<P>(k.scale + c));
            };
            int64_t c = 0;
            for (; c + LANES <= shape.C; c += LANES) streamed ? stream(out + c, result(c)) : store(out + c, result(c));
            if (c < shape.C) store(out + c, result(c, shape.C - c), shape.C - c);
        }
    });
}
}  // namespace

namespace syncbn::SYNCBN_ISA {
void backward_coefficients(const Shape& shape, const double* wire, double count_global, const double* mean,
                           const double* invstd, const Values& weight, double* scratch, void* coefficients) {
    const double count = count_global < 1.0 ? 1.0 : count_global;
    read_values(weight, shape.C, 1.0, scratch);
    const auto round = [&](auto k) {
        typedef typename decltype(k)::Scalar Scalar;
        for (int64_t c = 0; c < shape.C; ++c) {
            k.mean[c] = Scalar(mean[c]);
            k.slope[c] = Scalar(-(invstd[c] * wire[shape.C + c] / count));
            k.offset[c] = Scalar(wire[c] / count);
            k.scale[c] = Scalar(invstd[c] * scratch[c]);
        }
    };
    shape.dtype == DType::float64 ? round(Coefficients<double>(coefficients, shape.C))
                                  : round(Coefficients<float>(coefficients, shape.C));
}

void backward_input(const Shape& shape, const Elements& grad_y, const Elements& x, const Elements& grad_x,
                    void* coefficients, const Part& part) {
    with_type(shape.dtype, [&](auto storage) {
        using T = typename decltype(storage)::Type;
        if (!shape.rows) return planes<T>(shape, grad_y, x, grad_x, coefficients, part);
        shape.far && rows_aligned<T>(grad_x) ? rows<true, T>(shape, grad_y, x, grad_x, coefficients, part)
                                             : rows<false, T>(shape, grad_y, x, grad_x, coefficients, part);
    });
    if (shape.far) streams_done();
}
}  // namespace syncbn::SYNCBN_ISA
