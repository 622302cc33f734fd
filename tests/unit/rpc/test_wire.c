// test_wire.c - messages encoded by hand, in every order, cut at every byte, with every lie: never wrong, never unsafe.
//
// The reference for what a legal message means is protobuf-c's own parser on the whole, contiguous message.
#include "daemon/rpc/wire.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define LIMIT ((size_t)1 << 20)

typedef struct text { // a message under construction
    uint8_t bytes[4096];
    size_t length;
} text_t;

static void add(text_t *text, const void *bytes, size_t length) {
    cr_assert_leq(text->length + length, sizeof(text->bytes));
    memcpy(text->bytes + text->length, bytes, length);
    text->length += length;
}

static void add_varint(text_t *text, uint64_t value) {
    do {
        uint8_t byte = (uint8_t)((value & 0x7f) | (value > 0x7f ? 0x80 : 0));
        add(text, &byte, 1);
        value >>= 7;
    } while (value != 0);
}

static void add_bytes_field(text_t *text, uint32_t number, const void *bytes, size_t length) {
    add_varint(text, (uint64_t)number << 3 | 2);
    add_varint(text, length);
    add(text, bytes, length);
}

static void add_block(text_t *text, const Balancekv__V1__PutBlock *block) {
    uint8_t packed[1024];
    size_t length = balancekv__v1__put_block__pack(block, packed);
    add_bytes_field(text, 1, packed, length);
}

// The bytes as gRPC may have received them: cut into pieces of `piece` bytes, the first of `first`.
static grpc_byte_buffer *received(const uint8_t *bytes, size_t length, size_t first, size_t piece) {
    grpc_slice slices[8192];
    size_t count = 0;
    for (size_t at = 0; at < length; count++) {
        size_t want = count == 0 ? first : piece;
        size_t take = want < length - at ? want : length - at;
        slices[count] = grpc_slice_from_copied_buffer((const char *)bytes + at, take);
        at += take;
    }
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(slices, count);
    for (size_t i = 0; i < count; i++) {
        grpc_slice_unref(slices[i]);
    }
    return message;
}

static bkv_status_t split_put(const uint8_t *bytes, size_t length, size_t first, size_t piece, bkv_bump_t *bump,
                              bkv_split_t *split, uint8_t *data, bkv_error_t *err) {
    grpc_byte_buffer *message = received(bytes, length, first, piece);
    bkv_status_t status = bkv_wire_split(&balancekv__v1__put_request__descriptor, message, 1024, bump, split, err);
    if (status == BKV_OK) {
        cr_assert_leq(split->data_bytes, split->data.remaining);
        bkv_cursor_copy(&split->data, data, split->data_bytes);
    }
    grpc_byte_buffer_destroy(message);
    return status;
}

static const uint8_t key[BKV_KEY_BYTES] = {1, 2, 3};
static const uint8_t spec_id[BKV_SPEC_ID_BYTES] = {9, 8, 7};

static Balancekv__V1__PutBlock sample_block(void) {
    Balancekv__V1__PutBlock block = BALANCEKV__V1__PUT_BLOCK__INIT;
    block.spec_id = (ProtobufCBinaryData){sizeof(spec_id), (uint8_t *)(uintptr_t)spec_id};
    block.key = (ProtobufCBinaryData){sizeof(key), (uint8_t *)(uintptr_t)key};
    block.position = 12345678901;
    block.tokens = 256;
    block.payload_bytes = 77;
    block.codec = BALANCEKV__V1__CODEC__CODEC_DENSE4;
    block.rate = 16;
    block.ttl_ms = 5000;
    block.checksum = 0x1122334455667788;
    block.has_checksum = 1;
    return block;
}

// Whether a split gives what protobuf-c reads from the whole.
static void assert_as_whole(const text_t *text, size_t first, size_t piece) {
    bkv_bump_t bump;
    bkv_bump_init(&bump, LIMIT);
    bkv_split_t split;
    bkv_error_t err;
    uint8_t data[4096];
    bkv_status_t status = split_put(text->bytes, text->length, first, piece, &bump, &split, data, &err);
    cr_assert_eq(status, BKV_OK, "cut at %zu/%zu: %s", first, piece, err.message);
    Balancekv__V1__PutRequest *whole = balancekv__v1__put_request__unpack(NULL, text->length, text->bytes);
    cr_assert_not_null(whole);
    cr_assert_eq(split.data_bytes, whole->data.len);
    cr_assert(whole->data.len == 0 || memcmp(data, whole->data.data, whole->data.len) == 0);
    const Balancekv__V1__PutBlock *block = ((const Balancekv__V1__PutRequest *)split.head)->block;
    cr_assert_eq(block == NULL, whole->block == NULL);
    if (block != NULL) {
        uint8_t ours[1024], theirs[1024];
        size_t ours_length = balancekv__v1__put_block__pack(block, ours);
        cr_assert_eq(ours_length, balancekv__v1__put_block__pack(whole->block, theirs));
        cr_assert_arr_eq(ours, theirs, ours_length);
    }
    balancekv__v1__put_request__free_unpacked(whole, NULL);
    bkv_bump_deinit(&bump);
}

static void assert_any_cut(const text_t *text) {
    for (size_t first = 1; first <= text->length; first++) {
        assert_as_whole(text, first, text->length);
    }
    assert_as_whole(text, 1, 1);
    assert_as_whole(text, 3, 7);
}

// ---- split: legal messages ----

Test(rpc_wire, split_takes_the_usual_order) {
    text_t text = {.length = 0};
    Balancekv__V1__PutBlock block = sample_block();
    uint8_t data[300];
    memset(data, 0xab, sizeof(data));
    add_block(&text, &block);
    add_bytes_field(&text, 15, data, sizeof(data));
    assert_any_cut(&text);
}

Test(rpc_wire, split_takes_data_before_the_block) {
    text_t text = {.length = 0};
    Balancekv__V1__PutBlock block = sample_block();
    add_bytes_field(&text, 15, "payload", 7);
    add_block(&text, &block);
    assert_any_cut(&text);
}

Test(rpc_wire, split_takes_either_alone_and_neither) {
    text_t only_data = {.length = 0}, only_block = {.length = 0}, empty_data = {.length = 0}, nothing = {.length = 0};
    Balancekv__V1__PutBlock block = sample_block();
    add_bytes_field(&only_data, 15, "payload", 7);
    add_block(&only_block, &block);
    add_bytes_field(&empty_data, 15, "", 0);
    assert_any_cut(&only_data);
    assert_any_cut(&only_block);
    assert_any_cut(&empty_data);
    assert_as_whole(&nothing, 1, 1);
}

Test(rpc_wire, split_lets_the_last_data_count) {
    text_t text = {.length = 0};
    Balancekv__V1__PutBlock block = sample_block();
    add_bytes_field(&text, 15, "first", 5);
    add_block(&text, &block);
    add_bytes_field(&text, 15, "second, longer", 14);
    assert_any_cut(&text);
}

Test(rpc_wire, split_merges_a_repeated_block) {
    text_t text = {.length = 0};
    Balancekv__V1__PutBlock block = sample_block();
    add_block(&text, &block);
    add_bytes_field(&text, 15, "payload", 7);
    block.tokens = 8;
    block.ttl_ms = 0; // not on the wire: the first one's stays
    add_block(&text, &block);
    assert_any_cut(&text);
}

Test(rpc_wire, split_steps_over_unknown_fields) {
    text_t text = {.length = 0};
    Balancekv__V1__PutBlock block = sample_block();
    add_varint(&text, 7 << 3 | 0);
    add_varint(&text, UINT64_MAX);
    add_varint(&text, 8 << 3 | 1);
    add(&text, "12345678", 8);
    add_block(&text, &block);
    add_varint(&text, 9 << 3 | 5);
    add(&text, "1234", 4);
    add_bytes_field(&text, 15, "payload", 7);
    add_bytes_field(&text, 200, "from the future", 15);
    add_varint(&text, (uint64_t)UINT32_MAX >> 3 << 3 | 0);
    add_varint(&text, 1);
    assert_any_cut(&text);
}

Test(rpc_wire, split_takes_numbers_in_long_form) {
    text_t text = {.length = 0};
    const uint8_t long_tag[] = {0xfa, 0x80, 0x00, 0x87, 0x80, 0x80, 0x00}; // field 15, 7 bytes follow
    add(&text, long_tag, sizeof(long_tag));
    add(&text, "payload", 7);
    assert_any_cut(&text);
}

// ---- split: illegal messages ----

static void assert_refused(const text_t *text, bkv_status_t status, const char *words) {
    bkv_bump_t bump;
    bkv_bump_init(&bump, LIMIT);
    bkv_split_t split;
    bkv_error_t err;
    uint8_t data[4096];
    for (size_t piece = 1; piece <= text->length; piece++) {
        cr_assert_eq(split_put(text->bytes, text->length, piece, piece, &bump, &split, data, &err), status);
        cr_assert_not_null(strstr(err.message, words), "%s", err.message);
        bkv_bump_reset(&bump);
    }
    bkv_bump_deinit(&bump);
}

Test(rpc_wire, split_refuses_every_truncation) {
    text_t text = {.length = 0};
    Balancekv__V1__PutBlock block = sample_block();
    add_block(&text, &block);
    size_t boundary = text.length;
    add_bytes_field(&text, 15, "some payload bytes", 18);
    bkv_bump_t bump;
    bkv_bump_init(&bump, LIMIT);
    for (size_t length = 0; length < text.length; length++) {
        bkv_split_t split;
        bkv_error_t err;
        uint8_t data[4096];
        bool whole_fields = length == 0 || length == boundary;
        uint8_t *exact = malloc(length + 1); // so that a sanitizer sees a step too far
        memcpy(exact, text.bytes, length);
        bkv_status_t status = split_put(exact, length, length, length, &bump, &split, data, &err);
        cr_assert_eq(status, whole_fields ? BKV_OK : BKV_INVALID_ARGUMENT, "%zu bytes", length);
        free(exact);
        bkv_bump_reset(&bump);
    }
    bkv_bump_deinit(&bump);
}

Test(rpc_wire, split_refuses_lying_lengths) {
    const uint64_t lies[] = {8, 100, UINT32_MAX, (uint64_t)INT64_MAX, UINT64_MAX};
    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        for (uint32_t field = 1; field <= 16; field += 7) { // 1, 8, 15
            text_t text = {.length = 0};
            add_varint(&text, field << 3 | 2);
            add_varint(&text, lies[i]);
            add(&text, "7 bytes", 7);
            assert_refused(&text, BKV_INVALID_ARGUMENT, "bytes, but only 7 follow");
        }
    }
}

Test(rpc_wire, split_refuses_hostile_numbers) {
    text_t too_long = {.length = 0}, too_large = {.length = 0}, field_0 = {.length = 0}, wide_tag = {.length = 0};
    add(&too_long, "\x7a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 12);
    assert_refused(&too_long, BKV_INVALID_ARGUMENT, "more than 64 bits");
    add(&too_large, "\x7a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", 11);
    assert_refused(&too_large, BKV_INVALID_ARGUMENT, "more than 64 bits");
    add(&field_0, "\x02\x00", 2);
    assert_refused(&field_0, BKV_INVALID_ARGUMENT, "no field number");
    add_varint(&wide_tag, (uint64_t)1 << 33 | 2);
    add_varint(&wide_tag, 0);
    assert_refused(&wide_tag, BKV_INVALID_ARGUMENT, "no field number");
}

Test(rpc_wire, split_refuses_wrong_types) {
    text_t group = {.length = 0}, type_7 = {.length = 0}, number = {.length = 0}, block = {.length = 0};
    add(&group, "\x4b\x4c", 2);
    assert_refused(&group, BKV_INVALID_ARGUMENT, "wire type");
    add(&type_7, "\x4f", 1);
    assert_refused(&type_7, BKV_INVALID_ARGUMENT, "wire type");
    add(&number, "\x78\x05", 2); // field 15 as a number
    assert_refused(&number, BKV_INVALID_ARGUMENT, "not bytes");
    add_bytes_field(&block, 1, "\xff\xff\xff", 3); // no PutBlock inside
    assert_refused(&block, BKV_INVALID_ARGUMENT, "PutRequest");
}

Test(rpc_wire, split_bounds_what_is_beside_the_data) {
    text_t text = {.length = 0};
    uint8_t junk[1100] = {0};
    add_bytes_field(&text, 3, junk, sizeof(junk));
    assert_refused(&text, BKV_RESOURCE_EXHAUSTED, "beside field 15");
}

// ---- whole messages ----

Test(rpc_wire, unpack_joins_pieces) {
    text_t text = {.length = 0};
    add_bytes_field(&text, 1, spec_id, sizeof(spec_id));
    for (int i = 0; i < 5; i++) {
        add_bytes_field(&text, 2, key, sizeof(key));
    }
    bkv_bump_t bump;
    bkv_bump_init(&bump, LIMIT);
    for (size_t piece = 1; piece <= text.length; piece += 13) {
        bkv_error_t err;
        const ProtobufCMessage *message;
        grpc_byte_buffer *bytes = received(text.bytes, text.length, piece, piece);
        cr_assert_eq(bkv_wire_unpack(&balancekv__v1__lookup_request__descriptor, bytes, LIMIT, &bump, &message, &err), BKV_OK);
        grpc_byte_buffer_destroy(bytes); // the request does not need it any more
        const Balancekv__V1__LookupRequest *request = (const Balancekv__V1__LookupRequest *)message;
        cr_assert_eq(request->n_keys, 5);
        cr_assert_arr_eq(request->keys[4].data, key, sizeof(key));
        cr_assert_arr_eq(request->spec_id.data, spec_id, sizeof(spec_id));
        bkv_bump_reset(&bump);
    }
    bkv_bump_deinit(&bump);
}

Test(rpc_wire, unpack_bounds_size_and_memory) {
    bkv_error_t err;
    const ProtobufCMessage *message;
    bkv_bump_t bump;
    bkv_bump_init(&bump, (size_t)64 << 10);
    size_t length = 8000;
    uint8_t *empty_keys = malloc(length); // 2 bytes each on the wire, far more once unpacked
    for (size_t i = 0; i < length; i += 2) {
        empty_keys[i] = 0x12;
        empty_keys[i + 1] = 0;
    }
    grpc_byte_buffer *bytes = received(empty_keys, length, length, length);
    bkv_status_t status = bkv_wire_unpack(&balancekv__v1__lookup_request__descriptor, bytes, 7999, &bump, &message, &err);
    cr_assert_eq(status, BKV_RESOURCE_EXHAUSTED);
    cr_assert_not_null(strstr(err.message, "8000 bytes"), "%s", err.message);
    status = bkv_wire_unpack(&balancekv__v1__lookup_request__descriptor, bytes, 8000, &bump, &message, &err);
    cr_assert_eq(status, BKV_RESOURCE_EXHAUSTED);
    cr_assert_not_null(strstr(err.message, "more fields"), "%s", err.message);
    grpc_byte_buffer_destroy(bytes);
    free(empty_keys);
    bkv_bump_deinit(&bump);
}

Test(rpc_wire, unpack_refuses_what_is_no_message) {
    bkv_error_t err;
    const ProtobufCMessage *message;
    bkv_bump_t bump;
    bkv_bump_init(&bump, LIMIT);
    grpc_byte_buffer *bytes = received((const uint8_t *)"\x0a\x7f", 2, 1, 1);
    cr_assert_eq(bkv_wire_unpack(&balancekv__v1__lookup_request__descriptor, bytes, LIMIT, &bump, &message, &err),
                 BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "balancekv.v1.LookupRequest"));
    grpc_byte_buffer_destroy(bytes);
    bkv_bump_deinit(&bump);
}

Test(rpc_wire, compressed_messages_are_not_taken) {
    bkv_error_t err;
    grpc_slice slice = grpc_slice_from_static_string("zipped");
    grpc_byte_buffer *plain = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_byte_buffer *zipped = grpc_raw_compressed_byte_buffer_create(&slice, 1, GRPC_COMPRESS_GZIP);
    cr_assert_eq(bkv_wire_check_encoding(plain, &err), BKV_OK);
    cr_assert_eq(bkv_wire_check_encoding(zipped, &err), BKV_UNIMPLEMENTED);
    grpc_byte_buffer_destroy(plain);
    grpc_byte_buffer_destroy(zipped);
}

// ---- fields ----

static Balancekv__V1__Spec sample_spec(void) {
    static char model[] = "m@1", tenant[] = "t";
    static uint8_t shares[] = {1, 2, 3, 4, 5, 6, 7, 255};
    Balancekv__V1__Spec spec = BALANCEKV__V1__SPEC__INIT;
    spec.model = model;
    spec.tenant = tenant;
    spec.layers = 4;
    spec.kv_heads = 2;
    spec.key_dim = 64;
    spec.value_dim = 32;
    spec.dtype = BALANCEKV__V1__DTYPE__DTYPE_FP16;
    spec.block_tokens = 128;
    spec.tp_rank = 1;
    spec.tp_size = 2;
    spec.codec = BALANCEKV__V1__CODEC__CODEC_DENSE8;
    spec.rate = 8;
    spec.sink_tokens = 5;
    spec.seed = 99;
    spec.shares = (ProtobufCBinaryData){.len = sizeof(shares), .data = shares};
    return spec;
}

Test(rpc_wire, spec_goes_to_a_model_and_back) {
    Balancekv__V1__Spec spec = sample_spec(), back;
    bkv_model_t model;
    bkv_error_t err;
    cr_assert_eq(bkv_wire_get_spec(&spec, &model, &err), BKV_OK);
    cr_assert_str_eq(model.name, "m@1");
    cr_assert_str_eq(model.tenant_name, "t");
    cr_assert(model.shape.layers == 4 && model.shape.heads == 2 && model.shape.tokens == 128);
    cr_assert(model.shape.key_dim == 64 && model.shape.value_dim == 32 && model.shape.dtype == BKV_FP16);
    cr_assert(model.tp_rank == 1 && model.tp_size == 2 && model.params.codec == BKV_CODEC_DENSE8);
    cr_assert(model.params.rate == 8 && model.params.sink == 5 && model.params.seed == 99);
    cr_assert_eq(model.share_count, 8);
    cr_assert_arr_eq(model.params.shares, spec.shares.data, 8);
    bkv_wire_set_spec(&model, &back);
    uint8_t ours[512], theirs[512];
    size_t length = balancekv__v1__spec__pack(&spec, theirs);
    cr_assert_eq(balancekv__v1__spec__pack(&back, ours), length);
    cr_assert_arr_eq(ours, theirs, length);
}

Test(rpc_wire, spec_sink_has_a_default_and_an_off) {
    Balancekv__V1__Spec spec = sample_spec(), back;
    bkv_model_t model;
    bkv_error_t err;
    spec.sink_tokens = 0;
    cr_assert_eq(bkv_wire_get_spec(&spec, &model, &err), BKV_OK);
    cr_assert_eq(model.params.sink, BKV_DEFAULT_SINK);
    spec.no_sink = 1;
    cr_assert_eq(bkv_wire_get_spec(&spec, &model, &err), BKV_OK);
    cr_assert_eq(model.params.sink, 0);
    bkv_wire_set_spec(&model, &back);
    cr_assert(back.no_sink && back.sink_tokens == 0);
    spec.sink_tokens = 3;
    cr_assert_eq(bkv_wire_get_spec(&spec, &model, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "spec.no_sink"));
}

static void assert_spec_refused(const Balancekv__V1__Spec *spec, const char *field) {
    bkv_model_t model;
    bkv_error_t err;
    cr_assert_eq(bkv_wire_get_spec(spec, &model, &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(err.message, field, strlen(field)), 0, "%s", err.message);
}

Test(rpc_wire, spec_fields_are_named_when_refused) {
    char long_text[BKV_MODEL_NAME_MAX + 2];
    memset(long_text, 'x', sizeof(long_text) - 1);
    long_text[sizeof(long_text) - 1] = '\0';
    assert_spec_refused(NULL, "spec: ");
    Balancekv__V1__Spec spec = sample_spec();
    spec.dtype = (Balancekv__V1__DType)0;
    assert_spec_refused(&spec, "spec.dtype: ");
    spec.dtype = (Balancekv__V1__DType)-3;
    assert_spec_refused(&spec, "spec.dtype: ");
    spec = sample_spec();
    spec.codec = (Balancekv__V1__Codec)5;
    assert_spec_refused(&spec, "spec.codec: ");
    spec.codec = (Balancekv__V1__Codec)-1;
    assert_spec_refused(&spec, "spec.codec: ");
    spec = sample_spec();
    spec.model = long_text;
    assert_spec_refused(&spec, "spec.model: ");
    spec = sample_spec();
    spec.tenant = long_text;
    assert_spec_refused(&spec, "spec.tenant: ");
}

Test(rpc_wire, keys_are_checked_one_by_one) {
    bkv_error_t err;
    ProtobufCBinaryData keys[3] = {{32, (uint8_t *)(uintptr_t)key}, {32, (uint8_t *)(uintptr_t)key}, {31, NULL}};
    cr_assert_eq(bkv_wire_check_keys(2, keys, 2, &err), BKV_OK);
    cr_assert_eq(bkv_wire_check_keys(0, NULL, 2, &err), BKV_OK);
    cr_assert_eq(bkv_wire_check_keys(3, keys, 2, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert_eq(bkv_wire_check_keys(3, keys, 3, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "keys[2]: 31 bytes"), "%s", err.message);
    bkv_key_t out[2];
    bkv_wire_get_keys(2, keys, out);
    cr_assert_arr_eq(out[1].bytes, key, sizeof(key));
}

Test(wire, profiles) {
    Balancekv__V1__Band bands[9], *list[9];
    for (uint32_t i = 0; i < 9; i++) {
        balancekv__v1__band__init(&bands[i]);
        bands[i].age = 100 + i;
        bands[i].rate = UINT32_MAX - i;
        list[i] = &bands[i];
    }
    bkv_profile_t profile;
    bkv_error_t err;
    cr_assert_eq(bkv_wire_get_profile(8, list, &profile, &err), BKV_OK);
    cr_assert(profile.count == 8 && profile.bands[7].age == 107 && profile.bands[7].rate == UINT32_MAX - 7);
    cr_assert_eq(bkv_wire_get_profile(0, NULL, &profile, &err), BKV_OK);
    cr_assert_eq(profile.count, 0);
    cr_assert_eq(bkv_wire_get_profile(9, list, &profile, &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(err.message, "profile: 9 bands", 16), 0, "%s", err.message);
}

Test(rpc_wire, block_is_taken_over_field_by_field) {
    Balancekv__V1__PutBlock block = sample_block();
    bkv_ingest_args_t args;
    bkv_error_t err;
    cr_assert_eq(bkv_wire_get_block(&block, &args, &err), BKV_OK);
    cr_assert_arr_eq(args.spec_id.bytes, spec_id, sizeof(spec_id));
    cr_assert_arr_eq(args.key.bytes, key, sizeof(key));
    cr_assert(args.position == 12345678901 && args.tokens == 256 && args.payload_bytes == 77 && args.rate == 16);
    cr_assert(args.codec == BKV_CODEC_DENSE4 && args.ttl_ms == 5000 && args.has_checksum);
    cr_assert_eq(args.checksum, 0x1122334455667788);
    block.codec = (Balancekv__V1__Codec)-1;
    cr_assert_eq(bkv_wire_get_block(&block, &args, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "codec: "));
    block.key.len = 31;
    cr_assert_eq(bkv_wire_get_block(&block, &args, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "key: "));
    block.spec_id.len = 17;
    cr_assert_eq(bkv_wire_get_block(&block, &args, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "spec_id: "));
}

// ---- writing ----

static void count_release(void *user) {
    ++*(int *)user;
}

Test(rpc_wire, pack_appends_data_without_copying_it) {
    static char text[] = "the record's bytes";
    int released = 0;
    Balancekv__V1__RecordChunk chunk = BALANCEKV__V1__RECORD_CHUNK__INIT;
    chunk.index = 300;
    chunk.record_bytes = UINT64_MAX;
    grpc_slice data = grpc_slice_new_with_user_data(text, sizeof(text), count_release, &released);
    grpc_byte_buffer *message = bkv_wire_pack(&chunk.base, &data);
    grpc_byte_buffer_reader reader;
    cr_assert(grpc_byte_buffer_reader_init(&reader, message));
    grpc_slice *slice;
    cr_assert(grpc_byte_buffer_reader_peek(&reader, &slice));
    cr_assert(grpc_byte_buffer_reader_peek(&reader, &slice));
    cr_assert_eq((void *)GRPC_SLICE_START_PTR(*slice), (void *)text, "the bytes themselves");
    grpc_byte_buffer_reader_init(&reader, message);
    grpc_slice whole = grpc_byte_buffer_reader_readall(&reader);
    Balancekv__V1__RecordChunk *back =
        balancekv__v1__record_chunk__unpack(NULL, GRPC_SLICE_LENGTH(whole), GRPC_SLICE_START_PTR(whole));
    cr_assert_not_null(back);
    cr_assert(back->index == 300 && back->record_bytes == UINT64_MAX && back->data.len == sizeof(text));
    cr_assert_arr_eq(back->data.data, text, sizeof(text));
    balancekv__v1__record_chunk__free_unpacked(back, NULL);
    grpc_slice_unref(whole);
    cr_assert_eq(released, 0);
    grpc_byte_buffer_destroy(message);
    cr_assert_eq(released, 1, "the reference was taken over and given up once");
}

Test(rpc_wire, pack_without_data_is_protobuf_cs_own) {
    Balancekv__V1__UnpinResponse reply = BALANCEKV__V1__UNPIN_RESPONSE__INIT;
    grpc_byte_buffer *empty = bkv_wire_pack(&reply.base, NULL);
    cr_assert_eq(grpc_byte_buffer_length(empty), 0);
    grpc_byte_buffer_destroy(empty);
    reply.boot_epoch = 1;
    grpc_byte_buffer *message = bkv_wire_pack(&reply.base, NULL);
    cr_assert_eq(grpc_byte_buffer_length(message), 2);
    grpc_byte_buffer_destroy(message);
}
