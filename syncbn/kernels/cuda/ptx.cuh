// SPDX-License-Identifier: BSD-3-Clause
// The few operations that plain C++ has no word for. The only file of this folder that the tests replace when they
// run the kernels on a CPU (tests/cuda_on_cpu/cuda.hpp): keep arithmetic and indices out of it.
//
// Written in PTX instead of cuda_fp16.h: NVRTC needs no headers of the CUDA toolkit then. Limits: compute capability
// 8.0, the first that rounds to bfloat16 in hardware.
#ifndef SYNCBN_PTX // a guard with a name: whoever defines it brings these functions along
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

// An aligned store of 16 or 8 bytes that stays one store: of a struct's, the compiler makes several now and then.
__device__ inline void store_words(void* p, unsigned a, unsigned b, unsigned c, unsigned d) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

__device__ inline void store_words(void* p, unsigned a, unsigned b) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(a), "r"(b) : "memory");
}

#endif
