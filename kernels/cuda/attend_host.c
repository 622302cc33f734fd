// attend_host.c - attention over records on a GPU: checks the arguments, divides the workspace, chooses the kernel.
// attend.cu and what it includes do the work.
#include "bkv_cuda.h"

#include "attend_gpu.h"
#include "device.h"
#include "record.h"

#include <assert.h>
#include <math.h>

// Tokens in a tile of the general kernel, which keeps none in shared memory.
#define GENERAL_TILE 64

// Thread blocks of the general kernel for each processor.
#define GENERAL_BLOCKS 2

// The most rows of a KV head.
#define ROWS_MAX 65536

static bkv_status_t args_check(const bkv_cuda_attend_args_t *args, bkv_error_t *err) {
    bkv_shape_t shape = {args->layer + 1, args->heads, 1, args->key_dim, args->value_dim, args->dtype};
    if (args->layer >= BKV_MAX_LAYERS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "layer: %u is not below %d", args->layer, BKV_MAX_LAYERS);
    }
    bkv_status_t status = bkv_shape_check(&shape, err);
    if (status != BKV_OK) {
        return status;
    }
    if (!bkv_dtype_name(args->q_dtype) || !bkv_dtype_name(args->out_dtype)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "q_dtype, out_dtype: %d and %d are not both bf16, fp16 or fp32",
                        (int)args->q_dtype, (int)args->out_dtype);
    }
    if (args->query_heads == 0 || args->query_heads % args->heads != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "query_heads: %u is not a multiple of %u heads", args->query_heads,
                        args->heads);
    }
    uint64_t rows = (uint64_t)(args->query_heads / args->heads) * args->queries;
    if (rows == 0 || rows > ROWS_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "queries: %u for each of %u query heads a head is not in 1..%d",
                        args->queries, args->query_heads / args->heads, ROWS_MAX);
    }
    if (args->batch == 0 || args->batch > INT32_MAX / (args->heads * rows)) { // which becomes a grid's x
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "batch: %u sequences of %u heads and %llu queries each", args->batch,
                        args->heads, (unsigned long long)rows);
    }
    return isfinite(args->scale) ? BKV_OK : bkv_fail(err, BKV_INVALID_ARGUMENT, "scale: not finite");
}

static bool tile_fits(const bkv_gpu_attend_t *job, uint32_t key_kind, uint32_t value_kind, uint32_t tokens) {
    return bkv_gpu_key_room(key_kind, job->key_dim, tokens) <= job->key_stage &&
           bkv_gpu_value_room(value_kind, job->value_dim, tokens) <= job->value_stage;
}

// The most tokens of these kinds in a tile.
static uint32_t tile_limit(const bkv_gpu_attend_t *job, uint32_t key_kind, uint32_t value_kind) {
    if (job->key_stage == 0) {
        return GENERAL_TILE;
    }
    uint32_t tokens = BKV_GPU_TILE_MAX;
    while (tokens > BKV_GPU_TILE_STEP && !tile_fits(job, key_kind, value_kind, tokens)) {
        tokens -= BKV_GPU_TILE_STEP;
    }
    assert(key_kind == BKV_GPU_FP32 || value_kind == BKV_GPU_FP32 || tile_fits(job, key_kind, value_kind, tokens));
    return tokens;
}

// Everything but addresses.
static void job_shape(const bkv_cuda_t *cuda, const bkv_cuda_attend_args_t *args, bkv_gpu_attend_t *job) {
    *job = (bkv_gpu_attend_t){.scale = args->scale == 0.0f ? 1.0f / sqrtf((float)args->key_dim) : args->scale,
                              .batch = args->batch,
                              .heads = args->heads,
                              .layer = args->layer,
                              .key_dim = args->key_dim,
                              .value_dim = args->value_dim,
                              .max_records = args->max_records,
                              .rows = args->query_heads / args->heads * args->queries,
                              .q_dtype = (uint8_t)args->q_dtype,
                              .out_dtype = (uint8_t)args->out_dtype,
                              .dtype = (uint8_t)args->dtype,
                              .overlaps = cuda->traits.capability >= 90};
    bool fast = bkv_gpu_attend_shape(job, cuda->traits.shared_memory);
    job->thread_blocks = cuda->traits.processors * (fast ? 1 : GENERAL_BLOCKS);
    job->blocks = (job->rows + job->columns - 1) / job->columns;
    for (uint32_t key = 0; key < BKV_GPU_KINDS; key++) {
        for (uint32_t value = 0; value < BKV_GPU_KINDS; value++) {
            job->limit[key][value] = (uint8_t)tile_limit(job, key, value);
        }
    }
}

static size_t job_carve(bkv_gpu_attend_t *job, void *workspace) {
    bkv_scratch_t scratch = {.base = workspace};
    uint64_t pairs = (uint64_t)job->batch * job->heads;
    uint64_t parts = (uint64_t)job->thread_blocks * job->thread_block_warps + pairs * job->blocks;
    job->sections = bkv_scratch_take(&scratch, (uint64_t)job->max_records * job->heads * sizeof(*job->sections));
    job->tiles = bkv_scratch_take(&scratch, pairs * sizeof(*job->tiles));
    job->before = bkv_scratch_take(&scratch, (pairs + 1) * sizeof(*job->before));
    job->parts = bkv_scratch_take(&scratch, parts * job->columns * (job->value_dim + 4) * sizeof(*job->parts));
    return scratch.used;
}

size_t bkv_cuda_attend_workspace(const bkv_cuda_t *cuda, const bkv_cuda_attend_args_t *args) {
    if (args_check(args, NULL) != BKV_OK) {
        return 0;
    }
    bkv_gpu_attend_t job;
    job_shape(cuda, args, &job);
    return job_carve(&job, NULL);
}

bkv_status_t bkv_cuda_attend(const bkv_cuda_t *cuda, const bkv_cuda_attend_args_t *args, void *workspace, void *stream,
                             bkv_error_t *err) {
    bkv_status_t status = args_check(args, err);
    if (status != BKV_OK) {
        return status;
    }
    if ((uintptr_t)args->q % 16 != 0 || (uintptr_t)workspace % 64 != 0 || !workspace) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "q, workspace: not aligned to 16 and 64 bytes");
    }
    bkv_gpu_attend_t job;
    job_shape(cuda, args, &job);
    job.q = args->q;
    job.records = args->records;
    job.first = args->first;
    job.out = args->out;
    job.lse = args->lse;
    job_carve(&job, workspace);
    int before, error = bkv_gpu_enter(cuda->device, &before);
    if (error == 0) {
        error = bkv_gpu_attend(&job, stream);
        bkv_gpu_leave(before);
    }
    return error == 0 ? BKV_OK : bkv_fail(err, BKV_INTERNAL, "attention: %s", bkv_gpu_error(error));
}
