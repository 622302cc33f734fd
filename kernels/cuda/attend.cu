// attend.cu - attention over records on the GPU: finding the sections and cutting them into tiles before, merging the
// partial results after. What is between is in attend_run.cuh and attend_general.cu.
#include "attend_codes.cuh"
#include "attend_launch.cuh"
#include "attend_walk.cuh"

#define PLAN_THREADS  512
#define MERGE_THREADS 256

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

// --- after: one thread block for each column of each part; its warps share the partial results, its lanes the channels

template <class T> __device__ __forceinline__ T block_sum(T value, T *shared) {
    for (uint32_t step = WARP / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, (int)step);
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0) {
        shared[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    T sum = 0;
    for (uint32_t i = 0; i < MERGE_THREADS / WARP; i++) {
        sum += shared[i];
    }
    return sum;
}

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

// What `warps` warps left of column `column` of `part`, from warp `first` on, merged. The result is every thread's; the sums
// of channels are in `sums`, relative to its top.
__device__ inline merge_t merge_parts(const bkv_gpu_attend_t &job, uint32_t part, uint32_t column, uint32_t first,
                                      uint32_t warps, float *sums) {
    __shared__ merge_t of_warp[MERGE_THREADS / WARP];
    const uint32_t lane = threadIdx.x % WARP, own = threadIdx.x / WARP, dim = job.value_dim;
    float *mine = sums + own * dim;
    merge_t all = {-INFINITY, 0};
    for (uint32_t i = own; i < warps; i += MERGE_THREADS / WARP) {
        const float *row = part_at(job, first + i, part) + (uint64_t)column * (dim + 4);
        merge_t next = {row[dim], row[dim + 1]};
        float top = fmaxf(all.top, next.top), keep = merge_factor(top, all.top), gain = merge_factor(top, next.top);
        for (uint32_t d = lane; d < dim; d += WARP) {
            mine[d] = (i < MERGE_THREADS / WARP ? 0 : mine[d] * keep) + row[d] * gain;
        }
        all = {top, all.sum * keep + next.sum * gain};
    }
    if (lane == 0) {
        of_warp[own] = all;
    }
    __syncthreads();
    uint32_t used = min(warps, (uint32_t)(MERGE_THREADS / WARP));
    all = {-INFINITY, 0};
    for (uint32_t i = 0; i < used; i++) {
        all.top = fmaxf(all.top, of_warp[i].top);
    }
    for (uint32_t i = 0; i < used; i++) {
        all.sum += of_warp[i].sum * merge_factor(all.top, of_warp[i].top);
    }
    for (uint32_t d = threadIdx.x; d < dim; d += MERGE_THREADS) {
        float sum = 0;
        for (uint32_t i = 0; i < used; i++) {
            sum += sums[i * dim + d] * merge_factor(all.top, of_warp[i].top);
        }
        sums[d] = sum; // this thread alone reads and writes channel d
    }
    return all;
}

__global__ void __launch_bounds__(MERGE_THREADS)
    attend_merge(const __grid_constant__ bkv_gpu_attend_t job, uint32_t all_warps) {
    extern __shared__ float sums[];
    __shared__ unsigned long long counts[MERGE_THREADS / WARP];
    const uint32_t pair = blockIdx.x, block = blockIdx.y / job.columns, column = blockIdx.y % job.columns;
    const uint32_t row = block * job.columns + column;
    if (row >= job.rows) {
        return;
    }
    unsigned long long before = 0, total = 0;
    for (uint32_t i = threadIdx.x; i < job.batch * job.heads; i += MERGE_THREADS) {
        uint32_t tiles = pair_tiles(job, i);
        before += i < pair ? tiles : 0;
        total += tiles;
    }
    before = block_sum(before, counts) * job.blocks;
    total = block_sum(total, counts) * job.blocks;
    const uint64_t at = (uint64_t)pair * job.rows + row;
    const uint32_t tiles = job.tiles[pair];
    if (tiles == 0 || tiles == BKV_GPU_BROKEN) {
        for (uint32_t d = threadIdx.x; d < job.value_dim; d += MERGE_THREADS) {
            out_store(job, at * job.value_dim + d, tiles == 0 ? 0 : NAN);
        }
        if (threadIdx.x == 0) {
            job.lse[at] = tiles == 0 ? -INFINITY : NAN;
        }
        return;
    }
    before += (uint64_t)block * tiles;
    all_warps = share_warps(total, all_warps);
    uint32_t first = share_owner(total, before, all_warps), last = share_owner(total, before + tiles - 1, all_warps);
    merge_t all = merge_parts(job, pair * job.blocks + block, column, first, last - first + 1, sums);
    for (uint32_t d = threadIdx.x; d < job.value_dim; d += MERGE_THREADS) {
        out_store(job, at * job.value_dim + d, sums[d] / all.sum);
    }
    if (threadIdx.x == 0) {
        job.lse[at] = (all.top + log2f(all.sum)) * 0.6931471805599453f;
    }
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
        dim3 grid(job->batch * job->heads, job->blocks * job->columns);
        size_t shared = MERGE_THREADS / WARP * job->value_dim * sizeof(float);
        attend_merge<<<grid, MERGE_THREADS, shared, queue>>>(*job, job->thread_blocks * job->thread_block_warps);
        error = (int)cudaGetLastError();
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
    uint32_t needed = 0; // by the shortest tile of any pair of kinds
    for (uint32_t pair = 0; pair < BKV_GPU_FP32 * BKV_GPU_FP32; pair++) {
        uint32_t room = bkv_gpu_tile_room(pair / BKV_GPU_FP32, key_dim, pair % BKV_GPU_FP32, value_dim, BKV_GPU_TILE_STEP);
        needed = room > needed ? room : needed;
    }
    uint32_t most = narrow ? NARROW_WARPS : WIDE_WARPS, warps = most;
    while (warps > 1 && stage_bytes(shared_memory, warps) < (warps > most * 2 / 3 && wanted > needed ? wanted : needed)) {
        warps--;
    }
    job->thread_block_warps = warps;
    job->stage = stage_bytes(shared_memory, warps);
    return true;
}
