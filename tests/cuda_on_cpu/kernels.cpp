// SPDX-License-Identifier: BSD-3-Clause
// The kernels' own source, compiled for a CPU: four steps, four storage types, two layouts.
#include "kernels.hpp"

#include "cuda.hpp"

#include "backward_input.cu"
#include "backward_sums.cu"
#include "local_moments.cu"
#include "normalize.cu"

#define ONE(step, Arguments, T, Layout) \
    {#step "<" #T ", " #Layout ">", [](const void* a) { step<T, Layout>(*static_cast<const Arguments*>(a)); }},
#define TYPES(step, Arguments, Layout)                                                 \
    ONE(step, Arguments, Float16, Layout) ONE(step, Arguments, BFloat16, Layout)       \
    ONE(step, Arguments, float, Layout) ONE(step, Arguments, double, Layout)
#define STEP(step, Arguments) TYPES(step, Arguments, Planes) TYPES(step, Arguments, Rows)

extern "C" int argument_size(const char* step) {
    const std::map<std::string, size_t> sizes = {{"local_moments", sizeof(LocalMoments)},
                                                 {"normalize", sizeof(Normalize)},
                                                 {"backward_sums", sizeof(BackwardSums)},
                                                 {"backward_input", sizeof(BackwardInput)}};
    return int(sizes.at(step));
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
        STEP(local_moments, LocalMoments) STEP(normalize, Normalize)
        STEP(backward_sums, BackwardSums) STEP(backward_input, BackwardInput)};
    return all;
}
