// wire.h - between protobuf bytes and the pipeline's structures. Nothing that arrives here is trusted.
//
// Requests are unpacked by protobuf-c into a bump, whose limit bounds them. A message whose last field, number 15, carries a
// payload (PutRequest.data, AttendRequest.q) is split first: its other fields go through protobuf-c, the payload's bytes stay
// where gRPC received them and are read through a cursor. The split walks the message's top level field by field, so that
// any legal encoding is understood: any order, repeated fields (the last data counts), unknown fields, split anywhere.
#ifndef BKV_RPC_WIRE_H
#define BKV_RPC_WIRE_H

#include "daemon/pipeline/pipeline.h"
#include "daemon/rpc/bump.h"
#include "daemon/transport/transport.h"

#include "balancekv.pb-c.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/slice.h>

// The field number of payloads.
#define BKV_WIRE_DATA_FIELD 15

// ---- reading received bytes ----

// A place in a received message. The byte buffer must outlive it.
typedef struct bkv_cursor {
    grpc_byte_buffer_reader reader;
    const uint8_t *at; // the rest of the present slice
    size_t left;       // bytes there
    size_t remaining;  // bytes to the end of the message
} bkv_cursor_t;

void bkv_cursor_init(bkv_cursor_t *cursor, grpc_byte_buffer *message);

// The next bytes that lie together, at most `most`; the cursor moves past them. 0 at the end.
size_t bkv_cursor_next(bkv_cursor_t *cursor, size_t most, const uint8_t **bytes);

// Moves on by `bytes`, or copies that many out. They must be there (see remaining).
void bkv_cursor_skip(bkv_cursor_t *cursor, size_t bytes);
void bkv_cursor_copy(bkv_cursor_t *cursor, void *out, size_t bytes);

// UNIMPLEMENTED when the message is compressed: KV data does not shrink, and a small message must not become a huge one.
bkv_status_t bkv_wire_check_encoding(const grpc_byte_buffer *message, bkv_error_t *err);

// A whole message, unpacked into bump. More than `most` bytes or more than the bump holds: RESOURCE_EXHAUSTED; not protobuf:
// INVALID_ARGUMENT. The result lives until the bump's reset.
bkv_status_t bkv_wire_unpack(const ProtobufCMessageDescriptor *type, grpc_byte_buffer *message, size_t most, bkv_bump_t *bump,
                             const ProtobufCMessage **result, bkv_error_t *err);

// A message split into its fields below 15, unpacked, and where the bytes of field 15 lie. Fields above 15 are ignored.
typedef struct bkv_split {
    const ProtobufCMessage *head;
    bkv_cursor_t data; // at the payload's first byte
    size_t data_bytes; // 0 when there is none
} bkv_split_t;

// head_most: most bytes of the fields below 15; few of them cost little, whatever head_most is. Statuses as above; a length
// that goes past the end: INVALID_ARGUMENT.
bkv_status_t bkv_wire_split(const ProtobufCMessageDescriptor *type, grpc_byte_buffer *message, size_t head_most,
                            bkv_bump_t *bump, bkv_split_t *split, bkv_error_t *err);

// ---- fields ----

// What a Spec says; bkv_model_complete still has to check it. Shares stay where the message has them.
bkv_status_t bkv_wire_get_spec(const Balancekv__V1__Spec *spec, bkv_model_t *model, bkv_error_t *err);

// The Spec of a completed model; its strings and shares are the model's.
void bkv_wire_set_spec(const bkv_model_t *model, Balancekv__V1__Spec *spec);

bkv_status_t bkv_wire_get_spec_id(const ProtobufCBinaryData *bytes, bkv_spec_id_t *id, bkv_error_t *err);

// `count` keys; out has room for them. More than max_batch: RESOURCE_EXHAUSTED.
bkv_status_t bkv_wire_check_keys(size_t count, const ProtobufCBinaryData *keys, uint32_t max_batch, bkv_error_t *err);
void bkv_wire_get_keys(size_t count, const ProtobufCBinaryData *keys, bkv_key_t *out); // checked ones

// The bands of a FoldRequest; more than a profile has: INVALID_ARGUMENT. What they say is checked by the pipeline.
bkv_status_t bkv_wire_get_profile(size_t count, Balancekv__V1__Band *const *bands, bkv_profile_t *profile, bkv_error_t *err);

bkv_status_t bkv_wire_get_block(const Balancekv__V1__PutBlock *block, bkv_ingest_args_t *args, bkv_error_t *err);

// ---- shared memory (wire_place.c) ----

#define BKV_WIRE_PAGES 65536 // most in a layout

// A place as a request says it, with all that it refers to; not to be copied.
typedef struct bkv_wire_place {
    bkv_session_id_t session;
    bkv_place_t place;
    bkv_device_layout_t layout; // place.layout where there is one
    uint64_t *numbers;          // of the layout; owned
    uint8_t event[BKV_CUDA_HANDLE_BYTES];
} bkv_wire_place_t;

// The place of a block's payload; `layers` is the spec's. bytes are filled in. Lengths, counts and alignment are checked, not
// whether it lies within the session. To be cleared, also after a failure.
bkv_status_t bkv_wire_get_payload_place(const Balancekv__V1__PutBlock *block, uint32_t layers, bkv_wire_place_t *out,
                                        bkv_error_t *err);

// Room for records; there is nothing to clear.
bkv_status_t bkv_wire_get_room(const Balancekv__V1__Place *place, bkv_wire_place_t *out, bkv_error_t *err);

void bkv_wire_place_clear(bkv_wire_place_t *place);

bkv_status_t bkv_wire_get_session_id(const char *field, const ProtobufCBinaryData *bytes, bkv_session_id_t *id,
                                     bkv_error_t *err);

// What an AttachRequest asks for; args refers to the request and to the bump. `local` is left to the caller.
bkv_status_t bkv_wire_get_attach(const Balancekv__V1__AttachRequest *request, bkv_bump_t *bump, bkv_attach_args_t *args,
                                 bkv_error_t *err);

// ---- writing ----

// A message to send: `head` packed and, when data is not NULL, field 15 with the bytes of *data, which are referenced, not
// copied (the reference is taken over). The result is the caller's.
grpc_byte_buffer *bkv_wire_pack(const ProtobufCMessage *head, const grpc_slice *data);

#endif
