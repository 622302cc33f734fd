// test_lanes.c - kernels/lanes_*.c: every table of inner loops that this machine can run, against float64 and, where results are
// the same to the bit, against ref. What the machine lacks is said.
#include "cpu/lanes.h"

#include "convert.h"
#include "cpu/cpu.h"
#include "oracle.h"
#include "quant.h"
#include "record.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct level {
    const char *name;
    const bkv_lanes_t *lanes;
    bool here, rounds; // rounds: factors of products are bfloat16
} level_t;

enum { LEVELS = 4 };

static void levels_find(level_t levels[LEVELS]) {
    memset(levels, 0, LEVELS * sizeof(*levels));
    levels[0] = (level_t){"ref", &bkv_lanes_ref, true, false};
#if defined(__x86_64__)
    levels[1] = (level_t){"avx2", &bkv_lanes_avx2, bkv_cpu_avx2(), false};
    levels[2] = (level_t){"avx512", &bkv_lanes_avx512, bkv_cpu_avx512(), false};
    levels[3] = (level_t){"amx", &bkv_lanes_amx, bkv_cpu_amx(), true};
#endif
    for (int i = 1; i < LEVELS; i++) {
        if (!levels[i].here) {
            fprintf(stderr, "SKIPPED: %s, which this machine does not have\n", levels[i].name ? levels[i].name : "a level");
        }
    }
}

// Runs a check on every level.
static void on_every_level(void (*check)(const level_t *level)) {
    level_t levels[LEVELS];
    levels_find(levels);
    for (int i = 0; i < LEVELS; i++) {
        if (levels[i].here) {
            check(&levels[i]);
        }
    }
}

// Exactly n floats, so that AddressSanitizer sees one too many.
static float *gauss(size_t n, double scale, uint64_t seed) {
    oracle_random_t random = {seed};
    float *values = oracle_exact(n * sizeof(float));
    for (size_t i = 0; i < n; i++) {
        values[i] = (float)(scale * oracle_gauss(&random));
    }
    return values;
}

static void check_vectors(const level_t *level) {
    for (uint32_t n = 8; n <= 1024; n = n < 80 ? n + 8 : n * 2 + 8) {
        float *a = gauss(n, 1, n), *b = gauss(n, 1, n + 1), *y = oracle_exact(n * sizeof(float));
        double sum = 0;
        memcpy(y, b, n * sizeof(float));
        level->lanes->axpy(-1.5f, a, n, y);
        for (uint32_t i = 0; i < n; i++) {
            sum += (double)a[i] * (double)b[i];
            cr_assert(fabs((double)y[i] - ((double)b[i] - 1.5 * (double)a[i])) < 2e-6, "%s, %u", level->name, n);
        }
        cr_assert(fabs((double)level->lanes->dot(a, b, n) - sum) < 1e-5 * n, "%s, %u", level->name, n);
        free(a), free(b), free(y);
    }
}

static void check_weigh(const level_t *level) {
    static const uint32_t dims[] = {8, 24, 64, 72, 128, 136, 200};
    for (uint32_t d = 0; d < 7; d++) {
        uint32_t dim = dims[d], n = 1 + 50 * d, list[400];
        float *values = gauss((size_t)2 * n * dim, 1, d), *weight = gauss(n, 1, 3), *out = gauss(dim, 1, 4);
        double *want = oracle_alloc(dim * sizeof(double));
        for (uint32_t i = 0; i < dim; i++) {
            want[i] = (double)out[i];
        }
        for (uint32_t t = 0; t < n; t++) {
            list[t] = 2 * t + 1;
            for (uint32_t i = 0; i < dim; i++) {
                want[i] += (double)weight[t] * (double)values[(size_t)list[t] * dim + i];
            }
        }
        const bkv_rows_t rows = {.rows = values, .list = list, .n = n, .dim = dim};
        level->lanes->weigh(&rows, weight, out);
        for (uint32_t i = 0; i < dim; i++) {
            cr_assert(fabs((double)out[i] - want[i]) < 2e-5 * sqrt(n), "%s: %u rows of %u", level->name, n, dim);
        }
        free(values), free(weight), free(out), free(want);
    }
}

Test(lanes, weigh) {
    on_every_level(check_weigh);
}

Test(lanes, dot_and_axpy) {
    on_every_level(check_vectors);
}

static void check_to_float(const level_t *level) {
    for (uint32_t type = BKV_BF16; type <= BKV_FP32; type++) {
        bkv_dtype_t dtype = (bkv_dtype_t)type;
        size_t bytes = bkv_dtype_bytes(dtype), n = 65536 + 7;
        uint8_t *source = (uint8_t *)oracle_exact(n * bytes + 1) + 1; // at an odd address
        for (size_t i = 0; i < n; i++) {
            uint32_t bits = dtype == BKV_FP32 ? (uint32_t)i * 2654435761u : (uint32_t)i;
            memcpy(source + i * bytes, &bits, bytes);
        }
        float *want = oracle_exact(n * sizeof(float)), *got = oracle_exact(n * sizeof(float));
        bkv_row_to_float(dtype, source, n, want);
        level->lanes->to_float(dtype, source, n, got);
        for (size_t i = 0; i < n; i++) {
            cr_assert(memcmp(&want[i], &got[i], 4) == 0 || (isnan(want[i]) && isnan(got[i])), "%s, %s: element %zu",
                      level->name, bkv_dtype_name(dtype), i);
        }
        free(source - 1), free(want), free(got);
    }
}

Test(lanes, to_float_is_exact) {
    on_every_level(check_to_float);
}

static double product(const float *a, const float *b, uint32_t dim) {
    double sum = 0;
    for (uint32_t i = 0; i < dim; i++) {
        sum += (double)a[i] * (double)b[i];
    }
    return sum;
}

static void products_of(const level_t *level, uint32_t na, uint32_t nb, uint32_t dim, bool same) {
    float *a = gauss((size_t)na * dim, 1, na), *b = same ? a : gauss((size_t)nb * dim, 1, nb + 1000);
    if (level->rounds) { // to numbers that bfloat16 holds: then its products are exact too
        for (size_t i = 0; i < (size_t)na * dim; i++) {
            a[i] = bkv_bf16_to_float(bkv_float_to_bf16(a[i]));
        }
        for (size_t i = 0; !same && i < (size_t)nb * dim; i++) {
            b[i] = bkv_bf16_to_float(bkv_float_to_bf16(b[i]));
        }
    }
    uint32_t stride = bkv_tile_pad(nb);
    size_t size = (size_t)bkv_tile_pad(na) * stride;
    float *out = oracle_exact(size * sizeof(float));
    memset(out, 0xff, size * sizeof(float)); // NaN
    void *scratch = oracle_exact(level->lanes->products_scratch(na, nb, dim));
    memset(scratch, 0xff, level->lanes->products_scratch(na, nb, dim));
    bkv_rows_t left = {.rows = a, .n = na, .dim = dim}, right = {.rows = b, .n = nb, .dim = dim};
    level->lanes->products(&left, same ? NULL : &right, out, stride, scratch);
    for (uint32_t i = 0; i < na; i++) {
        for (uint32_t j = same ? i / BKV_TILE * BKV_TILE : 0; j < nb; j++) {
            double want = product(a + (size_t)i * dim, b + (size_t)j * dim, dim), got = (double)out[(size_t)i * stride + j];
            cr_assert(fabs(got - want) < 2e-5 * sqrt(dim), "%s: %u x %u x %u at %u, %u: %g for %g", level->name, na, nb, dim, i,
                      j, got, want);
        }
    }
    for (uint32_t i = 0; i < bkv_tile_pad(na); i++) {
        for (uint32_t j = same ? i / BKV_TILE * BKV_TILE : 0; j < stride; j++) {
            cr_assert(isfinite(out[(size_t)i * stride + j]), "%s: %u, %u", level->name, i, j);
        }
    }
    free(a), free(out), free(scratch);
    if (!same) {
        free(b);
    }
}

static void check_products(const level_t *level) {
    static const uint32_t dims[] = {8, 24, 32, 40, 64, 72, 128, 136, 576};
    static const uint32_t counts[][2] = {{1, 1}, {5, 96}, {16, 17}, {33, 40}, {211, 27}, {256, 16}};
    for (size_t d = 0; d < sizeof(dims) / sizeof(dims[0]); d++) {
        for (size_t c = 0; c < sizeof(counts) / sizeof(counts[0]); c++) {
            products_of(level, counts[c][0], counts[c][1], dims[d], false);
        }
        products_of(level, counts[d % 6][0], counts[d % 6][0], dims[d], true);
    }
    products_of(level, 211, 211, 128, true);
}

Test(lanes, products) {
    on_every_level(check_products);
}

// Rounding to bfloat16 is off by 2^-9 of an element: a product is within twice that, and much nearer on average.
static void check_rounded_products(const level_t *level) {
    uint32_t n = 64, dim = 128;
    float *a = gauss((size_t)n * dim, 1, 5), *out = oracle_exact(n * n * sizeof(float));
    void *scratch = oracle_exact(level->lanes->products_scratch(n, n, dim));
    bkv_rows_t rows = {.rows = a, .n = n, .dim = dim};
    level->lanes->products(&rows, NULL, out, n, scratch);
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t j = i; j < n; j++) {
            double off = (double)out[i * n + j] - product(a + (size_t)i * dim, a + (size_t)j * dim, dim);
            cr_assert(fabs(off) < (i == j ? 0.5 : 0.2), "%s: %g", level->name, off);
        }
    }
    free(a), free(out), free(scratch);
}

Test(lanes, products_of_any_floats) {
    on_every_level(check_rounded_products);
}

// Rows picked by a list, about a centre; every other row is NaN.
static void check_picked_products(const level_t *level) {
    enum { N = 21, DIM = 40 };
    float *rows = gauss((size_t)2 * N * DIM, 1, 6), *centre = gauss(DIM, 1, 7), *out = oracle_exact(32 * 32 * sizeof(float));
    float *picked = oracle_exact(sizeof(float) * N * DIM);
    uint32_t list[N];
    for (uint32_t i = 0; i < N; i++) {
        list[i] = 2 * i + 1;
        for (uint32_t d = 0; d < DIM; d++) {
            rows[(size_t)2 * i * DIM + d] = NAN;
            picked[i * DIM + d] = rows[(size_t)list[i] * DIM + d] - centre[d];
        }
    }
    void *scratch = oracle_exact(level->lanes->products_scratch(N, N, DIM));
    bkv_rows_t all = {.rows = rows, .list = list, .centre = centre, .n = N, .dim = DIM};
    for (int same = 0; same < 2; same++) {
        level->lanes->products(&all, same ? NULL : &all, out, 32, scratch);
        for (uint32_t i = 0; i < N; i++) {
            for (uint32_t j = i; j < N; j++) {
                double want = product(picked + (size_t)i * DIM, picked + (size_t)j * DIM, DIM), got = (double)out[i * 32 + j];
                cr_assert(fabs(got - want) < (level->rounds ? 0.5 : 1e-4), "%s: %u, %u: %g for %g", level->name, i, j, got,
                          want);
            }
        }
    }
    free(rows), free(centre), free(out), free(picked), free(scratch);
}

Test(lanes, products_of_picked_rows) {
    on_every_level(check_picked_products);
}

static void kernel_of(const level_t *level, uint32_t n, uint32_t key_dim, uint32_t value_dim, double scale) {
    uint32_t padded = bkv_tile_pad(n);
    float *k = gauss((size_t)n * key_dim, scale, n), *v = gauss((size_t)n * value_dim, 1, n + 1);
    for (size_t i = 0; level->rounds && i < (size_t)n * key_dim; i++) {
        k[i] = bkv_bf16_to_float(bkv_float_to_bf16(k[i]));
    }
    for (size_t i = 0; level->rounds && i < (size_t)n * value_dim; i++) {
        v[i] = bkv_bf16_to_float(bkv_float_to_bf16(v[i]));
    }
    size_t bytes = level->lanes->kernel_scratch(n, key_dim, value_dim);
    float *gram = oracle_exact((size_t)padded * padded * sizeof(float));
    void *scratch = oracle_exact(bytes);
    memset(scratch, 0xff, bytes);
    memset(gram, 0xff, (size_t)padded * padded * sizeof(float));
    bkv_rows_t keys = {.rows = k, .n = n, .dim = key_dim}, values = {.rows = v, .n = n, .dim = value_dim};
    const bkv_kernel_t kernel = {.scale = 1.0f / sqrtf((float)key_dim), .top = 20, .lift = 0.025f};
    level->lanes->kernel(&keys, &values, &kernel, gram, scratch);
    double shift = 0, per = (double)kernel.scale;
    for (uint32_t i = 0; i < n; i++) {
        shift = fmax(shift, product(k + (size_t)i * key_dim, k + (size_t)i * key_dim, key_dim) * per - 20);
    }
    for (uint32_t i = 0; i < padded; i++) {
        for (uint32_t j = 0; j < padded; j++) {
            bool there = i < n && j < n;
            double keys_of = there ? product(k + (size_t)i * key_dim, k + (size_t)j * key_dim, key_dim) : 0;
            double values_of = there ? product(v + (size_t)i * value_dim, v + (size_t)j * value_dim, value_dim) : 0;
            double size = exp(fmin(20, keys_of * per - shift)), want = size * (values_of + (double)0.025f);
            double got = (double)gram[(size_t)i * padded + j];
            // The exponent is off by the rounding of its products, up to the shift's size.
            double tolerance = 1e-30 + size * (2e-6 * (20 + shift) * (fabs(values_of) + 0.1 + sqrt(value_dim)));
            cr_assert(fabs(got - want) <= tolerance, "%s: %u of %u x %u at %u, %u: %g for %g", level->name, n, key_dim,
                      value_dim, i, j, got, want);
        }
    }
    free(k), free(v), free(gram), free(scratch);
}

static void check_kernel(const level_t *level) {
    static const uint32_t counts[] = {1, 15, 16, 17, 40, 64, 100, 211}, dims[][2] = {{8, 8}, {64, 24}, {40, 128}, {128, 128}};
    for (int c = 0; c < 8; c++) {
        for (int d = 0; d < 4; d++) {
            kernel_of(level, counts[c], dims[d][0], dims[d][1], d % 2 ? 3 : 0.5); // with a shift, and without
        }
    }
}

Test(lanes, kernel) {
    on_every_level(check_kernel);
}

static void refit_of(const level_t *level, uint32_t tokens, uint32_t rows, uint32_t dim) {
    uint32_t stride = bkv_tile_pad(rows);
    float *parts = gauss((size_t)tokens * stride, 10, tokens + rows), *half = gauss(stride, 10, 3),
          *weight = gauss(tokens, 1, 4);
    float *values = gauss((size_t)tokens * dim, 1, 5), *mass = oracle_exact(stride * sizeof(float));
    float *fit = oracle_exact((size_t)stride * dim * sizeof(float));
    memset(mass, 0, stride * sizeof(float));
    memset(fit, 0, (size_t)stride * dim * sizeof(float));
    double *want = oracle_alloc((size_t)rows * (dim + 1) * sizeof(double));
    for (uint32_t r = rows; r < stride; r++) {
        half[r] = INFINITY;
    }
    for (uint32_t t = 0; t < tokens; t++) {
        weight[t] = t % 5 == 0 ? 0 : fabsf(weight[t]);
        double sum = 0, top = -INFINITY;
        for (uint32_t r = 0; r < rows; r++) {
            top = fmax(top, ((double)parts[t * stride + r] - (double)half[r]) * 0.3);
        }
        for (uint32_t r = 0; r < rows; r++) {
            sum += exp(((double)parts[t * stride + r] - (double)half[r]) * 0.3 - top);
        }
        for (uint32_t r = 0; r < rows; r++) {
            double part = (double)weight[t] * exp(((double)parts[t * stride + r] - (double)half[r]) * 0.3 - top) / sum;
            want[r * (dim + 1) + dim] += part;
            for (uint32_t i = 0; i < dim; i++) {
                want[r * (dim + 1) + i] += part * (double)values[t * dim + i];
            }
        }
    }
    level->lanes->shares(parts, tokens, rows, stride, half, 0.3f, weight, mass);
    void *scratch = oracle_exact(level->lanes->products_scratch(rows, dim, tokens));
    level->lanes->mix(parts, tokens, rows, stride, values, dim, fit, scratch);
    free(scratch);
    for (uint32_t r = 0; r < rows; r++) {
        cr_assert(fabs((double)mass[r] - want[r * (dim + 1) + dim]) < 2e-5 * tokens, "%s: mass %u of %u", level->name, r, rows);
        for (uint32_t i = 0; i < dim; i++) {
            double off = (double)fit[(size_t)r * dim + i] - want[r * (dim + 1) + i];
            cr_assert(fabs(off) < (level->rounds ? 1e-3 : 2e-5) * tokens, "%s: fit %u, %u of %u x %u: %g", level->name, r, i,
                      rows, dim, off);
        }
    }
    free(parts), free(half), free(weight), free(values), free(mass), free(fit), free(want);
}

static void check_refit(const level_t *level) {
    static const uint32_t dims[] = {8, 16, 24, 40, 64, 128, 136}, rows[] = {1, 9, 16, 27, 96};
    for (uint32_t d = 0; d < 7; d++) {
        for (uint32_t r = 0; r < 5; r++) {
            refit_of(level, 1 + 61 * ((d + r) % 5), rows[r], dims[d]);
        }
    }
}

Test(lanes, shares_and_mix) {
    on_every_level(check_refit);
}

static void quantised(const level_t *level, uint32_t count, uint32_t dim, uint32_t bits, double scale, bool keys) {
    float *rows = gauss((size_t)count * dim, scale, count + dim), *scratch = oracle_exact(4 * (size_t)dim * sizeof(float));
    memset(rows, 0, sizeof(float) * 8); // a value group or a channel of nothing
    for (uint32_t t = 0; t < count; t++) {
        rows[(size_t)t * dim + 5] = -2.5f; // a channel without a range
    }
    uint32_t groups = (dim + 63) / 64;
    size_t params = keys ? 4 * (size_t)dim : 4 * (size_t)count * groups, codes = (size_t)count * dim * bits / 8;
    uint8_t *want = oracle_exact(params + codes), *got_params = oracle_exact(params), *got_codes = oracle_exact(codes);
    const bkv_lanes_t *ref = &bkv_lanes_ref;
    if (keys) {
        ref->quant_keys(rows, count, dim, bits, want, want + params, scratch);
        level->lanes->quant_keys(rows, count, dim, bits, got_params, got_codes, scratch);
    } else {
        ref->quant_values(rows, count, dim, bits, want, want + params);
        level->lanes->quant_values(rows, count, dim, bits, got_params, got_codes);
    }
    cr_assert(memcmp(want, got_params, params) == 0, "%s: params, %u x %u, %u bits, keys %d", level->name, count, dim, bits,
              keys);
    cr_assert(memcmp(want + params, got_codes, codes) == 0, "%s: codes, %u x %u, %u bits, keys %d", level->name, count, dim,
              bits, keys);
    free(rows), free(scratch), free(want), free(got_params), free(got_codes);
}

static void check_quant(const level_t *level) {
    static const uint32_t dims[] = {8, 24, 32, 64, 72, 104, 128, 200, 256, 1024}, widths[] = {2, 3, 4, 8};
    static const double scales[] = {1, 1e-7, 30000, 1e6}; // subnormal scales; beyond what float16 holds
    for (uint32_t d = 0; d < 10; d++) {
        for (uint32_t w = 0; w < 4; w++) {
            for (uint32_t count = 1; count <= 96; count = count * 3 - count / 2) {
                quantised(level, count, dims[d], widths[w], scales[(count + w) % 4], true);
                quantised(level, count, dims[d], widths[w], scales[(count + w) % 4], false);
            }
        }
    }
    uint8_t params[32];
    memset(params, 0xff, sizeof(params));
    level->lanes->quant_keys(NULL, 0, 8, 4, params, NULL, NULL);
    for (uint32_t i = 0; i < sizeof(params); i++) {
        cr_assert_eq(params[i], 0);
    }
}

Test(lanes, quantising_is_the_same_to_the_bit) {
    on_every_level(check_quant);
}

static void check_read(const level_t *level) {
    static const uint32_t dims[][2] = {{8, 24}, {64, 40}, {128, 128}, {136, 72}, {104, 200}};
    static const bkv_codec_params_t codecs[] = {{.codec = BKV_CODEC_RAW},
                                                {.codec = BKV_CODEC_DENSE8},
                                                {.codec = BKV_CODEC_DENSE4},
                                                {.codec = BKV_CODEC_BALANCE, .rate = 4, .seed = 1},
                                                {.codec = BKV_CODEC_BALANCE, .rate = 16, .seed = 1},
                                                {.codec = BKV_CODEC_BALANCE, .rate = 48, .seed = 1}};
    uint32_t seen = 0;
    for (uint32_t d = 0; d < 5; d++) {
        bkv_shape_t shape = {1, 1, 256, dims[d][0], dims[d][1], d % 2 ? BKV_FP16 : BKV_BF16};
        bkv_block_t block;
        oracle_block(&shape, d, 1, &block);
        for (uint32_t c = 0; c < 6; c++) {
            bkv_error_t err;
            if (oracle_try(&block, &codecs[c], 0, &err) != BKV_OK) {
                continue; // too small for the rate
            }
            size_t length;
            bkv_section_view_t view;
            bkv_record_section(oracle_compress(&block, &codecs[c], 0, &length), 0, 0, &view);
            seen |= 1u << (view.key_bits & 15);
            for (uint32_t first = 0; first < view.tokens; first = 3 * first + 1) {
                for (uint32_t count = 1; count <= view.tokens - first; count = 2 * count + 5) {
                    size_t keys = (size_t)count * shape.key_dim, values = (size_t)count * shape.value_dim;
                    float *want = oracle_alloc((keys + values) * sizeof(float));
                    float *k = oracle_exact(keys * sizeof(float)), *v = oracle_exact(values * sizeof(float));
                    bkv_section_read_range(&view, first, count, want, want + keys, NULL);
                    level->lanes->read_keys(&view, first, count, k);
                    level->lanes->read_values(&view, first, count, v);
                    cr_assert(memcmp(want, k, keys * sizeof(float)) == 0, "%s: keys, dims %u, %u bits, %u from %u", level->name,
                              d, view.key_bits, count, first);
                    cr_assert(memcmp(want + keys, v, values * sizeof(float)) == 0, "%s: values, dims %u, %u bits, %u from %u",
                              level->name, d, view.value_bits, count, first);
                    free(want), free(k), free(v);
                }
            }
        }
    }
    cr_assert((seen & (1u << 3)) && (seen & (1u << 4)) && (seen & (1u << 8)) && (seen & (1u << 15)), "bits seen: %x", seen);
}

Test(lanes, sections_are_read_the_same_to_the_bit) {
    on_every_level(check_read);
}
