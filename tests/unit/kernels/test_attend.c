// test_attend.c - attention by every CPU backend, kernels/attend_*.c, against float64 softmax over the bit-by-bit decoded
// records; test_attend_codes.c has the shapes. What the machine lacks is said.
#include "codec.h"

#include "oracle.h"

#include <criterion/criterion.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static bkv_status_t attend(const bkv_backend_t *backend, const void *const *records, uint32_t count,
                           const bkv_attend_args_t *args, bkv_error_t *err) {
    void *workspace = oracle_exact(bkv_attend_workspace(backend, records, count, args));
    bkv_status_t status = bkv_attend(backend, records, count, args, workspace, err);
    free(workspace);
    return status;
}

typedef struct fixture {
    const bkv_backend_t *backend;
    bkv_shape_t shape;
    const void *records[3];
    bkv_attend_args_t args;
    float *q;
} fixture_t;

// Three records of one sequence: raw, balance, dense.
static void prepare(fixture_t *f, const bkv_backend_t *backend, double scale) {
    static const bkv_codec_params_t codecs[] = {
        {.codec = BKV_CODEC_RAW}, {.codec = BKV_CODEC_BALANCE, .rate = 8, .seed = 5}, {.codec = BKV_CODEC_DENSE8}};
    f->backend = backend;
    f->shape = (bkv_shape_t){3, 2, 150, 64, 40, BKV_BF16};
    for (uint32_t i = 0; i < 3; i++) {
        bkv_block_t block;
        size_t length;
        oracle_block(&f->shape, i, scale, &block);
        f->records[i] = oracle_compress(&block, &codecs[i], 150 * i, &length);
    }
    f->args = (bkv_attend_args_t){.layers = 2, .first_layer = 1, .query_heads = 6, .queries = 4};
    size_t rows = 2 * 6 * 4;
    oracle_random_t random = {11};
    f->q = oracle_alloc(rows * 64 * sizeof(float));
    for (size_t i = 0; i < rows * 64; i++) {
        f->q[i] = (float)(oracle_gauss(&random) * 2);
    }
    f->args.q = f->q;
    f->args.out = oracle_alloc(rows * 40 * sizeof(float));
    f->args.lse = oracle_alloc(rows * sizeof(float));
}

static void expect(const fixture_t *f, uint32_t first, uint32_t count, const float *out, const float *lse) {
    double scale = f->args.scale == 0 ? 1 / sqrt(64.0) : (double)f->args.scale;
    for (uint32_t layer = 0; layer < 2; layer++) {
        for (uint32_t head = 0; head < 2; head++) {
            oracle_section_t sections[3];
            for (uint32_t i = 0; i < count; i++) {
                oracle_read(f->records[first + i], 1 + layer, head, &sections[i]);
            }
            for (uint32_t row = 0; row < 3 * 4; row++) { // three query heads read this KV head, four queries each
                size_t at = ((size_t)layer * 6 + head * 3) * 4 + row;
                double exact[40], sum = oracle_attend(sections, count, f->q + at * 64, scale, exact);
                cr_assert(fabs((double)lse[at] - sum) < 1e-4 * (1 + fabs(sum)));
                for (uint32_t i = 0; i < 40; i++) {
                    cr_assert(fabs((double)out[at * 40 + i] - exact[i]) < 5e-4, "row %zu: %g %g", at, (double)out[at * 40 + i],
                              exact[i]);
                }
            }
        }
    }
}

static void check_equals_float64_over_one_and_several_records(const bkv_backend_t *backend) {
    fixture_t f;
    prepare(&f, backend, 1);
    for (uint32_t first = 0; first < 3; first++) {
        for (uint32_t count = 1; first + count <= 3; count++) {
            cr_assert_eq(attend(backend, f.records + first, count, &f.args, NULL), BKV_OK);
            expect(&f, first, count, f.args.out, f.args.lse);
        }
    }
}

Test(attend, equals_float64_over_one_and_several_records) {
    oracle_on_every_backend(check_equals_float64_over_one_and_several_records);
}

static void check_takes_the_scale_it_is_given(const bkv_backend_t *backend) {
    fixture_t f;
    prepare(&f, backend, 1);
    f.args.scale = 0.7f;
    cr_assert_eq(attend(backend, f.records, 3, &f.args, NULL), BKV_OK);
    expect(&f, 0, 3, f.args.out, f.args.lse);
}

Test(attend, takes_the_scale_it_is_given) {
    oracle_on_every_backend(check_takes_the_scale_it_is_given);
}

static void check_sharp_softmaxes_do_not_overflow(const bkv_backend_t *backend) {
    fixture_t f;
    prepare(&f, backend, 30); // logits in the thousands
    cr_assert_eq(attend(backend, f.records, 2, &f.args, NULL), BKV_OK);
    for (size_t i = 0; i < 2 * 6 * 4; i++) {
        cr_assert(isfinite(f.args.lse[i]));
        cr_assert(isfinite(f.args.out[i * 40]));
    }
}

Test(attend, sharp_softmaxes_do_not_overflow) {
    oracle_on_every_backend(check_sharp_softmaxes_do_not_overflow);
}

static void check_partial_results_merge_to_the_whole(const bkv_backend_t *backend) {
    fixture_t f;
    prepare(&f, backend, 1);
    size_t rows = 2 * 6 * 4;
    float *out = oracle_alloc(rows * 40 * sizeof(float)), *lse = oracle_alloc(rows * sizeof(float));
    for (size_t i = 0; i < rows; i++) {
        lse[i] = -INFINITY;
    }
    for (uint32_t i = 0; i < 3; i++) {
        cr_assert_eq(attend(backend, f.records + i, 1, &f.args, NULL), BKV_OK);
        bkv_attend_merge(out, lse, f.args.out, f.args.lse, rows, 40);
    }
    expect(&f, 0, 3, out, lse);
}

Test(attend, partial_results_merge_to_the_whole) {
    oracle_on_every_backend(check_partial_results_merge_to_the_whole);
}

Test(attend, merging_with_nothing_changes_nothing) {
    float out_a[2] = {1, 2}, lse_a = 0.5f, out_b[2] = {NAN, NAN}, lse_b = -INFINITY;
    bkv_attend_merge(out_a, &lse_a, out_b, &lse_b, 1, 2);
    cr_assert(out_a[0] == 1 && out_a[1] == 2 && lse_a == 0.5f);
    bkv_attend_merge(out_b, &lse_b, out_a, &lse_a, 1, 2);
    cr_assert(out_b[0] == 1 && out_b[1] == 2 && lse_b == 0.5f);
    float none_a = -INFINITY, none_b = -INFINITY;
    bkv_attend_merge(out_a, &none_a, out_b, &none_b, 1, 2);
    cr_assert_eq(none_a, -INFINITY);
}

Test(attend, merging_far_apart_results_is_exact) {
    float out_a[1] = {1}, lse_a = 1000, out_b[1] = {3}, lse_b = 1000 - (float)log(3.0);
    bkv_attend_merge(out_a, &lse_a, out_b, &lse_b, 1, 1);
    cr_assert(fabs((double)out_a[0] - 1.5) < 1e-4);
    cr_assert(fabs((double)lse_a - (1000 + log(4.0 / 3))) < 1e-3);
    float far[1] = {9}, far_lse = -1e30f;
    bkv_attend_merge(out_a, &lse_a, far, &far_lse, 1, 1);
    cr_assert(fabs((double)out_a[0] - 1.5) < 1e-4);
}

static void refused(const fixture_t *f, uint32_t count, const bkv_attend_args_t *args, const char *field) {
    bkv_error_t err = {0};
    cr_assert_eq(attend(f->backend, f->records, count, args, &err), BKV_INVALID_ARGUMENT, "%s", field);
    cr_assert_eq(strncmp(err.message, field, strlen(field)), 0, "'%s' does not name %s", err.message, field);
}

static void check_bad_arguments_name_their_field(const bkv_backend_t *backend) {
    fixture_t f;
    prepare(&f, backend, 1);
    bkv_attend_args_t args = f.args;
    refused(&f, 0, &args, "records");
    args = f.args, args.first_layer = 2, refused(&f, 1, &args, "layers");
    args = f.args, args.first_layer = UINT32_MAX, refused(&f, 1, &args, "layers");
    args = f.args, args.layers = 0, refused(&f, 1, &args, "layers");
    args = f.args, args.query_heads = 5, refused(&f, 1, &args, "query_heads");
    args = f.args, args.query_heads = 0, refused(&f, 1, &args, "query_heads");
    args = f.args, args.queries = 0, refused(&f, 1, &args, "queries");
    args = f.args, args.scale = NAN, refused(&f, 1, &args, "scale");
    f.q[77] = INFINITY, refused(&f, 1, &f.args, "q");
    f.q[77] = 3e38f, f.q[78] = -3e38f, refused(&f, 1, &f.args, "q");
}

Test(attend, bad_arguments_name_their_field) {
    oracle_on_every_backend(check_bad_arguments_name_their_field);
}

static void check_records_must_go_together(const bkv_backend_t *backend) {
    fixture_t f;
    prepare(&f, backend, 1);
    bkv_codec_params_t params = {.codec = BKV_CODEC_RAW};
    bkv_shape_t others[] = {{2, 2, 150, 64, 40, BKV_BF16},
                            {3, 1, 150, 64, 40, BKV_BF16},
                            {3, 2, 150, 72, 40, BKV_BF16},
                            {3, 2, 150, 64, 48, BKV_BF16}};
    for (int i = 0; i < 4; i++) {
        bkv_block_t block;
        size_t length;
        oracle_block(&others[i], 1, 1, &block);
        f.records[1] = oracle_compress(&block, &params, 150, &length);
        refused(&f, 2, &f.args, "records");
    }
}

Test(attend, records_must_go_together) {
    oracle_on_every_backend(check_records_must_go_together);
}
