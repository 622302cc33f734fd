// fake_gpu_work.c - the fake GPU at work: streams, events, and kernels, which are the reference backend's.
#include "fake_gpu_state.h"

#include "kernels/codec.h"
#include "kernels/cuda/attend_gpu.h"

#include <stddef.h>
#include <unistd.h>

typedef struct event {
    uint32_t generation, references;
    uint64_t wanted, reached; // how often it was recorded, and has come
    struct event *original;   // of an import
    struct event *next;       // of all that ever were: so that the use of one that is gone is seen
} event_t;
static event_t *events;

typedef struct op {
    struct op *next;
    void (*run)(void *arguments);
    max_align_t arguments[];
} op_t;

typedef struct stream {
    uint32_t generation;
    pthread_t thread;
    op_t *first, **last;
    bool over;
} stream_t;

// ---- streams ----

static void *stream_main(void *argument) {
    stream_t *stream = argument;
    uint32_t seed = 1;
    pthread_mutex_lock(&gpu.lock);
    for (;;) {
        while ((stream->first == NULL || gpu.held) && !stream->over && stream->generation == gpu.generation) {
            pthread_cond_wait(&gpu.changed, &gpu.lock);
        }
        op_t *op = stream->first;
        if (op == NULL) {
            break;
        }
        stream->first = op->next;
        stream->last = stream->first == NULL ? &stream->first : stream->last;
        bool lost = gpu.broken || stream->generation != gpu.generation;
        pthread_mutex_unlock(&gpu.lock);
        usleep((seed = seed * 1664525u + 1013904223u) >> 24); // up to 255 us
        if (!lost) {
            op->run(op->arguments);
        }
        free(op);
        pthread_mutex_lock(&gpu.lock);
        pthread_cond_broadcast(&gpu.changed);
    }
    bool lost = !stream->over;
    pthread_mutex_unlock(&gpu.lock);
    if (lost) { // by a reset: nobody will join
        pthread_detach(pthread_self());
        free(stream);
    }
    return NULL;
}

int bkv_gpu_stream_create(void **out) {
    int error = fake_enter();
    if (error == 0) {
        stream_t *stream = calloc(1, sizeof(*stream));
        stream->generation = gpu.generation;
        stream->last = &stream->first;
        MUST(pthread_create(&stream->thread, NULL, stream_main, stream) == 0);
        gpu.counts.streams++;
        *out = stream;
    }
    return fake_leave(error);
}

void bkv_gpu_stream_destroy(void *argument) {
    stream_t *stream = argument;
    if (stream == NULL) {
        return;
    }
    (void)fake_enter();
    MUST(stream->generation == gpu.generation && stream->first == NULL);
    stream->over = true;
    gpu.counts.streams--;
    fake_leave(0);
    pthread_join(stream->thread, NULL);
    free(stream);
}

static int enqueue(void *argument, void (*run)(void *), const void *arguments, size_t bytes) {
    stream_t *stream = argument;
    if (stream == NULL) { // a test's own, or a thread's
        int error = fake_leave(fake_enter());
        if (error != 0) {
            return error;
        }
        op_t *op = malloc(sizeof(*op) + bytes);
        memcpy(op->arguments, arguments, bytes);
        run(op->arguments);
        free(op);
        return 0;
    }
    int error = fake_enter();
    if (error == 0) {
        MUST(stream->generation == gpu.generation);
        op_t *op = malloc(sizeof(*op) + bytes);
        op->next = NULL;
        op->run = run;
        memcpy(op->arguments, arguments, bytes);
        *stream->last = op;
        stream->last = &op->next;
    }
    return fake_leave(error);
}

// ---- events ----

static int event_new(event_t *original, void **out) {
    event_t *event = calloc(1, sizeof(*event));
    event->generation = gpu.generation;
    event->references = 1;
    event->original = original;
    event->next = events;
    events = event;
    *out = event;
    return 0;
}

int bkv_gpu_event_create(bool shared, void **event) {
    (void)shared;
    int error = fake_enter();
    error = error == 0 ? event_new(NULL, event) : error;
    gpu.counts.events += error == 0;
    return fake_leave(error);
}

void bkv_gpu_event_destroy(void *argument) {
    event_t *event = argument;
    if (event == NULL) {
        return;
    }
    (void)fake_enter();
    MUST(event->generation == gpu.generation);
    gpu.counts.events--;
    event->generation = 0;
    fake_leave(0);
}

static event_t *event_of(void *argument) {
    event_t *event = argument;
    MUST(event->generation == gpu.generation);
    return event->original != NULL ? event->original : event;
}

static void event_reach(void *arguments) {
    event_t *event = *(event_t **)arguments;
    (void)fake_enter();
    event->reached++;
    fake_leave(0);
}

int bkv_gpu_event_record(void *argument, void *stream) {
    int error = fake_enter();
    event_t *event = error == 0 ? event_of(argument) : NULL;
    if (error == 0) {
        event->wanted++;
    }
    fake_leave(0);
    return error != 0 ? error : enqueue(stream, event_reach, &event, sizeof(event));
}

int bkv_gpu_event_query(void *argument) {
    int error = fake_enter();
    const event_t *event = error == 0 ? event_of(argument) : NULL;
    return fake_leave(error != 0 ? error : event->reached < event->wanted ? BKV_GPU_NOT_YET : 0);
}

int bkv_gpu_event_wait(void *argument) {
    int error = fake_enter();
    const event_t *event = error == 0 ? event_of(argument) : NULL;
    while (error == 0 && event->reached < event->wanted) {
        pthread_cond_wait(&gpu.changed, &gpu.lock);
        error = gpu.broken ? BROKEN : 0;
    }
    return fake_leave(error);
}

int bkv_gpu_event_export(void *argument, uint8_t bytes[BKV_GPU_HANDLE_BYTES]) {
    const handle_t handle = {.magic = MAGIC, .event = argument};
    memset(bytes, 0, BKV_GPU_HANDLE_BYTES);
    memcpy(bytes, &handle, sizeof(handle));
    return 0;
}

int bkv_gpu_event_import(const uint8_t bytes[BKV_GPU_HANDLE_BYTES], void **event) {
    handle_t handle;
    memcpy(&handle, bytes, sizeof(handle));
    int error = fake_enter();
    error = error == 0 && (handle.magic != MAGIC || handle.event == NULL) ? INVALID : error;
    error = error == 0 ? event_new(handle.event, event) : error;
    gpu.counts.events += error == 0;
    return fake_leave(error);
}

void *fake_gpu_event(uint8_t handle[BKV_GPU_HANDLE_BYTES]) {
    void *made;
    (void)fake_enter();
    fake_leave(event_new(NULL, &made)); // the worker's: not counted, and no reset of ours ends it
    event_t *event = made;
    event->wanted = 1;
    bkv_gpu_event_export(event, handle);
    return event;
}

void fake_gpu_event_come(void *event) {
    event_reach(&event);
}

// ---- work ----

// All of it lies in memory of the device that is mapped.
static void check_mapped(const void *address, size_t bytes) {
    const uint8_t *at = address, *end = at + bytes;
    (void)fake_enter();
    while (at < end) { // chunks behind one another count as one
        const mapping_t *mapping = fake_mapping_find(at, false);
        MUST(mapping != NULL);
        at = mapping->base + mapping->bytes;
    }
    fake_leave(0);
}

typedef struct copy {
    void *to;
    const void *from;
    size_t bytes;
} copy_t;

static void copy_run(void *arguments) {
    const copy_t *copy = arguments;
    memcpy(copy->to, copy->from, copy->bytes);
}

int bkv_gpu_copy(void *to, const void *from, size_t bytes, void *stream) {
    const copy_t copy = {to, from, bytes};
    return enqueue(stream, copy_run, &copy, sizeof(copy));
}

static void gather_run(void *arguments) {
    const bkv_gpu_gather_t *gather = arguments;
    const bkv_shape_t *shape = &gather->shape;
    uint8_t *to = gather->payload;
    for (uint32_t i = 0; i < 2 * shape->layers * shape->heads * shape->tokens; i++) {
        uint32_t token = i % shape->tokens, head = i / shape->tokens % shape->heads, tensor = i / shape->tokens / shape->heads;
        bool value = tensor % 2;
        size_t row = (value ? shape->value_dim : shape->key_dim) * bkv_dtype_bytes(shape->dtype);
        const uint8_t *from = (const uint8_t *)(uintptr_t)gather->bases[tensor] + gather->pages[token / gather->page_tokens] +
                              head * (value ? gather->value_head : gather->key_head) +
                              token % gather->page_tokens * (value ? gather->value_token : gather->key_token);
        check_mapped(from, row);
        memcpy(to, from, row);
        to += row;
    }
    check_mapped(gather->payload, bkv_shape_bytes(shape));
}

int bkv_gpu_gather(const bkv_gpu_gather_t *gather, void *stream) {
    (void)fake_enter();
    gpu.counts.gathers++;
    fake_leave(0);
    return enqueue(stream, gather_run, gather, sizeof(*gather));
}

typedef struct upload {
    uint8_t *to;
    uint32_t count;
    uint8_t bytes[BKV_GPU_UPLOAD_BYTES];
} upload_t;

static void upload_run(void *arguments) {
    const upload_t *upload = arguments;
    check_mapped(upload->to, upload->count);
    memcpy(upload->to, upload->bytes, upload->count);
}

int bkv_gpu_upload(const bkv_gpu_job_t *job, const uint8_t *bytes, uint32_t first, uint32_t count, void *stream) {
    upload_t upload = {.to = job->preamble + first, .count = count};
    memcpy(upload.bytes, bytes, count);
    return enqueue(stream, upload_run, &upload, sizeof(upload));
}

typedef struct setup {
    bkv_gpu_block_t *to;
    uint32_t count;
    bkv_gpu_block_t blocks[BKV_GPU_SETUP_BLOCKS];
} setup_t;

static void setup_run(void *arguments) {
    const setup_t *setup = arguments;
    check_mapped(setup->to, setup->count * sizeof(setup->blocks[0]));
    memcpy(setup->to, setup->blocks, setup->count * sizeof(setup->blocks[0]));
}

int bkv_gpu_setup(const bkv_gpu_job_t *job, const bkv_gpu_block_t *blocks, uint32_t first, uint32_t count, void *stream) {
    setup_t setup = {.to = job->blocks + first, .count = count};
    memcpy(setup.blocks, blocks, count * sizeof(blocks[0]));
    return enqueue(stream, setup_run, &setup, sizeof(setup));
}

// Every row, whatever the strides.
static void check_block(const bkv_block_t *block) {
    const bkv_shape_t *shape = &block->shape;
    for (uint32_t i = 0; i < 2 * shape->layers * shape->heads * shape->tokens; i++) {
        bool value = i % 2;
        uint32_t token = i / 2 % shape->tokens, head = i / 2 / shape->tokens % shape->heads,
                 layer = i / 2 / shape->tokens / shape->heads;
        const bkv_stride_t *stride = value ? &block->value_stride : &block->key_stride;
        check_mapped((const uint8_t *)(value ? block->values : block->keys) + layer * stride->layer + head * stride->head +
                         token * stride->token,
                     (value ? shape->value_dim : shape->key_dim) * bkv_dtype_bytes(shape->dtype));
    }
}

static void compress_run(void *arguments) {
    const bkv_gpu_job_t *job = arguments;
    const bkv_record_header_t *header = (const bkv_record_header_t *)(const void *)job->preamble;
    const bkv_codec_params_t params = {.codec = header->codec, .rate = header->rate, .sink = job->sink, .seed = job->seed};
    const bkv_backend_t *ref = bkv_backend_get("ref");
    void *workspace = aligned_alloc(64, (bkv_compress_workspace(ref, &job->shape, &params) + 63) / 64 * 64);
    for (uint32_t i = 0; i < job->count; i++) {
        const bkv_gpu_block_t *from = &job->blocks[i];
        const bkv_block_t block = {.shape = job->shape,
                                   .keys = from->keys,
                                   .values = from->values,
                                   .key_stride = {from->key_layer, from->key_head, from->key_token},
                                   .value_stride = {from->value_layer, from->value_head, from->value_token}};
        const bkv_record_id_t id = {from->key, from->spec_id, from->tenant, from->position};
        size_t length = 0;
        check_block(&block);
        check_mapped(job->records + i * job->record_stride, header->length);
        bkv_status_t status = bkv_compress(ref, &block, &params, &id, job->records + i * job->record_stride, job->record_stride,
                                           workspace, &length, NULL);
        MUST(status != BKV_OK || length == header->length);
        job->status[i] = status == BKV_OK ? BKV_GPU_CLEAN : bkv_gpu_finding(0, false, job->shape.heads, 0, 0, false);
    }
    free(workspace);
}

static int compress(const bkv_gpu_job_t *job, void *stream) {
    (void)fake_enter();
    gpu.counts.compressions++;
    fake_leave(0);
    return enqueue(stream, compress_run, job, sizeof(*job));
}

int bkv_gpu_raw(const bkv_gpu_job_t *job, void *stream) {
    return compress(job, stream);
}

int bkv_gpu_dense(const bkv_gpu_job_t *job, void *stream) {
    return compress(job, stream);
}

int bkv_gpu_balance(const bkv_gpu_job_t *job, void *stream) {
    return compress(job, stream);
}

int bkv_gpu_general(const bkv_gpu_job_t *job, void *stream) {
    return compress(job, stream);
}

bool bkv_gpu_balance_fits(const bkv_gpu_job_t *job) {
    (void)job;
    return true;
}

uint64_t bkv_gpu_general_scratch(const bkv_gpu_job_t *job) {
    (void)job;
    return 0;
}

bool bkv_gpu_attend_shape(bkv_gpu_attend_t *job, uint32_t shared_memory) {
    (void)shared_memory;
    job->columns = job->thread_block_warps = 1;
    return false;
}

// One sequence's share, over records that must lie in memory of the device.
static void attend_sequence(const bkv_gpu_attend_t *job, uint32_t sequence) {
    const uint32_t first = job->first[sequence], count = job->first[sequence + 1] - first;
    const size_t rows = (size_t)job->heads * job->rows;
    const bkv_attend_args_t args = {.layers = 1,
                                    .first_layer = job->layer,
                                    .query_heads = (uint32_t)rows, // of one query each: the rows of a KV head lie together
                                    .queries = 1,
                                    .scale = job->scale,
                                    .q = (const float *)job->q + sequence * rows * job->key_dim,
                                    .out = (float *)job->out + sequence * rows * job->value_dim,
                                    .lse = job->lse + sequence * rows};
    const bkv_backend_t *ref = bkv_backend_get("ref");
    for (uint32_t i = 0; i < count; i++) {
        bkv_record_header_t header;
        memcpy(&header, job->records[first + i], sizeof(header));
        check_mapped(job->records[first + i], header.length);
    }
    const size_t bytes = bkv_attend_workspace(ref, job->records + first, count, &args);
    void *workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);
    MUST(bkv_attend(ref, job->records + first, count, &args, workspace, NULL) == BKV_OK);
    free(workspace);
}

static void attend_run(void *arguments) {
    const bkv_gpu_attend_t *job = arguments;
    for (uint32_t i = 0; i < job->batch; i++) {
        attend_sequence(job, i);
    }
}

int bkv_gpu_attend(const bkv_gpu_attend_t *job, void *stream) {
    MUST(job->q_dtype == BKV_FP32 && job->out_dtype == BKV_FP32);
    (void)fake_enter();
    gpu.counts.attends++;
    fake_leave(0);
    return enqueue(stream, attend_run, job, sizeof(*job));
}
