// What every kernel may use, and what CUDA and the host (host.h) spell differently: only here does a kernel know which.
#pragma once

typedef signed char int8;
typedef unsigned char uint8;
typedef unsigned short uint16;

#ifdef MINIMTP_HOST
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(host::dynamic_shared)

__device__ inline float half_to_float(uint16 half) {
    _Float16 value;
    memcpy(&value, &half, 2);
    return float(value);
}
__device__ inline uint16 float_to_half(float x) {  // nearest, ties to even
    _Float16 value = _Float16(x);
    uint16 half;
    memcpy(&half, &value, 2);
    return half;
}
__device__ inline unsigned and_or(unsigned a, unsigned b, unsigned c) { return a & b | c; }
#else
#define DYNAMIC_SHARED(type, name)                                       \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];      \
    type* name = reinterpret_cast<type*>(dynamic_shared)

__device__ inline float half_to_float(uint16 half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}
__device__ inline uint16 float_to_half(float x) {
    uint16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}
__device__ inline unsigned and_or(unsigned a, unsigned b, unsigned c) {  // a & b | c; of constants nvcc would make two
    unsigned result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
#define INFINITY __uint_as_float(0x7F800000u)
#endif

__device__ inline float bf16_to_float(uint16 bits) { return __uint_as_float(unsigned(bits) << 16); }
__device__ inline uint16 float_to_bf16(float x) {  // nearest, ties to even; NaN stays NaN
    unsigned bits = __float_as_uint(x);
    return x != x ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

// The sum over a warp, in every lane: always the same tree, whatever else the pass computes.
__device__ inline float warp_sum(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }
__device__ inline float silu(float x) { return x / (1 + expf(-x)); }
__device__ inline float gelu(float x) {  // in its tanh form
    return 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * (x * x * x))));
}

// How a float is stored: a constant such as SCALE or WEIGHT names one of these, and widen makes it a float.
typedef float f32;
struct f16 { uint16 bits; };
struct bf16 { uint16 bits; };
__device__ inline float widen(f32 x) { return x; }
__device__ inline float widen(f16 x) { return half_to_float(x.bits); }
__device__ inline float widen(bf16 x) { return bf16_to_float(x.bits); }

// sum + a · b, always in this order and rounded once a product: the same bits on a GPU and on a CPU.
__device__ inline float dot4(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// The code under `mask`, which has its lowest bit at `unit`, less `zero`. Exact, in two instructions: in the bits of
// 2^23 the code makes the float 2^23 + code * unit.
__device__ inline float code_to_float(unsigned word, unsigned mask, int unit, int zero) {
    return fmaf(__uint_as_float(and_or(word, mask, 0x4B000000)), 1.0f / unit, -float(8388608 / unit + zero));
}
__device__ inline float4 four_nibbles(unsigned word) {  // the low four, less 8
    return make_float4(code_to_float(word, 0xF, 1, 8), code_to_float(word, 0xF0, 16, 8),
                       code_to_float(word, 0xF00, 256, 8), code_to_float(word, 0xF000, 4096, 8));
}
__device__ inline float4 four_bytes(unsigned word, int zero) {
    return make_float4(code_to_float(word, 0xFF, 1, zero), code_to_float(word, 0xFF00, 256, zero),
                       code_to_float(word >> 16, 0xFF, 1, zero), code_to_float(word >> 16, 0xFF00, 256, zero));
}

// How keys and values are kept (kv_storage.STORAGES), for a constant STORAGE.
#define F32 0
#define F16 1
#define BF16 2
#define INT8 3

// Cosine and sine of position * frequency, as layers.rope_table has them: the angle of a far position needs more than
// float32's digits, so it is kept in two parts until quarter turns are taken off. Then two short series (Cephes).
__device__ inline float2 cos_sin(int position, float frequency) {
    float at = float(position), angle = at * frequency, rest = fmaf(at, frequency, -angle);
    float quarters = rintf(angle * 0.636619772f);
    float x = fmaf(-quarters, 1.57079637f, angle);  // exact
    x += fmaf(quarters, 4.37113883e-8f, rest);  // by so much that constant is above half pi
    float square = x * x;
    float sine = fmaf(fmaf(fmaf(-1.95152959e-4f, square, 8.33216087e-3f), square, -1.66666546e-1f), x * square, x);
    float cosine = fmaf(fmaf(2.44331571e-5f, square, -1.38873163e-3f), square, 4.16666457e-2f);
    cosine = fmaf(cosine * square, square, fmaf(-0.5f, square, 1.0f));
    int turned = int(quarters) & 3;
    float c = turned & 1 ? sine : cosine, s = turned & 1 ? cosine : sine;
    return make_float2(turned == 1 || turned == 2 ? -c : c, turned & 2 ? -s : s);
}
