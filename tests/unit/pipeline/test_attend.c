// test_attend.c - attention next to the data equals attention computed here in float64 over the tokens as put.
#include "fixture.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TOKENS      64
#define KEY_DIM     32
#define VALUE_DIM   16
#define KV_HEADS    2
#define QUERY_HEADS 4
#define QUERIES     3
#define MAX_LAYERS  2

typedef struct query {
    float q[MAX_LAYERS * QUERY_HEADS * QUERIES * KEY_DIM];
    float out[MAX_LAYERS * QUERY_HEADS * QUERIES * VALUE_DIM];
    float lse[MAX_LAYERS * QUERY_HEADS * QUERIES];
    bkv_attend_args_t args;
} query_t;

static query_t *make_query(uint32_t first_layer, uint32_t layers) {
    query_t *query = calloc(1, sizeof(*query));
    for (size_t i = 0; i < sizeof(query->q) / sizeof(query->q[0]); i++) {
        query->q[i] = (float)sin(0.7 * (double)i + 0.1);
    }
    query->args = (bkv_attend_args_t){.first_layer = first_layer,
                                      .layers = layers,
                                      .query_heads = QUERY_HEADS,
                                      .queries = QUERIES,
                                      .q = query->q,
                                      .out = query->out,
                                      .lse = query->lse};
    return query;
}

static bkv_status_t attend(fixture_t *fixture, const bkv_key_t *keys, uint32_t count, const bkv_attend_args_t *args,
                           outcome_t *outcome) {
    outcome_init(outcome);
    bkv_status_t status = bkv_attend_start(fixture->pipeline, &fixture->model.id, keys, count, args, fixture_now(),
                                           outcome_attend_done, outcome, &outcome->error);
    if (status == BKV_OK) {
        outcome_wait(outcome);
        status = outcome->error.status;
    }
    return status;
}

// Row (layer, query head, query) over payloads, by the definition of softmax attention.
static void expect_row(float *const *payloads, uint32_t count, uint32_t layer, uint32_t kv_head, const float *q, double *out,
                       double *lse) {
    const size_t keys_of_layer = KV_HEADS * TOKENS * KEY_DIM, values_of_layer = KV_HEADS * TOKENS * VALUE_DIM;
    double sum = 0;
    memset(out, 0, VALUE_DIM * sizeof(*out));
    for (uint32_t p = 0; p < count; p++) {
        const float *k = payloads[p] + layer * (keys_of_layer + values_of_layer) + kv_head * TOKENS * KEY_DIM;
        const float *v = payloads[p] + layer * (keys_of_layer + values_of_layer) + keys_of_layer + kv_head * TOKENS * VALUE_DIM;
        for (size_t t = 0; t < TOKENS; t++) {
            double dot = 0;
            for (size_t i = 0; i < KEY_DIM; i++) {
                dot += (double)q[i] * (double)k[t * KEY_DIM + i];
            }
            double weight = exp(dot / sqrt(KEY_DIM));
            sum += weight;
            for (size_t i = 0; i < VALUE_DIM; i++) {
                out[i] += weight * (double)v[t * VALUE_DIM + i];
            }
        }
    }
    for (size_t i = 0; i < VALUE_DIM; i++) {
        out[i] /= sum;
    }
    *lse = log(sum);
}

static void assert_matches(const query_t *query, float *const *payloads, uint32_t count, uint32_t first_layer,
                           uint32_t layers) {
    for (uint32_t row = 0; row < layers * QUERY_HEADS * QUERIES; row++) {
        uint32_t layer = row / (QUERY_HEADS * QUERIES), head = row / QUERIES % QUERY_HEADS;
        double out[VALUE_DIM], lse;
        expect_row(payloads, count, first_layer + layer, head / (QUERY_HEADS / KV_HEADS), query->q + row * KEY_DIM, out, &lse);
        cr_assert_float_eq(query->lse[row], lse, 1e-4);
        for (size_t i = 0; i < VALUE_DIM; i++) {
            cr_assert_float_eq(query->out[row * VALUE_DIM + i], out[i], 1e-4);
        }
    }
}

Test(pipeline_attend, equals_float64_over_the_tokens_as_put) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    bkv_key_t keys[2] = {fixture_key(1), fixture_key(2)};
    float *payloads[2];
    for (uint32_t i = 0; i < 2; i++) {
        fixture_put_block(&fixture, i + 1, TOKENS * i, TOKENS, BKV_CODEC_RAW);
        payloads[i] = fixture_payload(&fixture, TOKENS, i + 1);
    }
    outcome_t outcome;
    query_t *all = make_query(0, 0), *second_layer = make_query(1, 1);
    cr_assert_eq(attend(&fixture, keys, 2, &all->args, &outcome), BKV_OK, "%s", outcome.error.message);
    assert_matches(all, payloads, 2, 0, 2);
    cr_assert_eq(attend(&fixture, keys, 2, &second_layer->args, &outcome), BKV_OK, "%s", outcome.error.message);
    assert_matches(second_layer, payloads, 2, 1, 1);
    cr_assert_eq(fixture_metrics(&fixture).attends_total, 2);
    free(all);
    free(second_layer);
    free(payloads[0]);
    free(payloads[1]);
    fixture_close(&fixture);
}

Test(pipeline_attend, bad_requests_are_named) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 0, TOKENS, BKV_CODEC_RAW);
    bkv_key_t keys[2] = {fixture_key(1), fixture_key(9)};
    query_t *query = make_query(0, 0);
    const bkv_attend_args_t good = query->args;
    const struct {
        size_t offset;
        uint32_t value;
        const char *message;
    } cases[] = {
        {offsetof(bkv_attend_args_t, first_layer), 2, "first_layer: 2"},
        {offsetof(bkv_attend_args_t, layers), 3, "layers: 3"},
        {offsetof(bkv_attend_args_t, query_heads), 0, "query_heads: 0"},
        {offsetof(bkv_attend_args_t, query_heads), 3, "query_heads: 3 is not a multiple of the 2"},
        {offsetof(bkv_attend_args_t, query_heads), 1u << 31, "query_heads: 2147483648"},
        {offsetof(bkv_attend_args_t, queries), 0, "queries: 0"},
        {offsetof(bkv_attend_args_t, queries), UINT32_MAX, "queries:"},
        {offsetof(bkv_attend_args_t, scale), 0x7fc00000u, "scale:"}, // NaN
    };
    outcome_t outcome;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        bkv_attend_args_t args = good;
        memcpy((char *)&args + cases[i].offset, &cases[i].value, sizeof(cases[i].value));
        cr_assert_eq(attend(&fixture, keys, 1, &args, &outcome), BKV_INVALID_ARGUMENT, "%s", cases[i].message);
        cr_assert_eq(strncmp(outcome.error.message, cases[i].message, strlen(cases[i].message)), 0, "%s",
                     outcome.error.message);
    }
    cr_assert_eq(attend(&fixture, keys, 2, &good, &outcome), BKV_NOT_FOUND);
    cr_assert_eq(strncmp(outcome.error.message, "keys[1]: ", 9), 0);
    cr_assert_eq(attend(&fixture, keys, 0, &good, &outcome), BKV_INVALID_ARGUMENT);
    query->q[17] = INFINITY;
    cr_assert_eq(attend(&fixture, keys, 1, &good, &outcome), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(outcome.error.message, "q: number 17", 12), 0);
    cr_assert_eq(fixture_metrics(&fixture).attends_total, 0);
    free(query);
    fixture_close(&fixture);
}
