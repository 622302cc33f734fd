// compress.c - the host's half of bkv_cuda_compress: checks, the plan of a record, the order of kernels. What runs on the
// device is in dense.cu, balance.cu and general.cu.
#include "bkv_cuda.h"

#include "backend.h"
#include "device.h"

#include <assert.h>
#include <stdlib.h>

#define FAIL(...) bkv_fail(err, BKV_INVALID_ARGUMENT, __VA_ARGS__)

// Thread blocks of the general kernel for each multiprocessor: enough to hide its waits for memory.
#define GENERAL_BLOCKS 4

#define WORKSPACE_ALIGN 256

// A call under way: the job, and the preamble of its records, from malloc.
typedef struct bkv_plan {
    bkv_gpu_job_t job;
    uint8_t *preamble;
    size_t length; // of a record
    bool raw;
} bkv_plan_t;

static void fill_directory(const bkv_shape_t *shape, bkv_codec_t codec, bkv_section_t *sections) {
    uint8_t bits = codec == BKV_CODEC_RAW ? BKV_BITS_NATIVE : codec == BKV_CODEC_DENSE8 ? 8 : 4;
    for (uint32_t i = 0; i < shape->layers * shape->heads; i++) {
        sections[i] =
            (bkv_section_t){.tokens = shape->tokens, .key_bits = bits, .value_bits = bits, .index_kind = BKV_INDEX_ALL};
    }
}

// The most tokens that any section keeps from the walk.
static uint32_t walked_most(const bkv_shape_t *shape, const bkv_section_t *sections) {
    uint32_t most = 0;
    for (uint32_t i = 0; i < shape->layers * shape->heads; i++) {
        uint32_t m = sections[i].tokens, walked = m < shape->tokens ? m - bkv_protect_count(shape->tokens, m) : 0;
        most = walked > most ? walked : most;
    }
    return most;
}

// Everything that follows from shape and params alone. plan->preamble is the caller's to free; NULL without memory for it.
static void plan_make(const bkv_cuda_t *cuda, const bkv_shape_t *shape, const bkv_codec_params_t *params, uint32_t count,
                      bkv_plan_t *plan) {
    uint64_t bytes = bkv_record_preamble(shape->layers, shape->heads);
    *plan = (bkv_plan_t){.preamble = malloc((size_t)bytes), .raw = params->codec == BKV_CODEC_RAW};
    if (!plan->preamble) {
        return;
    }
    bkv_record_id_t none = {0};
    bkv_record_init(plan->preamble, shape, &none, params->codec, 0);
    bkv_record_header_t *header = (bkv_record_header_t *)plan->preamble;
    bkv_section_t *sections = bkv_record_directory(plan->preamble);
    bool weights = false;
    fill_directory(shape, params->codec, sections);
    if (params->codec == BKV_CODEC_BALANCE) {
        bool fits = bkv_balance_plan(shape, false, bkv_balance_budget(shape, params->rate), params->shares, sections, &weights);
        assert(fits && "checked");
        (void)fits;
        header->flags = weights ? BKV_RECORD_WEIGHTS : 0;
        header->rate = (uint8_t)params->rate;
        header->seed = params->seed;
    }
    plan->length = (size_t)bkv_record_place(plan->preamble);
    plan->job = (bkv_gpu_job_t){.preamble_bytes = (uint32_t)bytes,
                                .seed = params->seed,
                                .count = count,
                                .shape = *shape,
                                .sink = params->sink,
                                .walked = walked_most(shape, sections),
                                .shared_memory = cuda->traits.shared_memory,
                                .processors = cuda->traits.processors,
                                .weights = weights};
}

// Records without weights keep every token of every section.
static bool needs_scratch(const bkv_gpu_job_t *job) {
    return job->weights && !bkv_gpu_balance_fits(job);
}

static size_t round_up(uint64_t bytes) {
    return (size_t)((bytes + WORKSPACE_ALIGN - 1) / WORKSPACE_ALIGN * WORKSPACE_ALIGN);
}

// How many heads the general kernel has under way at a time.
static uint32_t scratch_count(const bkv_gpu_job_t *job) {
    uint64_t heads = (uint64_t)job->count * job->shape.layers * job->shape.heads;
    uint64_t most = (uint64_t)job->processors * GENERAL_BLOCKS;
    return (uint32_t)(heads < most ? heads : most);
}

// Gives the parts of the workspace their places; returns its size.
static size_t workspace_carve(bkv_gpu_job_t *job, uint8_t *workspace) {
    size_t blocks = round_up(job->count * sizeof(bkv_gpu_block_t)), preamble = round_up(job->preamble_bytes);
    job->blocks = (bkv_gpu_block_t *)(void *)workspace;
    job->preamble = workspace + blocks;
    job->scratch = workspace + blocks + preamble;
    if (needs_scratch(job)) {
        job->scratch_count = scratch_count(job);
        job->scratch_stride = bkv_gpu_general_scratch(job);
    }
    return blocks + preamble + (size_t)(job->scratch_count * job->scratch_stride);
}

size_t bkv_cuda_compress_workspace(const bkv_cuda_t *cuda, const bkv_shape_t *shape, const bkv_codec_params_t *params,
                                   uint32_t count) {
    bkv_plan_t plan;
    plan_make(cuda, shape, params, count, &plan);
    bkv_gpu_job_t job = plan.job;
    static uint8_t nowhere[1]; // sizes do not depend on the address
    size_t bytes = plan.preamble ? workspace_carve(&job, nowhere) : SIZE_MAX;
    free(plan.preamble);
    return bytes;
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

static bkv_status_t check_room(const bkv_cuda_compress_args_t *args, bkv_error_t *err) {
    const bkv_shape_t *shape = &args->blocks[0].shape;
    bkv_status_t status = bkv_codec_check_shape(&args->params, shape, err);
    if (status != BKV_OK) {
        return status;
    }
    uint64_t bound = bkv_codec_bound(shape, &args->params);
    if (args->record_stride < bound || args->record_stride % BKV_RECORD_ALIGN != 0 ||
        (uintptr_t)args->records % BKV_RECORD_ALIGN != 0) {
        return FAIL("record_stride: %zu bytes, a record may need %llu, and all must be aligned to 16", args->record_stride,
                    (unsigned long long)bound);
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

static int enqueue_setup(const bkv_plan_t *plan, const bkv_cuda_compress_args_t *args) {
    const bkv_gpu_job_t *job = &plan->job;
    int error = 0;
    for (uint32_t first = 0; error == 0 && first < job->preamble_bytes; first += BKV_GPU_UPLOAD_BYTES) {
        uint32_t left = job->preamble_bytes - first, count = left < BKV_GPU_UPLOAD_BYTES ? left : BKV_GPU_UPLOAD_BYTES;
        error = bkv_gpu_upload(job, plan->preamble + first, first, count, args->stream);
    }
    for (uint32_t first = 0; error == 0 && first < args->count; first += BKV_GPU_SETUP_BLOCKS) {
        bkv_gpu_block_t blocks[BKV_GPU_SETUP_BLOCKS];
        uint32_t left = args->count - first, count = left < BKV_GPU_SETUP_BLOCKS ? left : BKV_GPU_SETUP_BLOCKS;
        for (uint32_t i = 0; i < count; i++) {
            blocks[i] = describe(&args->blocks[first + i], &args->ids[first + i]);
        }
        error = bkv_gpu_setup(job, blocks, first, count, args->stream);
    }
    return error;
}

static int enqueue(const bkv_plan_t *plan, const bkv_cuda_compress_args_t *args) {
    int error = enqueue_setup(plan, args);
    if (error != 0) {
        return error;
    }
    if (plan->raw) {
        return bkv_gpu_raw(&plan->job, args->stream);
    }
    if (!plan->job.weights) {
        return bkv_gpu_dense(&plan->job, args->stream);
    }
    return needs_scratch(&plan->job) ? bkv_gpu_general(&plan->job, args->stream) : bkv_gpu_balance(&plan->job, args->stream);
}

static bkv_status_t plan_run(const bkv_cuda_t *cuda, const bkv_cuda_compress_args_t *args, bkv_plan_t *plan, bkv_error_t *err) {
    size_t need = workspace_carve(&plan->job, args->workspace);
    if (args->workspace_bytes < need || (uintptr_t)args->workspace % WORKSPACE_ALIGN != 0) {
        return FAIL("workspace: %zu bytes, %zu are needed, aligned to %d", args->workspace_bytes, need, WORKSPACE_ALIGN);
    }
    plan->job.records = args->records;
    plan->job.record_stride = args->record_stride;
    plan->job.status = (unsigned long long *)(void *)args->status;
    int before, error = bkv_gpu_enter(cuda->device, &before);
    if (error == 0) {
        error = enqueue(plan, args);
        bkv_gpu_leave(before);
    }
    if (error != 0) {
        return bkv_fail(err, BKV_INTERNAL, "device: %d, %s", cuda->device, bkv_gpu_error(error));
    }
    return BKV_OK;
}

bkv_status_t bkv_cuda_compress(const bkv_cuda_t *cuda, const bkv_cuda_compress_args_t *args, size_t *length, bkv_error_t *err) {
    bkv_status_t status = check_args(args, err);
    if (status == BKV_OK) {
        status = check_room(args, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    bkv_plan_t plan;
    plan_make(cuda, &args->blocks[0].shape, &args->params, args->count, &plan);
    if (!plan.preamble) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "memory: none for a record's directory");
    }
    status = plan_run(cuda, args, &plan, err);
    free(plan.preamble);
    if (status == BKV_OK && length) {
        *length = plan.length;
    }
    return status;
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
