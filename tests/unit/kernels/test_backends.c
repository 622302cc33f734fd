// test_backends.c - whole compressions and folds by every CPU backend, held against ref: attention over what they make is as
// good (its error at most 8 % above that over ref's, in the mean over some seeds: where sums round differently, coins fall
// differently), the same input gives the same bytes, and no section depends on another. What the machine lacks is said.
#include "codec.h"

#include "oracle.h"
#include "record.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const bkv_codec_params_t balance16 = {.codec = BKV_CODEC_BALANCE, .rate = 16, .sink = 4, .seed = 4};

// A block whose heads are tokens around a few centres, with one direction common to all keys, as text has it.
static void text_block(const bkv_shape_t *shape, uint64_t seed, bkv_block_t *block) {
    oracle_random_t random = {seed};
    float *centre = oracle_alloc(16 * 1024 * sizeof(float));
    oracle_block(shape, seed, 0.5, block);
    for (uint32_t s = 0; s < shape->layers * shape->heads; s++) {
        for (uint32_t i = 0; i < 16 * 1024; i++) {
            centre[i] = (float)oracle_gauss(&random);
        }
        for (uint32_t t = 0; t < shape->tokens; t++) {
            const float *k = centre + oracle_next(&random) % 8 * 1024, *v = k + 8 * 1024;
            for (uint32_t i = 0; i < shape->key_dim; i++) {
                double own = oracle_element(block, false, s / shape->heads, s % shape->heads, t, i);
                oracle_put(block, false, s / shape->heads, s % shape->heads, t, i,
                           (float)own + k[i] + (i % 16 == 2 ? 4.0f : 0));
            }
            for (uint32_t i = 0; i < shape->value_dim; i++) {
                double own = oracle_element(block, true, s / shape->heads, s % shape->heads, t, i);
                oracle_put(block, true, s / shape->heads, s % shape->heads, t, i, (float)own + v[i]);
            }
        }
    }
    free(centre);
}

// Attention of a few random queries over every section of a record, in float64: [sections][QUERIES][value_dim].
enum { QUERIES = 12 };

static double *attended(const void *record, uint32_t layers, uint32_t heads, size_t *n) {
    oracle_random_t random = {9};
    double *out = oracle_alloc((size_t)layers * heads * QUERIES * 128 * sizeof(double));
    float q[128];
    *n = 0;
    for (uint32_t s = 0; s < layers * heads; s++) {
        oracle_section_t section;
        oracle_read(record, s / heads, s % heads, &section);
        for (uint32_t at = 0; at < QUERIES; at++) {
            for (uint32_t i = 0; i < section.key_dim; i++) {
                q[i] = (float)oracle_gauss(&random);
            }
            oracle_attend(&section, 1, q, 1 / sqrt(section.key_dim), out + *n);
            *n += section.value_dim;
        }
        free(section.k), free(section.v), free(section.logw), free(section.index);
    }
    return out;
}

// Relative error of one record's attention against `exact`.
static double attention_error(const void *record, uint32_t layers, uint32_t heads, const double *exact) {
    size_t n;
    double error = 0, norm = 0, *got = attended(record, layers, heads, &n);
    for (size_t i = 0; i < n; i++) {
        error += (got[i] - exact[i]) * (got[i] - exact[i]);
        norm += exact[i] * exact[i];
    }
    free(got);
    return sqrt(error / norm);
}

static void check_quality(const bkv_backend_t *backend) {
    static const bkv_shape_t shapes[] = {
        {1, 4, 256, 128, 128, BKV_BF16}, {2, 2, 200, 72, 40, BKV_FP16}, {1, 3, 600, 64, 64, BKV_FP32}};
    for (int s = 0; s < 3; s++) {
        bkv_block_t block;
        text_block(&shapes[s], 20 + (uint64_t)s, &block);
        bkv_codec_params_t raw = {.codec = BKV_CODEC_RAW};
        size_t length, n;
        const double *exact = attended(oracle_compress(&block, &raw, 512, &length), shapes[s].layers, shapes[s].heads, &n);
        for (uint32_t rate = 8; rate <= 32; rate *= 2) {
            bkv_codec_params_t params = balance16;
            params.rate = rate;
            double ours = 0, ref = 0;
            for (params.seed = 0; params.seed < 8; params.seed++) {
                const void *by_ref = oracle_compress(&block, &params, 512, &length);
                ref += attention_error(by_ref, shapes[s].layers, shapes[s].heads, exact);
                const void *by_us = oracle_compress_by(backend, &block, &params, 512, &length);
                ours += attention_error(by_us, shapes[s].layers, shapes[s].heads, exact);
            }
            cr_assert(ours < 1.08 * ref, "%s, shape %d, %ux: %g, ref %g", backend->name, s, rate, ours / 8, ref / 8);
        }
    }
}

Test(backends, attention_is_as_good_as_by_ref) {
    oracle_on_every_backend(check_quality);
}

static void check_dense(const bkv_backend_t *backend) {
    static const bkv_shape_t shapes[] = {
        {1, 2, 256, 128, 128, BKV_BF16}, {2, 1, 97, 72, 40, BKV_FP16}, {1, 1, 33, 64, 8, BKV_FP32}};
    for (int s = 0; s < 3; s++) {
        bkv_block_t block;
        oracle_block(&shapes[s], 5, 2, &block);
        for (int codec = BKV_CODEC_DENSE8; codec <= BKV_CODEC_DENSE4; codec++) {
            bkv_codec_params_t params = {.codec = (bkv_codec_t)codec};
            size_t length, other;
            void *want = oracle_compress(&block, &params, 0, &length);
            void *got = oracle_compress_by(backend, &block, &params, 0, &other);
            cr_assert(length == other && memcmp(want, got, length) == 0, "%s, shape %d, codec %d", backend->name, s, codec);
        }
    }
}

Test(backends, dense_codecs_are_the_same_to_the_bit) {
    oracle_on_every_backend(check_dense);
}

static void check_alone(const bkv_backend_t *backend) {
    // Other numbers in head 2 of layer 1 change that section and no other.
    bkv_shape_t shape = {2, 3, 256, 64, 64, BKV_BF16};
    bkv_block_t block;
    text_block(&shape, 3, &block);
    size_t length;
    const uint8_t *a = oracle_compress_by(backend, &block, &balance16, 256, &length);
    const uint8_t *again = oracle_compress_by(backend, &block, &balance16, 256, &length);
    cr_assert_arr_eq(a, again, length, "%s: the same input, other bytes", backend->name);
    for (uint32_t t = 0; t < shape.tokens; t++) {
        oracle_put(&block, false, 1, 2, t, t % 64, 9);
        oracle_put(&block, true, 1, 2, t, t % 64, 9);
    }
    const uint8_t *b = oracle_compress_by(backend, &block, &balance16, 256, &length);
    for (uint32_t s = 0; s < 6; s++) {
        bkv_section_view_t x, y;
        bkv_record_section(a, s / 3, s % 3, &x);
        bkv_record_section(b, s / 3, s % 3, &y);
        bool same = memcmp(x.key_plane, y.key_plane, x.layout.key_bytes) == 0 &&
                    memcmp(x.value_plane, y.value_plane, x.layout.value_bytes) == 0;
        cr_assert_eq(same, s != 5, "%s: section %u", backend->name, s);
    }
    bkv_codec_params_t other = balance16;
    other.seed++;
    const uint8_t *c = oracle_compress_by(backend, &block, &other, 256, &length);
    cr_assert_arr_neq(b, c, length, "%s: the seed changes nothing", backend->name);
}

Test(backends, sections_depend_on_nothing_else) {
    oracle_on_every_backend(check_alone);
}

static void check_strides(const bkv_backend_t *backend) {
    // The same block with its tokens interleaved: [token][head][dim], keys before values.
    bkv_shape_t shape = {1, 2, 130, 64, 24, BKV_BF16};
    bkv_block_t block, strided = {.shape = shape};
    text_block(&shape, 3, &block);
    uint16_t *k = oracle_exact(2ull * 130 * 2 * 64), *v = oracle_exact(2ull * 130 * 2 * 24);
    for (uint32_t t = 0; t < 130; t++) {
        for (uint32_t h = 0; h < 2; h++) {
            memcpy(k + (size_t)(t * 2 + h) * 64, (const uint8_t *)block.keys + ((size_t)h * 130 + t) * 128, 128);
            memcpy(v + (size_t)(t * 2 + h) * 24, (const uint8_t *)block.values + ((size_t)h * 130 + t) * 48, 48);
        }
    }
    strided.keys = k, strided.values = v;
    strided.key_stride = (bkv_stride_t){.head = 128, .token = 256};
    strided.value_stride = (bkv_stride_t){.head = 48, .token = 96};
    static const bkv_codec_t codecs[] = {BKV_CODEC_RAW, BKV_CODEC_DENSE4, BKV_CODEC_BALANCE};
    for (int c = 0; c < 3; c++) {
        bkv_codec_params_t params = {.codec = codecs[c], .rate = 8, .seed = 1};
        size_t length;
        const uint8_t *want = oracle_compress_by(backend, &block, &params, 0, &length);
        const uint8_t *got = oracle_compress_by(backend, &strided, &params, 0, &length);
        cr_assert_arr_eq(want, got, length, "%s: codec %d", backend->name, (int)codecs[c]);
    }
    free(k), free(v);
}

Test(backends, strides_do_not_matter) {
    oracle_on_every_backend(check_strides);
}

enum { CHILDREN = 5 };

static void *folded(const bkv_backend_t *backend, const void *const *records, uint64_t budget, uint64_t seed, size_t *length) {
    bkv_record_id_t id = {.tenant = 3};
    const bkv_fold_params_t params = {.budget = budget, .seed = seed};
    bkv_error_t err = {0};
    size_t scratch = bkv_fold_workspace(backend, records, CHILDREN, budget);
    void *workspace = oracle_exact(scratch), *record = oracle_exact((size_t)budget);
    memset(workspace, 0xff, scratch);
    bkv_status_t status = bkv_fold(backend, records, CHILDREN, &id, &params, record, workspace, length, &err);
    cr_assert_eq(status, BKV_OK, "%s: %s", backend->name, err.message);
    cr_assert_eq(bkv_record_check(record, *length, &err), BKV_OK, "%s: %s", backend->name, err.message);
    free(workspace);
    return record;
}

static void check_fold(const bkv_backend_t *backend) {
    bkv_shape_t shape = {1, 2, 150, 64, 48, BKV_BF16};
    const void *records[CHILDREN], *raws[CHILDREN];
    uint64_t bytes = CHILDREN * bkv_shape_bytes(&shape);
    for (uint32_t i = 0; i < CHILDREN; i++) {
        bkv_codec_params_t dense = {.codec = i % 2 ? BKV_CODEC_DENSE4 : BKV_CODEC_DENSE8}, raw = {.codec = BKV_CODEC_RAW};
        bkv_block_t block;
        size_t length;
        text_block(&shape, 7, &block); // the same centres in each
        records[i] = oracle_compress(&block, &dense, i * 150, &length);
        raws[i] = oracle_compress(&block, &raw, i * 150, &length);
    }
    const bkv_backend_t *ref = bkv_backend_get("ref");
    size_t length, n;
    const double *exact = attended(folded(ref, raws, bytes, 1, &length), 1, 2, &n);
    for (uint64_t rate = 8; rate <= 32; rate *= 2) {
        double ours = 0, theirs = 0;
        for (uint64_t seed = 0; seed < 16; seed++) {
            void *a = folded(backend, records, bytes / rate / 16 * 16, seed, &length);
            void *b = folded(backend, records, bytes / rate / 16 * 16, seed, &length);
            cr_assert_arr_eq(a, b, length, "%s", backend->name);
            ours += attention_error(a, 1, 2, exact);
            theirs += attention_error(folded(ref, records, bytes / rate / 16 * 16, seed, &length), 1, 2, exact);
            free(a), free(b);
        }
        cr_assert(ours < 1.08 * theirs, "%s, %llux: %g, ref %g", backend->name, (unsigned long long)rate, ours / 16,
                  theirs / 16);
    }
}

Test(backends, folds_are_as_good_as_by_ref) {
    oracle_on_every_backend(check_fold);
}
