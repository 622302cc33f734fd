// wire.h - protobuf messages in and out of gRPC byte buffers, large byte fields without a needless copy.
#ifndef BKV_CLIENT_WIRE_H
#define BKV_CLIENT_WIRE_H

#include "balancekv.pb-c.h"
#include "client/balancekv.h"
#include "client/memory/window.h"

#include <grpc/byte_buffer.h>
#include <grpc/slice.h>

// Packs a message; the slice is the caller's.
grpc_slice bkv_client_pack(const ProtobufCMessage *message);

// Unpacks a response; NULL when it is none. The caller frees it with protobuf_c_message_free_unpacked.
ProtobufCMessage *bkv_client_unpack(const ProtobufCMessageDescriptor *descriptor, grpc_byte_buffer *message);

// References to 32-byte keys, for messages' repeated fields. NULL: out of memory. The caller frees the array.
ProtobufCBinaryData *bkv_client_key_list(const bkv_key_t *keys, size_t count);
ProtobufCBinaryData bkv_client_spec_bytes(const bkv_spec_id_t *id);
ProtobufCBinaryData bkv_client_session_bytes(const bkv_client_window_t *window);

#endif
