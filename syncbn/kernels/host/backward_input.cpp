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
        const int64_t n = j.n, c = j.c, s = j.s;
        const int64_t length = shape.S - s < syncbn::SEGMENT ? shape.S - s : syncbn::SEGMENT;
        const T *g = at<T>(grad_y, n, c, s), *in = at<T>(x, n, c, s);
        T* out = at<T>(grad_x, n, c, s);
        const P mean = all<P>(k.mean[c]), slope = all<P>(k.slope[c]);
        const P offset = all<P>(k.offset[c]), scale = all<P>(k.scale[c]);
        int64_t i = 0;
        for (; i + syncbn::LANES <= length; i += syncbn::LANES)
            store(out + i, formula(load<P>(in + i), load<P>(g + i), mean, slope, offset, scale));
        if (i == length) continue;
        const P v = load<P>(in + i, length - i), w = load<P>(g + i, length - i);
        store(out + i, formula(v, w, mean, slope, offset, scale), length - i);
    }
}

template <int group, class T>
void some_rows(const Shape& shape, const Elements& grad_y, const Elements& x, const Elements& grad_x, void* memory,
               int64_t r) {
    typedef typename Compute<T>::Lanes P;
    const Coefficients<T> k(memory, shape.C);
    const T *g[group], *in[group];
    T* out[group];
    for (int i = 0; i < group; ++i) {
        g[i] = row<T>(grad_y, shape, r + i);
        in[i] = row<T>(x, shape, r + i);
        out[i] = row<T>(grad_x, shape, r + i);
    }
    for (int64_t c = 0; c < shape.C; c += syncbn::LANES) {  // the coefficients are padded
        const P mean = load<P>(k.mean + c), slope = load<P>(k.slope + c);
        const P offset = load<P>(k.offset + c), scale = load<P>(k.scale + c);
        const int64_t length = shape.C - c;
        for (int i = 0; i < group; ++i) {
            if (length < syncbn::LANES) {
                const P v = load<P>(in[i] + c, length), w = load<P>(g[i] + c, length);
                store(out[i] + c, formula(v, w, mean, slope, offset, scale), length);
                continue;
            }
            store(out[i] + c, formula(load<P>(in[i] + c), load<P>(g[i] + c), mean, slope, offset, scale));
        }
    }
}

template <class T>
void rows(const Shape& shape, const Elements& grad_y, const Elements& x, const Elements& grad_x, void* memory,
          const Part& part) {
    int64_t r = part.first;
    if (!shape.far)
        for (; r + 4 <= part.last; r += 4) some_rows<4, T>(shape, grad_y, x, grad_x, memory, r);
    for (; r < part.last; ++r) some_rows<1, T>(shape, grad_y, x, grad_x, memory, r);
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
        shape.rows ? rows<T>(shape, grad_y, x, grad_x, coefficients, part)
                   : planes<T>(shape, grad_y, x, grad_x, coefficients, part);
    });
}
}  // namespace syncbn::SYNCBN_ISA
