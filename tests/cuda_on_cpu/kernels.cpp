// SPDX-License-Identifier: BSD-3-Clause
// The kernels' own source, compiled for a CPU: four steps, four storage types, two layouts, two sums. With SYNCBN_FEW
// two storage types and one sum, in a third of the time: for builds of which each test makes its own.
#include "kernels.hpp"

#include "cuda.hpp"

#include "backward_input.cu"
#include "backward_sums.cu"
#include "local_moments.cu"
#include "normalize.cu"

#define ONE(step, Arguments, ...) \
    {#step "<" #__VA_ARGS__ ">", [](const void* a) { step<__VA_ARGS__>(*static_cast<const Arguments*>(a)); }},
#define TWO(step, Arguments, ...) ONE(step, Arguments, BFloat16, __VA_ARGS__) ONE(step, Arguments, float, __VA_ARGS__)
#ifdef SYNCBN_FEW
#define TYPES TWO
#define SLOW_SUMS(...)
#else
#define SHORT(step, Arguments, ...) ONE(step, Arguments, Float16, __VA_ARGS__) TWO(step, Arguments, __VA_ARGS__)
#define TYPES(step, Arguments, ...) SHORT(step, Arguments, __VA_ARGS__) ONE(step, Arguments, double, __VA_ARGS__)
#define SLOW_SUMS(step, Arguments) \
    SHORT(step, Arguments, Planes, Expansion) SHORT(step, Arguments, Rows, Expansion)
#endif
#define STEP(step, Arguments) TYPES(step, Arguments, Planes) TYPES(step, Arguments, Rows)
#define SUMS(step, Arguments) \
    TYPES(step, Arguments, Planes, Float64) TYPES(step, Arguments, Rows, Float64) SLOW_SUMS(step, Arguments)

extern "C" int argument_size(const char* step) {
    const std::map<std::string, size_t> sizes = {{"local_moments", sizeof(LocalMoments)},
                                                 {"normalize", sizeof(Normalize)},
                                                 {"backward_sums", sizeof(BackwardSums)},
                                                 {"backward_input", sizeof(BackwardInput)}};
    return int(sizes.at(step));
}

// One thread's sums of x and of x * y, in each arithmetic: sums[arithmetic][2].
extern "C" void add_up(int count, const float* x, const float* y, double* sums) {
    Float64<float> native[2];
    Expansion<float> expansion[2];
    for (int i = 0; i < count; ++i) {
        native[0].add(x[i]), native[1].add_product(x[i], y[i]);
        expansion[0].add(x[i]), expansion[1].add_product(x[i], y[i]);
    }
    for (int i = 0; i < 2; ++i) sums[i] = native[i].value(), sums[2 + i] = expansion[i].value();
}

// Every half precision number widened, and numbers narrowed: cuda.hpp's own arithmetic wants a test too.
extern "C" void widen_all(float* halves, float* bfloats) {
    for (unsigned bits = 0; bits < 65536; ++bits) {
        halves[bits] = half_to_float(static_cast<unsigned short>(bits));
        bfloats[bits] = bfloat16_to_float(static_cast<unsigned short>(bits));
    }
}
extern "C" void narrow_all(int count, const float* x, unsigned short* halves, unsigned short* bfloats) {
    for (int i = 0; i < count; ++i) {
        halves[i] = float_to_half(x[i]);
        bfloats[i] = float_to_bfloat16(x[i]);
    }
}

const std::map<std::string, Kernel>& kernels() {
    static const std::map<std::string, Kernel> all = {
        SUMS(local_moments, LocalMoments) STEP(normalize, Normalize)
        SUMS(backward_sums, BackwardSums) STEP(backward_input, BackwardInput)};
    return all;
}
