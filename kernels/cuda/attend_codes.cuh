// attend_codes.cuh - internal: packed codes as operands of matrix instructions.
//
// A code c, masked out of its word, is read as the subnormal float16 c * 2^(shift - 24): tensor cores multiply those exactly,
// so that unpacking two codes costs one AND. What is left of the factors 2^shift is powers of two that keys fold into the
// query and values into the sum at the end. Which code ends up in which place of an operand follows from the packing alone;
// the functions below say it, and the other operand is put in the same order.
#ifndef BKV_ATTEND_CODES_CUDA_CUH
#define BKV_ATTEND_CODES_CUDA_CUH

#include "attend_gpu.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Elements of 16 bits hold two codes; 32 codes, or what stands for them, are 16 such pairs.
#define PAIRS 16

// Words that hold 32 elements.
__host__ __device__ constexpr int kind_words(int kind) {
    return kind == BKV_GPU_BITS2 ? 2 : kind == BKV_GPU_BITS3 ? 3 : kind == BKV_GPU_BITS4 ? 4 : kind == BKV_GPU_BITS8 ? 8 : 16;
}

__host__ __device__ constexpr bool kind_native(int kind) {
    return kind > BKV_GPU_BITS8;
}

// Pairs that one word holds; of three bits, but for the last pair.
__host__ __device__ constexpr int kind_pairs(int kind) {
    return kind == BKV_GPU_BITS2 ? 8 : kind == BKV_GPU_BITS3 ? 5 : kind == BKV_GPU_BITS4 ? 4 : kind == BKV_GPU_BITS8 ? 2 : 1;
}

// Which of the 32 elements is the lower half of pair `e`; the upper half is the kind_reach-th after it.
__host__ __device__ constexpr int kind_lower(int kind, int e) {
    return kind == BKV_GPU_BITS3 ? (e == 15 ? 30 : e / 5 * 10 + e % 5)
                                 : e / kind_pairs(kind) * (32 / kind_words(kind)) + e % kind_pairs(kind);
}

__host__ __device__ constexpr int kind_reach(int kind, int e) {
    return kind == BKV_GPU_BITS3 ? (e == 15 ? 1 : 5) : kind_pairs(kind);
}

// Pair `e` comes out times 2^(kind_shift - 24).
__host__ __device__ constexpr int kind_shift(int kind, int e) {
    return kind == BKV_GPU_BITS2   ? (e % 8 < 5 ? e % 8 * 2 : e % 8 * 2 - 10)
           : kind == BKV_GPU_BITS3 ? (e == 15     ? 6
                                      : e % 5 < 3 ? e % 5 * 3
                                                  : e % 5 * 3 - 9)
           : kind == BKV_GPU_BITS4 ? e % 2 * 4
                                   : 0;
}

// The pair that holds element `i`, and whether it is the upper half, in the order of three-bit codes.
__host__ __device__ constexpr int three_pair(int i) {
    return i >= 30 ? 15 : i / 10 * 5 + i % 5;
}

__host__ __device__ constexpr bool three_upper(int i) {
    return i >= 30 ? i == 31 : i % 10 >= 5;
}

__device__ __forceinline__ half2 as_half2(uint32_t bits) {
    half2 value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

template <class T> __device__ __forceinline__ uint32_t as_bits(T pair) {
    uint32_t bits;
    static_assert(sizeof(pair) == sizeof(bits), "a pair of 16 bits each");
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

// All pairs of `words`, which are kind_words(KIND) words of one row or as many that have a half of one row's word each below
// and of another row's above.
template <int KIND> __device__ __forceinline__ void codes_open(const uint32_t *words, uint32_t *pairs) {
    if constexpr (KIND == BKV_GPU_BITS2) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t low = words[i], high = low >> 10;
#pragma unroll
            for (int p = 0; p < 5; p++) {
                pairs[8 * i + p] = low & 0x00030003u << 2 * p;
            }
#pragma unroll
            for (int p = 5; p < 8; p++) {
                pairs[8 * i + p] = high & 0x00030003u << (2 * p - 10);
            }
        }
    } else if constexpr (KIND == BKV_GPU_BITS3) {
        uint32_t last[3];
#pragma unroll
        for (int i = 0; i < 3; i++) {
            uint32_t low = words[i], high = low >> 9;
            pairs[5 * i] = low & 0x00070007u;
            pairs[5 * i + 1] = low & 0x00380038u;
            pairs[5 * i + 2] = low & 0x01c001c0u;
            pairs[5 * i + 3] = high & 0x00070007u;
            pairs[5 * i + 4] = high & 0x00380038u;
            last[i] = high & 0x00400040u;
        }
        const half2 two = __floats2half2_rn(2, 2), four = __floats2half2_rn(4, 4); // exact, and no work for the integer units
        pairs[15] = as_bits(__hfma2(as_half2(last[2]), four, __hfma2(as_half2(last[1]), two, as_half2(last[0]))));
    } else if constexpr (KIND == BKV_GPU_BITS4) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t low = words[i], high = low >> 8;
            pairs[4 * i] = low & 0x000f000fu;
            pairs[4 * i + 1] = low & 0x00f000f0u;
            pairs[4 * i + 2] = high & 0x000f000fu;
            pairs[4 * i + 3] = high & 0x00f000f0u;
        }
    } else if constexpr (KIND == BKV_GPU_BITS8) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            pairs[2 * i] = words[i] & 0x00ff00ffu;
            pairs[2 * i + 1] = words[i] >> 8 & 0x00ff00ffu;
        }
    } else {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            pairs[i] = words[i];
        }
    }
}

__device__ __forceinline__ uint32_t halves_low(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x5410);
}

__device__ __forceinline__ uint32_t halves_high(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x7632);
}

__device__ __forceinline__ uint32_t halves_multiply(uint32_t a, uint32_t b) {
    return as_bits(__hmul2(as_half2(a), as_half2(b)));
}

// What is at hand in the order of three-bit codes, as pair `e` of kind KIND.
template <int KIND> __device__ __forceinline__ uint32_t pair_reorder(const uint32_t *three, int e) {
    if constexpr (KIND == BKV_GPU_BITS3) {
        return three[e];
    } else {
        const int lower = kind_lower(KIND, e), upper = lower + kind_reach(KIND, e);
        const uint32_t select = (three_upper(lower) ? 0x32u : 0x10u) | (three_upper(upper) ? 0x7600u : 0x5400u);
        return __byte_perm(three[three_pair(lower)], three[three_pair(upper)], select);
    }
}

// d += a * b for a tile of 16 x 16 by 16 x 8. Lane 4 * g + c holds of a: rows g and g + 8 of columns 2c, 2c + 1 (a0, a1)
// and of columns 2c + 8, 2c + 9 (a2, a3); of b: those rows of column g (b0, b1); of d: columns 2c, 2c + 1 of row g (d[0],
// d[1]) and of row g + 8. Which columns of a those are matters not as long as the rows of b are the same.
template <bool BF16>
__device__ __forceinline__ void multiply_add(float d[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                             uint32_t b1) {
    if constexpr (BF16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

// An 8 x 8 matrix of 16-bit elements, two of a row in each lane, transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
    uint32_t out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
