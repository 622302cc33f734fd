// lane.c - the threads that do the work: each takes some transfers that are alike, enqueues all of it on a stream of
// its own, sleeps until the device has done it, and ends them. While one sleeps the others go on, so that compressing, copying
// and publishing of different blocks overlap.
//
// Everything enqueued lies in memory that stays put until the lane has seen it done: its own, the arena's slots that the
// ingests hold, records that the deliveries pin, and the sessions' mappings, which last as long as their transfers.
#include "daemon/transport/cuda_ipc/cuda_ipc.h"

#include <assert.h>
#include <string.h>

#define BATCH 32 // transfers at once

// Device memory: most that is gathered for one batch, unless a single block needs more, and most that a lane keeps from one
// batch to the next, as a worker's GPU has little to spare. With every session gone it keeps none.
#define BATCH_BYTES ((size_t)96 << 20)
#define KEEP_BYTES  ((size_t)192 << 20)
#define STEP_BYTES  ((size_t)16 << 20)

typedef struct batch {
    bkv_ipc_transfer_t *list[BATCH];
    uint32_t count;
} batch_t;

static size_t round_up(uint64_t bytes) {
    return (size_t)((bytes + 255) / 256 * 256);
}

// ---- choosing ----

static bool made_alike(const bkv_ingest_device_t *a, const bkv_ingest_device_t *b) {
    const bkv_shape_t *s = &a->shape, *t = &b->shape;
    const bkv_codec_params_t *p = &a->params, *q = &b->params;
    return s->layers == t->layers && s->heads == t->heads && s->tokens == t->tokens && s->key_dim == t->key_dim &&
           s->value_dim == t->value_dim && s->dtype == t->dtype && p->codec == q->codec && p->rate == q->rate &&
           p->sink == q->sink && p->seed == q->seed && p->shares == q->shares;
}

static bool alike(const bkv_ipc_transfer_t *a, const bkv_ipc_transfer_t *b) {
    return a->ingest == NULL || b->ingest == NULL ? a->ingest == b->ingest : made_alike(&a->make, &b->make);
}

// What a transfer needs of the lane's memory, workspace aside.
static size_t record_stride(const bkv_ipc_transfer_t *transfer) {
    return round_up(bkv_codec_bound(&transfer->make.shape, &transfer->make.params));
}

static size_t cost(const bkv_ipc_transfer_t *transfer) {
    if (transfer->ingest == NULL) {
        return 0;
    }
    size_t gathered = transfer->gathers ? round_up(bkv_shape_bytes(&transfer->make.shape)) : 0;
    return record_stride(transfer) + gathered + round_up(transfer->table_count * sizeof(uint64_t)) + 256;
}

// The first transfer that is ready and those right behind it that are like it; no more than this lane's share, so that the
// others have some too. Under the device's lock.
static void choose(bkv_ipc_device_t *device, batch_t *batch) {
    uint32_t share = (device->ready.count + BKV_IPC_LANES - 1) / BKV_IPC_LANES;
    size_t bytes = cost(device->ready.first);
    share = share < BATCH ? share : BATCH;
    do {
        batch->list[batch->count++] = bkv_ipc_queue_take(&device->ready);
        bytes += device->ready.first != NULL ? cost(device->ready.first) : 0;
    } while (batch->count < share && device->ready.first != NULL && bytes <= BATCH_BYTES &&
             alike(batch->list[0], device->ready.first));
}

// ---- what a lane has ----

// What it had before a reset is gone.
static void forget(bkv_ipc_lane_t *lane) {
    uint32_t generation = atomic_load(&lane->device->generation);
    if (lane->generation != generation) {
        lane->generation = generation;
        lane->stream = lane->event = NULL;
        lane->memory = lane->host = NULL;
        lane->memory_bytes = lane->host_bytes = 0;
    }
}

static int make_stream(bkv_ipc_lane_t *lane) {
    forget(lane);
    int error = lane->stream == NULL ? bkv_gpu_stream_create(&lane->stream) : 0;
    if (error != 0) {
        lane->stream = NULL;
        return error;
    }
    error = lane->event == NULL ? bkv_gpu_event_create(false, &lane->event) : 0;
    lane->event = error != 0 ? NULL : lane->event;
    return error;
}

static void give_memory(bkv_ipc_lane_t *lane) {
    bkv_gpu_give(lane->memory);
    lane->memory = NULL;
    lane->memory_bytes = 0;
}

static int make_room(bkv_ipc_lane_t *lane, size_t memory_bytes, size_t host_bytes) {
    int error = 0;
    if (lane->memory_bytes < memory_bytes) {
        give_memory(lane);
        size_t bytes = (memory_bytes + STEP_BYTES - 1) / STEP_BYTES * STEP_BYTES;
        void *memory = NULL;
        error = bkv_gpu_take(&memory, bytes);
        if (error == 0) {
            lane->memory = memory;
            lane->memory_bytes = bytes;
        }
    }
    if (error == 0 && lane->host_bytes < host_bytes) {
        bkv_gpu_host_give(lane->host);
        lane->host = NULL;
        lane->host_bytes = 0;
        void *host = NULL;
        error = bkv_gpu_host_take(&host, 2 * host_bytes);
        if (error == 0) {
            lane->host = host;
            lane->host_bytes = 2 * host_bytes;
        }
    }
    return error;
}

// Gives back what is not needed while nobody uses the device; `all`: for good. What is on a device that has failed goes with
// it.
static void lane_rest(bkv_ipc_lane_t *lane, bool all) {
    int before;
    if (bkv_ipc_device_enter(lane->device, &before, NULL) != BKV_OK) {
        lane->memory = NULL;
        lane->memory_bytes = 0;
        return;
    }
    forget(lane);
    give_memory(lane);
    if (all) {
        bkv_gpu_host_give(lane->host);
        bkv_gpu_event_destroy(lane->event);
        bkv_gpu_stream_destroy(lane->stream);
    }
    bkv_ipc_device_leave(lane->device, before);
}

// Waits for all that has been enqueued.
static int wait_for_stream(bkv_ipc_lane_t *lane) {
    int error = bkv_gpu_event_record(lane->event, lane->stream);
    return error != 0 ? error : bkv_gpu_event_wait(lane->event);
}

// ---- compressing ----

// Where the parts of a batch lie in the lane's memory; all is round_up'ed. Status words, then tables, lie in host memory alike.
typedef struct room {
    size_t stride, records, status, tables, workspace, workspace_bytes, payloads, payload_bytes, total;
} room_t;

// Planning a record takes as long as making one, so the last answer is kept; not where there are shares, whose address may by
// now be that of others.
static size_t workspace_bytes(bkv_ipc_lane_t *lane, const bkv_ingest_device_t *make, uint32_t count) {
    if (lane->planned_count != count || make->params.shares != NULL || !made_alike(&lane->planned, make)) {
        lane->planned = *make;
        lane->planned_count = count;
        lane->planned_bytes = bkv_cuda_compress_workspace(lane->device->cuda, &make->shape, &make->params, count);
    }
    return lane->planned_bytes;
}

static room_t lay_out(bkv_ipc_lane_t *lane, const batch_t *batch) {
    const bkv_ipc_transfer_t *first = batch->list[0];
    room_t room = {.stride = record_stride(first)};
    uint32_t gathered = 0, tables = 0;
    for (uint32_t i = 0; i < batch->count; i++) {
        gathered += batch->list[i]->gathers;
        tables += batch->list[i]->table_count;
    }
    room.status = room.records + room.stride * batch->count;
    room.tables = room.status + round_up(batch->count * sizeof(uint64_t));
    room.workspace = room.tables + round_up(tables * sizeof(uint64_t));
    room.workspace_bytes = workspace_bytes(lane, &first->make, batch->count);
    room.payloads = room.workspace + (room.workspace_bytes < SIZE_MAX ? round_up(room.workspace_bytes) : 0);
    room.payload_bytes = round_up(bkv_shape_bytes(&first->make.shape));
    room.total = room.payloads + gathered * room.payload_bytes;
    return room;
}

// Brings blocks in pages into one piece each, and says where every block lies.
static int gather(bkv_ipc_lane_t *lane, const batch_t *batch, const room_t *room, bkv_block_t *blocks) {
    size_t tables = 0, status_bytes = room->tables - room->status;
    uint64_t *host = (uint64_t *)(void *)(lane->host + status_bytes);
    uint8_t *device = lane->memory + room->tables, *payload = lane->memory + room->payloads;
    for (uint32_t i = 0; i < batch->count; i++) {
        const bkv_ipc_transfer_t *transfer = batch->list[i];
        memcpy(host + tables, transfer->tables, transfer->table_count * sizeof(uint64_t));
        tables += transfer->table_count;
    }
    int error = tables > 0 ? bkv_gpu_copy(device, host, tables * sizeof(uint64_t), lane->stream) : 0;
    for (uint32_t i = 0; error == 0 && i < batch->count; i++) {
        const bkv_ipc_transfer_t *transfer = batch->list[i];
        blocks[i] = transfer->block;
        if (!transfer->gathers) {
            continue;
        }
        bkv_gpu_gather_t job = transfer->gather;
        job.bases = (const uint64_t *)(void *)device;
        job.pages = job.bases + (size_t)2 * job.shape.layers;
        job.payload = payload;
        error = bkv_gpu_gather(&job, lane->stream);
        bkv_block_from_payload(&job.shape, payload, &blocks[i]);
        device += transfer->table_count * sizeof(uint64_t);
        payload += room->payload_bytes;
    }
    return error;
}

// Enqueues everything: gather, compress, and the copies of records and status words to the host.
static bkv_status_t enqueue(bkv_ipc_lane_t *lane, const batch_t *batch, const room_t *room, size_t *length, bkv_error_t *err) {
    bkv_ipc_device_t *device = lane->device;
    bkv_block_t blocks[BATCH];
    bkv_record_id_t ids[BATCH];
    int error = gather(lane, batch, room, blocks);
    if (error != 0) {
        return bkv_ipc_device_fail(device, error, "cuda-ipc: gathering", err);
    }
    for (uint32_t i = 0; i < batch->count; i++) {
        ids[i] = batch->list[i]->make.id;
    }
    const bkv_cuda_compress_args_t args = {.blocks = blocks,
                                           .ids = ids,
                                           .count = batch->count,
                                           .params = batch->list[0]->make.params,
                                           .records = lane->memory + room->records,
                                           .record_stride = room->stride,
                                           .status = (uint64_t *)(void *)(lane->memory + room->status),
                                           .workspace = lane->memory + room->workspace,
                                           .workspace_bytes = room->workspace_bytes,
                                           .stream = lane->stream};
    bkv_status_t status = bkv_cuda_compress(device->cuda, &args, length, err);
    if (status != BKV_OK) {
        return status;
    }
    error = bkv_gpu_copy(lane->host, args.status, batch->count * sizeof(uint64_t), lane->stream);
    for (uint32_t i = 0; error == 0 && i < batch->count; i++) {
        assert(*length <= batch->list[i]->make.capacity);
        error = bkv_ipc_copy(&device->ipc->pins, batch->list[i]->make.record, lane->memory + room->records + i * room->stride,
                             *length, lane->stream);
    }
    return error != 0 ? bkv_ipc_device_fail(device, error, "cuda-ipc: copying", err) : BKV_OK;
}

// Makes records of a batch of blocks. BKV_OK: lane->host has a status word for each.
static bkv_status_t compress(bkv_ipc_lane_t *lane, const batch_t *batch, size_t *length, bkv_error_t *err) {
    room_t room = lay_out(lane, batch);
    if (room.workspace_bytes == SIZE_MAX) {
        lane->planned_count = 0;
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a record's directory");
    }
    int error = make_room(lane, room.total, room.workspace - room.status);
    if (error != 0) {
        bkv_status_t status = bkv_ipc_device_fail(lane->device, error, "cuda-ipc", err);
        return status != BKV_INTERNAL ? status
                                      : bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cuda-ipc: %zu bytes of GPU memory: %s",
                                                 room.total, bkv_gpu_error(error));
    }
    bkv_status_t status = enqueue(lane, batch, &room, length, err);
    error = wait_for_stream(lane); // in every case: what has been enqueued uses what the callers get back
    return error != 0 ? bkv_ipc_device_fail(lane->device, error, "cuda-ipc: compressing", err) : status;
}

// ---- delivering ----

static int deliver_one(bkv_ipc_lane_t *lane, const bkv_ipc_transfer_t *transfer) {
    bkv_ipc_spans_t spans = bkv_ipc_memory_spans(transfer->session->memory);
    const bkv_delivery_t *delivery = transfer->delivery;
    int error = 0;
    for (uint64_t at = 0; error == 0 && at < delivery->length;) {
        const bkv_ipc_span_t *span = bkv_ipc_span_find(&spans, transfer->offset + at);
        assert(span != NULL && "the place was checked against the session");
        uint64_t in_span = transfer->offset + at - span->first, left = delivery->length - at;
        uint64_t bytes = span->bytes - in_span < left ? span->bytes - in_span : left;
        error = bkv_ipc_copy(&lane->device->ipc->pins, span->base + in_span, delivery->data + at, bytes, lane->stream);
        at += bytes;
    }
    return error;
}

static bkv_status_t deliver(bkv_ipc_lane_t *lane, const batch_t *batch, bkv_error_t *err) {
    int error = 0;
    for (uint32_t i = 0; error == 0 && i < batch->count; i++) {
        error = deliver_one(lane, batch->list[i]);
    }
    int waited = wait_for_stream(lane); // in every case, as above
    error = error != 0 ? error : waited;
    return error != 0 ? bkv_ipc_device_fail(lane->device, error, "cuda-ipc: copying", err) : BKV_OK;
}

// ---- a batch ----

// Takes out those whose session is gone, ends them, and keeps the others.
static void drop_lost(batch_t *batch, batch_t *lost) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < batch->count; i++) {
        bkv_ipc_transfer_t *transfer = batch->list[i];
        if (bkv_ipc_session_check(transfer->session, &transfer->copy) == BKV_OK) {
            batch->list[kept++] = transfer;
        } else {
            lost->list[lost->count++] = transfer;
        }
    }
    batch->count = kept;
}

static void end_lost(const batch_t *lost) {
    for (uint32_t i = 0; i < lost->count; i++) {
        const bkv_error_t error = lost->list[i]->copy;
        bkv_ipc_transfer_end(lost->list[i], 0, &error);
    }
}

// Each ends as its own status word says.
static void end_batch(const batch_t *batch, const uint64_t *words, size_t length, const bkv_error_t *error) {
    for (uint32_t i = 0; i < batch->count; i++) {
        bkv_ipc_transfer_t *transfer = batch->list[i];
        bkv_error_t own = *error;
        if (own.status == BKV_OK && transfer->ingest != NULL) {
            own.status = bkv_cuda_compress_check(&transfer->make.shape, words[i], &own);
        }
        bkv_ipc_transfer_end(transfer, length, &own);
    }
}

static void run(bkv_ipc_lane_t *lane, batch_t *batch) {
    bkv_ipc_device_t *device = lane->device;
    batch_t lost = {.count = 0};
    uint64_t words[BATCH] = {0};
    size_t length = 0;
    int before;
    bkv_error_t error = {.status = BKV_OK};
    if (bkv_ipc_device_enter(device, &before, &error) == BKV_OK) {
        drop_lost(batch, &lost);
        int made = make_stream(lane);
        if (made != 0) {
            bkv_ipc_device_fail(device, made, "cuda-ipc: no stream", &error);
        } else if (batch->count > 0 && batch->list[0]->ingest == NULL) {
            (void)deliver(lane, batch, &error);
        } else if (batch->count > 0 && compress(lane, batch, &length, &error) == BKV_OK) {
            assert(lane->host != NULL);
            memcpy(words, lane->host, batch->count * sizeof(words[0]));
        }
        if (lane->memory_bytes > KEEP_BYTES) {
            give_memory(lane);
        }
        bkv_ipc_device_leave(device, before);
    }
    end_lost(&lost);
    end_batch(batch, words, length, &error);
}

// The next batch. An empty one: nobody uses the device any more. False: it is being closed.
static bool next(bkv_ipc_lane_t *lane, batch_t *batch) {
    bkv_ipc_device_t *device = lane->device;
    batch->count = 0;
    pthread_mutex_lock(&device->lock);
    while (device->ready.count == 0 && !device->stopping && (device->sessions > 0 || lane->memory == NULL)) {
        pthread_cond_wait(&device->lane_has, &device->lock);
    }
    bool goes_on = !device->stopping;
    if (device->ready.count > 0) {
        choose(device, batch);
    }
    pthread_mutex_unlock(&device->lock);
    return goes_on;
}

void *bkv_ipc_lane_main(void *argument) {
    bkv_ipc_lane_t *lane = argument;
    batch_t batch;
    while (next(lane, &batch)) {
        if (batch.count > 0) {
            run(lane, &batch);
        } else {
            lane_rest(lane, false);
        }
    }
    lane_rest(lane, true);
    return NULL;
}
