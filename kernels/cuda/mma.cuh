// mma.cuh - internal: the instructions for which CUDA C++ has no name: asynchronous copies, matrix loads, tensor core
// products (PTX ISA 8.x, sm_80).
#ifndef BKV_MMA_CUDA_CUH
#define BKV_MMA_CUDA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

__device__ __forceinline__ uint32_t shared_address(const void *at) {
    return (uint32_t)__cvta_generic_to_shared(at);
}

// A copy of `bytes` bytes, a multiple of 16, to shared memory, of which `arrived`, an 8-byte word of shared memory, is told.
// Before there were such copies (sm_80) a lane copies 16 bytes at a time, and waits for its own.
__device__ __forceinline__ void arrivals_begin(uint64_t *arrived, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
                 "fence.proxy.async.shared::cta;\n\t"
                 "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrived)),
                 "r"(bytes)
                 : "memory");
#endif
}

__device__ __forceinline__ void copy_row(uint32_t shared, const uint8_t *global, uint32_t bytes, uint64_t *arrived) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(shared_address(arrived))
                 : "memory");
#else
    for (uint32_t at = 0; at < bytes; at += 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared + at), "l"(global + at) : "memory");
    }
#endif
}

// Waits until all that was announced is there. All lanes of the warp, as each sees what it waited for.
__device__ __forceinline__ void arrivals_wait(uint64_t *arrived) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .pred done;\n"
                 "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n\t@!done bra again;\n\t}" ::"r"(
                     shared_address(arrived))
                 : "memory");
#else
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    __syncwarp();
}

__device__ __forceinline__ void prefetch_l2(const void *global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t out[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t out[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// Two to the power of `value`; denormal results are 0.
__device__ __forceinline__ float power_of_two(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// sum += a (16 x 16) b (16 x 8), elements bfloat16 or float16, sums float. Lane l holds sums of row l / 4, columns
// 2 * (l % 4) and the next, and the same of row l / 4 + 8.
template <class T> __device__ __forceinline__ void multiply(float sum[4], const uint32_t a[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float sum[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <> __device__ __forceinline__ void multiply<__half>(float sum[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What differs between the two 16-bit types.
template <class T> struct element;

template <> struct element<__nv_bfloat16> {
    static constexpr uint32_t ones = 0x3f803f80u;

    static __device__ __forceinline__ float2 unpack(uint32_t pair) {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
        return *(uint32_t *)&both;
    }
    static __device__ __forceinline__ uint32_t least(uint32_t a, uint32_t b) {
        __nv_bfloat162 both = __hmin2(*(__nv_bfloat162 *)&a, *(__nv_bfloat162 *)&b);
        return *(uint32_t *)&both;
    }
    static __device__ __forceinline__ uint32_t greatest(uint32_t a, uint32_t b) {
        __nv_bfloat162 both = __hmax2(*(__nv_bfloat162 *)&a, *(__nv_bfloat162 *)&b);
        return *(uint32_t *)&both;
    }
    // A float as the sum of two, the smaller one in the upper half.
    static __device__ __forceinline__ uint32_t split(float value) {
        float high = __bfloat162float(__float2bfloat16_rn(value));
        return pack(high, value - high);
    }
};

template <> struct element<__half> {
    static constexpr uint32_t ones = 0x3c003c00u;

    static __device__ __forceinline__ float2 unpack(uint32_t pair) {
        return __half22float2(*(__half2 *)&pair);
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        __half2 both = __floats2half2_rn(low, high);
        return *(uint32_t *)&both;
    }
    static __device__ __forceinline__ uint32_t least(uint32_t a, uint32_t b) {
        __half2 both = __hmin2(*(__half2 *)&a, *(__half2 *)&b);
        return *(uint32_t *)&both;
    }
    static __device__ __forceinline__ uint32_t greatest(uint32_t a, uint32_t b) {
        __half2 both = __hmax2(*(__half2 *)&a, *(__half2 *)&b);
        return *(uint32_t *)&both;
    }
    // A float as the sum of two, the smaller one in the upper half.
    static __device__ __forceinline__ uint32_t split(float value) {
        float high = __half2float(__float2half_rn(value));
        return pack(high, value - high);
    }
};

template <class T> __device__ __forceinline__ void unpack_eight(uint4 chunk, float out[8]) {
    uint32_t word[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = element<T>::unpack(word[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}

#endif
