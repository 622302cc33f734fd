// wire.h - protobuf messages in and out of gRPC byte buffers, large byte fields without a needless copy.
#ifndef BKV_CLIENT_WIRE_H
#define BKV_CLIENT_WIRE_H

#include "balancekv.h"
#include "balancekv.pb-c.h"
#include "window.h"

#include <grpc/byte_buffer.h>
#include <grpc/slice.h>

// Packs a message; the slice is the caller's.
grpc_slice bkv_client_pack(const ProtobufCMessage *message);

// The same with the head of a field of `length` bytes behind it, for those bytes to follow: field is its number, 1..15.
grpc_slice bkv_client_pack_before(const ProtobufCMessage *message, unsigned field, uint64_t length);

// Unpacks a response; NULL when it is none. The caller frees it with protobuf_c_message_free_unpacked.
ProtobufCMessage *bkv_client_unpack(const ProtobufCMessageDescriptor *descriptor, grpc_byte_buffer *message);

// A response whose `data` (field 15) may be large: everything else unpacked, and where in the message its data lies.
typedef struct bkv_client_chunk {
    Balancekv__V1__RecordChunk *head;
    uint64_t data_at, data_bytes;
} bkv_client_chunk_t;

// False: not a RecordChunk, or one with more than 4 KiB besides its data. The head is the caller's to free.
bool bkv_client_chunk_parse(bkv_client_chunk_t *chunk, grpc_byte_buffer *message);

// Copies bytes [at, at + length) of a message, which must have them.
void bkv_client_copy(grpc_byte_buffer *message, uint64_t at, uint64_t length, void *out);

// References to 32-byte keys, for messages' repeated fields. NULL: out of memory. The caller frees the array.
ProtobufCBinaryData *bkv_client_key_list(const bkv_key_t *keys, size_t count);
ProtobufCBinaryData bkv_client_spec_bytes(const bkv_spec_id_t *id);
ProtobufCBinaryData bkv_client_session_bytes(const bkv_client_window_t *window);

// The bkv_status_t of a gRPC status code; codes that are none of ours become INTERNAL.
bkv_status_t bkv_client_status(uint32_t grpc_code);

// Copies text from a peer into an error, without what a terminal might act on.
void bkv_client_text(const void *text, size_t length, char *out, size_t room);

#endif
