// test_attend_codes.c - attention by every instruction set over records made of chosen sections: every width of codes, odd
// counts and dims, several key groups, mixed records. Each against float64 over the bit-by-bit decoded record.
#include "record.h"

#include "oracle.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RECORDS = 4, HEADS = 2 };

// What a record's sections are.
typedef struct kind {
    uint32_t tokens, m;
    uint8_t key_bits, value_bits;
} kind_t;

static void put_half(uint8_t *at, double value) {
    uint16_t half = bkv_float_to_half((float)value);
    memcpy(at, &half, sizeof(half));
}

// Random scales about `scale` and zeros about the middle of their codes.
static void fill_params(oracle_random_t *random, uint8_t *params, size_t n, double scale, uint32_t bits) {
    double step = scale / ((1 << bits) - 1);
    for (size_t i = 0; i < n; i++) {
        put_half(params + 4 * i, step * (0.2 + oracle_uniform(random)));
        put_half(params + 4 * i + 2, -scale * (0.3 + 0.4 * oracle_uniform(random)));
    }
}

static void fill_plane(oracle_random_t *random, uint8_t *codes, size_t n, uint32_t row, uint8_t bits, bkv_dtype_t dtype,
                       double scale) {
    bkv_block_t all = {.shape = {.dtype = dtype}, .keys = codes};
    size_t dim = row / bkv_dtype_bytes(dtype);
    for (size_t i = 0; i < n * (bits == BKV_BITS_NATIVE ? dim : row); i++) {
        if (bits == BKV_BITS_NATIVE) {
            oracle_put(&all, false, 0, 0, 0, (uint32_t)i, (float)(scale * (2 * oracle_uniform(random) - 1)));
        } else {
            codes[i] = (uint8_t)oracle_next(random);
        }
    }
}

static void fill_section(oracle_random_t *random, const bkv_section_view_t *view, double scale) {
    const bkv_plane_layout_t *layout = &view->layout;
    uint8_t *keys = (uint8_t *)(uintptr_t)view->key_plane, *values = (uint8_t *)(uintptr_t)view->value_plane;
    for (uint32_t t = 0; t < view->tokens; t++) {
        uint32_t source = view->source_tokens - view->tokens + t; // the last ones
        if (view->index_kind == BKV_INDEX_LIST) {
            memcpy(keys + 4 * (size_t)t, &source, sizeof(source));
        } else if (view->index_kind == BKV_INDEX_BITMAP) {
            keys[source / 8] = (uint8_t)(keys[source / 8] | 1 << source % 8);
        }
        if (view->has_weights) {
            keys[layout->weights + 4 + t] = (uint8_t)oracle_next(random);
        }
    }
    if (view->has_weights) {
        put_half(keys + layout->weights, -0.5);
        put_half(keys + layout->weights + 2, 0.01);
    }
    fill_plane(random, keys + layout->key_codes, view->tokens, layout->key_row, view->key_bits, view->dtype, scale);
    fill_plane(random, values + layout->value_codes, view->tokens, layout->value_row, view->value_bits, view->dtype, 1);
    if (view->key_bits != BKV_BITS_NATIVE) {
        fill_params(random, keys + layout->key_params, (size_t)layout->key_groups * view->key_dim, scale, view->key_bits);
    }
    if (view->value_bits != BKV_BITS_NATIVE) {
        fill_params(random, values, (size_t)view->tokens * layout->value_groups, 1, view->value_bits);
    }
}

// Memory that ends where its page does, before a page that nobody may read: vector loads, which no sanitizer sees, fault there.
static uint8_t *guarded(size_t bytes, void **map, size_t *mapped) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    *mapped = whole + page;
    *map = mmap(NULL, *mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert(*map != MAP_FAILED);
    cr_assert_eq(mprotect((uint8_t *)*map + whole, page, PROT_NONE), 0);
    return (uint8_t *)*map + whole - bytes; // records are a multiple of 16 bytes
}

typedef struct made {
    void *record, *map;
    size_t mapped;
} made_t;

static made_t record_make(uint64_t seed, const kind_t *kind, uint32_t key_dim, uint32_t value_dim, bkv_dtype_t dtype,
                          bool weights, double scale) {
    bkv_shape_t shape = {1, HEADS, kind->tokens, key_dim, value_dim, dtype};
    bkv_record_id_t id = {.tenant = 1};
    _Alignas(16) uint8_t start[sizeof(bkv_record_header_t) + HEADS * sizeof(bkv_section_t)];
    bkv_record_init(start, &shape, &id, BKV_CODEC_BALANCE, weights ? BKV_RECORD_WEIGHTS : 0);
    ((bkv_record_header_t *)start)->rate = 16;
    for (uint32_t i = 0; i < HEADS; i++) {
        bkv_index_kind_t index = kind->m == kind->tokens ? BKV_INDEX_ALL : bkv_index_choose(kind->tokens, kind->m);
        bkv_record_directory(start)[i] = (bkv_section_t){
            .tokens = kind->m, .key_bits = kind->key_bits, .value_bits = kind->value_bits, .index_kind = (uint8_t)index};
    }
    size_t length = (size_t)bkv_record_place(start);
    made_t made;
    uint8_t *record = made.record = guarded(length, &made.map, &made.mapped);
    memcpy(record, start, sizeof(start));
    oracle_random_t random = {seed};
    for (uint32_t i = 0; i < HEADS; i++) {
        bkv_section_view_t view;
        bkv_record_section(record, 0, i, &view);
        fill_section(&random, &view, scale);
    }
    bkv_error_t err = {0};
    cr_assert_eq(bkv_record_check(record, length, &err), BKV_OK, "%s", err.message);
    return made;
}

// Root of the summed squares of the difference to float64, over that of float64; and the largest error of the log-sum-exp.
static void compare(const void *const *records, uint32_t count, const bkv_attend_args_t *args, uint32_t key_dim,
                    uint32_t value_dim, double *error, double *lse_error) {
    uint32_t rows = args->query_heads / HEADS * args->queries;
    double difference = 0, size = 0, exact[BKV_MAX_DIM];
    *lse_error = 0;
    for (uint32_t head = 0; head < HEADS; head++) {
        oracle_section_t sections[RECORDS];
        for (uint32_t i = 0; i < count; i++) {
            oracle_read(records[i], 0, head, &sections[i]);
        }
        for (uint32_t row = head * rows; row < (head + 1) * rows; row++) {
            double lse = oracle_attend(sections, count, args->q + (size_t)row * key_dim, 1 / sqrt(key_dim), exact);
            *lse_error = fmax(*lse_error, fabs(lse - (double)args->lse[row]));
            for (uint32_t i = 0; i < value_dim; i++) {
                double d = (double)args->out[(size_t)row * value_dim + i] - exact[i];
                difference += d * d;
                size += exact[i] * exact[i];
            }
        }
    }
    *error = sqrt(difference / size);
}

// Attention over the kinds by every CPU backend here, with GQA groups of `group` heads.
static void check(const kind_t *kinds, uint32_t count, uint32_t key_dim, uint32_t value_dim, bkv_dtype_t dtype, bool weights,
                  double scale, uint32_t group, uint32_t queries, double most) {
    static const char *const names[] = {"ref", "avx2", "avx512", "amx"};
    const void *records[RECORDS];
    made_t made[RECORDS];
    for (uint32_t i = 0; i < count; i++) {
        made[i] = record_make(i + 31 * key_dim, &kinds[i], key_dim, value_dim, dtype, weights, scale);
        records[i] = made[i].record;
    }
    size_t rows = (size_t)HEADS * group * queries;
    float *q = oracle_alloc(rows * key_dim * sizeof(float));
    oracle_random_t random = {77};
    for (size_t i = 0; i < rows * key_dim; i++) {
        q[i] = (float)oracle_gauss(&random);
    }
    bkv_attend_args_t args = {.layers = 1, .query_heads = HEADS * group, .queries = queries, .q = q};
    args.out = oracle_exact(rows * value_dim * sizeof(float));
    args.lse = oracle_exact(rows * sizeof(float));
    for (int i = 0; i < 4; i++) {
        const bkv_backend_t *backend = bkv_backend_get(names[i]);
        if (!backend) {
            fprintf(stderr, "SKIPPED: %s, which this machine does not have\n", names[i]);
            continue;
        }
        memset(args.out, 0xff, rows * value_dim * sizeof(float)); // NaN
        void *workspace = oracle_exact(bkv_attend_workspace(backend, records, count, &args));
        bkv_error_t err = {0};
        cr_assert_eq(bkv_attend(backend, records, count, &args, workspace, &err), BKV_OK, "%s: %s", names[i], err.message);
        double error, lse_error;
        compare(records, count, &args, key_dim, value_dim, &error, &lse_error);
        cr_assert(error < most && lse_error < most, "%s, dims %u/%u, bits %u/%u, m %u, %u records: errors %g, %g", names[i],
                  key_dim, value_dim, kinds[0].key_bits, kinds[0].value_bits, kinds[0].m, count, error, lse_error);
        free(workspace);
    }
    for (uint32_t i = 0; i < count; i++) {
        munmap(made[i].map, made[i].mapped);
    }
    free(q);
    free(args.out);
    free(args.lse);
}

static const uint8_t widths[] = {2, 3, 4, 8, BKV_BITS_NATIVE};
static const uint32_t counts[] = {1, 7, 70, 95, 300};

static void check_dims(uint32_t key_dim, uint32_t value_dim) {
    for (uint32_t i = 0; i < 5; i++) {
        for (uint32_t c = 0; c < 5; c++) {
            // All tokens, a bitmap, a list, by turns.
            kind_t kind = {counts[c] * (c % 3 == 0 ? 1 : c % 3 == 1 ? 3 : 50), counts[c], widths[i], widths[i]};
            check(&kind, 1, key_dim, value_dim, (bkv_dtype_t)(1 + (i + c) % 3), c % 2 == 0, 1, 3, 1, 2e-4);
        }
    }
}

Test(attend_codes, every_width_and_count_in_small_heads) {
    check_dims(8, 8);
    check_dims(40, 40);
    check_dims(64, 64);
}

Test(attend_codes, every_width_and_count_in_usual_heads) {
    check_dims(96, 96);
    check_dims(128, 128);
}

Test(attend_codes, every_width_and_count_in_latent_heads) {
    check_dims(192, 128);
    check_dims(576, 512);
}

Test(attend_codes, records_of_all_sorts_in_one_softmax) {
    static const kind_t kinds[][RECORDS] = {
        {{256, 70, 3, 3}, {256, 70, 3, 3}, {300, 300, 4, 4}, {100, 100, BKV_BITS_NATIVE, BKV_BITS_NATIVE}},
        {{400, 333, 2, 8}, {256, 1, 8, 2}, {90, 80, 3, BKV_BITS_NATIVE}, {90, 81, BKV_BITS_NATIVE, 3}},
        {{5, 5, 4, 3}, {900, 640, 3, 2}, {30, 2, 3, 3}, {64, 64, 8, 8}}};
    for (uint32_t i = 0; i < 3; i++) {
        check(kinds[i], RECORDS, 128, 128, BKV_BF16, true, 1, 4, 1, 2e-4);
        check(kinds[i], RECORDS, 72, 104, BKV_FP16, true, 1, 8, 1, 2e-4);
    }
}

Test(attend_codes, any_number_of_query_rows) {
    static const kind_t kinds[] = {{256, 70, 3, 3}, {256, 71, 3, 3}};
    for (uint32_t rows = 1; rows <= 17; rows++) {
        check(kinds, 2, 128, 128, BKV_BF16, true, 1, rows, 1, 2e-4);
    }
    check(kinds, 2, 128, 128, BKV_BF16, true, 1, 4, 65, 2e-4);
}

Test(attend_codes, large_logits) {
    static const kind_t kinds[] = {{256, 70, 3, 3}, {256, 95, 4, 4}, {80, 80, BKV_BITS_NATIVE, BKV_BITS_NATIVE}};
    check(kinds, 3, 128, 128, BKV_BF16, true, 30, 4, 1, 1e-3);
    check(kinds, 3, 128, 128, BKV_BF16, true, 300, 4, 1, 1e-3); // logits of hundreds
}
