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
        const int64_t n = j.n, c = j.c, s = j.s;
        const int64_t length = shape.S - s < syncbn::SEGMENT ? shape.S - s : syncbn::SEGMENT;
        const T* in = at<T>(x, n, c, s);
        T* out = at<T>(y, n, c, s);
        const P mean = all<P>(k.mean[c]), scale = all<P>(k.scale[c]), bias = all<P>(k.bias[c]);
        int64_t i = 0;
        for (; i + syncbn::LANES <= length; i += syncbn::LANES)
            store(out + i, (load<P>(in + i) - mean) * scale + bias);
        if (i < length) store(out + i, (load<P>(in + i, length - i) - mean) * scale + bias, length - i);
    }
}

template <int group, class T>
void some_rows(const Shape& shape, const Elements& x, const Elements& y, void* memory, int64_t r) {
    typedef typename Compute<T>::Lanes P;
    const Coefficients<T> k(memory, shape.C);
    const T* in[group];
    T* out[group];
    for (int g = 0; g < group; ++g) {
        in[g] = row<T>(x, shape, r + g);
        out[g] = row<T>(y, shape, r + g);
    }
    int64_t c = 0;
    for (; c + syncbn::LANES <= shape.C; c += syncbn::LANES) {
        const P mean = load<P>(k.mean + c), scale = load<P>(k.scale + c), bias = load<P>(k.bias + c);
        for (int g = 0; g < group; ++g) store(out[g] + c, (load<P>(in[g] + c) - mean) * scale + bias);
    }
    if (c == shape.C) return;
    const P mean = load<P>(k.mean + c), scale = load<P>(k.scale + c), bias = load<P>(k.bias + c);  // padded
    for (int g = 0; g < group; ++g)
        store(out[g] + c, (load<P>(in[g] + c, shape.C - c) - mean) * scale + bias, shape.C - c);
}

template <class T> void rows(const Shape& shape, const Elements& x, const Elements& y, void* memory, const Part& part) {
    int64_t r = part.first;
    if (!shape.far)
        for (; r + 4 <= part.last; r += 4) some_rows<4, T>(shape, x, y, memory, r);
    for (; r < part.last; ++r) some_rows<1, T>(shape, x, y, memory, r);
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
        shape.rows ? rows<T>(shape, x, y, coefficients, part) : planes<T>(shape, x, y, coefficients, part);
    });
}
}  // namespace syncbn::SYNCBN_ISA
