// SPDX-License-Identifier: BSD-3-Clause
// normalize: y = (x - mean) * (invstd * weight) + bias, and the numbers per channel that this needs.
//
// finalize: mean = sum_x / count;  var = sum_x2 / count - mean * mean, not below 0;  invstd = 1 / sqrt(var + eps).
// update_running: running = (1 - momentum) * running + momentum * batch, var * count / (count - 1) for the variance.
// In: x, planes or rows, of four dtypes; wire, float64 [count, sum_x (C), sum_x2 (C), ...]; weight, bias, running
// mean and var of any floating dtype and stride. Out: y, of x's dtype; mean, var, invstd, float64 (C,).
// Per channel in float64, rounded once to the type of elementwise arithmetic (float32; float64 for float64). The mean
// is subtracted first: a channel of one value everywhere gives exactly the bias. No reduction: any split of the
// elements over threads gives the same bits. Reads and writes each element once: 4, 8 or 16 bytes per element.
#include "vector.hpp"

namespace {
using namespace lanes;
using syncbn::Elements;
using syncbn::LANES;
using syncbn::Part;
using syncbn::Shape;
using syncbn::Values;

template <class T> struct Coefficients {
    typedef typename Compute<T>::Scalar Scalar;
    Scalar *mean, *scale, *bias;
    Coefficients(void* memory, int64_t C)
        : mean(static_cast<Scalar*>(memory)), scale(mean + syncbn::padded(C)), bias(scale + syncbn::padded(C)) {}
};

template <class T> void planes(const Shape& shape, const Elements& x, const Elements& y, void* memory, const Part& part) {
    typedef typename Compute<T>::Lanes P;
    const Coefficients<T> k(memory, shape.C);
    for (Segment j(shape, part.first); j.index < part.last; j.step()) {
        const T* in = at<T>(x, j.n, j.c, j.s);
        T* out = at<T>(y, j.n, j.c, j.s);
        const P mean = all<P>(k.mean[j.c]), scale = all<P>(k.scale[j.c]), bias = all<P>(k.bias[j.c]);
        const auto formula = [&](P v) { return (v - mean) * scale + bias; };
        const int64_t length = j.length();
        int64_t i = 0;
        if (shape.far) {
            i = least(to_aligned(out), length);
            if (i > 0) store(out, formula(load<P>(in, i)), i);
            for (; i + LANES <= length; i += LANES) stream(out + i, formula(load<P>(in + i)));
        }
        for (; i + LANES <= length; i += LANES) store(out + i, formula(load<P>(in + i)));
        if (i < length) store(out + i, formula(load<P>(in + i, length - i)), length - i);
    }
}

// Row by row: memory is read and written in order, and the numbers per channel stay in the first-level cache.
template <bool streamed, class T>
void rows(const Shape& shape, const Elements& x, const Elements& y, void* memory, const Part& part) {
    typedef typename Compute<T>::Lanes P;
    const Coefficients<T> k(memory, shape.C);
    each_run(Row(shape, part.first), part.last - part.first, [&](int64_t n, int64_t s, int64_t count) {
        const T* in = at<T>(x, n, 0, s);
        T* out = at<T>(y, n, 0, s);
        for (; count > 0; --count, in += x.stride_s, out += y.stride_s) {
            const auto result = [&](int64_t c, auto... length) {
                const P v = load<P>(in + c, length...) - load<P>(k.mean + c);
                return v * load<P>(k.scale + c) + load<P>(k.bias + c);
            };
            int64_t c = 0;
            for (; c + LANES <= shape.C; c += LANES) streamed ? stream(out + c, result(c)) : store(out + c, result(c));
            if (c < shape.C) store(out + c, result(c, shape.C - c), shape.C - c);
        }
    });
}

void update(const Values& running, int64_t C, const double* batch, double factor, double momentum) {
    with_type(running.dtype, [&](auto storage) {
        auto* p = reinterpret_cast<typename decltype(storage)::Type*>(running.data);
        typedef typename Compute<typename decltype(storage)::Type>::Scalar Scalar;
        const int64_t stride = running.stride;
        if (stride == 1)
            for (int64_t c = 0; c < C; ++c)
                narrow(Scalar(widen(p[c]) * (1.0 - momentum) + batch[c] * factor * momentum), p + c);
        else
            for (int64_t c = 0; c < C; ++c)
                narrow(Scalar(widen(p[c * stride]) * (1.0 - momentum) + batch[c] * factor * momentum), p + c * stride);
    });
}
}  // namespace

namespace syncbn::SYNCBN_ISA {
void finalize(int64_t C, const double* wire, double eps, double* mean, double* var, double* invstd) {
    const double count = wire[0] < 1.0 ? 1.0 : wire[0];
    for (int64_t c = 0; c < C; ++c) {
        mean[c] = wire[1 + c] / count;
        const double v = wire[1 + C + c] / count - mean[c] * mean[c];
        var[c] = v < 0.0 ? 0.0 : v;  // NaN stays NaN
        invstd[c] = 1.0 / __builtin_sqrt(var[c] + eps);
    }
}

void update_running(int64_t C, const double* mean, const double* var, const Running& running) {
    update(running.mean, C, mean, 1.0, running.momentum);
    update(running.var, C, var, running.count_global / (running.count_global - 1.0), running.momentum);
}

void normalize_coefficients(const Shape& shape, const double* mean, const double* invstd, const Values& weight,
                            const Values& bias, double* scratch, void* coefficients) {
    double *w = scratch, *b = scratch + shape.C;
    read_values(weight, shape.C, 1.0, w);
    read_values(bias, shape.C, 0.0, b);
    const auto round = [&](auto k) {
        for (int64_t c = 0; c < shape.C; ++c) {
            k.mean[c] = typename decltype(k)::Scalar(mean[c]);
            k.scale[c] = typename decltype(k)::Scalar(invstd[c] * w[c]);
            k.bias[c] = typename decltype(k)::Scalar(b[c]);
        }
    };
    shape.dtype == DType::float64 ? round(Coefficients<double>(coefficients, shape.C))
                                  : round(Coefficients<float>(coefficients, shape.C));
}

void normalize(const Shape& shape, const Elements& x, const Elements& y, void* coefficients, const Part& part) {
    with_type(shape.dtype, [&](auto storage) {
        using T = typename decltype(storage)::Type;
        if (!shape.rows) return planes<T>(shape, x, y, coefficients, part);
        shape.far && rows_aligned<T>(y) ? rows<true, T>(shape, x, y, coefficients, part)
                                        : rows<false, T>(shape, x, y, coefficients, part);
    });
    if (shape.far) streams_done();
}
}  // namespace syncbn::SYNCBN_ISA
