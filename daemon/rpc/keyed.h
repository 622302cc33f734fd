// keyed.h - what calls over keys have in common: the spec id, the keys, and their checks.
#ifndef BKV_RPC_KEYED_H
#define BKV_RPC_KEYED_H

#include "daemon/rpc/call.h"

typedef struct bkv_keyed {
    bkv_spec_id_t spec_id;
    const bkv_model_t *model;
    const bkv_key_t *keys; // in the bump
    uint32_t count;
} bkv_keyed_t;

// Checks and reads a request's spec_id and keys. INVALID_ARGUMENT: not what they should be; NOT_FOUND: the spec was never
// opened here; RESOURCE_EXHAUSTED: more than max_batch, or no memory.
bkv_status_t bkv_keyed_get(const bkv_call_t *call, bkv_bump_t *bump, const ProtobufCBinaryData *spec_id, size_t count,
                           const ProtobufCBinaryData *keys, bkv_keyed_t *keyed, bkv_error_t *err);

// INVALID_ARGUMENT where there are none.
bkv_status_t bkv_keyed_need(const bkv_keyed_t *keyed, bkv_error_t *err);

#endif
