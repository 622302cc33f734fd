// cuda_ipc.c - GPU memory of local workers: their blocks are compressed where they lie, by the GPU that has them, and only
// records cross the bus. Sessions, and how transfers start and end; what they do in between is gate.c's and
// lane.c's, and cuda_ipc.h has the whole picture.
//
// A client that overwrites a block while it is being compressed gets a record of some mixture, sound in itself, under its own
// key.
#include "daemon/transport/cuda_ipc/cuda_ipc.h"

#include "daemon/observe/clock.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// How often a commit is tried that finds too many compute jobs queued, a millisecond apart.
#define COMMIT_TRIES 1000

// ---- open and close ----

static bkv_status_t ipc_open(bkv_transports_t *transports, void **self, bkv_error_t *err) {
    const bkv_transports_config_t *config = bkv_transports_config_of(transports);
    if (!config->cuda_ipc) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "turned off (transport.cuda_ipc)");
    }
    uint32_t count = bkv_cuda_count();
    if (count == 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "there is no CUDA device here");
    }
    bkv_ipc_t *ipc = calloc(1, sizeof(*ipc));
    if (ipc == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for the transports");
    }
    ipc->config = *config;
    ipc->count = count < BKV_IPC_DEVICES ? count : BKV_IPC_DEVICES;
    for (uint32_t i = 0; i < ipc->count; i++) {
        int error = bkv_gpu_uuid((int)i, ipc->uuids[i]);
        if (error != 0) {
            free(ipc);
            return bkv_fail(err, BKV_UNIMPLEMENTED, "GPU %u: %s", i, bkv_gpu_error(error));
        }
    }
    pthread_mutex_init(&ipc->lock, NULL);
    bkv_ipc_pins_init(&ipc->pins, config);
    *self = ipc;
    return BKV_OK;
}

static void ipc_close(void *self) {
    bkv_ipc_t *ipc = self;
    for (uint32_t i = 0; i < ipc->count; i++) {
        bkv_ipc_device_close(ipc->devices[i]);
    }
    bkv_ipc_pins_deinit(&ipc->pins);
    pthread_mutex_destroy(&ipc->lock);
    free(ipc);
}

// ---- sessions ----

// The device of that name, opened: the first time that takes a moment.
static bkv_status_t find_device(bkv_ipc_t *ipc, const uint8_t *uuid, bkv_ipc_device_t **device, bkv_error_t *err) {
    assert(uuid != NULL);
    for (uint32_t i = 0; i < ipc->count; i++) {
        if (memcmp(ipc->uuids[i], uuid, BKV_GPU_UUID_BYTES) != 0) {
            continue;
        }
        pthread_mutex_lock(&ipc->lock);
        bkv_status_t status = BKV_OK;
        *device = atomic_load(&ipc->devices[i]);
        if (*device == NULL) {
            status = bkv_ipc_device_open(ipc, (int)i, device, err);
            atomic_store(&ipc->devices[i], *device);
        }
        pthread_mutex_unlock(&ipc->lock);
        return status;
    }
    return bkv_fail(err, BKV_UNIMPLEMENTED, "cuda_ipc.uuid: none of the %u GPUs that the daemon sees", ipc->count);
}

static void count_session(bkv_ipc_device_t *device, bool more) {
    pthread_mutex_lock(&device->lock);
    device->sessions += more ? 1 : 0;
    device->sessions -= more ? 0 : 1;
    if (device->sessions == 0) {
        pthread_cond_broadcast(&device->lane_has); // they give back their memory
    }
    pthread_mutex_unlock(&device->lock);
}

static bkv_status_t session_map(bkv_ipc_session_t *session, const bkv_attach_args_t *args, bkv_error_t *err) {
    int before;
    bkv_status_t status = bkv_ipc_device_enter(session->device, &before, err);
    if (atomic_load(&session->device->dead)) {
        status = bkv_fail(err, BKV_UNIMPLEMENTED, "cuda_ipc.uuid: this GPU has failed; only a restart of the daemon can help");
    } else if (status == BKV_OK) {
        session->generation = atomic_load(&session->device->generation);
        status = bkv_ipc_memory_open(session->device, args->allocations, args->allocation_count, &session->memory, err);
        bkv_ipc_device_leave(session->device, before);
    }
    return status;
}

static bkv_status_t ipc_attach(void *self, const bkv_attach_args_t *args, bkv_attach_result_t *result, void **state,
                               bkv_error_t *err) {
    bkv_ipc_session_t *session = calloc(1, sizeof(*session));
    if (session == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a session");
    }
    bkv_status_t status = find_device(self, args->uuid, &session->device, err);
    if (session->device != NULL) {
        status = session_map(session, args, err);
    }
    if (status != BKV_OK || session->device == NULL) {
        free(session);
        return status;
    }
    count_session(session->device, true);
    result->bytes = bkv_ipc_memory_bytes(session->memory);
    *state = session;
    return BKV_OK;
}

static void ipc_end(void *self, void *state) {
    (void)self;
    bkv_ipc_session_t *session = state;
    atomic_store(&session->ended, true);
    pthread_mutex_lock(&session->device->lock);
    pthread_cond_signal(&session->device->gate_has); // it gives up what waits for this client's events
    pthread_mutex_unlock(&session->device->lock);
}

static void ipc_detach(void *self, void *state) {
    (void)self;
    bkv_ipc_session_t *session = state;
    bkv_ipc_device_t *device = session->device;
    int before;
    bool entered = bkv_ipc_device_enter(device, &before, NULL) == BKV_OK;
    bool there = entered && session->generation == atomic_load(&device->generation);
    if (there) {
        bkv_ipc_events_close(session);
    }
    bkv_ipc_memory_close(session->memory, there);
    if (entered) {
        bkv_ipc_device_leave(device, before);
    }
    free(session);
    count_session(device, false);
}

static bool device_usable(const bkv_ipc_device_t *device) {
    return device == NULL || !(atomic_load(&device->dead) || atomic_load(&device->broken));
}

static bool ipc_alive(void *self, void *state) {
    const bkv_ipc_t *ipc = self;
    const bkv_ipc_session_t *session = state;
    if (session != NULL) {
        return device_usable(session->device) && session->generation == atomic_load(&session->device->generation);
    }
    bool any = false;
    for (uint32_t i = 0; i < ipc->count; i++) {
        any = any || device_usable(atomic_load(&ipc->devices[i]));
    }
    return any;
}

bkv_status_t bkv_ipc_session_check(const bkv_ipc_session_t *session, bkv_error_t *err) {
    if (atomic_load(&session->ended)) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "place.session: has ended; Attach again");
    }
    if (session->generation != atomic_load(&session->device->generation)) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "place.session: was lost when the GPU was reset; Attach again");
    }
    return BKV_OK;
}

static bkv_status_t ipc_give_fd(void *self, void *state, uint32_t index, int fd, bkv_error_t *err) {
    (void)self;
    bkv_ipc_session_t *session = state;
    int before;
    bkv_status_t status = bkv_ipc_device_enter(session->device, &before, err);
    if (status != BKV_OK) {
        close(fd);
        return status;
    }
    status = bkv_ipc_session_check(session, err);
    if (status == BKV_OK) {
        status = bkv_ipc_memory_give(session->memory, index, fd, err);
    } else {
        close(fd);
    }
    bkv_ipc_device_leave(session->device, before);
    return status;
}

static bkv_status_t check_session(const bkv_ipc_session_t *session, bkv_error_t *err) {
    uint32_t missing;
    bkv_status_t status = bkv_ipc_session_check(session, err);
    if (status == BKV_OK && !bkv_ipc_memory_complete(session->memory, &missing)) {
        status = bkv_fail(err, BKV_FAILED_PRECONDITION, "place.session: the descriptor of allocation %u has not come", missing);
    }
    return status;
}

// ---- how transfers end ----

// A record has been made: hands it to the pipeline, which may have too many jobs queued for a moment.
static bkv_status_t commit(bkv_ipc_transfer_t *transfer, bkv_error_t *err) {
    bkv_status_t status = BKV_BUSY;
    for (int i = 0; status == BKV_BUSY && i < COMMIT_TRIES; i++) {
        if (i > 0) {
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        }
        status = bkv_ingest_commit(transfer->ingest, transfer->ingested, transfer->user, err);
    }
    return status;
}

static void end_ingest(bkv_ipc_transfer_t *transfer, uint64_t length, const bkv_error_t *error) {
    bkv_error_t own = *error;
    bkv_ipc_device_done(transfer->session->device); // while the session is there: afterwards it may not be
    if (own.status == BKV_OK) {
        bkv_ingest_made(transfer->ingest, length);
        own.status = commit(transfer, &own);
    }
    if (own.status != BKV_OK) {
        bkv_ingest_abort(transfer->ingest);
        transfer->ingested(transfer->user, &own, &(bkv_ingest_result_t){0});
    }
    free(transfer);
}

static void verify(bkv_ipc_transfer_t *transfer) {
    const bkv_ipc_t *ipc = transfer->session->device->ipc;
    transfer->sound.status = bkv_delivery_verify(ipc->config.pipeline, transfer->delivery, &transfer->sound);
}

// Whoever does the last part ends the delivery.
static void part_done(bkv_ipc_transfer_t *transfer) {
    if (atomic_fetch_sub(&transfer->parts, 1) > 1) {
        return;
    }
    bkv_ipc_device_done(transfer->session->device);
    const bkv_error_t *error = transfer->sound.status != BKV_OK ? &transfer->sound : &transfer->copy;
    transfer->delivered(transfer->user, error);
    free(transfer);
}

static void verify_run(bkv_job_t *job, bkv_scratch_t *scratch) {
    (void)scratch;
    bkv_ipc_transfer_t *transfer = (bkv_ipc_transfer_t *)job;
    verify(transfer);
    part_done(transfer);
}

static void verify_cancel(bkv_job_t *job) {
    bkv_ipc_transfer_t *transfer = (bkv_ipc_transfer_t *)job;
    bkv_fail(&transfer->sound, BKV_CANCELLED, "the daemon stopped before the record was verified");
    part_done(transfer);
}

void bkv_ipc_transfer_end(bkv_ipc_transfer_t *transfer, uint64_t length, const bkv_error_t *error) {
    if (transfer->ingest != NULL) {
        end_ingest(transfer, length, error);
        return;
    }
    transfer->copy = *error;
    if (transfer->verify_here) {
        verify(transfer);
    }
    part_done(transfer);
}

// ---- how they start ----

static bkv_ipc_transfer_t *transfer_create(bkv_ipc_session_t *session, const bkv_place_t *place, size_t tables, void *user,
                                           bkv_error_t *err) {
    bkv_ipc_transfer_t *transfer = calloc(1, sizeof(*transfer) + tables * sizeof(transfer->tables[0]));
    if (transfer == NULL) {
        bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a transfer");
        return NULL;
    }
    transfer->session = session;
    transfer->user = user;
    transfer->table_count = (uint32_t)tables;
    transfer->has_event = place->event != NULL;
    transfer->due_ms = bkv_now_ms() + BKV_IPC_EVENT_MS;
    if (transfer->has_event) {
        memcpy(transfer->event, place->event, sizeof(transfer->event));
    }
    return transfer;
}

// A payload in one piece.
static bkv_status_t locate_payload(const bkv_ipc_spans_t *spans, const bkv_place_t *place, const bkv_shape_t *shape,
                                   bkv_block_t *block, bkv_error_t *err) {
    const uint8_t *payload = bkv_ipc_span_address(spans, place->offset, bkv_shape_bytes(shape));
    if (payload == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.offset: the payload does not lie within one allocation");
    }
    bkv_block_from_payload(shape, payload, block);
    return BKV_OK;
}

static void fill_gather(bkv_ipc_transfer_t *transfer, const bkv_device_layout_t *layout, const bkv_ipc_spans_t *spans) {
    const bkv_shape_t *shape = &transfer->make.shape;
    transfer->gathers = true;
    transfer->gather = (bkv_gpu_gather_t){.key_token = layout->token_stride,
                                          .key_head = layout->head_stride,
                                          .value_token = layout->value_token_stride,
                                          .value_head = layout->value_head_stride,
                                          .page_tokens = bkv_ipc_layout_page_tokens(layout, shape),
                                          .shape = *shape};
    bkv_ipc_layout_tables(layout, shape, spans, transfer->tables, transfer->tables + (size_t)2 * shape->layers);
}

// Says where the block lies: by strides, or by the tables that a gather needs.
static bkv_status_t ingest_create(bkv_ipc_session_t *session, const bkv_place_t *place, const bkv_ingest_device_t *make,
                                  void *user, bkv_ipc_transfer_t **out, bkv_error_t *err) {
    bkv_ipc_spans_t spans = bkv_ipc_memory_spans(session->memory);
    const bkv_device_layout_t *layout = place->layout;
    bkv_block_t block = {.shape = make->shape};
    bkv_status_t status = bkv_codec_check_shape(&make->params, &make->shape, err); // the kernels' plan counts on it
    if (status == BKV_OK) {
        status = layout == NULL ? locate_payload(&spans, place, &make->shape, &block, err)
                                : bkv_ipc_layout_check(layout, &make->shape, &spans, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    bool direct = layout == NULL || bkv_ipc_layout_direct(layout, &make->shape, &spans, &block);
    size_t tables = direct ? 0 : (size_t)2 * make->shape.layers + bkv_ipc_layout_pages(layout);
    bkv_ipc_transfer_t *transfer = transfer_create(session, place, tables, user, err);
    if (transfer == NULL) {
        return BKV_RESOURCE_EXHAUSTED;
    }
    transfer->make = *make;
    transfer->block = block;
    if (!direct) {
        fill_gather(transfer, layout, &spans);
    }
    *out = transfer;
    return BKV_OK;
}

static bkv_status_t ipc_fetch(void *self, void *state, const bkv_place_t *place, bkv_ingest_t *ingest, bkv_ingest_done_t done,
                              void *user, bkv_error_t *err) {
    (void)self;
    bkv_ipc_session_t *session = state;
    bkv_ingest_device_t make;
    bkv_ingest_device(ingest, &make);
    if (make.record == NULL) {
        return bkv_ingest_commit(ingest, done, user, err); // it is there already
    }
    bkv_ipc_transfer_t *transfer = NULL;
    bkv_status_t status = check_session(session, err);
    if (status == BKV_OK) {
        status = ingest_create(session, place, &make, user, &transfer, err);
    }
    if (status == BKV_OK) {
        status = bkv_ipc_device_admit(session->device, err);
    }
    if (status != BKV_OK) {
        free(transfer);
        return status;
    }
    transfer->ingest = ingest;
    transfer->ingested = done;
    bkv_ipc_device_queue(session->device, transfer);
    return BKV_OK;
}

static bkv_status_t ipc_deliver(void *self, void *state, const bkv_place_t *place, const bkv_delivery_t *delivery,
                                bkv_delivered_t done, void *user, bkv_error_t *err) {
    const bkv_ipc_t *ipc = self;
    bkv_ipc_session_t *session = state;
    bkv_status_t status = check_session(session, err);
    bkv_ipc_transfer_t *transfer = status == BKV_OK ? transfer_create(session, place, 0, user, err) : NULL;
    if (transfer == NULL) {
        return status == BKV_OK ? BKV_RESOURCE_EXHAUSTED : status;
    }
    status = bkv_ipc_device_admit(session->device, err);
    if (status != BKV_OK) {
        free(transfer);
        return status;
    }
    transfer->verify = (bkv_job_t){.run = verify_run, .cancel = verify_cancel};
    transfer->delivery = delivery;
    transfer->offset = place->offset;
    transfer->delivered = done;
    atomic_store(&transfer->parts, 2);
    if (bkv_pipeline_submit(ipc->config.pipeline, &transfer->verify, NULL) != BKV_OK) {
        transfer->verify_here = true;
        atomic_store(&transfer->parts, 1);
    }
    bkv_ipc_device_queue(session->device, transfer);
    return BKV_OK;
}

const bkv_transport_ops_t bkv_transport_cuda_ipc = {
    .name = "cuda-ipc",
    .local = true,
    .on_device = true,
    .open = ipc_open,
    .close = ipc_close,
    .attach = ipc_attach,
    .end = ipc_end,
    .detach = ipc_detach,
    .alive = ipc_alive,
    .fetch = ipc_fetch,
    .deliver = ipc_deliver,
    .give_fd = ipc_give_fd,
};
