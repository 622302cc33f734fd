// cuda_rig.h - a daemon's transports with a fake GPU, and a worker with memory on it, for the tests of cuda-ipc.
#ifndef BKV_TEST_CUDA_RIG_H
#define BKV_TEST_CUDA_RIG_H

#include "fake_gpu.h"
#include "fixture.h"

#define CUDA_MEMORY ((size_t)1 << 20)
#define CUDA_TOKENS 100 // of a block: 75 KiB as raw

typedef struct cuda_rig {
    fixture_t fixture;
    uint8_t *memory; // a worker's, by handle
    bkv_spec_id_t spec;
} cuda_rig_t;

// The block as a payload at an offset of the session's memory.
typedef struct cuda_layout {
    uint64_t keys[2], values[2], pages[64];
    bkv_device_layout_t layout;
} cuda_layout_t;

void cuda_rig_open(cuda_rig_t *rig);
void cuda_rig_close(cuda_rig_t *rig); // asserts that nothing is left on the device, and nothing pinned

// ---- sessions ----

bkv_device_allocation_t cuda_by_handle(uint8_t *memory, uint64_t bytes, uint8_t handle[BKV_GPU_HANDLE_BYTES]);
bkv_status_t cuda_try_attach(cuda_rig_t *rig, const bkv_device_allocation_t *list, uint32_t count, bkv_session_id_t *id,
                             bkv_error_t *err);
bkv_session_t *cuda_attach(cuda_rig_t *rig, const bkv_device_allocation_t *list, uint32_t count); // a reference
bkv_session_t *cuda_attach_memory(cuda_rig_t *rig);                                               // of the rig's memory
void cuda_detach(cuda_rig_t *rig, bkv_session_t *session);                                        // the reference, too

// ---- blocks ----

bkv_shape_t cuda_shape(const cuda_rig_t *rig);
bkv_ingest_args_t cuda_put_args(const cuda_rig_t *rig, uint32_t key, bkv_codec_t codec, uint32_t rate);

// A payload as it is, at an offset of the session's memory.
void cuda_layout_payload(const cuda_rig_t *rig, uint64_t offset, cuda_layout_t *layout);

// What a put says; where its start fails the ingest has been given up.
bkv_status_t cuda_put(cuda_rig_t *rig, bkv_session_t *session, const bkv_ingest_args_t *args, const bkv_place_t *place,
                      outcome_t *outcome, bkv_error_t *err);
void cuda_put_well(cuda_rig_t *rig, bkv_session_t *session, const bkv_ingest_args_t *args, const bkv_device_layout_t *layout);

// That the store has under `key` what the reference backend makes of the payload.
void cuda_assert_stored(cuda_rig_t *rig, uint32_t key, const bkv_ingest_args_t *args, const void *payload);

#endif
