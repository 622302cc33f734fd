// intake.h - finished records on their way in: what a stream of StoreRequests says, checked and brought into the store.
//
// It knows messages and the store, but no call: peer_store.c reads the messages. A record that is refused says why in its code,
// its bytes are skipped, and the others go on; what makes no sense as a stream ends it.
//
// Bytes are summed as they are copied into their slot, message by message, so that no record, however long, keeps a thread for
// more than one message at a time. Nobody can find it before its structure and its checksum have been found in order.
//
// Not thread-safe.
#ifndef BKV_RPC_INTAKE_H
#define BKV_RPC_INTAKE_H

#include "daemon/rpc/wire.h"

typedef struct bkv_intake bkv_intake_t;

// models: where the spec of a record is open, its tenant must be that spec's. Both outlive the intake. NULL: no memory.
bkv_intake_t *bkv_intake_create(bkv_store_t *store, const bkv_model_table_t *models, uint32_t records_most);

// Gives up what has not come completely. NULL: nothing.
void bkv_intake_destroy(bkv_intake_t *intake);

// The next message. A failure ends the stream, though what came before has been taken in. INVALID_ARGUMENT: no StoreRequest, or
// data that belong to no record; RESOURCE_EXHAUSTED: one record more than records_most, or no memory.
bkv_status_t bkv_intake_take(bkv_intake_t *intake, grpc_byte_buffer *message, bkv_bump_t *bump, uint64_t now_ms,
                             bkv_error_t *err);

// There is no further message. *codes: [count], gRPC's, one per record; *message of the first that was refused, "" when none was.
// Both are the intake's.
void bkv_intake_end(bkv_intake_t *intake, const uint32_t **codes, uint32_t *count, const char **message);

// Bytes of records that have come.
uint64_t bkv_intake_bytes(const bkv_intake_t *intake);

#endif
