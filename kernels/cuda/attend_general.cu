// attend_general.cu - attention for any dims and element types, one query at a time: the plain way, in float32. The lanes
// of a warp share the channels; attend_fast.cuh is for the usual dims.
#include "attend_codes.cuh"
#include "attend_launch.cuh"
#include "attend_walk.cuh"

#define LOG2E 1.4426950408889634f

// Element `i` of a row: its code, or its value where the kind is native.
__device__ inline float element_at(uint32_t kind, const uint8_t *row, uint32_t dim, uint32_t i) {
    switch (kind) {
    case BKV_GPU_BITS2:
        return (float)(row[i / 4] >> i % 4 * 2 & 3);
    case BKV_GPU_BITS4:
        return (float)(row[i / 2] >> i % 2 * 4 & 15);
    case BKV_GPU_BITS8:
        return (float)row[i];
    case BKV_GPU_BF16:
        return __uint_as_float((uint32_t)((const uint16_t *)row)[i] << 16);
    case BKV_GPU_FP16:
        return __half2float(__ushort_as_half(((const uint16_t *)row)[i]));
    case BKV_GPU_FP32:
        return ((const float *)row)[i];
    default:
        break;
    }
    const uint8_t *group = row + i / 32 * 12; // three bits
    uint32_t place = i % 32;
    if (i / 32 == dim / 32) { // what no whole group is left of
        uint32_t bit = 3 * place, byte = bit / 8;
        uint32_t both = group[byte] | (bit % 8 > 5 ? (uint32_t)group[byte + 1] << 8 : 0);
        return (float)(both >> bit % 8 & 7);
    }
    if (place < 30) {
        uint32_t half = place / 5, bits = group[2 * half] | (uint32_t)group[2 * half + 1] << 8;
        return (float)(bits >> place % 5 * 3 & 7);
    }
    const uint8_t *top = group + 2 * (place - 30) + 1;
    return (float)(top[0] >> 7 | top[4] >> 7 << 1 | top[8] >> 7 << 2);
}

__device__ __forceinline__ float2 params_at(const uint8_t *params, uint64_t i) {
    return __half22float2(as_half2(((const uint32_t *)params)[i]));
}

__device__ __forceinline__ float warp_sum(float value) {
    for (int step = 16; step > 0; step /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, step);
    }
    return value;
}

// Lane i has channels i, i + 32, ... of everything.
template <int SLICES> struct general_t {
    float q[SLICES], out[SLICES];
    float top, sum;
};

template <int SLICES> __device__ void general_open(const bkv_gpu_attend_t &job, uint32_t part, general_t<SLICES> &f) {
    uint64_t first = (uint64_t)part * job.key_dim; // a block is a row here
    f.top = -INFINITY;
    f.sum = 0;
#pragma unroll
    for (int k = 0; k < SLICES; k++) {
        uint32_t i = threadIdx.x % WARP + WARP * k;
        f.out[k] = f.q[k] = 0;
        if (i < job.key_dim) {
            f.q[k] = job.q_dtype == BKV_FP32   ? ((const float *)job.q)[first + i]
                     : job.q_dtype == BKV_FP16 ? __half2float(((const __half *)job.q)[first + i])
                                               : __bfloat162float(((const __nv_bfloat16 *)job.q)[first + i]);
            f.q[k] *= job.scale * LOG2E;
        }
    }
}

// Logits of up to 32 tokens of a tile from `first`, one in each lane.
template <int SLICES>
__device__ float general_logits(const bkv_gpu_attend_t &job, const general_t<SLICES> &f, const place_t &section, uint32_t group,
                                uint64_t first, uint32_t count) {
    const uint32_t lane = threadIdx.x % WARP, kind = key_kind(section.shape), row = bkv_gpu_row_bytes(kind, job.key_dim);
    const uint8_t *keys = section_keys(section, kind, job.key_dim) + first * row;
    float scaled[SLICES], zero = 0, logit = -INFINITY;
#pragma unroll
    for (int k = 0; k < SLICES; k++) {
        uint32_t i = lane + WARP * k;
        scaled[k] = f.q[k];
        if (kind <= BKV_GPU_BITS8 && i < job.key_dim) {
            float2 params = params_at(section_params(section), (uint64_t)group * job.key_dim + i);
            zero += f.q[k] * params.y;
            scaled[k] *= params.x;
        }
    }
    for (uint32_t t = 0; t < count; t++, keys += row) {
        float product = zero;
#pragma unroll
        for (int k = 0; k < SLICES; k++) {
            uint32_t i = lane + WARP * k;
            if (i < job.key_dim) {
                product += scaled[k] * element_at(kind, keys, job.key_dim, i);
            }
        }
        product = warp_sum(product);
        logit = lane == t ? product : logit;
    }
    if (is_weighted(section.shape) && lane < count) {
        float2 range = __half22float2(as_half2(section.weights));
        logit += (range.x + range.y * (float)section.keys[4 + first + lane]) * LOG2E;
    }
    return logit;
}

template <int SLICES>
__device__ void general_values(const bkv_gpu_attend_t &job, general_t<SLICES> &f, const place_t &section, uint64_t first,
                               uint32_t count, float weight) {
    const uint32_t lane = threadIdx.x % WARP, kind = value_kind(section.shape), row = bkv_gpu_row_bytes(kind, job.value_dim);
    const uint32_t groups = (job.value_dim + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS;
    const uint8_t *values = section_values(section, kind, job.value_dim) + first * row;
    for (uint32_t t = 0; t < count; t++, values += row) {
        float p = lane_get(weight, t);
#pragma unroll
        for (int k = 0; k < SLICES; k++) {
            uint32_t i = lane + WARP * k;
            if (i < job.value_dim) {
                float2 params = make_float2(1, 0);
                if (kind <= BKV_GPU_BITS8) {
                    params = params_at(section.values, (first + t) * groups + i / BKV_VALUE_GROUP_DIMS);
                }
                f.out[k] += p * (params.y + params.x * element_at(kind, values, job.value_dim, i));
            }
        }
    }
}

template <int SLICES> __device__ void general_take(const bkv_gpu_attend_t &job, general_t<SLICES> &f, const found_t &found) {
    const span_t &span = found.span;
    for (uint32_t t = 0; t < span.count; t += WARP) {
        uint32_t count = min(span.count - t, WARP);
        float logit = general_logits(job, f, found.section, span.group, span.first + t, count), top = logit;
        for (int step = 16; step > 0; step /= 2) {
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, step));
        }
        top = fmaxf(top, f.top);
        float shrink = exp2_fast(f.top - top), weight = exp2_fast(logit - top);
        f.top = top;
        f.sum = f.sum * shrink + warp_sum(weight);
#pragma unroll
        for (int k = 0; k < SLICES; k++) {
            f.out[k] *= shrink;
        }
        general_values(job, f, found.section, span.first + t, count, weight);
    }
}

template <int SLICES>
__device__ void general_write(const bkv_gpu_attend_t &job, const general_t<SLICES> &f, uint32_t warp, uint32_t part) {
    float *row = part_at(job, warp, part);
#pragma unroll
    for (int k = 0; k < SLICES; k++) {
        uint32_t i = threadIdx.x % WARP + WARP * k;
        if (i < job.value_dim) {
            row[i] = f.out[k];
        }
    }
    if (threadIdx.x % WARP == 0) {
        row[job.value_dim] = f.top;
        row[job.value_dim + 1] = f.sum;
    }
}

template <int SLICES>
__global__ void __launch_bounds__(GENERAL_WARPS *WARP)
    attend_any(const __grid_constant__ bkv_gpu_attend_t job, uint32_t all_warps) {
    launch_follows();
    launch_awaits();
    const uint32_t warp = threadIdx.x / WARP * gridDim.x + blockIdx.x;
    __shared__ uint64_t sums[GENERAL_WARPS * WARP];
    const share_t share = share_find(job, sums, warp, all_warps);
    uint32_t left = share.left;
    if (left == 0) {
        return;
    }
    walk_t walk;
    general_t<SLICES> f;
    walk_start(job, walk, share);
    uint32_t part = walk.part;
    general_open(job, part, f);
    while (left > 0) {
        found_t found;
        const uint32_t count = walk_look(job, walk, left, found);
        if (walk.part != part) {
            general_write(job, f, warp, part);
            part = walk.part;
            general_open(job, part, f);
        }
        for (uint32_t i = 0; i < count; i++) {
            general_take(job, f, found_get(found, i));
        }
        left -= count;
    }
    general_write(job, f, warp, part);
}

int attend_general(const bkv_gpu_attend_t *job, cudaStream_t stream) {
    auto *kernel = job->key_dim <= 256 && job->value_dim <= 256 ? attend_any<8> : attend_any<BKV_MAX_DIM / WARP>;
    return launch_behind(kernel, job->thread_blocks, GENERAL_WARPS * WARP, 0, stream, job, job->thread_blocks * GENERAL_WARPS);
}
