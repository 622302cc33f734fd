// compress_cuda.c - the host's half of bkv_cuda_compress: checks, the plan of a record, the order of kernels. What runs on the
// device is in dense_cuda.cu, balance_cuda.cu and general_cuda.cu.
#include "cuda.h"

#include "backend.h"
#include "device_cuda.h"

#include <assert.h>

#define FAIL(...) bkv_fail(err, BKV_INVALID_ARGUMENT, __VA_ARGS__)

// Thread blocks of the general kernel for each multiprocessor: enough to hide its waits for memory.
#define GENERAL_BLOCKS 4

#define WORKSPACE_ALIGN 256

// Everything that follows from shape and params alone. False when no record fits the rate.
static bool job_plan(const bkv_cuda_t *cuda, const bkv_shape_t *shape, const bkv_codec_params_t *params, uint32_t count,
                     bkv_gpu_job_t *job) {
    *job = (bkv_gpu_job_t){.seed = params->seed,
                           .count = count,
                           .shape = *shape,
                           .sink = params->sink,
                           .shared_memory = cuda->traits.shared_memory,
                           .processors = cuda->traits.processors,
                           .codec = (uint8_t)params->codec};
    uint8_t bits = params->codec == BKV_CODEC_RAW ? BKV_BITS_NATIVE : params->codec == BKV_CODEC_DENSE8 ? 8 : 4;
    job->section = (bkv_section_t){.tokens = shape->tokens, .key_bits = bits, .value_bits = bits, .index_kind = BKV_INDEX_ALL};
    if (params->codec != BKV_CODEC_BALANCE) {
        job->seed = 0; // a header has one where there was a walk
        return true;
    }
    bool weights;
    uint64_t budget = bkv_balance_budget(shape, params->rate), sections = (uint64_t)shape->layers * shape->heads;
    if (!bkv_balance_fits(shape, budget)) {
        return false;
    }
    bkv_shape_t one = *shape;
    one.layers = one.heads = 1;
    uint64_t share = (budget - bkv_record_preamble(shape->layers, shape->heads)) / sections;
    bkv_balance_plan(&one, false, bkv_record_preamble(1, 1) + share, NULL, &job->section, &weights);
    job->rate = (uint8_t)params->rate;
    job->flags = weights ? BKV_RECORD_WEIGHTS : 0;
    job->protect = bkv_protect_count(shape->tokens, job->section.tokens);
    return true;
}

static bool keeps_all(const bkv_gpu_job_t *job) {
    return job->section.tokens == job->shape.tokens;
}

static bool needs_scratch(const bkv_gpu_job_t *job) {
    return !keeps_all(job) && !bkv_gpu_balance_fits(job);
}

static size_t blocks_bytes(uint32_t count) {
    return (count * sizeof(bkv_gpu_block_t) + WORKSPACE_ALIGN - 1) / WORKSPACE_ALIGN * WORKSPACE_ALIGN;
}

// How many heads the general kernel has under way at a time.
static uint32_t scratch_count(const bkv_gpu_job_t *job) {
    uint64_t heads = (uint64_t)job->count * job->shape.layers * job->shape.heads,
             most = (uint64_t)job->processors * GENERAL_BLOCKS;
    return (uint32_t)(heads < most ? heads : most);
}

size_t bkv_cuda_compress_workspace(const bkv_cuda_t *cuda, const bkv_shape_t *shape, const bkv_codec_params_t *params,
                                   uint32_t count) {
    bkv_gpu_job_t job;
    if (!job_plan(cuda, shape, params, count, &job) || !needs_scratch(&job)) {
        return blocks_bytes(count);
    }
    return blocks_bytes(count) + (size_t)(scratch_count(&job) * bkv_gpu_general_scratch(&job));
}

static bool same_shape(const bkv_shape_t *a, const bkv_shape_t *b) {
    return a->layers == b->layers && a->heads == b->heads && a->tokens == b->tokens && a->key_dim == b->key_dim &&
           a->value_dim == b->value_dim && a->dtype == b->dtype;
}

static bool is_aligned(const void *address, const bkv_stride_t *stride) {
    return (uintptr_t)address % 16 == 0 && (stride->layer | stride->head | stride->token) % 16 == 0;
}

static bkv_status_t check_block(const bkv_cuda_compress_args_t *args, uint32_t i, bkv_error_t *err) {
    const bkv_block_t *block = &args->blocks[i];
    if (!same_shape(&block->shape, &args->blocks[0].shape)) {
        return FAIL("blocks: %u and 0 have different shapes", i);
    }
    if (!is_aligned(block->keys, &block->key_stride) || !is_aligned(block->values, &block->value_stride)) {
        return FAIL("blocks: %u has an address or a stride that is no multiple of 16 bytes", i);
    }
    if (args->ids[i].position > UINT64_MAX - block->shape.tokens) {
        return FAIL("position: %llu leaves no room for %u tokens", (unsigned long long)args->ids[i].position,
                    block->shape.tokens);
    }
    return BKV_OK;
}

static bkv_status_t check_args(const bkv_cuda_compress_args_t *args, bkv_error_t *err) {
    if (args->count == 0) {
        return FAIL("blocks: none");
    }
    bkv_status_t status = bkv_shape_check(&args->blocks[0].shape, err);
    if (status == BKV_OK) {
        status = bkv_codec_check(&args->params, err);
    }
    for (uint32_t i = 0; status == BKV_OK && i < args->count; i++) {
        status = check_block(args, i, err);
    }
    return status;
}

static bkv_status_t check_memory(const bkv_cuda_t *cuda, const bkv_cuda_compress_args_t *args, bkv_error_t *err) {
    const bkv_shape_t *shape = &args->blocks[0].shape;
    uint64_t bound = bkv_codec_bound(shape, &args->params);
    if (bound > BKV_RECORD_MAX) {
        return FAIL("tokens: %u make a record of %llu bytes, above %llu", shape->tokens, (unsigned long long)bound,
                    (unsigned long long)BKV_RECORD_MAX);
    }
    if (args->record_stride < bound || args->record_stride % BKV_RECORD_ALIGN != 0 ||
        (uintptr_t)args->records % BKV_RECORD_ALIGN != 0) {
        return FAIL("record_stride: %zu bytes, a record may need %llu, and all must be aligned to 16", args->record_stride,
                    (unsigned long long)bound);
    }
    size_t need = bkv_cuda_compress_workspace(cuda, shape, &args->params, args->count);
    if (args->workspace_bytes < need || (uintptr_t)args->workspace % WORKSPACE_ALIGN != 0) {
        return FAIL("workspace: %zu bytes, %zu are needed, aligned to %d", args->workspace_bytes, need, WORKSPACE_ALIGN);
    }
    return BKV_OK;
}

static bkv_gpu_block_t describe(const bkv_block_t *block, const bkv_record_id_t *id) {
    return (bkv_gpu_block_t){.keys = block->keys,
                             .values = block->values,
                             .key_layer = block->key_stride.layer,
                             .key_head = block->key_stride.head,
                             .key_token = block->key_stride.token,
                             .value_layer = block->value_stride.layer,
                             .value_head = block->value_stride.head,
                             .value_token = block->value_stride.token,
                             .key = id->key,
                             .spec_id = id->spec_id,
                             .tenant = id->tenant,
                             .position = id->position};
}

static int enqueue(const bkv_gpu_job_t *job, const bkv_cuda_compress_args_t *args) {
    int error = 0;
    for (uint32_t first = 0; error == 0 && first < args->count; first += BKV_GPU_SETUP_BLOCKS) {
        bkv_gpu_block_t blocks[BKV_GPU_SETUP_BLOCKS];
        uint32_t count = args->count - first < BKV_GPU_SETUP_BLOCKS ? args->count - first : BKV_GPU_SETUP_BLOCKS;
        for (uint32_t i = 0; i < count; i++) {
            blocks[i] = describe(&args->blocks[first + i], &args->ids[first + i]);
        }
        error = bkv_gpu_setup(job, blocks, first, count, args->stream);
    }
    if (error != 0) {
        return error;
    }
    if (args->params.codec == BKV_CODEC_RAW) {
        return bkv_gpu_raw(job, args->stream);
    }
    if (keeps_all(job)) {
        return bkv_gpu_dense(job, args->stream);
    }
    return bkv_gpu_balance_fits(job) ? bkv_gpu_balance(job, args->stream) : bkv_gpu_general(job, args->stream);
}

static size_t record_length(const bkv_gpu_job_t *job) {
    bkv_plane_layout_t layout;
    bkv_plane_layout(job->shape.tokens, job->section.tokens, job->shape.key_dim, job->shape.value_dim, job->section.key_bits,
                     job->section.value_bits, (bkv_index_kind_t)job->section.index_kind, (job->flags & BKV_RECORD_WEIGHTS) != 0,
                     job->shape.dtype, &layout);
    return (size_t)(bkv_record_preamble(job->shape.layers, job->shape.heads) +
                    (layout.key_bytes + layout.value_bytes) * job->shape.layers * job->shape.heads);
}

bkv_status_t bkv_cuda_compress(const bkv_cuda_t *cuda, const bkv_cuda_compress_args_t *args, size_t *length, bkv_error_t *err) {
    bkv_status_t status = check_args(args, err);
    bkv_gpu_job_t job;
    if (status == BKV_OK && !job_plan(cuda, &args->blocks[0].shape, &args->params, args->count, &job)) {
        status = FAIL("tokens: %u are too few for rate %u, whose bytes hold no record", args->blocks[0].shape.tokens,
                      args->params.rate);
    }
    if (status == BKV_OK) {
        status = check_memory(cuda, args, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    uint8_t *workspace = args->workspace;
    job.blocks = args->workspace;
    job.records = args->records;
    job.record_stride = args->record_stride;
    job.status = (unsigned long long *)args->status;
    job.scratch = workspace + blocks_bytes(args->count);
    job.scratch_stride = needs_scratch(&job) ? bkv_gpu_general_scratch(&job) : 0;
    job.scratch_count = scratch_count(&job);
    int before, error = bkv_gpu_enter(cuda->device, &before);
    if (error == 0) {
        error = enqueue(&job, args);
        bkv_gpu_leave(before);
    }
    if (error != 0) {
        return bkv_fail(err, BKV_INTERNAL, "device: %d, %s", cuda->device, bkv_gpu_error(error));
    }
    if (length) {
        *length = record_length(&job);
    }
    return BKV_OK;
}

bkv_status_t bkv_cuda_compress_check(const bkv_shape_t *shape, uint64_t status, bkv_error_t *err) {
    if (status == BKV_GPU_CLEAN) {
        return BKV_OK;
    }
    // The packing of bkv_gpu_finding, backwards.
    bool finite = status & 1;
    unsigned token = (unsigned)(status >> 1 & 0xffffff);
    uint64_t head = status >> 25, plane = head / shape->heads;
    const char *tensor = plane % 2 ? "v" : "k";
    unsigned layer = (unsigned)(plane / 2), number = (unsigned)(head % shape->heads);
    if (!finite) {
        return FAIL("%s: NaN or infinity at layer %u, head %u, token %u", tensor, layer, number, token);
    }
    return FAIL("%s: a value beyond 65504 at layer %u, head %u, token %u, which only codec raw can hold", tensor, layer, number,
                token);
}
