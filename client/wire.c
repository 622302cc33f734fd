// wire.c - packing and unpacking of messages. What is in them is the operations' business (unary.c, put.c, get.c).
#include "wire.h"

#include <grpc/byte_buffer_reader.h>
#include <stdlib.h>
#include <string.h>

#define HEAD_MAX   4096
#define DATA_FIELD 15

// Wire types of protobuf.
enum { WIRE_VARINT = 0, WIRE_FIXED64 = 1, WIRE_BYTES = 2, WIRE_FIXED32 = 5 };

grpc_slice bkv_client_pack(const ProtobufCMessage *message) {
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(message));
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    return slice;
}

grpc_slice bkv_client_pack_before(const ProtobufCMessage *message, unsigned field, uint64_t length) {
    uint8_t head[1 + 10];
    size_t n = 0;
    head[n++] = (uint8_t)(field << 3 | WIRE_BYTES);
    for (uint64_t rest = length; n == 1 || rest > 0; rest >>= 7) {
        head[n++] = (uint8_t)((rest & 0x7f) | (rest > 0x7f ? 0x80 : 0));
    }
    size_t packed = protobuf_c_message_get_packed_size(message);
    grpc_slice slice = grpc_slice_malloc(packed + n);
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    memcpy(GRPC_SLICE_START_PTR(slice) + packed, head, n);
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

void bkv_client_copy(grpc_byte_buffer *message, uint64_t at, uint64_t length, void *out) {
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
static bool field_take(head_t *head, cursor_t *cursor, bkv_client_chunk_t *chunk) {
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

bool bkv_client_chunk_parse(bkv_client_chunk_t *chunk, grpc_byte_buffer *message) {
    *chunk = (bkv_client_chunk_t){0};
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

bkv_status_t bkv_client_status(uint32_t grpc_code) {
    switch (grpc_code) {
#define X(name, code, text)                                                                                                    \
    case code:                                                                                                                 \
        return BKV_##name;
        BKV_STATUS_LIST(X)
#undef X
    default:
        return BKV_INTERNAL;
    }
}

void bkv_client_text(const void *text, size_t length, char *out, size_t room) {
    const unsigned char *from = text;
    size_t n = length < room - 1 ? length : room - 1;
    for (size_t i = 0; i < n; i++) {
        out[i] = (char)(from[i] < 0x20 || from[i] == 0x7f ? ' ' : from[i]);
    }
    out[n] = '\0';
}
