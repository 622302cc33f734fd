// quant.cuh - internal: quant.c for a thread block: ranges, float16 scale and zero, codes and their packing, byte for byte
// what the C reference writes. Where rows come from is the caller's: fetch(row, chunk, float[8]) gives 8 channels of a row.
#ifndef BKV_QUANT_CUDA_CUH
#define BKV_QUANT_CUDA_CUH

#include "gpu.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define BKV_HALF_LARGEST 65504.0f

// Eight elements of `dtype` from memory that is aligned to 16 bytes.
__device__ __forceinline__ void load_eight(const uint8_t *at, bkv_dtype_t dtype, float out[8]) {
    if (dtype == BKV_FP32) {
        float4 low = ((const float4 *)at)[0], high = ((const float4 *)at)[1];
        out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
        out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
        return;
    }
    uint4 all = *(const uint4 *)at;
    uint32_t word[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (dtype == BKV_BF16) {
            out[2 * i] = __uint_as_float(word[i] << 16);
            out[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
        } else {
            out[2 * i] = __half2float(__ushort_as_half((unsigned short)(word[i] & 0xffff)));
            out[2 * i + 1] = __half2float(__ushort_as_half((unsigned short)(word[i] >> 16)));
        }
    }
}

__device__ __forceinline__ uint16_t half_saturated(float value) {
    return __half_as_ushort(__float2half_rn(fminf(fmaxf(value, -BKV_HALF_LARGEST), BKV_HALF_LARGEST)));
}

__device__ __forceinline__ float half_expand(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}

// What a code is computed from; `word` is scale and zero as stored.
struct quant_params {
    float inverse, zero;
    uint32_t word;
};

__device__ __forceinline__ quant_params params_choose(float low, float high, uint32_t bits) {
    uint16_t zero_half = half_saturated(low);
    float zero = half_expand(zero_half);
    float range = __fsub_rn(fminf(fmaxf(high, -BKV_HALF_LARGEST), BKV_HALF_LARGEST), zero);
    uint16_t scale_half = half_saturated(range > 0 ? __fdiv_rn(range, (float)((1u << bits) - 1u)) : 0.0f);
    float scale = half_expand(scale_half);
    return {scale > 0 ? __fdiv_rn(1.0f, scale) : 0.0f, zero, scale_half | (uint32_t)zero_half << 16};
}

__device__ __forceinline__ uint32_t code_of(float value, float inverse, float zero, float top) {
    float code = __fadd_rn(__fmul_rn(__fsub_rn(value, zero), inverse), 0.5f);
    return (uint32_t)fminf(fmaxf(code, 0.0f), top); // fmaxf(NaN, 0) is 0
}

// A packed row piece to memory that may be aligned to a byte only.
__device__ __forceinline__ void store_packed(uint8_t *at, const uint32_t *words, uint32_t bytes) {
    if (((uintptr_t)at & 3) == 0 && (bytes & 3) == 0) {
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            if (4 * i < bytes) {
                ((uint32_t *)at)[i] = words[i];
            }
        }
        return;
    }
#pragma unroll
    for (uint32_t i = 0; i < 32; i++) {
        if (i < bytes) {
            at[i] = (uint8_t)(words[i / 4] >> i % 4 * 8);
        }
    }
}

// Thirty-two codes, or the 8, 16 or 24 that end a row, packed as summary.h says. `at` is where the first one's byte is.
template <uint32_t BITS> __device__ __forceinline__ void pack_group(const uint32_t *codes, uint32_t count, uint8_t *at) {
    uint32_t words[BITS] = {0};
    if (BITS == 3 && count == 32) {
#pragma unroll
        for (uint32_t half = 0; half < 6; half++) {
            uint32_t five = 0;
#pragma unroll
            for (uint32_t p = 0; p < 5; p++) {
                five |= codes[5 * half + p] << 3 * p;
            }
            five |= (codes[30 + half % 2] >> half / 2 & 1u) << 15;
            words[half / 2] |= five << half % 2 * 16;
        }
        store_packed(at, words, 12);
        return;
    }
#pragma unroll
    for (uint32_t i = 0; i < 32; i++) {
        uint32_t bit = i * BITS, code = i < count ? codes[i] : 0;
        words[bit / 32] |= code << bit % 32;
        if (bit % 32 + BITS > 32) {
            words[bit / 32 + 1] |= code >> (32 - bit % 32);
        }
    }
    store_packed(at, words, count * BITS / 8);
}

__device__ __forceinline__ void pack_codes(const uint32_t *codes, uint32_t count, uint32_t bits, uint8_t *at) {
    switch (bits) {
    case 2:
        return pack_group<2>(codes, count, at);
    case 3:
        return pack_group<3>(codes, count, at);
    case 4:
        return pack_group<4>(codes, count, at);
    default:
        return pack_group<8>(codes, count, at);
    }
}

// Floats as integers of the same order, for atomicMin and atomicMax.
__device__ __forceinline__ int ordered(float value) {
    int bits = __float_as_int(value);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

__device__ __forceinline__ float unordered(int bits) {
    return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff));
}

// Room for one key group's ranges in shared memory, in bytes.
#define QUANT_KEYS_SHARED(dim) (8u * (dim))

// One key group by all threads: params [dim], codes [count] rows. shared: QUANT_KEYS_SHARED bytes. Ends with a barrier.
template <class Fetch>
__device__ void quant_keys(const Fetch &fetch, uint32_t count, uint32_t dim, uint32_t bits, uint8_t *params, uint8_t *codes,
                           uint8_t *shared) {
    int *low = (int *)shared, *high = low + dim;
    for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) {
        low[i] = 0x7fffffff;
        high[i] = -0x7fffffff - 1;
    }
    __syncthreads();
    uint32_t chunks = dim / 8, slices = blockDim.x / chunks, chunk = threadIdx.x % chunks, slice = threadIdx.x / chunks;
    if (slice < slices && slice < count) {
        float least[8], most[8], row[8];
        fetch(slice, chunk, least);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            most[i] = least[i];
        }
        for (uint32_t t = slice + slices; t < count; t += slices) {
            fetch(t, chunk, row);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                least[i] = fminf(least[i], row[i]);
                most[i] = fmaxf(most[i], row[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            atomicMin(&low[8 * chunk + i], ordered(least[i]));
            atomicMax(&high[8 * chunk + i], ordered(most[i]));
        }
    }
    __syncthreads();
    float *inverse = (float *)low, *zero = (float *)high; // each channel's own thread turns its range into these
    for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) {
        quant_params chosen = {0, 0, 0};
        if (count > 0) {
            chosen = params_choose(unordered(low[i]), unordered(high[i]), bits);
        }
        ((uint32_t *)params)[i] = chosen.word; // planes start at 16 bytes, params at a multiple of 4
        inverse[i] = chosen.inverse;
        zero[i] = chosen.zero;
    }
    __syncthreads();
    uint32_t groups = (dim + 31) / 32;
    float top = (float)((1u << bits) - 1u);
    for (uint32_t task = threadIdx.x; task < count * groups; task += blockDim.x) {
        uint32_t t = task % count, group = task / count, n = min(32u, dim - 32 * group), code[32];
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            float row[8] = {0};
            if (8 * c < n) {
                fetch(t, 4 * group + c, row);
#pragma unroll
                for (uint32_t i = 0; i < 8; i++) {
                    uint32_t channel = 32 * group + 8 * c + i;
                    code[8 * c + i] = code_of(row[i], inverse[channel], zero[channel], top);
                }
            }
        }
        pack_codes(code, n, bits, codes + (uint64_t)t * (dim * bits / 8) + group * 4 * bits);
    }
    __syncthreads();
}

// `count` value rows by all threads, one 64-channel group a thread.
template <class Fetch>
__device__ void quant_values(const Fetch &fetch, uint32_t count, uint32_t dim, uint32_t bits, uint8_t *params, uint8_t *codes) {
    uint32_t groups = (dim + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS;
    float top = (float)((1u << bits) - 1u);
    for (uint32_t task = threadIdx.x; task < count * groups; task += blockDim.x) {
        uint32_t t = task % count, group = task / count, first = group * (BKV_VALUE_GROUP_DIMS / 8);
        uint32_t chunks = min((uint32_t)BKV_VALUE_GROUP_DIMS / 8, dim / 8 - first);
        float least = INFINITY, most = -INFINITY, row[8];
        for (uint32_t c = 0; c < chunks; c++) {
            fetch(t, first + c, row);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                least = fminf(least, row[i]);
                most = fmaxf(most, row[i]);
            }
        }
        quant_params chosen = params_choose(least, most, bits);
        ((uint32_t *)params)[(uint64_t)t * groups + group] = chosen.word;
        for (uint32_t half = 0; half < 2 && 4 * half < chunks; half++) {
            uint32_t code[32], n = min(4u, chunks - 4 * half);
#pragma unroll
            for (uint32_t c = 0; c < 4; c++) {
                if (c < n) {
                    fetch(t, first + 4 * half + c, row);
#pragma unroll
                    for (uint32_t i = 0; i < 8; i++) {
                        code[8 * c + i] = code_of(row[i], chosen.inverse, chosen.zero, top);
                    }
                }
            }
            pack_codes(code, 8 * n, bits, codes + (uint64_t)t * (dim * bits / 8) + (first + 4 * half) * bits);
        }
    }
}

#endif
