// chunk.c - packs around large data, and takes a RecordChunk apart. Fields of a message may come in any order and split anywhere, so all but the data is gathered
// first; nothing that a message says of lengths is believed.
#include "proto/chunk.h"

#include <grpc/byte_buffer_reader.h>
#include <string.h>

#define HEAD_MAX   4096
#define DATA_FIELD 15

// Wire types of protobuf.
enum { WIRE_VARINT = 0, WIRE_FIXED64 = 1, WIRE_BYTES = 2, WIRE_FIXED32 = 5 };

// ---- packing ----

grpc_slice bkv_chunk_pack_before(const ProtobufCMessage *message, uint64_t length) {
    uint8_t head[1 + 10];
    size_t n = 0;
    head[n++] = DATA_FIELD << 3 | WIRE_BYTES;
    for (uint64_t rest = length; n == 1 || rest > 0; rest >>= 7) {
        head[n++] = (uint8_t)((rest & 0x7f) | (rest > 0x7f ? 0x80 : 0));
    }
    size_t packed = protobuf_c_message_get_packed_size(message);
    grpc_slice slice = grpc_slice_malloc(packed + n);
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    memcpy(GRPC_SLICE_START_PTR(slice) + packed, head, n);
    return slice;
}

// ---- reading across slices ----

typedef struct cursor {
    grpc_byte_buffer_reader reader;
    const uint8_t *bytes; // of the current slice
    size_t left;          // in it
    uint64_t at;          // in the message
} cursor_t;

static bool cursor_init(cursor_t *cursor, grpc_byte_buffer *message) {
    *cursor = (cursor_t){0};
    return grpc_byte_buffer_reader_init(&cursor->reader, message) != 0;
}

// False at the end of the message.
static bool cursor_fill(cursor_t *cursor) {
    grpc_slice *slice;
    while (cursor->left == 0) {
        if (!grpc_byte_buffer_reader_peek(&cursor->reader, &slice)) {
            return false;
        }
        cursor->bytes = GRPC_SLICE_START_PTR(*slice);
        cursor->left = GRPC_SLICE_LENGTH(*slice);
    }
    return true;
}

// Takes n bytes, into out unless that is NULL.
static bool cursor_take(cursor_t *cursor, uint64_t n, uint8_t *out) {
    while (n > 0) {
        if (!cursor_fill(cursor)) {
            return false;
        }
        size_t step = n < cursor->left ? (size_t)n : cursor->left;
        if (out != NULL) {
            memcpy(out, cursor->bytes, step);
            out += step;
        }
        cursor->bytes += step;
        cursor->left -= step;
        cursor->at += step;
        n -= step;
    }
    return true;
}

void bkv_chunk_copy(grpc_byte_buffer *message, uint64_t at, uint64_t length, void *out) {
    cursor_t cursor;
    if (cursor_init(&cursor, message)) {
        (void)(cursor_take(&cursor, at, NULL) && cursor_take(&cursor, length, out));
        grpc_byte_buffer_reader_destroy(&cursor.reader);
    }
}

// ---- RecordChunk ----

// Everything but the data, gathered so that protobuf-c can unpack it: fields of a message may come in any order.
typedef struct head {
    uint8_t bytes[HEAD_MAX];
    size_t length;
} head_t;

static bool head_take(head_t *head, cursor_t *cursor, uint64_t n) {
    if (n > HEAD_MAX - head->length || !cursor_take(cursor, n, head->bytes + head->length)) {
        return false;
    }
    head->length += (size_t)n;
    return true;
}

// A varint, which is kept in the head as well.
static bool head_varint(head_t *head, cursor_t *cursor, uint64_t *value) {
    *value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        if (!head_take(head, cursor, 1)) {
            return false;
        }
        uint8_t byte = head->bytes[head->length - 1];
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if ((byte & 0x80) == 0) {
            return true;
        }
    }
    return false;
}

// One field: into the head, or, if it is the data, only noted where it lies.
static bool field_take(head_t *head, cursor_t *cursor, bkv_chunk_t *chunk) {
    size_t start = head->length;
    uint64_t tag, value;
    if (!head_varint(head, cursor, &tag)) {
        return false;
    }
    switch (tag & 7) {
    case WIRE_VARINT:
        return head_varint(head, cursor, &value);
    case WIRE_FIXED64:
        return head_take(head, cursor, 8);
    case WIRE_FIXED32:
        return head_take(head, cursor, 4);
    case WIRE_BYTES:
        if (!head_varint(head, cursor, &value)) {
            return false;
        }
        if (tag >> 3 != DATA_FIELD) {
            return head_take(head, cursor, value);
        }
        head->length = start;
        if (chunk->data_at != 0) {
            return false; // twice
        }
        chunk->data_at = cursor->at;
        chunk->data_bytes = value;
        return cursor_take(cursor, value, NULL);
    default:
        return false;
    }
}

bool bkv_chunk_parse(bkv_chunk_t *chunk, grpc_byte_buffer *message) {
    *chunk = (bkv_chunk_t){0};
    cursor_t cursor;
    head_t head;
    head.length = 0;
    if (!cursor_init(&cursor, message)) {
        return false;
    }
    bool good = true;
    while (good && cursor_fill(&cursor)) {
        good = field_take(&head, &cursor, chunk);
    }
    grpc_byte_buffer_reader_destroy(&cursor.reader);
    chunk->head = good ? balancekv__v1__record_chunk__unpack(NULL, head.length, head.bytes) : NULL;
    return chunk->head != NULL;
}
