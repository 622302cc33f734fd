// attend_cuda.cu - attention over records on the GPU: finding the sections and cutting them into tiles before, merging the
// partial results after. What is between is in attend_run_cuda.cuh and attend_general_cuda.cu.
#include "attend_codes_cuda.cuh"
#include "attend_launch_cuda.cuh"
#include "attend_walk_cuda.cuh"

#define PLAN_THREADS  512
#define MERGE_THREADS 1024
#define MERGE_PARTS   4 // that a warp merges one after the other, if there are warps enough

// --- before: one thread block for each (sequence, head), one thread for each of its records

__device__ __forceinline__ uint32_t kind_of(uint32_t bits, uint32_t dtype) {
    if (bits == BKV_BITS_NATIVE) {
        return dtype == BKV_BF16 ? BKV_GPU_BF16 : dtype == BKV_FP16 ? BKV_GPU_FP16 : BKV_GPU_FP32;
    }
    return bits == 8 ? BKV_GPU_BITS8 : bits - 2;
}

// False for a record that is not what the caller said.
__device__ inline bool section_find(const bkv_gpu_attend_t &job, const uint8_t *record, uint32_t head,
                                    bkv_gpu_section_t *section, uint32_t *tiles) {
    const bkv_record_header_t *header = (const bkv_record_header_t *)record;
    if (header->magic != BKV_RECORD_MAGIC || header->version != BKV_RECORD_VERSION || header->layers <= job.layer ||
        header->heads != job.heads || header->key_dim != job.key_dim || header->value_dim != job.value_dim ||
        header->dtype != job.dtype) {
        return false;
    }
    const uint4 *directory = (const uint4 *)(record + sizeof(*header));
    uint4 words = directory[(uint64_t)job.layer * job.heads + head];
    bkv_section_t entry;
    memcpy(&entry, &words, sizeof(entry));
    uint64_t index = entry.index_kind == BKV_INDEX_BITMAP ? (header->tokens + 31ull) / 32 * 4
                     : entry.index_kind == BKV_INDEX_LIST ? 4ull * entry.tokens
                                                          : 0;
    uint32_t key_kind = kind_of(entry.key_bits, job.dtype), value_kind = kind_of(entry.value_bits, job.dtype);
    uint32_t limit = job.limit[key_kind][value_kind],
             groups = max(1u, (entry.tokens + BKV_KEY_GROUP_TOKENS / 2) / BKV_KEY_GROUP_TOKENS);
    uint32_t group_tokens = key_kind > BKV_GPU_BITS8 ? limit : (entry.tokens + groups - 1) / groups;
    section->keys = record + (uint64_t)entry.key_offset * BKV_RECORD_ALIGN + index;
    section->values = record + (uint64_t)entry.value_offset * BKV_RECORD_ALIGN;
    section->tokens = entry.tokens;
    section->weighted = (header->flags & BKV_RECORD_WEIGHTS) != 0;
    section->weights = section->weighted ? *(const uint32_t *)section->keys : 0;
    section->kinds = (uint8_t)(key_kind | value_kind << 4);
    section->group_tokens = (uint8_t)group_tokens;
    section->group_tiles = (uint8_t)((group_tokens + limit - 1) / limit);
    *tiles = (entry.tokens + group_tokens - 1) / group_tokens * section->group_tiles;
    return true;
}

// Exclusive prefix sum over the thread block; *sum gets the total.
__device__ inline uint32_t block_prefix(uint32_t value, uint32_t *sum) {
    __shared__ uint32_t warp_sums[PLAN_THREADS / WARP];
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, upto = value, before = 0, all = 0;
    for (uint32_t step = 1; step < WARP; step *= 2) {
        uint32_t other = __shfl_up_sync(ALL_LANES, upto, step);
        upto += lane >= step ? other : 0;
    }
    if (lane == WARP - 1) {
        warp_sums[warp] = upto;
    }
    __syncthreads();
    for (uint32_t i = 0; i < PLAN_THREADS / WARP; i++) {
        before += i < warp ? warp_sums[i] : 0;
        all += warp_sums[i];
    }
    __syncthreads();
    *sum = all;
    return before + upto - value;
}

__global__ void __launch_bounds__(PLAN_THREADS) attend_plan(const __grid_constant__ bkv_gpu_attend_t job) {
    const uint32_t pair = blockIdx.x, sequence = pair / job.heads, head = pair % job.heads;
    const uint32_t from = job.first[sequence], to = job.first[sequence + 1];
    bool good = from <= to && to <= job.max_records;
    uint32_t count = good ? to - from : 0, tiles = 0;
    bkv_gpu_section_t *list = job.sections + (uint64_t)from * job.heads + (uint64_t)head * count;
    for (uint32_t base = 0; base < count; base += PLAN_THREADS) {
        uint32_t i = base + threadIdx.x, own = 0, sum;
        bkv_gpu_section_t section = {};
        if (i < count) {
            good = section_find(job, (const uint8_t *)job.records[from + i], head, &section, &own) && good;
        }
        section.tile = tiles + block_prefix(own, &sum);
        if (i < count) {
            uint4 halves[2];
            memcpy(halves, &section, sizeof(section));
            ((uint4 *)&list[i])[0] = halves[0];
            ((uint4 *)&list[i])[1] = halves[1];
        }
        tiles += sum;
    }
    good = __syncthreads_and(good);
    if (threadIdx.x == 0) {
        job.tiles[pair] = good ? tiles : BKV_GPU_BROKEN;
    }
}

// --- after: one thread block for each part; some of its warps for each column, its lanes the channels

__device__ __forceinline__ void out_store(const bkv_gpu_attend_t &job, uint64_t i, float value) {
    if (job.out_dtype == BKV_FP32) {
        ((float *)job.out)[i] = value;
    } else if (job.out_dtype == BKV_FP16) {
        ((__half *)job.out)[i] = __float2half_rn(value);
    } else {
        ((__nv_bfloat16 *)job.out)[i] = __float2bfloat16_rn(value);
    }
}

struct merge_t {
    float top, sum;
};

__device__ __forceinline__ float merge_factor(float top, float of) {
    return of == -INFINITY ? 0 : exp2_fast(of - top);
}

// What warps first, first + step, ... before `end` left of column `column` of `part`, merged by a warp. The sums of channels
// are in `sums`, relative to the result's top.
__device__ inline merge_t merge_parts(const bkv_gpu_attend_t &job, uint32_t part, uint32_t column, uint32_t first, uint32_t end,
                                      uint32_t step, float *sums) {
    const uint32_t lane = threadIdx.x % WARP, dim = job.value_dim;
    merge_t all = {-INFINITY, 0};
    for (uint32_t i = first; i < end; i += step) {
        const float *row = part_at(job, i, part) + (uint64_t)column * (dim + 4);
        merge_t next = {row[dim], row[dim + 1]};
        float top = fmaxf(all.top, next.top), keep = merge_factor(top, all.top), gain = merge_factor(top, next.top);
        for (uint32_t d = lane; d < dim; d += WARP) {
            sums[d] = (i == first ? 0 : sums[d] * keep) + row[d] * gain;
        }
        all = {top, all.sum * keep + next.sum * gain};
    }
    return all;
}

// The results of `count` warps, whose sums are `dim` floats apart, merged and written out by the first of them.
__device__ inline void merge_write(const bkv_gpu_attend_t &job, const merge_t *merged, const float *sums, uint32_t count,
                                   uint64_t row) {
    merge_t all = {-INFINITY, 0};
    for (uint32_t i = 0; i < count; i++) {
        all.top = fmaxf(all.top, merged[i].top);
    }
    for (uint32_t i = 0; i < count; i++) {
        all.sum += merged[i].sum * merge_factor(all.top, merged[i].top);
    }
    for (uint32_t d = threadIdx.x % WARP; d < job.value_dim; d += WARP) {
        float sum = 0;
        for (uint32_t i = 0; i < count; i++) {
            float factor = merge_factor(all.top, merged[i].top);
            sum += factor > 0 ? sums[i * job.value_dim + d] * factor : 0; // a warp without parts has no sums either
        }
        out_store(job, row * job.value_dim + d, sum / all.sum);
    }
    if (threadIdx.x % WARP == 0) {
        job.lse[row] = (all.top + log2f(all.sum)) * 0.6931471805599453f;
    }
}

// Of a pair without records, or with wrong ones.
__device__ inline void merge_nothing(const bkv_gpu_attend_t &job, uint64_t row, bool broken) {
    for (uint32_t d = threadIdx.x % WARP; d < job.value_dim; d += WARP) {
        out_store(job, row * job.value_dim + d, broken ? NAN : 0);
    }
    if (threadIdx.x % WARP == 0) {
        job.lse[row] = broken ? NAN : -INFINITY;
    }
}

__global__ void __launch_bounds__(MERGE_THREADS)
    attend_merge(const __grid_constant__ bkv_gpu_attend_t job, uint32_t all_warps) {
    extern __shared__ float sums[]; // [warps of the thread block][value_dim]
    __shared__ merge_t merged[MERGE_THREADS / WARP];
    const uint32_t each = blockDim.x / WARP / job.columns, own = threadIdx.x / WARP, column = own / each;
    const uint32_t part = blockIdx.x, pair = part / job.blocks, block = part % job.blocks;
    const uint32_t tiles = pair_tiles(job, pair), row = block * job.columns + column;
    const uint64_t at = (uint64_t)pair * job.rows + row;
    if (tiles == 0) {
        if (own % each == 0 && row < job.rows) {
            merge_nothing(job, at, job.tiles[pair] == BKV_GPU_BROKEN);
        }
        return;
    }
    const uint64_t total = job.before[job.batch * job.heads] * job.blocks;
    const uint64_t before = job.before[pair] * job.blocks + (uint64_t)block * tiles;
    const uint32_t warps = share_warps(total, all_warps);
    const uint32_t first = share_owner(total, before, warps), end = share_owner(total, before + tiles - 1, warps) + 1;
    merge_t all = merge_parts(job, part, column, first + own % each, end, each, sums + own * job.value_dim);
    if (threadIdx.x % WARP == 0) {
        merged[own] = all;
    }
    __syncthreads();
    if (own % each == 0 && row < job.rows) {
        merge_write(job, &merged[own], sums + own * job.value_dim, each, at);
    }
}

// Enough warps for each column that none merges many parts, if the thread block's shared memory holds their sums.
static int merge_launch(const bkv_gpu_attend_t *job, cudaStream_t stream) {
    const uint32_t warps = job->thread_blocks * job->thread_block_warps, parts = job->batch * job->heads * job->blocks;
    const uint32_t most = min(MERGE_THREADS / WARP, 48 * 1024 / (uint32_t)sizeof(float) / job->value_dim) / job->columns;
    uint32_t each = 1;
    while (2 * each <= most && each * MERGE_PARTS < warps / parts + 1) {
        each *= 2;
    }
    const uint32_t threads = each * job->columns * WARP;
    attend_merge<<<parts, threads, threads / WARP * job->value_dim * sizeof(float), stream>>>(*job, warps);
    return (int)cudaGetLastError();
}

extern "C" int bkv_gpu_attend(const bkv_gpu_attend_t *job, void *stream) {
    cudaStream_t queue = (cudaStream_t)stream;
    attend_plan<<<job->batch * job->heads, PLAN_THREADS, 0, queue>>>(*job);
    int error = (int)cudaGetLastError();
    if (error == 0) {
        error = job->stage == 0       ? attend_general(job, queue)
                : job->key_dim <= 128 ? attend_narrow(job, queue)
                                      : attend_wide(job, queue);
    }
    if (error == 0) {
        error = merge_launch(job, queue);
    }
    return error;
}

// The widest stage of a device's shared memory that a warp of `warps` gets.
static uint32_t stage_bytes(uint32_t shared_memory, uint32_t warps) {
    return (shared_memory - BKV_GPU_BARRIERS_ROOM) / (2 * warps) / 16 * 16;
}

extern "C" bool bkv_gpu_attend_shape(bkv_gpu_attend_t *job, uint32_t shared_memory) {
    uint32_t key_dim = job->key_dim, value_dim = job->value_dim;
    bool narrow = key_dim == value_dim && (key_dim == 64 || key_dim == 96 || key_dim == 128);
    bool wide = (key_dim == 192 && value_dim == 128) || (key_dim == 256 && value_dim == 256);
    job->stage = 0;
    if (job->dtype == BKV_FP32 || !(narrow || wide)) {
        job->columns = 1;
        job->thread_block_warps = GENERAL_WARPS;
        return false;
    }
    job->columns = job->rows <= 4 || value_dim > 128 ? 4 : 8;
    // As many warps as leave each a stage that takes 80 tokens of 3 bits; but rather shorter tiles than too few warps.
    uint32_t wanted = bkv_gpu_tile_room(BKV_GPU_BITS3, key_dim, BKV_GPU_BITS3, value_dim, BKV_GPU_TILE_MAX);
    uint32_t needed = bkv_gpu_tile_room(BKV_GPU_BF16, key_dim, BKV_GPU_BF16, value_dim, BKV_GPU_TILE_STEP);
    uint32_t most = narrow ? NARROW_WARPS : WIDE_WARPS, warps = most;
    while (warps > 1 && stage_bytes(shared_memory, warps) < (warps > most * 2 / 3 ? wanted : needed)) {
        warps--;
    }
    job->thread_block_warps = warps;
    job->stage = stage_bytes(shared_memory, warps);
    return true;
}
