// test_seal.c - kernels/seal.c: the checksum covers every byte but its own and the length's, which is compared.
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

Test(seal, is_xxh3_of_what_follows_the_field_seeded_with_what_comes_first) {
    size_t length;
    uint8_t *record = sealed(&length);
    uint64_t sum, seed;
    memcpy(&sum, record + 16, 8);
    memcpy(&seed, record, 8);
    cr_assert_eq(sum, XXH3_64bits_withSeed(record + 24, length - 24, seed));
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
        uint64_t seed;
        memcpy(&seed, bytes, 8);
        cr_assert_eq(bkv_record_checksum(bytes, length), XXH3_64bits_withSeed(bytes + 24, length - 24, seed));
    }
}

Test(seal, every_flipped_bit_is_found) {
    size_t length;
    uint8_t *record = sealed(&length);
    for (size_t at = 0; at < length; at++) {
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

Test(seal, pieces_sum_like_the_whole) {
    size_t length;
    uint8_t *record = sealed(&length);
    oracle_random_t random = {5};
    bkv_sum_t *sum = bkv_sum_create();
    for (int round = 0; round < 200; round++) {
        bkv_sum_restart(sum);
        for (size_t available = 0; available < length;) {
            size_t step = oracle_next(&random) % (round % 2 ? 40 : 400);
            available = available + step < length ? available + step : length;
            bkv_sum_advance(sum, record, available);
        }
        cr_assert_eq(bkv_sum_value(sum), bkv_record_checksum(record, length));
    }
    bkv_sum_destroy(sum);
}

Test(seal, appended_pieces_sum_like_the_whole) {
    size_t length;
    uint8_t *record = sealed(&length), piece[100];
    bkv_sum_t *sum = bkv_sum_create();
    for (size_t first = 128; first < length; first += 57) {
        bkv_sum_restart(sum);
        bkv_sum_advance(sum, record, first);
        for (size_t at = first; at < length;) {
            size_t step = length - at < sizeof(piece) ? length - at : sizeof(piece);
            memcpy(piece, record + at, step);
            bkv_sum_append(sum, piece, step);
            at += step;
        }
        cr_assert_eq(bkv_sum_value(sum), bkv_record_checksum(record, length));
    }
    bkv_sum_destroy(sum);
}
