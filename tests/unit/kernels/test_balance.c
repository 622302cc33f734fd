// test_balance.c - kernels/cpu/selection.c, walk.c, write.c and balance.c: how many tokens stay, which, with what
// weight, and that the walk does better than chance, measured in float64.
#include "cpu/balance.h"

#include "oracle.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct rows {
    uint32_t n, dim;
    float *k, *v;
} rows_t;

static void rows_read(const bkv_source_t *source, uint32_t first, uint32_t count, float *k, float *v) {
    const rows_t *rows = source->from;
    cr_assert(first + count <= rows->n);
    if (k) {
        memcpy(k, rows->k + (size_t)first * rows->dim, (size_t)count * rows->dim * sizeof(float));
    }
    if (v) {
        memcpy(v, rows->v + (size_t)first * rows->dim, (size_t)count * rows->dim * sizeof(float));
    }
}

// Tokens around a few centres, as the keys and values of text are.
static rows_t rows_make(uint32_t n, uint32_t dim, uint64_t seed) {
    oracle_random_t random = {seed};
    rows_t rows = {n, dim, oracle_alloc((size_t)n * dim * sizeof(float)), oracle_alloc((size_t)n * dim * sizeof(float))};
    float centre[8 * 2 * 128];
    cr_assert(dim <= 128);
    for (uint32_t i = 0; i < 8 * 2 * dim; i++) {
        centre[i] = (float)oracle_gauss(&random);
    }
    for (uint32_t t = 0; t < n; t++) {
        uint32_t c = oracle_next(&random) % 8;
        for (uint32_t i = 0; i < dim; i++) {
            rows.k[t * dim + i] = centre[c * dim + i] + 0.4f * (float)oracle_gauss(&random);
            rows.v[t * dim + i] = centre[(8 + c) * dim + i] + 0.4f * (float)oracle_gauss(&random);
        }
    }
    return rows;
}

static bkv_source_t source_of(const rows_t *rows) {
    return (bkv_source_t){.lanes = &bkv_lanes_ref,
                          .tokens = rows->n,
                          .key_dim = rows->dim,
                          .value_dim = rows->dim,
                          .read = rows_read,
                          .from = rows};
}

// |sum of (before - after) u|^2 over the walk's kernel, by its definition.
static double discrepancy(const rows_t *rows, const double *before, const double *after) {
    uint32_t n = rows->n, dim = rows->dim;
    double mean[128] = {0}, sum = 0;
    for (uint32_t t = 0; t < n; t++) {
        for (uint32_t i = 0; i < dim; i++) {
            mean[i] += (double)rows->k[t * dim + i] / n;
        }
    }
    for (uint32_t a = 0; a < n; a++) {
        for (uint32_t b = 0; b < n; b++) {
            double keys = 0, values = 0;
            for (uint32_t i = 0; i < dim; i++) {
                keys += ((double)rows->k[a * dim + i] - mean[i]) * ((double)rows->k[b * dim + i] - mean[i]);
                values += (double)rows->v[a * dim + i] * (double)rows->v[b * dim + i];
            }
            sum += (before[a] - after[a]) * (before[b] - after[b]) * exp(keys / sqrt(dim)) * (values + 0.025);
        }
    }
    return sum;
}

static void walk(const rows_t *rows, uint32_t target, float *weight, uint64_t seed, double *after) {
    uint32_t n = rows->n;
    bkv_source_t source = source_of(rows);
    bkv_scratch_t size = {0};
    bkv_walk_t scratch;
    bkv_walk_carve(&size, &bkv_lanes_ref, n, rows->dim, rows->dim, &scratch);
    bkv_scratch_t memory = {.base = oracle_exact(size.used)};
    bkv_walk_carve(&memory, &bkv_lanes_ref, n, rows->dim, rows->dim, &scratch);
    uint32_t *tokens = oracle_alloc(n * sizeof(uint32_t));
    for (uint32_t t = 0; t < n; t++) {
        tokens[t] = t;
    }
    bkv_random_t random = {seed};
    bkv_walk_reduce(&source, tokens, n, target, weight, &random, &scratch);
    memset(after, 0, n * sizeof(double));
    for (uint32_t i = 0; i < target; i++) {
        cr_assert(tokens[i] < n && (i == 0 || tokens[i] > tokens[i - 1]));
        after[tokens[i]] = (double)weight[tokens[i]];
    }
    free(memory.base);
}

Test(walk, keeps_exactly_so_many_and_all_the_weight) {
    oracle_random_t random = {3};
    for (uint32_t n = 1; n <= 300; n = n * 3 / 2 + 1) {
        rows_t rows = rows_make(n, 16, n);
        for (uint32_t target = 1; target <= n; target += 1 + n / 7) {
            float *weight = oracle_alloc(n * sizeof(float));
            double *after = oracle_alloc(n * sizeof(double)), total = 0, kept = 0;
            for (uint32_t t = 0; t < n; t++) {
                weight[t] = (float)(0.5 + oracle_uniform(&random) * 8);
                total += (double)weight[t];
            }
            walk(&rows, target, weight, 1, after);
            for (uint32_t t = 0; t < n; t++) {
                kept += after[t];
            }
            cr_assert(fabs(kept - total) < 1e-4 * total, "%u of %u: %g of %g", target, n, kept, total);
        }
    }
}

Test(walk, halving_is_exact_where_weights_are_equal) {
    rows_t rows = rows_make(256, 32, 1);
    float weight[256];
    double after[256];
    for (uint32_t t = 0; t < 256; t++) {
        weight[t] = 1;
    }
    walk(&rows, 64, weight, 5, after);
    for (uint32_t t = 0; t < 256; t++) {
        cr_assert(after[t] == 0 || after[t] == 4);
    }
}

// The walk's discrepancy over that of as many tokens at random, both averaged over seeds.
static double against_chance(uint32_t target) {
    rows_t rows = rows_make(192, 24, 4);
    double before[192], after[192], walked = 0, chance = 0;
    oracle_random_t random = {8};
    for (uint32_t seed = 0; seed < 10; seed++) {
        float weight[192];
        for (uint32_t t = 0; t < 192; t++) {
            before[t] = weight[t] = 1;
        }
        walk(&rows, target, weight, seed, after);
        walked += discrepancy(&rows, before, after);
        memset(after, 0, sizeof(after));
        for (uint32_t left = target; left > 0;) {
            uint32_t t = oracle_next(&random) % 192;
            left -= after[t] == 0 ? 1 : 0;
            after[t] = 192.0 / target;
        }
        chance += discrepancy(&rows, before, after);
    }
    return walked / chance;
}

Test(walk, one_halving_beats_chance) {
    double ratio = against_chance(96);
    cr_assert(ratio < 0.7, "%g", ratio);
}

Test(walk, several_halvings_and_a_partial_one_beat_chance) {
    double ratio = against_chance(36);
    cr_assert(ratio < 0.7, "%g", ratio);
}

Test(walk, weights_are_carried) {
    // Tokens of very unequal weight: a walk that ignored them would be far off.
    rows_t rows = rows_make(128, 24, 6);
    double before[128], after[128], walked = 0, chance = 0;
    oracle_random_t random = {2};
    for (uint32_t seed = 0; seed < 10; seed++) {
        float weight[128];
        double total = 0, half = 0;
        for (uint32_t t = 0; t < 128; t++) {
            before[t] = weight[t] = t % 4 == 0 ? 16 : 1;
            total += before[t];
        }
        walk(&rows, 64, weight, seed, after);
        walked += discrepancy(&rows, before, after);
        memset(after, 0, sizeof(after));
        for (uint32_t left = 64; left > 0;) {
            uint32_t t = oracle_next(&random) % 128;
            left -= after[t] == 0 ? 1 : 0;
            half += after[t] == 0 ? before[t] : 0;
            after[t] = before[t];
        }
        for (uint32_t t = 0; t < 128; t++) {
            after[t] *= total / half;
        }
        chance += discrepancy(&rows, before, after);
    }
    cr_assert(walked / chance < 0.7, "%g", walked / chance);
}

// All of a selection: returns the fates, weights through *weight.
static const uint8_t *select_from(const rows_t *rows, uint32_t sink, uint32_t m, uint64_t seed, float **weight) {
    bkv_source_t source = source_of(rows);
    bkv_scratch_t size = {0};
    bkv_selection_t selection;
    bkv_selection_carve(&size, &bkv_lanes_ref, rows->n, rows->dim, rows->dim, &selection);
    bkv_scratch_t memory = {.base = oracle_exact(size.used)};
    bkv_selection_carve(&memory, &bkv_lanes_ref, rows->n, rows->dim, rows->dim, &selection);
    for (uint32_t t = 0; t < rows->n; t++) {
        selection.source_weight[t] = 1;
    }
    bkv_random_t random = {seed};
    bkv_select(&source, sink, m, &random, &selection);
    *weight = selection.weight;
    return selection.fate;
}

Test(protect, planted_outliers_stay_as_they_are) {
    for (uint64_t seed = 0; seed < 5; seed++) {
        rows_t rows = rows_make(256, 32, seed);
        for (uint32_t t = 0; t < 256; t++) {
            rows.k[t * 32] += 8; // a common direction, which keys have
        }
        const uint32_t planted[] = {3, 77, 78, 200, 255};
        for (uint32_t i = 0; i < 5; i++) {
            rows.k[planted[i] * 32] = -8;
        }
        float *weight;
        const uint8_t *fate = select_from(&rows, 0, 40, seed, &weight);
        for (uint32_t i = 0; i < 5; i++) {
            cr_assert_eq(fate[planted[i]], BKV_PROTECTED);
            cr_assert_eq(weight[planted[i]], 1);
        }
    }
}

Test(protect, sinks_stay_but_leave_room) {
    rows_t rows = rows_make(256, 32, 1);
    float *weight;
    const uint8_t *fate = select_from(&rows, 32, 80, 1, &weight);
    for (uint32_t t = 0; t < 32; t++) {
        cr_assert_eq(fate[t], BKV_PROTECTED);
    }
    fate = select_from(&rows, 32, 20, 1, &weight);
    uint32_t kept = 0, walked = 0;
    for (uint32_t t = 0; t < 256; t++) {
        kept += fate[t] != BKV_DROPPED;
        walked += fate[t] == BKV_WALKED;
        cr_assert(t >= 10 || fate[t] == BKV_PROTECTED);
    }
    cr_assert_eq(kept, 20);
    cr_assert(walked >= 5);
}

Test(select, keeps_m_tokens_and_their_weight_at_any_size) {
    // Beyond 256 tokens there are several walks and a tree.
    static const uint32_t sizes[] = {1, 2, 3, 9, 255, 257, 513, 1500};
    for (uint32_t s = 0; s < 8; s++) {
        uint32_t n = sizes[s];
        rows_t rows = rows_make(n, 16, s);
        for (uint32_t m = 1; m <= n; m = m * 2 + 1) {
            float *weight;
            const uint8_t *fate = select_from(&rows, 4, m, s, &weight);
            uint32_t kept = 0;
            double sum = 0;
            for (uint32_t t = 0; t < n; t++) {
                kept += fate[t] != BKV_DROPPED;
                sum += fate[t] != BKV_DROPPED ? (double)weight[t] : 0;
            }
            cr_assert_eq(kept, m);
            cr_assert(m == 1 || fabs(sum - n) < 1e-3 * n, "%u of %u: %g", m, n, sum);
        }
    }
}

// What the record says, in source tokens: its weights must add up to them.
static double weight_sum(const void *record, uint32_t layer, uint32_t head) {
    oracle_section_t section;
    oracle_read(record, layer, head, &section);
    double sum = 0;
    for (uint32_t t = 0; t < section.m; t++) {
        sum += exp(section.logw[t]);
    }
    return sum;
}

Test(balance, stored_weights_add_up_to_the_tokens) {
    static const uint32_t rates[] = {6, 8, 16, 32};
    for (int r = 0; r < 4; r++) {
        bkv_shape_t shape = {2, 2, 256, 64, 64, BKV_BF16};
        bkv_codec_params_t params = {.codec = BKV_CODEC_BALANCE, .rate = rates[r], .sink = 8, .seed = 4};
        bkv_block_t block;
        oracle_block(&shape, 3, 1, &block);
        size_t length;
        void *record = oracle_compress(&block, &params, 0, &length);
        for (uint32_t i = 0; i < 4; i++) {
            double sum = weight_sum(record, i / 2, i % 2);
            cr_assert(fabs(sum - 256) < 256 * 0.01, "rate %u: %g", rates[r], sum);
        }
    }
}

Test(balance, kept_keys_are_the_blocks_own) {
    bkv_shape_t shape = {1, 2, 256, 64, 64, BKV_BF16};
    bkv_codec_params_t params = {.codec = BKV_CODEC_BALANCE, .rate = 8, .seed = 4};
    bkv_block_t block;
    oracle_block(&shape, 3, 1, &block);
    size_t length;
    void *record = oracle_compress(&block, &params, 0, &length);
    for (uint32_t head = 0; head < 2; head++) {
        oracle_section_t section;
        oracle_read(record, 0, head, &section);
        for (uint32_t t = 0; t < section.m; t++) {
            for (uint32_t i = 0; i < 64; i++) {
                double exact = oracle_element(&block, false, 0, head, section.index[t], i);
                cr_assert(fabs(section.k[t * 64 + i] - exact) < 0.6); // half of 1/7 of a range of about 7 sigma
            }
            if (section.logw[t] == 0) { // protected: the value is its own too
                for (uint32_t i = 0; i < 64; i++) {
                    cr_assert(fabs(section.v[t * 64 + i] - oracle_element(&block, true, 0, head, section.index[t], i)) < 0.6);
                }
            }
        }
    }
}

// Relative error of attention over the record against attention over the whole block, in float64, for random queries.
static double attention_error(const bkv_block_t *block, const void *record, uint64_t seed) {
    const bkv_shape_t *shape = &block->shape;
    oracle_section_t kept, whole;
    oracle_read(record, 0, 0, &kept);
    bkv_codec_params_t raw = {.codec = BKV_CODEC_RAW};
    size_t length;
    oracle_read(oracle_compress(block, &raw, 0, &length), 0, 0, &whole);
    oracle_random_t random = {seed};
    double error = 0, norm = 0, *a = oracle_alloc(1024 * sizeof(double)), *b = oracle_alloc(1024 * sizeof(double));
    float *q = oracle_alloc(1024 * sizeof(float));
    for (uint32_t n = 0; n < 50; n++) {
        for (uint32_t i = 0; i < shape->key_dim; i++) {
            q[i] = (float)oracle_gauss(&random);
        }
        oracle_attend(&kept, 1, q, 1 / sqrt(shape->key_dim), a);
        oracle_attend(&whole, 1, q, 1 / sqrt(shape->key_dim), b);
        for (uint32_t i = 0; i < shape->value_dim; i++) {
            error += (a[i] - b[i]) * (a[i] - b[i]);
            norm += b[i] * b[i];
        }
    }
    return sqrt(error / norm);
}

Test(balance, the_refit_and_the_weights_serve_attention) {
    // Clustered tokens at 16x: attention over the record must be near the whole's, and clearly nearer than over its
    // tokens taken without their weights.
    bkv_shape_t shape = {1, 1, 256, 64, 64, BKV_FP32};
    rows_t rows = rows_make(256, 64, 12);
    bkv_block_t block;
    bkv_block_from_payload(&shape, oracle_alloc((size_t)bkv_shape_bytes(&shape)), &block);
    memcpy((void *)(uintptr_t)block.keys, rows.k, 256 * 64 * sizeof(float));
    memcpy((void *)(uintptr_t)block.values, rows.v, 256 * 64 * sizeof(float));
    bkv_codec_params_t params = {.codec = BKV_CODEC_BALANCE, .rate = 16, .seed = 4};
    size_t length;
    uint8_t *record = oracle_compress(&block, &params, 0, &length);
    double with = attention_error(&block, record, 1);
    bkv_section_view_t view;
    bkv_record_section(record, 0, 0, &view);
    memset(record + (view.key_plane - record) + view.layout.weights, 0, 4); // every log weight 0
    double without = attention_error(&block, record, 1);
    cr_assert(with < 0.35, "%g", with);
    cr_assert(with < 0.7 * without, "%g against %g", with, without);
}

Test(balance, degenerate_blocks_work) {
    // Identical tokens, zero keys, one token, one outlier of enormous norm.
    for (int kind = 0; kind < 5; kind++) {
        bkv_shape_t shape = {1, 1, kind == 3 ? 1 : 256, 64, 24, BKV_FP32};
        bkv_codec_params_t params = {.codec = BKV_CODEC_BALANCE, .rate = kind == 3 ? 2 : 16, .sink = 32, .seed = 4};
        bkv_block_t block;
        oracle_block(&shape, 3, kind == 4 ? 10000 : 1, &block);
        for (uint32_t t = 0; t < shape.tokens; t++) {
            for (uint32_t i = 0; i < 64; i++) {
                if (kind == 0) {
                    oracle_put(&block, false, 0, 0, t, i, (float)i);
                    oracle_put(&block, true, 0, 0, t, i % 24, (float)i);
                } else if (kind == 1) {
                    oracle_put(&block, false, 0, 0, t, i, 0);
                } else if (kind == 2 && t == 100) {
                    oracle_put(&block, false, 0, 0, t, i, 65000);
                    oracle_put(&block, true, 0, 0, t, i % 24, -65000);
                } else if (kind == 4) {
                    float value = (float)fmin(65504, fmax(-65504, oracle_element(&block, false, 0, 0, t, i)));
                    oracle_put(&block, false, 0, 0, t, i, value);
                }
            }
        }
        bkv_error_t err = {0};
        bkv_status_t status = oracle_try(&block, &params, 0, &err);
        if (kind == 3) {
            cr_assert_eq(status, BKV_INVALID_ARGUMENT); // header and directory alone are more than half of one token
            continue;
        }
        size_t length;
        void *record = oracle_compress(&block, &params, 0, &length); // which also checks for finite scales
        cr_assert(fabs(weight_sum(record, 0, 0) - 256) < 3);
        cr_assert(kind == 2 || kind == 4 || attention_error(&block, record, 3) < 0.3);
    }
}

Test(balance, what_fits_whole_is_kept_whole) {
    bkv_shape_t shape = {1, 1, 256, 128, 64, BKV_BF16};
    bkv_codec_params_t params = {.codec = BKV_CODEC_BALANCE, .rate = 2, .seed = 4};
    bkv_block_t block;
    oracle_block(&shape, 3, 1, &block);
    size_t length;
    void *record = oracle_compress(&block, &params, 0, &length);
    oracle_section_t section;
    oracle_read(record, 0, 0, &section);
    cr_assert_eq(section.m, 256);
    cr_assert_eq(((bkv_record_header_t *)record)->flags, 0);
    cr_assert(attention_error(&block, record, 1) < 0.1);
}
