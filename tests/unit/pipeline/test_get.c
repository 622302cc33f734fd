// test_get.c - whole records and slices of them; what is damaged is never handed out.
#include "fixture.h"

#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

static bkv_status_t deliver(fixture_t *fixture, uint32_t key, bkv_deliver_range_t range, bkv_delivery_t *delivery,
                            bkv_error_t *err) {
    bkv_key_t full = fixture_key(key);
    return bkv_deliver(fixture->pipeline, &fixture->model.id, &full, &range, fixture_now(), delivery, err);
}

Test(pipeline_get, slice_holds_what_the_whole_holds) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 64, 40, BKV_CODEC_DENSE8);
    bkv_delivery_t whole, slice;
    bkv_error_t err;
    cr_assert_eq(deliver(&fixture, 1, (bkv_deliver_range_t){0}, &whole, &err), BKV_OK, "%s", err.message);
    cr_assert_eq(deliver(&fixture, 1, (bkv_deliver_range_t){.first_layer = 1, .first_head = 1}, &slice, &err), BKV_OK, "%s",
                 err.message);
    cr_assert_null(whole.slice);
    cr_assert_not_null(slice.slice);
    cr_assert_eq(bkv_record_verify(slice.data, slice.length, &err), BKV_OK, "%s", err.message);
    cr_assert_eq(bkv_record_check(slice.data, slice.length, &err), BKV_OK, "%s", err.message);
    const bkv_record_header_t *header = (const bkv_record_header_t *)slice.data;
    cr_assert_eq(header->flags & BKV_RECORD_SLICE, BKV_RECORD_SLICE);
    cr_assert_eq(header->layers, 1);
    cr_assert_eq(header->heads, 1);
    cr_assert_eq(header->first_layer, 1);
    cr_assert_eq(header->first_head, 1);
    bkv_section_view_t of_whole, of_slice;
    float k[2][40 * 32], v[2][40 * 16];
    bkv_record_section(whole.data, 1, 1, &of_whole);
    bkv_record_section(slice.data, 0, 0, &of_slice);
    bkv_section_read(&of_whole, k[0], v[0], NULL, NULL);
    bkv_section_read(&of_slice, k[1], v[1], NULL, NULL);
    cr_assert_arr_eq(k[0], k[1], sizeof(k[0]));
    cr_assert_arr_eq(v[0], v[1], sizeof(v[0]));
    bkv_delivery_release(fixture.pipeline, &whole);
    bkv_delivery_release(fixture.pipeline, &slice);
    bkv_delivery_release(fixture.pipeline, &slice); // empty by now
    cr_assert_eq(fixture_metrics(&fixture).get_records_total, 2);
    fixture_close(&fixture);
}

Test(pipeline_get, counts_that_spell_the_whole_out_need_no_slice) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 0, 64, BKV_CODEC_RAW);
    bkv_delivery_t delivery;
    cr_assert_eq(deliver(&fixture, 1, (bkv_deliver_range_t){.layers = 2, .heads = 2}, &delivery, NULL), BKV_OK);
    cr_assert_null(delivery.slice);
    bkv_delivery_release(fixture.pipeline, &delivery);
    fixture_close(&fixture);
}

Test(pipeline_get, bad_ranges_are_named) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 0, 64, BKV_CODEC_RAW);
    const struct {
        bkv_deliver_range_t range;
        const char *message;
    } cases[] = {
        {{.first_layer = 2}, "first_layer: 2 is not below 2"},
        {{.first_layer = UINT32_MAX, .layers = 2}, "first_layer:"},
        {{.first_layer = 1, .layers = UINT32_MAX}, "layers: 4294967295 from 1 on are more than 2"},
        {{.first_head = 2}, "first_head: 2"},
        {{.heads = 3}, "heads: 3 from 0 on"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        bkv_delivery_t delivery;
        bkv_error_t err;
        cr_assert_eq(deliver(&fixture, 1, cases[i].range, &delivery, &err), BKV_INVALID_ARGUMENT);
        cr_assert_eq(strncmp(err.message, cases[i].message, strlen(cases[i].message)), 0, "%s", err.message);
        cr_assert_null(delivery.data);
    }
    fixture_close(&fixture);
}

Test(pipeline_get, missing_and_unknown) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    bkv_delivery_t delivery;
    cr_assert_eq(deliver(&fixture, 7, (bkv_deliver_range_t){0}, &delivery, NULL), BKV_NOT_FOUND);
    cr_assert_eq(deliver(&fixture, 7, (bkv_deliver_range_t){.layers = 1}, &delivery, NULL), BKV_NOT_FOUND);
    fixture.model.id.bytes[0] ^= 1;
    bkv_error_t err;
    cr_assert_eq(deliver(&fixture, 7, (bkv_deliver_range_t){0}, &delivery, &err), BKV_NOT_FOUND);
    cr_assert_eq(strncmp(err.message, "spec_id:", 8), 0);
    fixture_close(&fixture);
}

// The bytes of a resident record, to be damaged as a stray write would.
static uint8_t *resident_bytes(fixture_t *fixture, uint32_t key) {
    bkv_delivery_t delivery;
    cr_assert_eq(deliver(fixture, key, (bkv_deliver_range_t){0}, &delivery, NULL), BKV_OK);
    uint8_t *bytes = (uint8_t *)(uintptr_t)delivery.data;
    bkv_delivery_release(fixture->pipeline, &delivery);
    return bytes;
}

Test(pipeline_get, flipped_bit_is_data_loss_then_a_miss) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 0, 64, BKV_CODEC_RAW);
    resident_bytes(&fixture, 1)[1000] ^= 4;
    bkv_delivery_t delivery;
    cr_assert_eq(deliver(&fixture, 1, (bkv_deliver_range_t){0}, &delivery, NULL), BKV_DATA_LOSS);
    cr_assert_eq(deliver(&fixture, 1, (bkv_deliver_range_t){0}, &delivery, NULL), BKV_NOT_FOUND);
    fixture_close(&fixture);
}

// A record with a sound checksum and a directory that points outside of it: only another writer of the arena makes such.
Test(pipeline_get, sealed_nonsense_is_not_sliced) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 0, 64, BKV_CODEC_RAW);
    uint8_t *bytes = resident_bytes(&fixture, 1);
    ((bkv_section_t *)(void *)(bytes + sizeof(bkv_record_header_t)))->value_offset = UINT32_MAX;
    bkv_record_seal(bytes);
    bkv_delivery_t delivery;
    bkv_error_t err;
    cr_assert_eq(deliver(&fixture, 1, (bkv_deliver_range_t){.layers = 1}, &delivery, &err), BKV_DATA_LOSS);
    cr_assert_eq(deliver(&fixture, 1, (bkv_deliver_range_t){.layers = 1}, &delivery, NULL), BKV_NOT_FOUND);
    fixture_close(&fixture);
}

static bkv_status_t deliver_unverified(fixture_t *fixture, uint32_t key, bkv_deliver_range_t range, bkv_delivery_t *delivery) {
    bkv_key_t full = fixture_key(key);
    return bkv_deliver_unverified(fixture->pipeline, &fixture->model.id, &full, &range, fixture_now(), delivery, NULL);
}

Test(pipeline_get, copies_are_the_record_and_verified) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 0, 64, BKV_CODEC_RAW); // more than a piece
    fixture_put_block(&fixture, 2, 0, 64, BKV_CODEC_DENSE4);
    for (uint32_t key = 1; key <= 2; key++) {
        for (uint32_t layers = 0; layers < 2; layers++) { // the whole, a slice
            bkv_delivery_t delivery;
            bkv_error_t err;
            cr_assert_eq(deliver_unverified(&fixture, key, (bkv_deliver_range_t){.layers = layers}, &delivery), BKV_OK);
            uint8_t *copy = malloc(delivery.length + 64);
            memset(copy, 0xee, delivery.length + 64);
            cr_assert_eq(bkv_delivery_verify(fixture.pipeline, &delivery, &err), BKV_OK, "%s", err.message);
            cr_assert_eq(bkv_delivery_copy(fixture.pipeline, &delivery, copy, &err), BKV_OK, "%s", err.message);
            cr_assert_eq(memcmp(copy, delivery.data, delivery.length), 0);
            cr_assert_eq(copy[delivery.length], 0xee);
            cr_assert_eq(bkv_record_verify(copy, delivery.length, NULL), BKV_OK);
            bkv_delivery_release(fixture.pipeline, &delivery);
            free(copy);
        }
    }
    cr_assert_eq(deliver_unverified(&fixture, 7, (bkv_deliver_range_t){0}, &(bkv_delivery_t){0}), BKV_NOT_FOUND);
    fixture_close(&fixture);
}

Test(pipeline_get, a_record_of_many_pieces_goes_past_the_cache_unchanged) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    bkv_model_t large = fixture.model;
    large.shape.tokens = 4096; // 3 MiB
    cr_assert_eq(bkv_model_complete(&large, NULL), BKV_OK);
    cr_assert_eq(bkv_model_table_add(bkv_pipeline_models(fixture.pipeline), &large, NULL), BKV_OK);
    fixture.model = large;
    fixture_put_block(&fixture, 1, 0, 4096, BKV_CODEC_RAW);
    bkv_delivery_t delivery;
    cr_assert_eq(deliver_unverified(&fixture, 1, (bkv_deliver_range_t){0}, &delivery), BKV_OK);
    uint8_t *copy = malloc(delivery.length);
    cr_assert_eq(bkv_delivery_copy(fixture.pipeline, &delivery, copy, NULL), BKV_OK);
    cr_assert_eq(memcmp(copy, delivery.data, delivery.length), 0);
    bkv_delivery_release(fixture.pipeline, &delivery);
    free(copy);
    fixture_close(&fixture);
}

Test(pipeline_get, damage_shows_when_the_record_moves_and_drops_it) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    static const size_t damaged[] = {0, 8, 16, 24, 1000, 49000}; // magic, length, checksum, key, payload
    for (size_t i = 0; i < sizeof(damaged) / sizeof(damaged[0]); i++) {
        for (int verify = 0; verify < 2; verify++) {
            fixture_put_block(&fixture, 1, 0, 64, BKV_CODEC_RAW);
            resident_bytes(&fixture, 1)[damaged[i]] ^= 4;
            bkv_delivery_t delivery;
            bkv_error_t err;
            cr_assert_eq(deliver_unverified(&fixture, 1, (bkv_deliver_range_t){0}, &delivery), BKV_OK);
            uint8_t *copy = malloc(delivery.length);
            cr_assert_eq(verify ? bkv_delivery_verify(fixture.pipeline, &delivery, &err)
                                : bkv_delivery_copy(fixture.pipeline, &delivery, copy, &err),
                         BKV_DATA_LOSS, "byte %zu", damaged[i]);
            free(copy);
            cr_assert_eq(deliver(&fixture, 1, (bkv_deliver_range_t){0}, &(bkv_delivery_t){0}, NULL), BKV_NOT_FOUND);
            bkv_delivery_release(fixture.pipeline, &delivery);
            cr_assert_eq(fixture_store_metrics(&fixture).slot_bytes, 0);
        }
    }
    cr_assert_eq(fixture_store_metrics(&fixture).corrupt_total, 2 * sizeof(damaged) / sizeof(damaged[0]));
    fixture_close(&fixture);
}

Test(pipeline_get, slices_are_bounded_by_staging_memory) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 0, 64, BKV_CODEC_RAW);
    void *all;
    cr_assert_eq(bkv_staging_get(fixture.pipeline->staging, FIXTURE_STAGING, &all, NULL), BKV_OK);
    bkv_delivery_t delivery;
    cr_assert_eq(deliver(&fixture, 1, (bkv_deliver_range_t){.layers = 1}, &delivery, NULL), BKV_BUSY);
    cr_assert_eq(deliver(&fixture, 1, (bkv_deliver_range_t){0}, &delivery, NULL), BKV_OK);
    bkv_delivery_release(fixture.pipeline, &delivery);
    bkv_staging_put(fixture.pipeline->staging, all);
    cr_assert_eq(fixture_metrics(&fixture).busy_total, 1);
    fixture_close(&fixture);
}

Test(pipeline_get, a_dropped_record_lives_as_long_as_its_reader) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 0, 64, BKV_CODEC_RAW);
    bkv_delivery_t delivery;
    cr_assert_eq(deliver(&fixture, 1, (bkv_deliver_range_t){0}, &delivery, NULL), BKV_OK);
    bkv_key_t key = fixture_key(1);
    cr_assert(bkv_store_drop(fixture.store, &fixture.model.id, &key, fixture_now()));
    for (uint32_t i = 2; i < 40; i++) {
        fixture_put_block(&fixture, i, 0, 64, BKV_CODEC_RAW);
    }
    cr_assert_eq(bkv_record_verify(delivery.data, delivery.length, NULL), BKV_OK);
    bkv_delivery_release(fixture.pipeline, &delivery);
    fixture_close(&fixture);
}
