// chunk.h - a RecordChunk out of a gRPC message, its data left where it lies, for whoever receives records.
#ifndef BKV_CHUNK_H
#define BKV_CHUNK_H

#include "balancekv.pb-c.h"

#include <grpc/byte_buffer.h>
#include <stdbool.h>

// A response whose `data` (field 15) may be large: everything else unpacked, and where in the message its data lies.
typedef struct bkv_chunk {
    Balancekv__V1__RecordChunk *head;
    uint64_t data_at, data_bytes;
} bkv_chunk_t;

// False: not a RecordChunk, or one with more than 4 KiB besides its data. The head is the caller's to free.
bool bkv_chunk_parse(bkv_chunk_t *chunk, grpc_byte_buffer *message);

// Copies bytes [at, at + length) of a message, which must have them.
void bkv_chunk_copy(grpc_byte_buffer *message, uint64_t at, uint64_t length, void *out);

#endif
