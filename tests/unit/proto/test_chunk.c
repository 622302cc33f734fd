// RecordChunks taken apart by hand: fields in any order, data anywhere, bytes that are none.
#include "proto/chunk.h"

#include <criterion/criterion.h>
#include <grpc/grpc.h>
#include <stdlib.h>
#include <string.h>

// The message cut into slices of `step` bytes.
static grpc_byte_buffer *sliced(const uint8_t *bytes, size_t length, size_t step) {
    grpc_slice slices[256];
    size_t count = 0;
    for (size_t at = 0; at < length; at += step) {
        cr_assert(count < 256);
        slices[count++] = grpc_slice_from_copied_buffer((const char *)bytes + at, length - at < step ? length - at : step);
    }
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(slices, count);
    for (size_t i = 0; i < count; i++) {
        grpc_slice_unref(slices[i]);
    }
    return message;
}

static bool parses(const uint8_t *bytes, size_t length) {
    bkv_chunk_t chunk;
    grpc_byte_buffer *message = sliced(bytes, length, 7);
    bool good = bkv_chunk_parse(&chunk, message);
    if (good) {
        balancekv__v1__record_chunk__free_unpacked(chunk.head, NULL);
    }
    grpc_byte_buffer_destroy(message);
    return good;
}

static size_t pack(uint8_t *out, const uint8_t *data, size_t length) {
    Balancekv__V1__RecordChunk chunk = BALANCEKV__V1__RECORD_CHUNK__INIT;
    uint8_t key[32] = {1, 2, 3};
    char text[] = "why";
    chunk.index = 300;
    chunk.message = text;
    chunk.record_bytes = 1ull << 40;
    chunk.key = (ProtobufCBinaryData){.len = 32, .data = key};
    chunk.boot_epoch = UINT64_MAX;
    chunk.data = (ProtobufCBinaryData){.len = length, .data = (uint8_t *)data};
    return balancekv__v1__record_chunk__pack(&chunk, out);
}

Test(chunk, chunk_in_slices_of_any_size) {
    uint8_t data[600], bytes[1024], copy[600];
    for (size_t i = 0; i < sizeof data; i++) {
        data[i] = (uint8_t)(i * 7);
    }
    size_t length = pack(bytes, data, sizeof data);
    for (size_t step = 3; step <= length; step += 5) {
        bkv_chunk_t chunk;
        grpc_byte_buffer *message = sliced(bytes, length, step);
        cr_assert(bkv_chunk_parse(&chunk, message), "step %zu", step);
        cr_assert(chunk.head->index == 300 && chunk.head->record_bytes == 1ull << 40 && chunk.head->boot_epoch == UINT64_MAX);
        cr_assert(chunk.head->key.len == 32 && chunk.head->key.data[2] == 3 && strcmp(chunk.head->message, "why") == 0);
        cr_assert(chunk.data_bytes == sizeof data);
        bkv_chunk_copy(message, chunk.data_at, chunk.data_bytes, copy);
        cr_assert(memcmp(copy, data, sizeof data) == 0);
        balancekv__v1__record_chunk__free_unpacked(chunk.head, NULL);
        grpc_byte_buffer_destroy(message);
    }
}

Test(chunk, data_need_not_come_last) {
    // data = "abc", then index = 5, then an unknown field of each kind
    static const uint8_t bytes[] = {0x7a, 3, 'a', 'b',  'c',  0x08, 5, 0x80, 0x02, 9, 0x85, 0x02, 1,
                                    2,    3, 4,   0x81, 0x02, 1,    2, 3,    4,    5, 6,    7,    8};
    bkv_chunk_t chunk;
    grpc_byte_buffer *message = sliced(bytes, sizeof bytes, sizeof bytes);
    cr_assert(bkv_chunk_parse(&chunk, message));
    cr_assert(chunk.head->index == 5 && chunk.data_bytes == 3 && chunk.data_at == 2);
    balancekv__v1__record_chunk__free_unpacked(chunk.head, NULL);
    grpc_byte_buffer_destroy(message);
}

Test(chunk, every_cut_is_noticed_or_a_chunk) {
    uint8_t data[40] = {0}, bytes[256];
    size_t length = pack(bytes, data, sizeof data);
    cr_assert(parses(bytes, length) && parses(bytes, 0));
    // The data is last and 42 bytes long with its head; a cut within it can never pass.
    for (size_t cut = length - 41; cut < length; cut++) {
        cr_assert(!parses(bytes, cut), "cut at %zu of %zu", cut, length);
    }
    for (size_t cut = 0; cut < length - 42; cut++) {
        parses(bytes, cut); // must only not crash
    }
}

Test(chunk, refuses) {
    static const uint8_t twice[] = {0x7a, 1, 'a', 0x7a, 1, 'b'};
    static const uint8_t endless_varint[] = {0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01};
    static const uint8_t group[] = {0x0b, 0x0c};
    static const uint8_t beyond[] = {0x7a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 'a'};
    cr_assert(!parses(twice, sizeof twice));
    cr_assert(!parses(endless_varint, sizeof endless_varint));
    cr_assert(!parses(group, sizeof group));
    cr_assert(!parses(beyond, sizeof beyond));
}

Test(chunk, no_more_than_a_head_full) {
    // A message field (3) of 5,000 bytes: larger than anything but data may be.
    uint8_t *bytes = calloc(1, 5003);
    memcpy(bytes, "\x1a\x88\x27", 3);
    grpc_byte_buffer *message = sliced(bytes, 5003, 500);
    bkv_chunk_t chunk;
    cr_assert(!bkv_chunk_parse(&chunk, message));
    grpc_byte_buffer_destroy(message);
    free(bytes);
}

Test(chunk, head_before_data) {
    Balancekv__V1__RecordChunk chunk = BALANCEKV__V1__RECORD_CHUNK__INIT;
    chunk.index = 1;
    static const struct {
        uint64_t length;
        const char *expected;
        size_t n;
    } cases[] = {{0, "\x08\x01\x7a\x00", 4},
                 {127, "\x08\x01\x7a\x7f", 4},
                 {128, "\x08\x01\x7a\x80\x01", 5},
                 {1 << 20, "\x08\x01\x7a\x80\x80\x40", 6}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        grpc_slice head = bkv_chunk_pack_before(&chunk.base, cases[i].length);
        cr_assert(GRPC_SLICE_LENGTH(head) == cases[i].n, "length %llu", (unsigned long long)cases[i].length);
        cr_assert(memcmp(GRPC_SLICE_START_PTR(head), cases[i].expected, cases[i].n) == 0);
        grpc_slice_unref(head);
    }
}
