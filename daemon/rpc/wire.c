// wire.c - the parsing and packing that wire.h describes. What the fields mean is the pipeline's to check.
#include "daemon/rpc/wire.h"

#include <assert.h>
#include <string.h>

#define VARINT_MAX 10   // bytes
#define HEAD_USUAL 1024 // what is beside a message's data, unless it names pages of GPU memory or many keys

typedef enum wire_type { WIRE_VARINT = 0, WIRE_FIXED64 = 1, WIRE_BYTES = 2, WIRE_FIXED32 = 5 } wire_type_t;

// ---- cursor ----

void bkv_cursor_init(bkv_cursor_t *cursor, grpc_byte_buffer *message) {
    *cursor = (bkv_cursor_t){.remaining = grpc_byte_buffer_length(message)};
    grpc_byte_buffer_reader_init(&cursor->reader, message); // holds nothing that would have to be destroyed
}

static bool next_slice(bkv_cursor_t *cursor) {
    grpc_slice *slice;
    while (cursor->left == 0) {
        if (!grpc_byte_buffer_reader_peek(&cursor->reader, &slice)) {
            return false;
        }
        cursor->at = GRPC_SLICE_START_PTR(*slice);
        cursor->left = GRPC_SLICE_LENGTH(*slice);
    }
    return true;
}

size_t bkv_cursor_next(bkv_cursor_t *cursor, size_t most, const uint8_t **bytes) {
    if (most == 0 || !next_slice(cursor)) {
        return 0;
    }
    size_t length = most < cursor->left ? most : cursor->left;
    *bytes = cursor->at;
    cursor->at += length;
    cursor->left -= length;
    cursor->remaining -= length;
    return length;
}

void bkv_cursor_skip(bkv_cursor_t *cursor, size_t bytes) {
    assert(bytes <= cursor->remaining);
    const uint8_t *ignored;
    while (bytes > 0) {
        bytes -= bkv_cursor_next(cursor, bytes, &ignored);
    }
}

void bkv_cursor_copy(bkv_cursor_t *cursor, void *out, size_t bytes) {
    assert(bytes <= cursor->remaining);
    uint8_t *to = out;
    while (bytes > 0) {
        const uint8_t *from = NULL;
        size_t length = bkv_cursor_next(cursor, bytes, &from);
        assert(length > 0);
        memcpy(to, from, length);
        to += length;
        bytes -= length;
    }
}

// ---- whole messages ----

bkv_status_t bkv_wire_check_encoding(const grpc_byte_buffer *message, bkv_error_t *err) {
    if (message->data.raw.compression != GRPC_COMPRESS_NONE) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "request: compressed messages are not taken; send them as they are");
    }
    return BKV_OK;
}

// protobuf-c says only "no"; find out whose fault it was.
static bkv_status_t unpack(const ProtobufCMessageDescriptor *type, const uint8_t *bytes, size_t length, bkv_bump_t *bump,
                           const ProtobufCMessage **result, bkv_error_t *err) {
    *result = protobuf_c_message_unpack(type, &bump->allocator, length, bytes);
    if (*result != NULL) {
        return BKV_OK;
    }
    if (bump->exhausted) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED,
                        "request: its %zu bytes hold more fields than the daemon takes in one call", length);
    }
    return bkv_fail(err, BKV_INVALID_ARGUMENT, "request: not a %s", type->name);
}

bkv_status_t bkv_wire_unpack(const ProtobufCMessageDescriptor *type, grpc_byte_buffer *message, size_t most, bkv_bump_t *bump,
                             const ProtobufCMessage **result, bkv_error_t *err) {
    bkv_cursor_t cursor;
    bkv_cursor_init(&cursor, message);
    size_t length = cursor.remaining;
    if (length > most) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "request: %zu bytes are more than the %zu of such a message", length,
                        most);
    }
    const uint8_t *bytes = NULL;
    if (bkv_cursor_next(&cursor, length, &bytes) < length) { // received in pieces
        uint8_t *whole = bkv_bump_alloc(bump, length);
        if (whole == NULL) {
            return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "request: no memory for its %zu bytes", length);
        }
        bkv_cursor_init(&cursor, message);
        bkv_cursor_copy(&cursor, whole, length);
        bytes = whole;
    }
    return unpack(type, bytes, length, bump, result, err);
}

// ---- split ----

typedef struct field {
    uint32_t number;
    wire_type_t type;
    uint64_t value; // of a varint
    size_t length;  // bytes that follow: of WIRE_BYTES, or 8 or 4; 0 for a varint
} field_t;

static bkv_status_t read_varint(bkv_cursor_t *cursor, uint64_t *value, bkv_error_t *err) {
    uint64_t result = 0;
    for (unsigned i = 0; i < VARINT_MAX; i++) {
        const uint8_t *byte = NULL;
        if (bkv_cursor_next(cursor, 1, &byte) == 0) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "request: ends within a number");
        }
        if (i == VARINT_MAX - 1 && *byte > 1) {
            break;
        }
        result |= (uint64_t)(*byte & 0x7f) << (7 * i);
        if ((*byte & 0x80) == 0) {
            *value = result;
            return BKV_OK;
        }
    }
    return bkv_fail(err, BKV_INVALID_ARGUMENT, "request: a number of more than 64 bits");
}

// The number and type of the next field, and for a varint its value; any bytes that belong to it come next.
static bkv_status_t read_field(bkv_cursor_t *cursor, field_t *field, bkv_error_t *err) {
    uint64_t tag = 0, length = 0;
    bkv_status_t status = read_varint(cursor, &tag, err);
    if (status != BKV_OK) {
        return status;
    }
    if (tag >> 3 == 0 || tag > UINT32_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "request: %llu is no field number", (unsigned long long)(tag >> 3));
    }
    field->number = (uint32_t)(tag >> 3);
    field->type = (wire_type_t)(tag & 7);
    field->value = 0;
    switch (field->type) {
    case WIRE_VARINT:
        status = read_varint(cursor, &field->value, err);
        break;
    case WIRE_BYTES:
        status = read_varint(cursor, &length, err);
        break;
    case WIRE_FIXED64:
        length = 8;
        break;
    case WIRE_FIXED32:
        length = 4;
        break;
    default:
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "request: field %u has the unknown wire type %llu", field->number,
                        (unsigned long long)(tag & 7));
    }
    if (status == BKV_OK && length > cursor->remaining) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "request: field %u says it has %llu bytes, but only %zu follow",
                        field->number, (unsigned long long)length, cursor->remaining);
    }
    field->length = (size_t)length;
    return status;
}

static size_t write_varint(uint8_t *out, uint64_t value) {
    size_t length = 0;
    while (value >= 0x80) {
        out[length++] = (uint8_t)(value | 0x80);
        value >>= 7;
    }
    out[length++] = (uint8_t)value;
    return length;
}

typedef struct head {
    uint8_t *bytes;
    size_t used, room;
    bool full; // a field found no room
} head_t;

// Copies a field, whose own bytes the cursor is at, to the head.
static bkv_status_t keep_field(bkv_cursor_t *cursor, const field_t *field, head_t *head, bkv_error_t *err) {
    uint8_t start[2 * VARINT_MAX];
    size_t length = write_varint(start, (uint64_t)field->number << 3 | field->type);
    if (field->type == WIRE_VARINT) {
        length += write_varint(start + length, field->value);
    } else if (field->type == WIRE_BYTES) {
        length += write_varint(start + length, field->length);
    }
    if (length > head->room - head->used || field->length > head->room - head->used - length) {
        head->full = true;
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "request: more than %zu bytes beside field %d", head->room,
                        BKV_WIRE_DATA_FIELD);
    }
    memcpy(head->bytes + head->used, start, length);
    bkv_cursor_copy(cursor, head->bytes + head->used + length, field->length);
    head->used += length + field->length;
    return BKV_OK;
}

static bkv_status_t split_fields(bkv_cursor_t *cursor, head_t *head, bkv_split_t *split, bkv_error_t *err) {
    while (cursor->remaining > 0) {
        field_t field = {0};
        bkv_status_t status = read_field(cursor, &field, err);
        if (status == BKV_OK && field.number == BKV_WIRE_DATA_FIELD && field.type != WIRE_BYTES) {
            status = bkv_fail(err, BKV_INVALID_ARGUMENT, "request: field %d is not bytes", BKV_WIRE_DATA_FIELD);
        }
        if (status == BKV_OK && field.number < BKV_WIRE_DATA_FIELD) {
            status = keep_field(cursor, &field, head, err);
        } else if (status == BKV_OK) {
            if (field.number == BKV_WIRE_DATA_FIELD) {
                split->data = *cursor;
                split->data_bytes = field.length;
            }
            bkv_cursor_skip(cursor, field.length);
        }
        if (status != BKV_OK) {
            return status;
        }
    }
    return BKV_OK;
}

// With room for so many bytes beside the data.
static bkv_status_t split_into(grpc_byte_buffer *message, size_t room, bkv_bump_t *bump, head_t *head, bkv_split_t *split,
                               bkv_error_t *err) {
    bkv_cursor_t cursor;
    bkv_cursor_init(&cursor, message);
    *split = (bkv_split_t){.data = cursor};
    // A kept field never grows: its numbers are written in the shortest form.
    *head = (head_t){.room = cursor.remaining < room ? cursor.remaining : room};
    head->bytes = bkv_bump_alloc(bump, head->room);
    if (head->bytes == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "request: no memory for its fields");
    }
    return split_fields(&cursor, head, split, err);
}

bkv_status_t bkv_wire_split(const ProtobufCMessageDescriptor *type, grpc_byte_buffer *message, size_t head_most,
                            bkv_bump_t *bump, bkv_split_t *split, bkv_error_t *err) {
    head_t head;
    size_t room = head_most < HEAD_USUAL ? head_most : HEAD_USUAL;
    bkv_status_t status = split_into(message, room, bump, &head, split, err);
    if (status != BKV_OK && head.full && room < head_most) {
        status = split_into(message, head_most, bump, &head, split, err);
    }
    return status == BKV_OK ? unpack(type, head.bytes, head.used, bump, &split->head, err) : status;
}

// ---- fields ----

static bkv_status_t get_text(const char *field, const char *text, char *out, size_t most, bkv_error_t *err) {
    size_t length = strlen(text);
    if (length > most) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.%s: %zu bytes are more than %zu", field, length, most);
    }
    memcpy(out, text, length + 1);
    return BKV_OK;
}

static bkv_status_t get_codec(const char *field, int codec, bkv_codec_t *out, bkv_error_t *err) {
    if (codec < 0 || codec > BKV_CODEC_BALANCE) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %d is no codec", field, codec);
    }
    *out = (bkv_codec_t)codec;
    return BKV_OK;
}

bkv_status_t bkv_wire_get_spec(const Balancekv__V1__Spec *spec, bkv_model_t *model, bkv_error_t *err) {
    if (spec == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec: missing");
    }
    *model = (bkv_model_t){
        .shape = {.layers = spec->layers,
                  .heads = spec->kv_heads,
                  .tokens = spec->block_tokens,
                  .key_dim = spec->key_dim,
                  .value_dim = spec->value_dim},
        .tp_rank = spec->tp_rank,
        .tp_size = spec->tp_size,
        .params = {.rate = spec->rate, .seed = spec->seed, .shares = spec->shares.len > 0 ? spec->shares.data : NULL},
        .share_count = spec->shares.len,
    };
    int dtype = (int)spec->dtype;
    if (dtype < BKV_BF16 || dtype > BKV_FP32) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.dtype: %d is no type", dtype);
    }
    model->shape.dtype = (bkv_dtype_t)dtype;
    if (spec->no_sink && spec->sink_tokens != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.no_sink: contradicts sink_tokens %u", spec->sink_tokens);
    }
    if (!spec->no_sink) {
        model->params.sink = spec->sink_tokens == 0 ? BKV_DEFAULT_SINK : spec->sink_tokens;
    }
    bkv_status_t status = get_codec("spec.codec", (int)spec->codec, &model->params.codec, err);
    if (status == BKV_OK) {
        status = get_text("model", spec->model, model->name, BKV_MODEL_NAME_MAX, err);
    }
    if (status == BKV_OK) {
        status = get_text("tenant", spec->tenant, model->tenant_name, BKV_TENANT_NAME_MAX, err);
    }
    return status;
}

void bkv_wire_set_spec(const bkv_model_t *model, Balancekv__V1__Spec *spec) {
    balancekv__v1__spec__init(spec);
    spec->model = (char *)model->name; // protobuf-c only reads what it packs
    spec->tenant = (char *)model->tenant_name;
    spec->layers = model->shape.layers;
    spec->kv_heads = model->shape.heads;
    spec->key_dim = model->shape.key_dim;
    spec->value_dim = model->shape.value_dim;
    spec->dtype = (Balancekv__V1__DType)model->shape.dtype;
    spec->block_tokens = model->shape.tokens;
    spec->tp_rank = model->tp_rank;
    spec->tp_size = model->tp_size;
    spec->codec = (Balancekv__V1__Codec)model->params.codec;
    spec->rate = model->params.rate;
    spec->sink_tokens = model->params.sink;
    spec->no_sink = model->params.sink == 0;
    spec->seed = model->params.seed;
    spec->shares = (ProtobufCBinaryData){.len = model->share_count, .data = (uint8_t *)model->params.shares};
}

bkv_status_t bkv_wire_get_spec_id(const ProtobufCBinaryData *bytes, bkv_spec_id_t *id, bkv_error_t *err) {
    if (bytes->len != BKV_SPEC_ID_BYTES) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec_id: %zu bytes instead of %d", bytes->len, BKV_SPEC_ID_BYTES);
    }
    memcpy(id->bytes, bytes->data, BKV_SPEC_ID_BYTES);
    return BKV_OK;
}

bkv_status_t bkv_wire_check_keys(size_t count, const ProtobufCBinaryData *keys, uint32_t max_batch, bkv_error_t *err) {
    if (count > max_batch) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: %zu are more than max_batch %u", count, max_batch);
    }
    for (size_t i = 0; i < count; i++) {
        if (keys[i].len != BKV_KEY_BYTES) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "keys[%zu]: %zu bytes instead of %d", i, keys[i].len, BKV_KEY_BYTES);
        }
    }
    return BKV_OK;
}

void bkv_wire_get_keys(size_t count, const ProtobufCBinaryData *keys, bkv_key_t *out) {
    for (size_t i = 0; i < count; i++) {
        memcpy(out[i].bytes, keys[i].data, BKV_KEY_BYTES);
    }
}

bkv_status_t bkv_wire_get_profile(size_t count, Balancekv__V1__Band *const *bands, bkv_profile_t *profile, bkv_error_t *err) {
    if (count > BKV_MAX_BANDS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "profile: %zu bands are more than %d", count, BKV_MAX_BANDS);
    }
    *profile = (bkv_profile_t){.count = (uint32_t)count};
    for (size_t i = 0; i < count; i++) {
        profile->bands[i] = (bkv_band_t){.age = bands[i]->age, .rate = bands[i]->rate};
    }
    return BKV_OK;
}

bkv_status_t bkv_wire_get_block(const Balancekv__V1__PutBlock *block, bkv_ingest_args_t *args, bkv_error_t *err) {
    *args = (bkv_ingest_args_t){
        .position = block->position,
        .tokens = block->tokens,
        .payload_bytes = block->payload_bytes,
        .rate = block->rate,
        .ttl_ms = block->ttl_ms,
        .has_checksum = block->has_checksum,
        .checksum = block->checksum,
    };
    bkv_status_t status = bkv_wire_get_spec_id(&block->spec_id, &args->spec_id, err);
    if (status == BKV_OK && block->key.len != BKV_KEY_BYTES) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "key: %zu bytes instead of %d", block->key.len, BKV_KEY_BYTES);
    }
    if (status == BKV_OK) {
        memcpy(args->key.bytes, block->key.data, BKV_KEY_BYTES);
        status = get_codec("codec", (int)block->codec, &args->codec, err);
    }
    return status;
}

// ---- writing ----

grpc_byte_buffer *bkv_wire_pack(const ProtobufCMessage *head, const grpc_slice *data) {
    size_t length = protobuf_c_message_get_packed_size(head);
    size_t room = length + (data != NULL ? 1 + VARINT_MAX : 0);
    grpc_slice slices[2] = {grpc_slice_malloc(room)};
    uint8_t *out = GRPC_SLICE_START_PTR(slices[0]);
    protobuf_c_message_pack(head, out);
    size_t count = 1;
    if (data != NULL) {
        out[length++] = BKV_WIRE_DATA_FIELD << 3 | WIRE_BYTES;
        length += write_varint(out + length, GRPC_SLICE_LENGTH(*data));
        slices[count++] = *data;
    }
    GRPC_SLICE_SET_LENGTH(slices[0], length);
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(slices, count); // takes references of its own
    for (size_t i = 0; i < count; i++) {
        grpc_slice_unref(slices[i]);
    }
    return message;
}
