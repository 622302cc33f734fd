// cuda_rig.c - see cuda_rig.h.
#include "cuda_rig.h"

#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

void cuda_rig_open(cuda_rig_t *rig) {
    bkv_error_t err;
    fake_gpu_plug(1);
    fixture_open(&rig->fixture, 64);
    bkv_transports_destroy(rig->fixture.transports);
    rig->fixture.config.cuda_ipc = true;
    cr_assert_eq(bkv_transports_create(&rig->fixture.config, &rig->fixture.transports, &err), BKV_OK, "%s", err.message);
    rig->memory = fake_gpu_alloc(CUDA_MEMORY, false);
    rig->spec = rig->fixture.model.id;
}

// Nothing may be left on the device, and nothing pinned.
void cuda_rig_close(cuda_rig_t *rig) {
    fixture_close(&rig->fixture);
    fake_gpu_counts_t left = fake_gpu_counts();
    cr_assert_eq(left.imports + left.spans + left.chunks, 0);
    cr_assert_eq(left.events + left.streams, 0);
    cr_assert_eq(left.memory, 0);
    cr_assert_eq(left.host, 0);
    cr_assert_eq(left.pins, 0);
}

// ---- sessions ----

bkv_device_allocation_t cuda_by_handle(uint8_t *memory, uint64_t bytes, uint8_t handle[BKV_GPU_HANDLE_BYTES]) {
    cr_assert_eq(bkv_gpu_export(memory, handle), 0);
    return (bkv_device_allocation_t){.handle = handle, .bytes = bytes};
}

bkv_status_t cuda_try_attach(cuda_rig_t *rig, const bkv_device_allocation_t *list, uint32_t count, bkv_session_id_t *id,
                             bkv_error_t *err) {
    uint8_t uuid[BKV_CUDA_UUID_BYTES];
    bkv_attach_result_t result;
    cr_assert_eq(bkv_gpu_uuid(0, uuid), 0);
    const bkv_attach_args_t args = {
        .kind = BKV_TRANSPORT_CUDA_IPC, .local = true, .uuid = uuid, .allocations = list, .allocation_count = count};
    bkv_status_t status = bkv_session_attach(rig->fixture.transports, &args, &result, err);
    *id = result.id;
    return status;
}

bkv_session_t *cuda_attach(cuda_rig_t *rig, const bkv_device_allocation_t *list, uint32_t count) {
    bkv_error_t err;
    bkv_session_id_t id;
    cr_assert_eq(cuda_try_attach(rig, list, count, &id, &err), BKV_OK, "%s", err.message);
    return fixture_find(&rig->fixture, &id);
}

bkv_session_t *cuda_attach_memory(cuda_rig_t *rig) {
    uint8_t handle[BKV_GPU_HANDLE_BYTES];
    const bkv_device_allocation_t allocation = cuda_by_handle(rig->memory, CUDA_MEMORY, handle);
    return cuda_attach(rig, &allocation, 1);
}

void cuda_detach(cuda_rig_t *rig, bkv_session_t *session) {
    bkv_error_t err;
    const bkv_session_id_t id = session->id;
    bkv_session_release(session);
    cr_assert_eq(bkv_session_detach(rig->fixture.transports, &id, NULL, NULL, &err), BKV_OK, "%s", err.message);
}

// ---- blocks ----

bkv_shape_t cuda_shape(const cuda_rig_t *rig) {
    bkv_shape_t shape = rig->fixture.model.shape;
    shape.tokens = CUDA_TOKENS;
    return shape;
}

bkv_ingest_args_t cuda_put_args(const cuda_rig_t *rig, uint32_t key, bkv_codec_t codec, uint32_t rate) {
    bkv_shape_t shape = cuda_shape(rig);
    bkv_ingest_args_t args = {.spec_id = rig->spec,
                              .tokens = CUDA_TOKENS,
                              .payload_bytes = bkv_shape_bytes(&shape),
                              .codec = codec,
                              .rate = rate,
                              .on_device = true};
    memcpy(args.key.bytes, &key, sizeof(key));
    return args;
}

void cuda_layout_payload(const cuda_rig_t *rig, uint64_t offset, cuda_layout_t *layout) {
    bkv_shape_t shape = cuda_shape(rig);
    uint64_t keys = (uint64_t)shape.heads * CUDA_TOKENS * shape.key_dim * 4,
             values = (uint64_t)shape.heads * CUDA_TOKENS * shape.value_dim * 4;
    *layout = (cuda_layout_t){.keys = {offset, offset + keys + values}, .values = {offset + keys, offset + 2 * keys + values}};
    layout->layout = (bkv_device_layout_t){.keys = layout->keys,
                                           .values = layout->values,
                                           .layers = 2,
                                           .token_stride = shape.key_dim * 4,
                                           .head_stride = (uint64_t)CUDA_TOKENS * shape.key_dim * 4,
                                           .value_token_stride = shape.value_dim * 4,
                                           .value_head_stride = (uint64_t)CUDA_TOKENS * shape.value_dim * 4};
}

// What a put says; the ingest is given up where the start fails.
bkv_status_t cuda_put(cuda_rig_t *rig, bkv_session_t *session, const bkv_ingest_args_t *args, const bkv_place_t *place,
                      outcome_t *outcome, bkv_error_t *err) {
    bkv_ingest_t *ingest;
    outcome_init(outcome);
    cr_assert_eq(bkv_ingest_begin(rig->fixture.pipeline, args, fixture_now(), &ingest, err), BKV_OK, "%s", err->message);
    bkv_status_t status = bkv_session_fetch(session, place, ingest, outcome_put_done, outcome, err);
    if (status != BKV_OK) {
        bkv_ingest_abort(ingest);
    }
    return status;
}

void cuda_put_well(cuda_rig_t *rig, bkv_session_t *session, const bkv_ingest_args_t *args, const bkv_device_layout_t *layout) {
    bkv_error_t err;
    outcome_t outcome;
    const bkv_place_t place = {.layout = layout};
    cr_assert_eq(cuda_put(rig, session, args, &place, &outcome, &err), BKV_OK, "%s", err.message);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
}

// The record that the CPU makes of the same payload.
static uint8_t *expected_record(const cuda_rig_t *rig, const bkv_ingest_args_t *args, const void *payload, size_t *length) {
    bkv_shape_t shape = cuda_shape(rig);
    bkv_codec_params_t params = rig->fixture.model.params;
    params.codec = args->codec != 0 ? args->codec : params.codec;
    params.rate = args->rate != 0 ? args->rate : params.rate;
    const bkv_record_id_t id = {.key = args->key, .spec_id = args->spec_id, .tenant = rig->fixture.model.tenant};
    const bkv_backend_t *ref = bkv_backend_get("ref");
    size_t room = (bkv_codec_bound(&shape, &params) + 63) / 64 * 64;
    uint8_t *record = aligned_alloc(64, room);
    void *workspace = aligned_alloc(64, (bkv_compress_workspace(ref, &shape, &params) + 63) / 64 * 64);
    bkv_block_t block;
    bkv_error_t err;
    bkv_block_from_payload(&shape, payload, &block);
    cr_assert_eq(bkv_compress(ref, &block, &params, &id, record, room, workspace, length, &err), BKV_OK, "%s", err.message);
    bkv_record_seal(record);
    free(workspace);
    return record;
}

void cuda_assert_stored(cuda_rig_t *rig, uint32_t key, const bkv_ingest_args_t *args, const void *payload) {
    size_t length = 0;
    uint8_t *record = expected_record(rig, args, payload, &length);
    bkv_delivery_t delivery = fixture_deliver(&rig->fixture, key);
    cr_assert_eq(delivery.length, length);
    cr_assert_eq(memcmp(delivery.data, record, length), 0);
    bkv_delivery_release(rig->fixture.pipeline, &delivery);
    free(record);
}
