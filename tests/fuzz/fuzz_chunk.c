// fuzz_chunk.c - responses as a hostile daemon may send them: what reads a RecordChunk.
//
// The first byte says how the rest is cut into slices. What is accepted is compared with protobuf-c's reading of the whole.
#include "proto/chunk.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static grpc_byte_buffer *received(const uint8_t *data, size_t size, size_t piece) {
    grpc_slice slices[64];
    size_t count = 0;
    piece = size / piece < 64 ? piece : size;
    for (size_t at = 0; at < size; at += piece) {
        slices[count++] = grpc_slice_from_copied_buffer((const char *)data + at, piece < size - at ? piece : size - at);
    }
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(slices, count);
    for (size_t i = 0; i < count; i++) {
        grpc_slice_unref(slices[i]);
    }
    return message;
}

static void compare(const bkv_chunk_t *chunk, grpc_byte_buffer *message, const uint8_t *data, size_t size) {
    Balancekv__V1__RecordChunk *whole = balancekv__v1__record_chunk__unpack(NULL, size, data);
    if (whole == NULL) {
        return; // protobuf-c is the stricter one about bytes that the client skips
    }
    uint8_t *bytes = malloc((size_t)chunk->data_bytes + 1);
    bkv_chunk_copy(message, chunk->data_at, chunk->data_bytes, bytes);
    assert(whole->data.len == chunk->data_bytes);
    assert(chunk->data_bytes == 0 || memcmp(bytes, whole->data.data, whole->data.len) == 0);
    assert(whole->index == chunk->head->index && whole->code == chunk->head->code);
    assert(whole->record_bytes == chunk->head->record_bytes && whole->key.len == chunk->head->key.len);
    free(bytes);
    balancekv__v1__record_chunk__free_unpacked(whole, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1) {
        return 0;
    }
    grpc_byte_buffer *message = received(data + 1, size - 1, 1 + (size_t)data[0]);
    bkv_chunk_t chunk;
    if (bkv_chunk_parse(&chunk, message)) {
        compare(&chunk, message, data + 1, size - 1);
        balancekv__v1__record_chunk__free_unpacked(chunk.head, NULL);
    }
    grpc_byte_buffer_destroy(message);
    return 0;
}
