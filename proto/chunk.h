// chunk.h - messages with a large field of bytes, `data` (15), which is left where it lies: those that are sent, and RecordChunks
// that come.
#ifndef BKV_CHUNK_H
#define BKV_CHUNK_H

#include "balancekv.pb-c.h"

#include <grpc/byte_buffer.h>
#include <grpc/slice.h>
#include <stdbool.h>

// Packs a message, and behind its fields the head of its data of so many bytes, which are to follow. The slice is the caller's.
grpc_slice bkv_chunk_pack_before(const ProtobufCMessage *message, uint64_t length);

// A response: everything but its data unpacked, and where in the message that lies.
typedef struct bkv_chunk {
    Balancekv__V1__RecordChunk *head;
    uint64_t data_at, data_bytes;
} bkv_chunk_t;

// False: not a RecordChunk, or one with more than 4 KiB besides its data. The head is the caller's to free.
bool bkv_chunk_parse(bkv_chunk_t *chunk, grpc_byte_buffer *message);

// Copies bytes [at, at + length) of a message, which must have them.
void bkv_chunk_copy(grpc_byte_buffer *message, uint64_t at, uint64_t length, void *out);

#endif
