// attend.cu - attention over records on the GPU: finding the sections and cutting them into tiles before, merging the
// partial results after. What is between is in attend_run.cuh and attend_general.cu.
#include "attend_codes.cuh"
#include "attend_launch.cuh"
#include "attend_walk.cuh"

#include <stddef.h>

#define FIND_THREADS  128
#define FIND_BLOCKS   1024 // most for a sequence
#define PLAN_THREADS  1024
#define PLAN_EACH     4 // sections of a thread at once
#define MERGE_THREADS 1024

// Shared memory of a thread block with eight columns: what its registers do not hold must fit in the first-level cache, which
// has the rest.
#define SHARED_MOST (163 * 1024)

// --- before: what is where, and which tile is whose

__device__ __forceinline__ uint32_t kind_of(uint32_t bits, uint32_t dtype) {
    if (bits == BKV_BITS_NATIVE) {
        return dtype == BKV_BF16 ? BKV_GPU_BF16 : dtype == BKV_FP16 ? BKV_GPU_FP16 : BKV_GPU_FP32;
    }
    return bits == 8 ? BKV_GPU_BITS8 : bits - 2;
}

// What a section's place depends on, of its record's header.
struct header_t {
    uint32_t tokens;
    bool weighted, good;
};

// good: the record is what the caller said.
__device__ __forceinline__ header_t header_read(const bkv_gpu_attend_t &job, const uint8_t *record) {
    static_assert(offsetof(bkv_record_header_t, tokens) == 88 && offsetof(bkv_record_header_t, heads) == 94 &&
                      offsetof(bkv_record_header_t, value_dim) == 102 && offsetof(bkv_record_header_t, dtype) == 104,
                  "three loads have all of it");
    const uint4 *header = (const uint4 *)record, first = header[0], middle = header[5], last = header[6];
    const bool ours = first.x == BKV_RECORD_MAGIC && (first.y & 0xffff) == BKV_RECORD_VERSION;
    const uint32_t layers = middle.w & 0xffff, heads = middle.w >> 16, key_dim = last.y & 0xffff, value_dim = last.y >> 16;
    return {middle.z, (first.y >> 24 & BKV_RECORD_WEIGHTS) != 0,
            ours && layers > job.layer && heads == job.heads && key_dim == job.key_dim && value_dim == job.value_dim &&
                (last.z & 255) == job.dtype};
}

// The section of a record's head. tile: how many tiles it has, or BKV_GPU_BROKEN where the record is not what the caller said.
__device__ __forceinline__ bkv_gpu_section_t section_find(const bkv_gpu_attend_t &job, const uint8_t *record, uint32_t head) {
    const header_t header = header_read(job, record);
    bkv_gpu_section_t section = {};
    section.tile = BKV_GPU_BROKEN;
    if (!header.good) {
        return section;
    }
    const uint4 words = ((const uint4 *)(record + sizeof(bkv_record_header_t)))[(uint64_t)job.layer * job.heads + head];
    bkv_section_t entry;
    memcpy(&entry, &words, sizeof(entry));
    uint64_t index = entry.index_kind == BKV_INDEX_BITMAP ? (header.tokens + 31ull) / 32 * 4
                     : entry.index_kind == BKV_INDEX_LIST ? 4ull * entry.tokens
                                                          : 0;
    uint32_t key_kind = kind_of(entry.key_bits, job.dtype), value_kind = kind_of(entry.value_bits, job.dtype);
    uint32_t limit = job.limit[key_kind][value_kind],
             groups = max(1u, (entry.tokens + BKV_KEY_GROUP_TOKENS / 2) / BKV_KEY_GROUP_TOKENS);
    uint32_t group_tokens = key_kind > BKV_GPU_BITS8 ? limit : (entry.tokens + groups - 1) / groups;
    section.keys = record + (uint64_t)entry.key_offset * BKV_RECORD_ALIGN + index;
    section.values = record + (uint64_t)entry.value_offset * BKV_RECORD_ALIGN;
    section.tokens = entry.tokens;
    section.weighted = header.weighted;
    section.weights = header.weighted ? *(const uint32_t *)section.keys : 0;
    section.kinds = (uint8_t)(key_kind | value_kind << 4);
    section.group_tokens = (uint8_t)group_tokens;
    section.group_tiles = (uint8_t)((group_tokens + limit - 1) / limit);
    section.tile = (entry.tokens + group_tokens - 1) / group_tokens * section.group_tiles;
    return section;
}

// One thread for each head of each record of the sequence blockIdx.x, in which all thread blocks of that x share: so the
// heads' threads, side by side, read a record's header and directory together.
__global__ void __launch_bounds__(FIND_THREADS) attend_find(const __grid_constant__ bkv_gpu_attend_t job) {
    launch_follows();
    const uint32_t from = job.first[blockIdx.x], to = job.first[blockIdx.x + 1];
    const uint64_t count = from <= to && to <= job.max_records ? to - from : 0, all = count * job.heads;
    bkv_gpu_section_t *list = job.sections + (uint64_t)from * job.heads;
    for (uint64_t i = (uint64_t)blockIdx.y * FIND_THREADS + threadIdx.x; i < all; i += (uint64_t)gridDim.y * FIND_THREADS) {
        const uint32_t record = (uint32_t)(i / job.heads), head = (uint32_t)(i % job.heads);
        const bkv_gpu_section_t section = section_find(job, (const uint8_t *)job.records[from + record], head);
        uint4 halves[2];
        memcpy(halves, &section, sizeof(section));
        uint4 *at = (uint4 *)&list[head * count + record];
        at[0] = halves[0];
        at[1] = halves[1];
    }
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
    for (uint32_t i = 0; i < blockDim.x / WARP; i++) {
        before += i < warp ? warp_sums[i] : 0;
        all += warp_sums[i];
    }
    __syncthreads();
    *sum = all;
    return before + upto - value;
}

// One thread block for each pair: from each section's tiles to those before it.
__global__ void __launch_bounds__(PLAN_THREADS) attend_plan(const __grid_constant__ bkv_gpu_attend_t job, uint32_t) {
    launch_follows();
    launch_awaits();
    const uint32_t pair = blockIdx.x, sequence = pair / job.heads, head = pair % job.heads;
    const uint32_t from = job.first[sequence], to = job.first[sequence + 1];
    bool good = from <= to && to <= job.max_records;
    uint32_t count = good ? to - from : 0, tiles = 0;
    bkv_gpu_section_t *list = job.sections + (uint64_t)from * job.heads + (uint64_t)head * count;
    for (uint32_t base = 0; base < count; base += blockDim.x * PLAN_EACH) {
        const uint32_t first = base + threadIdx.x * PLAN_EACH, end = min(count, max(first, first + PLAN_EACH));
        uint32_t own[PLAN_EACH], sum = 0, all;
#pragma unroll
        for (uint32_t i = 0; i < PLAN_EACH; i++) {
            own[i] = first + i < end ? list[first + i].tile : 0;
        }
#pragma unroll
        for (uint32_t i = 0; i < PLAN_EACH; i++) {
            good = good && own[i] != BKV_GPU_BROKEN;
            sum += own[i];
        }
        uint32_t before = tiles + block_prefix(sum, &all);
#pragma unroll
        for (uint32_t i = 0; i < PLAN_EACH; i++) {
            if (first + i < end) {
                list[first + i].tile = before;
            }
            before += own[i];
        }
        tiles += all;
    }
    good = __syncthreads_and(good);
    if (threadIdx.x == 0) {
        job.tiles[pair] = good ? tiles : BKV_GPU_BROKEN;
    }
}

// As many threads as sequences of average length need.
static int plan_launch(const bkv_gpu_attend_t *job, cudaStream_t stream) {
    const uint64_t records = (job->max_records + (uint64_t)job->batch - 1) / job->batch;
    const uint64_t blocks = (records * job->heads + FIND_THREADS - 1) / FIND_THREADS;
    const dim3 grid(job->batch, (uint32_t)max((uint64_t)1, min(blocks, (uint64_t)FIND_BLOCKS)));
    attend_find<<<grid, FIND_THREADS, 0, stream>>>(*job);
    const int error = (int)cudaGetLastError();
    uint32_t threads = WARP;
    while (threads < PLAN_THREADS && threads * PLAN_EACH < records) {
        threads *= 2;
    }
    return error != 0 ? error : launch_behind(attend_plan, job->batch * job->heads, threads, 0, stream, job, 0);
}

// --- after: one thread block for each column of each part; its warps share the partial results, its lanes the channels

__device__ __forceinline__ void out_store(const bkv_gpu_attend_t &job, uint64_t i, float value) {
    if (job.out_dtype == BKV_FP32) {
        ((float *)job.out)[i] = value;
    } else if (job.out_dtype == BKV_FP16) {
        ((__half *)job.out)[i] = __float2half_rn(value);
    } else {
        ((__nv_bfloat16 *)job.out)[i] = __float2bfloat16_rn(value);
    }
}

__device__ __forceinline__ float merge_factor(float top, float of) {
    return of == -INFINITY ? 0 : exp2_fast(of - top);
}

// Of a pair without records, or with wrong ones.
__device__ inline void merge_nothing(const bkv_gpu_attend_t &job, uint64_t row, uint32_t thread, uint32_t threads) {
    const bool broken = job.tiles[row / job.rows] == BKV_GPU_BROKEN;
    for (uint32_t d = thread; d < job.value_dim; d += threads) {
        out_store(job, row * job.value_dim + d, broken ? NAN : 0);
    }
    if (thread == 0) {
        job.lse[row] = broken ? NAN : -INFINITY;
    }
}

// Some warps of a thread block that merge the partial results of one column. All such teams of a thread block come to the
// same barriers.
struct team_t {
    uint32_t thread, threads;
    float *scratch; // [warps]
};

// The largest or the sum of all of the team's values, for each of its threads.
template <class F> __device__ inline float team_reduce(const team_t &team, float value, F both) {
    for (uint32_t step = WARP / 2; step > 0; step /= 2) {
        value = both(value, __shfl_xor_sync(ALL_LANES, value, (int)step));
    }
    if (team.thread % WARP == 0) {
        team.scratch[team.thread / WARP] = value;
    }
    __syncthreads();
    value = team.scratch[0];
    for (uint32_t i = 1; i < team.threads / WARP; i++) {
        value = both(value, team.scratch[i]);
    }
    __syncthreads();
    return value;
}

// Partial results of one column of a part: `count` of them, `step` floats apart.
struct partial_t {
    const float *rows;
    uint64_t step;
    uint32_t count;
};

__device__ inline partial_t merge_find(const bkv_gpu_attend_t &job, uint32_t part, uint32_t column, uint32_t all_warps) {
    const uint32_t pair = part / job.blocks, tiles = pair_tiles(job, pair);
    const uint64_t step = (uint64_t)job.columns * (job.value_dim + 4);
    const uint64_t total = job.before[job.batch * job.heads] * job.blocks;
    const uint64_t before = job.before[pair] * job.blocks + (uint64_t)(part % job.blocks) * tiles;
    if (tiles == 0) {
        return {job.parts, step, 0};
    }
    const uint32_t warps = share_warps(total, all_warps), first = share_owner(total, before, warps);
    const float *rows = part_at(job, first, part) + (uint64_t)column * (job.value_dim + 4);
    return {rows, step, share_owner(total, before + tiles - 1, warps) + 1 - first};
}

// Four channels of all partial results from `first` on, each times its factor: this warp's share of them.
__device__ __forceinline__ float4 merge_share(const team_t &team, const partial_t &partial, uint32_t dim, uint32_t first,
                                              float top) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (uint32_t i = team.thread / WARP; i < partial.count; i += team.threads / WARP) {
        const float *row = partial.rows + i * partial.step;
        const float4 four = *(const float4 *)(row + first);
        const float factor = merge_factor(top, row[dim]);
        sum.x += four.x * factor, sum.y += four.y * factor, sum.z += four.z * factor, sum.w += four.w * factor;
    }
    return sum;
}

// A team for each column, as many teams in a thread block as its y.
__global__ void __launch_bounds__(MERGE_THREADS)
    attend_merge(const __grid_constant__ bkv_gpu_attend_t job, uint32_t all_warps) {
    extern __shared__ float4 shared[]; // [threads] of each team, then [warps] of each
    launch_awaits();
    const uint32_t part = blockIdx.x / (job.columns / blockDim.y), dim = job.value_dim;
    const uint32_t column = blockIdx.x % (job.columns / blockDim.y) * blockDim.y + threadIdx.y;
    const uint32_t row = part % job.blocks * job.columns + column;
    float4 *const sums = shared + threadIdx.y * blockDim.x;
    const team_t team = {threadIdx.x, blockDim.x,
                         (float *)(shared + blockDim.x * blockDim.y) + threadIdx.y * blockDim.x / WARP};
    const partial_t partial = merge_find(job, part, column, all_warps);
    float top = -INFINITY, sum = 0;
    for (uint32_t i = team.thread; i < partial.count; i += team.threads) {
        top = fmaxf(top, partial.rows[i * partial.step + dim]);
    }
    top = team_reduce(team, top, [](float a, float b) { return fmaxf(a, b); });
    for (uint32_t i = team.thread; i < partial.count; i += team.threads) {
        const float *row = partial.rows + i * partial.step;
        sum += row[dim + 1] * merge_factor(top, row[dim]);
    }
    sum = team_reduce(team, sum, [](float a, float b) { return a + b; });
    const bool writes = row < job.rows && partial.count > 0;
    const uint64_t at = (uint64_t)(part / job.blocks) * job.rows + row;
    for (uint32_t d = 0; d < dim; d += 4 * WARP) {
        const uint32_t own = d + 4 * (team.thread % WARP); // of this lane's channels
        if (own < dim) {
            sums[team.thread] = merge_share(team, partial, dim, own, top);
        }
        __syncthreads();
        for (uint32_t i = team.thread; writes && i < 4 * WARP && d + i < dim; i += team.threads) {
            float all = 0;
            for (uint32_t warp = 0; warp < team.threads / WARP; warp++) {
                all += ((const float *)sums)[warp * 4 * WARP + i];
            }
            out_store(job, at * dim + d + i, all / sum);
        }
        __syncthreads();
    }
    if (writes && team.thread == 0) {
        job.lse[at] = (top + log2f(sum)) * 0.6931471805599453f;
    } else if (row < job.rows && partial.count == 0) {
        merge_nothing(job, at, team.thread, team.threads);
    }
}

// As many warps in a team as there are partial results for it, more or less; all columns of a part in one thread block, if
// that is not too much for one.
static int merge_launch(const bkv_gpu_attend_t *job, cudaStream_t stream) {
    const uint32_t warps = job->thread_blocks * job->thread_block_warps, parts = job->batch * job->heads * job->blocks;
    uint32_t own = 1;
    while (own < MERGE_THREADS / WARP && own * parts < warps) {
        own *= 2;
    }
    const uint32_t teams = own <= 4 ? job->columns : 1;
    const size_t shared = own * teams * (WARP * sizeof(float4) + sizeof(float));
    return launch_behind(attend_merge, parts * (job->columns / teams), dim3(own * WARP, teams), shared, stream, job, warps);
}

extern "C" int bkv_gpu_attend(const bkv_gpu_attend_t *job, void *stream) {
    cudaStream_t queue = (cudaStream_t)stream;
    int error = plan_launch(job, queue);
    if (error == 0) {
        error = job->key_stage == 0   ? attend_general(job, queue)
                : job->key_dim <= 128 ? attend_narrow(job, queue)
                                      : attend_wide(job, queue);
    }
    return error != 0 ? error : merge_launch(job, queue);
}

// Divides what a warp of `warps` has of a device's shared memory between keys and values: params go with the keys. True:
// `tokens` of this kind fit.
static bool stages_fit(bkv_gpu_attend_t *job, uint32_t shared_memory, uint32_t warps, uint32_t kind, uint32_t tokens) {
    const uint32_t own = (shared_memory - BKV_GPU_BARRIERS_ROOM) / warps / 16 * 16,
                   errands = BKV_GPU_AHEAD * BKV_GPU_ERRAND_ROOM;
    const uint32_t params = job->key_dim / 32 * BKV_GPU_PARAMS_STEP, rows = max(own, errands + params) - errands - params;
    job->thread_block_warps = warps;
    job->key_stage = params + rows / 16 * job->key_dim / (job->key_dim + job->value_dim) * 16;
    job->value_stage = params + rows - job->key_stage;
    return bkv_gpu_key_room(kind, job->key_dim, tokens) <= job->key_stage &&
           bkv_gpu_value_room(kind, job->value_dim, tokens) <= job->value_stage;
}

// The same for the shortest tiles of all kinds.
static bool stages_suffice(bkv_gpu_attend_t *job, uint32_t shared_memory, uint32_t warps) {
    bool all = true;
    for (uint32_t kind = 0; kind < BKV_GPU_FP32; kind++) {
        all = all && stages_fit(job, shared_memory, warps, kind, BKV_GPU_TILE_STEP);
    }
    return all;
}

extern "C" bool bkv_gpu_attend_shape(bkv_gpu_attend_t *job, uint32_t shared_memory) {
    uint32_t key_dim = job->key_dim, value_dim = job->value_dim;
    bool narrow = key_dim == value_dim && (key_dim == 64 || key_dim == 96 || key_dim == 128);
    bool wide = (key_dim == 192 && value_dim == 128) || (key_dim == 256 && value_dim == 256);
    job->key_stage = job->value_stage = 0;
    if (job->dtype == BKV_FP32 || !(narrow || wide)) {
        job->columns = 1;
        job->thread_block_warps = GENERAL_WARPS;
        return false;
    }
    job->columns = job->rows <= 4 || value_dim > 128 ? 4 : 8;
    shared_memory = job->columns == 4 ? shared_memory : min(shared_memory, (uint32_t)SHARED_MOST);
    // As many warps as leave each room for 80 tokens of 3 bits; but rather shorter tiles than too few warps.
    uint32_t most = narrow ? NARROW_WARPS : WIDE_WARPS, warps = most;
    while (warps > 1 && !(stages_suffice(job, shared_memory, warps) &&
                          (warps <= most * 2 / 3 || stages_fit(job, shared_memory, warps, BKV_GPU_BITS3, BKV_GPU_TILE_MAX)))) {
        warps--;
    }
    return true;
}
