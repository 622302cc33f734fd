// attend_run.cuh - internal: the kernel around attend_fast.cuh: a warp's way through its tiles, and what it leaves
// behind for each part of the work.
#ifndef BKV_ATTEND_RUN_CUDA_CUH
#define BKV_ATTEND_RUN_CUDA_CUH

#include "attend_fast.cuh"
#include "attend_launch.cuh"

// A tile's logits.
template <class F>
__device__ __forceinline__ void tile_keys(const F &f, const uint8_t *shared, const stage_t &stage, float s[SUBS][4],
                                          float largest[2]) {
    switch (key_kind(stage.shape)) {
    case BKV_GPU_BITS2:
        return tile_logits<BKV_GPU_BITS2, false>(f, shared, stage, s, largest);
    case BKV_GPU_BITS3:
        if (stage.count > BKV_GPU_TILE_MAX - BKV_GPU_TILE_STEP) {
            return tile_logits<BKV_GPU_BITS3, true>(f, shared, stage, s, largest);
        }
        return tile_logits<BKV_GPU_BITS3, false>(f, shared, stage, s, largest);
    case BKV_GPU_BITS4:
        return tile_logits<BKV_GPU_BITS4, false>(f, shared, stage, s, largest);
    case BKV_GPU_BITS8:
        return tile_logits<BKV_GPU_BITS8, false>(f, shared, stage, s, largest);
    case BKV_GPU_BF16:
        return tile_logits<BKV_GPU_BF16, false>(f, shared, stage, s, largest);
    default:
        return tile_logits<BKV_GPU_FP16, false>(f, shared, stage, s, largest);
    }
}

// Takes the tile into the running result.
template <class F>
__device__ __forceinline__ void tile_take(F &f, const uint8_t *shared, const stage_t &stage, const float s[SUBS][4],
                                          const float largest[2]) {
    fast_rescale(f, largest, tile_exponent<F>(shared, stage));
    switch (value_kind(stage.shape)) {
    case BKV_GPU_BITS2:
        return tile_values<BKV_GPU_BITS2, false>(f, shared, stage, s);
    case BKV_GPU_BITS3:
        if (stage.count > BKV_GPU_TILE_MAX - BKV_GPU_TILE_STEP) {
            return tile_values<BKV_GPU_BITS3, true>(f, shared, stage, s);
        }
        return tile_values<BKV_GPU_BITS3, false>(f, shared, stage, s);
    case BKV_GPU_BITS4:
        return tile_values<BKV_GPU_BITS4, false>(f, shared, stage, s);
    case BKV_GPU_BITS8:
        return tile_values<BKV_GPU_BITS8, false>(f, shared, stage, s);
    case BKV_GPU_BF16:
        return tile_values<BKV_GPU_BF16, false>(f, shared, stage, s);
    default:
        return tile_values<BKV_GPU_FP16, false>(f, shared, stage, s);
    }
}

// Sixteen channels of lanes g and g ^ 1 from the order of three-bit codes into their own: half a word's codes, five of each
// word, change places with the channels [16 g, 16 g + 16).
__device__ __forceinline__ void channels_straighten(float *x) {
    const bool upper = threadIdx.x / 4 % 2;
    float y[PAIRS], other[6];
#pragma unroll
    for (int i = 0; i < 6; i++) {
        other[i] = __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i < 5 ? 10 + i : 15], 4);
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        float low = i < 5 ? x[i] : i < 10 ? other[i - 5] : i < 15 ? x[i - 5] : other[5];
        float high = i < 4 ? x[6 + i] : i < 9 ? other[i - 4] : i < 14 ? x[i + 1] : i < 15 ? other[5] : x[15];
        y[i] = upper ? high : low;
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        x[i] = y[i];
    }
}

// The running result of a part: [columns][value_dim] sums that are relative to the largest logit, which follows them, and
// then the sum of weights. more: there is something already, from values of another kind.
template <class F>
__device__ __forceinline__ void fast_write(const bkv_gpu_attend_t &job, F &f, uint32_t warp, uint32_t part, uint32_t kind,
                                           bool more) {
    const uint32_t lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4;
    const bool upper = g / 4; // half of the channels
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
            f.sum[j] += __shfl_xor_sync(ALL_LANES, f.sum[j], step);
#pragma unroll
            for (int v = 0; v < F::CHUNKS * F::HALVES; v++) {
                float *zero = &f.zero[0][0][0] + 2 * v + j;
                *zero += __shfl_xor_sync(ALL_LANES, *zero, step);
            }
        }
        uint32_t column = 2 * (F::TWICE ? c % 2 : c) + j;
        float *row = part_at(job, warp, part) + column * (F::VALUE_DIM + 4);
        float before = more ? row[F::VALUE_DIM] : -INFINITY, sum = more ? row[F::VALUE_DIM + 1] : 0;
        __syncwarp();
        float top = fmaxf(before, f.top[j]);
        float keep = before == -INFINITY ? 0 : exp2_fast(before - top),
              gain = f.top[j] == -INFINITY ? 0 : exp2_fast(f.top[j] - top + (float)f.exponent);
#pragma unroll
        for (int v = 0; v < F::CHUNKS; v++) {
            float x[PAIRS];
            float zero = upper ? f.zero[v][F::HALVES - 1][j] : f.zero[v][0][j];
#pragma unroll
            for (int e = 0; e < PAIRS; e++) {
                int shift = kind_native((int)kind) ? 0 : 24 - kind_shift((int)kind, e);
                float sums = upper ? f.out[v][F::HALVES - 1][e / 2][e % 2 * 2 + j] : f.out[v][0][e / 2][e % 2 * 2 + j];
                x[e] = (sums * exp2f((float)shift) + zero) * gain;
            }
            if (kind == BKV_GPU_BITS3) {
                channels_straighten(x);
            }
            if (128 * v + 16 * g < F::VALUE_DIM && (!F::TWICE || c / 2 == upper)) {
                float4 *at = (float4 *)(row + 128 * v + 16 * g);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float4 old = more ? at[i] : make_float4(0, 0, 0, 0);
                    at[i] = make_float4(old.x * keep + x[4 * i], old.y * keep + x[4 * i + 1], old.z * keep + x[4 * i + 2],
                                        old.w * keep + x[4 * i + 3]);
                }
            }
        }
        if (g == 0 && (!F::TWICE || c < 2)) {
            row[F::VALUE_DIM] = top;
            row[F::VALUE_DIM + 1] = sum * keep + f.sum[j] * gain;
        }
    }
}

#define ERRANDS_ROOM (BKV_GPU_AHEAD * BKV_GPU_ERRAND_ROOM)

// Shared memory of a warp: errands, keys, values.
__host__ __device__ __forceinline__ uint32_t warp_room(const bkv_gpu_attend_t &job) {
    return ERRANDS_ROOM + job.key_stage + job.value_stage;
}

// Notes what is to be copied for the next tiles, and says how many these are.
template <int KEY_DIM, int VALUE_DIM>
__device__ __forceinline__ uint32_t errands_note(const bkv_gpu_attend_t &job, walk_t &walk, uint32_t left, uint32_t keys_at,
                                                 errand_t *errands) {
    found_t found;
    const uint32_t count = walk_look(job, walk, left, found), lane = threadIdx.x % WARP;
    __syncwarp(); // all have read what was noted before
    if (lane < count) {
        errand_note<KEY_DIM, VALUE_DIM>(found, keys_at, keys_at + job.key_stage, errands[lane]);
    }
    __syncwarp();
    return count;
}

template <int KEY_DIM, int VALUE_DIM, int COLUMNS, int WARPS>
__global__ void __launch_bounds__(WARPS *WARP, 1)
    attend_fast(const __grid_constant__ bkv_gpu_attend_t job, uint32_t all_warps) {
    extern __shared__ __align__(16) uint8_t shared[];
    launch_follows();
    launch_awaits();
    // Warps that follow one another are on different multiprocessors, so that little work uses many.
    const uint32_t own = threadIdx.x / WARP, warp = own * gridDim.x + blockIdx.x;
    const share_t share = share_find(job, (uint64_t *)(shared + BKV_GPU_BARRIERS_ROOM), warp, all_warps);
    copies_follow();
    __syncthreads();
    uint32_t left = share.left;
    if (left == 0) {
        return;
    }
    const uint32_t errands_at = BKV_GPU_BARRIERS_ROOM + own * warp_room(job), keys_at = errands_at + ERRANDS_ROOM;
    errand_t *const errands = (errand_t *)(shared + errands_at);
    fast_t<KEY_DIM, VALUE_DIM, COLUMNS> f;
    walk_t walk;
    copies_t keys, values;
    copies_open(keys, shared, 2 * own);
    copies_open(values, shared, 2 * own + 1);
    walk_start(job, walk, share);
    uint32_t ahead = errands_note<KEY_DIM, VALUE_DIM>(job, walk, left, keys_at, errands), at = 0; // noted; of these, run
    stage_t stage = errands[0].stage;
    keys_start(errands[0], shared, keys);
    values_start(errands[at++], shared, values);
    uint32_t part = walk.part, kind = value_kind(stage.shape);
    bool more = false;
    query_open(job, part, f);
    fast_reset(f);
    for (;;) {
        if (at == ahead && left > 1) { // while this tile is on its way
            ahead = errands_note<KEY_DIM, VALUE_DIM>(job, walk, left - 1, keys_at, errands);
            at = 0;
            if (walk.part != part) {
                query_fetch<fast_t<KEY_DIM, VALUE_DIM, COLUMNS>>(job, walk.part);
            }
        }
        float s[SUBS][4], largest[2];
        copies_wait(keys, stage.count > 0);
        if (stage.count > 0) {
            tile_keys(f, shared, stage, s, largest);
        }
        __syncwarp(); // all have read the keys before others come over them
        if (left > 1) {
            keys_start(errands[at], shared, keys);
        } else {
            copies_commit();
        }
        copies_wait(values, stage.count > 0);
        if (stage.count > 0) {
            tile_take(f, shared, stage, s, largest);
        }
        if (--left == 0) {
            break;
        }
        __syncwarp();
        stage = errands[at].stage;
        values_start(errands[at++], shared, values);
        if (walk.part != part || value_kind(stage.shape) != kind) {
            fast_write(job, f, warp, part, kind, more);
            more = walk.part == part;
            kind = value_kind(stage.shape);
            if (!more) {
                part = walk.part;
                query_open(job, part, f);
            }
            fast_reset(f);
        }
    }
    fast_write(job, f, warp, part, kind, more);
}

// Starts the kernel for these dims.
template <int KEY_DIM, int VALUE_DIM, int COLUMNS, int WARPS>
int fast_launch(const bkv_gpu_attend_t *job, cudaStream_t stream) {
    auto *kernel = attend_fast<KEY_DIM, VALUE_DIM, COLUMNS, WARPS>;
    int bytes = (int)(BKV_GPU_BARRIERS_ROOM + warp_room(*job) * job->thread_block_warps);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) {
        return (int)error;
    }
    return launch_behind(kernel, job->thread_blocks, job->thread_block_warps * WARP, (size_t)bytes, stream, job,
                         job->thread_blocks * job->thread_block_warps);
}

#endif
