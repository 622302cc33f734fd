// test_record_check.c - kernels/record_check.c: hostile bytes are refused, and what is accepted can be read safely (the
// sanitizer builds are what makes the mutation tests bite).
#include "record.h"

#include "oracle.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

static void *sample(bkv_codec_t codec, uint32_t rate, size_t *length) {
    bkv_shape_t shape = {2, 2, 70, 16, 24, BKV_FP16};
    bkv_codec_params_t params = {.codec = codec, .rate = rate, .sink = 2, .seed = 1};
    bkv_block_t block;
    oracle_block(&shape, 3, 1, &block);
    return oracle_compress(&block, &params, 512, length);
}

// A copy in exactly its size, so that a byte beyond is somebody else's.
static void *copy_of(const void *record, size_t length) {
    void *copy = oracle_exact(length);
    memcpy(copy, record, length);
    return copy;
}

static void refused(const void *record, size_t length, const char *field) {
    bkv_error_t err = {0};
    void *copy = copy_of(record, length);
    cr_assert_eq(bkv_record_check(copy, length, &err), BKV_INVALID_ARGUMENT, "%s", field);
    cr_assert(strstr(err.message, field), "'%s' does not name %s", err.message, field);
    free(copy);
}

// Everything that a caller does with an accepted record.
static void use(const void *record, size_t length) {
    const bkv_record_header_t *header = record;
    bkv_shape_t shape;
    bkv_record_shape(record, &shape);
    for (uint32_t i = 0; i < shape.layers * shape.heads; i++) {
        bkv_section_view_t view;
        bkv_record_section(record, i / shape.heads, i % shape.heads, &view);
        float *k = malloc((size_t)view.tokens * view.key_dim * sizeof(float));
        float *v = malloc((size_t)view.tokens * view.value_dim * sizeof(float));
        float *logw = malloc(view.tokens * sizeof(float));
        uint32_t *index = malloc(view.tokens * sizeof(uint32_t));
        bkv_section_read(&view, k, v, logw, index);
        for (uint32_t t = 0; t < view.tokens; t++) {
            cr_assert(index[t] < header->tokens && (t == 0 || index[t] > index[t - 1]));
        }
        free(k);
        free(v);
        free(logw);
        free(index);
    }
    size_t size = 0;
    cr_assert_eq(bkv_record_slice(record, 0, 1, shape.heads - 1, 1, NULL, &size, NULL), BKV_OK);
    cr_assert(size <= length);
    void *slice = oracle_exact(size);
    cr_assert_eq(bkv_record_slice(record, 0, 1, shape.heads - 1, 1, slice, &size, NULL), BKV_OK);
    bkv_error_t err = {0};
    cr_assert_eq(bkv_record_check(slice, size, &err), BKV_OK, "%s", err.message);
    free(slice);
}

Test(record_check, every_truncation_is_refused) {
    static const bkv_codec_t codecs[] = {BKV_CODEC_RAW, BKV_CODEC_DENSE4, BKV_CODEC_BALANCE};
    for (int c = 0; c < 3; c++) {
        size_t length;
        void *record = sample(codecs[c], 6, &length);
        for (size_t cut = 0; cut < length; cut++) {
            refused(record, cut, "length");
        }
        // A header that admits to the cut does not help either: a plane ends outside.
        for (size_t cut = 128; cut < length; cut += 16) {
            void *copy = copy_of(record, cut);
            ((bkv_record_header_t *)copy)->length = cut;
            cr_assert_eq(bkv_record_check(copy, cut, NULL), BKV_INVALID_ARGUMENT);
            free(copy);
        }
    }
}

Test(record_check, each_header_field_is_looked_at) {
    size_t length;
    bkv_record_header_t *header = sample(BKV_CODEC_BALANCE, 6, &length);
    const bkv_record_header_t good = *header;
#define BAD(change, name) *header = good, change, refused(header, length, name)
    BAD(header->magic ^= 1, "magic");
    BAD(header->version = BKV_RECORD_VERSION - 1, "version");
    BAD(header->codec = 0, "codec");
    BAD(header->codec = 5, "codec");
    BAD(header->flags |= 0x80, "flags");
    BAD(header->length += 16, "length");
    BAD(header->length = UINT64_MAX, "length");
    BAD(header->tokens = 0, "tokens");
    BAD(header->tokens = BKV_MAX_TOKENS + 1, "tokens");
    BAD(header->layers = 0, "layers");
    BAD(header->layers = 1025, "layers");
    BAD(header->heads = 0, "heads");
    BAD(header->heads = UINT16_MAX, "heads");
    BAD((header->layers = 1024, header->heads = 64), "length");
    BAD(header->first_layer = 1, "first_layer");
    BAD((header->first_layer = 1023, header->flags |= BKV_RECORD_SLICE), "first_layer");
    BAD((header->first_head = 1023, header->flags |= BKV_RECORD_SLICE), "first_head");
    BAD(header->key_dim = 12, "key_dim");
    BAD(header->value_dim = 0, "value_dim");
    BAD(header->dtype = 0, "dtype");
    BAD(header->rate = 1, "rate");
    BAD(header->rate = 65, "rate");
    BAD(header->flags |= BKV_RECORD_FOLD, "rate"); // a fold has none
    BAD(header->reserved0[5] = 1, "reserved");
    BAD(header->reserved1 = 1, "reserved");
    BAD(header->position = UINT64_MAX - 5, "position");
    BAD((header->codec = BKV_CODEC_DENSE4, header->rate = 0), "flags"); // weights
#undef BAD
    *header = good;
    cr_assert_eq(bkv_record_check(header, length, NULL), BKV_OK);
}

Test(record_check, each_section_field_is_looked_at) {
    size_t length;
    void *record = sample(BKV_CODEC_BALANCE, 6, &length);
    bkv_section_t *section = bkv_record_directory(record) + 2;
    const bkv_section_t good = *section;
    cr_assert_eq(good.index_kind, BKV_INDEX_BITMAP);
#define BAD(change, name) *section = good, change, refused(record, length, name)
    BAD(section->key_offset = 0, "key_offset");  // the header
    BAD(section->key_offset = 11, "key_offset"); // the directory's last entry
    BAD(section->key_offset = UINT32_MAX, "key_offset");
    BAD(section->value_offset = (uint32_t)(length / 16), "value_offset");
    BAD(section->tokens = 0, "tokens");
    BAD(section->tokens = 71, "tokens");
    BAD(section->tokens = UINT32_MAX, "tokens");
    BAD(section->tokens -= 1, "index");
    BAD(section->key_bits = 5, "bits");
    BAD(section->value_bits = 0, "bits");
    BAD(section->key_bits = 8, "overlap");
    BAD(section->index_kind = 3, "index_kind");
    BAD(section->index_kind = BKV_INDEX_ALL, "tokens");
    BAD(section->reserved = 1, "index_kind");
#undef BAD
}

Test(record_check, each_codec_keeps_its_promise) {
    size_t length;
    void *record = sample(BKV_CODEC_RAW, 0, &length);
    bkv_record_directory(record)[0].key_bits = 8;
    refused(record, length, "bits");
    record = sample(BKV_CODEC_DENSE8, 0, &length);
    bkv_record_directory(record)[3].value_bits = 4;
    refused(record, length, "bits");
}

Test(record_check, indices_must_be_those_of_the_kept_tokens) {
    size_t length;
    uint8_t *record = sample(BKV_CODEC_BALANCE, 6, &length);
    uint8_t *bitmap = record + 16 * (size_t)bkv_record_directory(record)[0].key_offset;
    uint32_t tokens = bkv_record_directory(record)[0].tokens, on = 0, off = 0;
    cr_assert(tokens < 70);
    while (!(bitmap[on / 8] >> (on % 8) & 1)) {
        on++;
    }
    while (bitmap[off / 8] >> (off % 8) & 1) {
        off++;
    }
    bitmap[off / 8] ^= (uint8_t)(1u << (off % 8));
    refused(record, length, "index");
    bitmap[on / 8] ^= (uint8_t)(1u << (on % 8)); // as many again, others: fine
    cr_assert_eq(bkv_record_check(record, length, NULL), BKV_OK);
    bitmap[off / 8] ^= (uint8_t)(1u << (off % 8));
    bitmap[70 / 8] ^= 1u << (70 % 8); // as many again, but one beyond the source
    refused(record, length, "index");
}

Test(record_check, lists_must_ascend_within_the_source) {
    // 3 of 512 tokens: a list.
    bkv_shape_t shape = {1, 1, 512, 8, 8, BKV_BF16};
    bkv_record_id_t id = {0};
    _Alignas(16) uint8_t record[512] = {0};
    bkv_record_init(record, &shape, &id, BKV_CODEC_BALANCE, BKV_RECORD_FOLD);
    *bkv_record_directory(record) = (bkv_section_t){.tokens = 3, .key_bits = 2, .value_bits = 2, .index_kind = BKV_INDEX_LIST};
    size_t length = (size_t)bkv_record_place(record);
    uint32_t *list = (uint32_t *)(record + 144);
    static const uint32_t good[][3] = {{0, 1, 2}, {5, 100, 511}};
    static const uint32_t bad[][3] = {{0, 0, 1}, {2, 1, 3}, {0, 1, 512}, {0, 1, UINT32_MAX}, {UINT32_MAX, 0, 1}};
    for (int i = 0; i < 2; i++) {
        memcpy(list, good[i], 12);
        cr_assert_eq(bkv_record_check(record, length, NULL), BKV_OK);
    }
    for (int i = 0; i < 5; i++) {
        memcpy(list, bad[i], 12);
        refused(record, length, "index");
    }
}

Test(record_check, scales_and_weights_must_be_finite) {
    size_t length;
    uint8_t *record = sample(BKV_CODEC_BALANCE, 6, &length);
    bkv_section_view_t view;
    bkv_record_section(record, 1, 1, &view);
    const size_t places[] = {(size_t)(view.key_plane - record) + view.layout.weights,
                             (size_t)(view.key_plane - record) + view.layout.weights + 2,
                             (size_t)(view.key_plane - record) + view.layout.key_params,
                             (size_t)(view.key_plane - record) + view.layout.key_codes - 2,
                             (size_t)(view.value_plane - record),
                             (size_t)(view.value_plane - record) + view.layout.value_codes - 2};
    static const char *names[] = {"weights", "weights", "key params", "key params", "value params", "value params"};
    for (int i = 0; i < 6; i++) {
        uint16_t old, bad = i % 2 ? 0x7c00 : 0xfe01;
        memcpy(&old, record + places[i], 2);
        memcpy(record + places[i], &bad, 2);
        refused(record, length, names[i]);
        memcpy(record + places[i], &old, 2);
    }
    cr_assert_eq(bkv_record_check(record, length, NULL), BKV_OK);
}

Test(record_check, planes_may_not_share_bytes) {
    size_t length;
    void *record = sample(BKV_CODEC_RAW, 0, &length);
    for (size_t cut = length - 16; cut > 192; cut -= 16) {
        // All sections over one plane, and the record cut to what that needs.
        uint8_t *copy = copy_of(record, length);
        for (int i = 0; i < 4; i++) {
            bkv_record_directory(copy)[i].key_offset = bkv_record_directory(copy)[i].value_offset = 12;
        }
        ((bkv_record_header_t *)copy)->length = cut;
        cr_assert_eq(bkv_record_check(copy, cut, NULL), BKV_INVALID_ARGUMENT);
        free(copy);
    }
}

Test(record_check, the_header_alone) {
    size_t length;
    bkv_record_header_t *header = sample(BKV_CODEC_DENSE8, 0, &length);
    cr_assert_eq(bkv_record_check_header(header, length, NULL), BKV_OK);
    cr_assert_eq(bkv_record_check_header(header, length + 4096, NULL), BKV_OK);
    cr_assert_eq(bkv_record_check_header(header, length - 1, NULL), BKV_INVALID_ARGUMENT);
    cr_assert_eq(bkv_record_check_header(header, 127, NULL), BKV_INVALID_ARGUMENT);
    header->length = 128 + 3 * 16; // the directory has four entries
    cr_assert_eq(bkv_record_check_header(header, length, NULL), BKV_INVALID_ARGUMENT);
}

Test(record_check, mutations_never_do_harm) {
    static const bkv_codec_t codecs[] = {BKV_CODEC_RAW, BKV_CODEC_DENSE8, BKV_CODEC_BALANCE, BKV_CODEC_BALANCE};
    oracle_random_t random = {77};
    uint32_t accepted = 0, rejected = 0;
    for (int c = 0; c < 4; c++) {
        size_t length;
        void *record = sample(codecs[c], c == 3 ? 3 : 6, &length);
        for (uint32_t round = 0; round < 4000; round++) {
            uint8_t *copy = copy_of(record, length);
            // Mostly where the structure is: header, directory, the beginning of planes.
            uint32_t changes = 1 + oracle_next(&random) % 3;
            for (uint32_t i = 0; i < changes; i++) {
                uint32_t range = oracle_next(&random) % 4 == 0 ? (uint32_t)length : 320;
                copy[oracle_next(&random) % range] = (uint8_t)(oracle_next(&random) >> (oracle_next(&random) % 8));
            }
            if (bkv_record_check(copy, length, NULL) == BKV_OK) {
                use(copy, length);
                accepted++;
            } else {
                rejected++;
            }
            free(copy);
        }
    }
    cr_assert(accepted > 1000 && rejected > 1000, "%u accepted, %u rejected: the mutations test nothing", accepted, rejected);
}
