// test_seal.c - kernels/seal.c: the checksum covers every byte after itself and nothing before.
#include "seal.h"

#include "oracle.h"

#include <criterion/criterion.h>
#include <string.h>
#include <xxhash.h>

static uint8_t *sealed(size_t *length) {
    bkv_shape_t shape = {2, 2, 24, 16, 8, BKV_BF16};
    bkv_codec_params_t params = {.codec = BKV_CODEC_DENSE4};
    bkv_block_t block;
    oracle_block(&shape, 1, 1, &block);
    uint8_t *record = oracle_compress(&block, &params, 0, length);
    bkv_record_seal(record);
    return record;
}

Test(seal, is_xxh3_of_what_follows_the_field) {
    size_t length;
    uint8_t *record = sealed(&length);
    uint64_t sum;
    memcpy(&sum, record + 16, 8);
    cr_assert_eq(sum, XXH3_64bits(record + 24, length - 24));
    cr_assert_eq(bkv_record_verify(record, length, NULL), BKV_OK);
}

Test(seal, every_length_sums_like_the_library) {
    // Short and long inputs take different paths inside the library, and so may its run-time variants.
    uint8_t *bytes = oracle_alloc(3000);
    oracle_random_t random = {4};
    for (size_t i = 0; i < 3000; i++) {
        bytes[i] = (uint8_t)oracle_next(&random);
    }
    for (size_t length = 128; length < 3000; length += 17) {
        cr_assert_eq(bkv_record_checksum(bytes, length), XXH3_64bits(bytes + 24, length - 24));
    }
}

Test(seal, every_flipped_bit_is_found) {
    size_t length;
    uint8_t *record = sealed(&length);
    for (size_t at = 8; at < length; at++) {
        record[at] ^= (uint8_t)(1u << (at % 8));
        bkv_error_t err = {0};
        cr_assert_eq(bkv_record_verify(record, length, &err), BKV_DATA_LOSS, "byte %zu", at);
        record[at] ^= (uint8_t)(1u << (at % 8));
    }
    cr_assert_eq(bkv_record_verify(record, length, NULL), BKV_OK);
}

Test(seal, the_length_must_match) {
    size_t length;
    uint8_t *record = sealed(&length);
    bkv_error_t err = {0};
    cr_assert_eq(bkv_record_verify(record, length - 16, &err), BKV_DATA_LOSS);
    cr_assert_eq(strncmp(err.message, "length:", 7), 0);
    memset(record + 8, 0, 8);
    cr_assert_eq(bkv_record_verify(record, 0, &err), BKV_DATA_LOSS);
}
