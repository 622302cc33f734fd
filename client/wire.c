// wire.c - packing and unpacking of messages. What is in them is the operations' business (unary.c, put.c, get.c).
#include "client/wire.h"

#include <grpc/byte_buffer_reader.h>
#include <stdlib.h>
#include <string.h>

grpc_slice bkv_client_pack(const ProtobufCMessage *message) {
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(message));
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    return slice;
}

ProtobufCMessage *bkv_client_unpack(const ProtobufCMessageDescriptor *descriptor, grpc_byte_buffer *message) {
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, message)) {
        return NULL;
    }
    grpc_slice bytes = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    ProtobufCMessage *unpacked =
        protobuf_c_message_unpack(descriptor, NULL, GRPC_SLICE_LENGTH(bytes), GRPC_SLICE_START_PTR(bytes));
    grpc_slice_unref(bytes);
    return unpacked;
}

// ---- small things ----

ProtobufCBinaryData *bkv_client_key_list(const bkv_key_t *keys, size_t count) {
    ProtobufCBinaryData *list = calloc(count + 1, sizeof *list);
    for (size_t i = 0; list != NULL && i < count; i++) {
        list[i] = (ProtobufCBinaryData){.len = BKV_KEY_BYTES, .data = (uint8_t *)keys[i].bytes};
    }
    return list;
}

ProtobufCBinaryData bkv_client_spec_bytes(const bkv_spec_id_t *id) {
    return (ProtobufCBinaryData){.len = BKV_SPEC_ID_BYTES, .data = (uint8_t *)id->bytes};
}

ProtobufCBinaryData bkv_client_session_bytes(const bkv_client_window_t *window) {
    return (ProtobufCBinaryData){.len = 16, .data = (uint8_t *)bkv_client_window_session(window)};
}
