// SPDX-License-Identifier: BSD-3-Clause
// The few operations that plain C++ cannot express. To run the kernels on a CPU, the tests replace only this file
// (tests/cuda_on_cpu/cuda.hpp), so keep arithmetic and indices out of it.
//
// Float32 arithmetic is here so that no compiler option changes it: CuPy compiles with -ftz=true, which treats denormal
// numbers as 0. PTX instead of cuda_fp16.h, so that NVRTC needs no headers of the CUDA toolkit. Limits: compute capability
// 8.0, the first that rounds to bfloat16 in hardware.
#ifndef SYNCBN_PTX // a file that defines this guard provides the functions itself
#define SYNCBN_PTX

__device__ inline float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ inline unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ inline float bfloat16_to_float(unsigned short bits) { return __uint_as_float(unsigned(bits) << 16); }

__device__ inline unsigned short float_to_bfloat16(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ inline float plus(float a, float b) {
    float result;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

__device__ inline float minus(float a, float b) {
    float result;
    asm("sub.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

__device__ inline float times(float a, float b) {
    float result;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

// The rounding error of a * b.
__device__ inline float lost_in_product(float a, float b, float product) {
    float result;
    asm("{.reg .f32 n; neg.f32 n, %3; fma.rn.f32 %0, %1, %2, n;}" : "=f"(result) : "f"(a), "f"(b), "f"(product));
    return result;
}

__device__ inline bool is_zero(float value) { return __float_as_uint(value) << 1 == 0; }

__device__ inline double to_double(float value) {
    double result;
    asm("cvt.f64.f32 %0, %1;" : "=d"(result) : "f"(value));
    return result;
}

__device__ inline float to_float(double value) {
    float result;
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(result) : "d"(value));
    return result;
}

// An aligned store of 16 or 8 bytes. The compiler sometimes splits the store of a struct into several.
__device__ inline void store_words(void* p, unsigned a, unsigned b, unsigned c, unsigned d) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

__device__ inline void store_words(void* p, unsigned a, unsigned b) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(a), "r"(b) : "memory");
}

#endif
