// SPDX-License-Identifier: BSD-3-Clause
// CUDA's words for a C++17 compiler, so that the kernels' own source runs on a CPU, in tests.
//
// Each CUDA thread is a fibre with a stack of its own; all run on one processor thread. The threads of a block take
// turns in a random order, from one __syncthreads to the next; blocks come one after the other in a random order. What
// is right here for many orders does not lean on an order. A barrier that not all threads reach is an error.
//
// Under -fsanitize=thread the sanitizer is told of every fibre, and that nothing but __syncthreads, a pair of fences
// and the end of a launch orders two of them: it then finds races inside a block and between blocks, although nothing
// runs at once. A block then gets a processor thread of its own, and with it fresh shared memory.
#pragma once
#include <math.h>
#include <string.h>

#include <cstdint>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct dim3 {
    unsigned x, y, z;
};

namespace cuda_on_cpu {
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
void synchronise();
void fence();
}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::thread_index())
#define blockIdx (cuda_on_cpu::block_index())
#define blockDim (cuda_on_cpu::block_size())
#define gridDim (cuda_on_cpu::grid_size())

inline void __syncthreads() { cuda_on_cpu::synchronise(); }
inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __threadfence_system() { cuda_on_cpu::fence(); }
// Relaxed, as on the device: an atomic alone orders nothing around it.
inline unsigned atomicAdd(unsigned* p, unsigned value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }

// In place of ptx.cuh: the conversions, by their definition, rounding to nearest, ties to even.
#define SYNCBN_PTX

inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float bfloat16_to_float(unsigned short bits) { return bits_to_float(uint32_t(bits) << 16); }

inline unsigned short float_to_bfloat16(float value) {
    const uint32_t bits = float_to_bits(value);
    if (isnan(value)) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(unsigned short bits) {
    const float sign = bits & 0x8000 ? -1.0f : 1.0f;
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return fraction ? bits_to_float(0x7fc00000) : sign * INFINITY;
    return sign * (exponent ? ldexpf(float(1024 + fraction), exponent - 25) : ldexpf(float(fraction), -24));
}

inline unsigned short float_to_half(float value) {
    const unsigned short sign = float_to_bits(value) >> 16 & 0x8000;
    const float size = fabsf(value);
    if (isnan(value)) return 0x7fff;
    if (size == 0) return sign;
    if (size >= 65520.0f) return sign | 0x7c00;  // the midpoint to 2^16 rounds up
    int exponent;
    frexpf(size, &exponent);
    if (exponent < -13) exponent = -13;                                         // subnormal: steps of 2^-24
    const int steps = int(nearbyintf(ldexpf(size, 11 - exponent)));             // of 2^(exponent - 11)
    return static_cast<unsigned short>(sign | (((exponent + 13) << 10) + steps));  // carries into the exponent
}

inline float plus(float a, float b) { return a + b; }
inline float minus(float a, float b) { return a - b; }
inline float times(float a, float b) { return a * b; }
inline float lost_in_product(float a, float b, float product) { return fmaf(a, b, -product); }
inline bool is_zero(float value) { return value == 0; }
inline double to_double(float value) { return value; }
inline float to_float(double value) { return float(value); }

struct alignas(16) FourWords {
    unsigned at[4];
};
struct alignas(8) TwoWords {
    unsigned at[2];
};
inline void store_words(void* p, unsigned a, unsigned b, unsigned c, unsigned d) {
    *static_cast<FourWords*>(p) = FourWords{{a, b, c, d}};
}
inline void store_words(void* p, unsigned a, unsigned b) { *static_cast<TwoWords*>(p) = TwoWords{{a, b}}; }
