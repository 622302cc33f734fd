// test_attend.c - bkv_cuda_attend against attention in float64 over what bkv_section_read says of the same records.
//
//   test_attend [--small]
//
// --small: few and small cases, for compute-sanitizer. Without a device it says that it skips, and succeeds.
//
// Records are made up here, plane by plane: any mixture of bits, tokens, index and weights that bkv_record_check accepts, not
// only what some codec writes.
#include "support.h"

#include "cuda/gpu.h"
#include "record.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The most relative error of a call's whole output, and the most difference of a log-sum-exp.
#define ERROR_MAX 2e-3
#define LSE_MAX   2e-3 // of 1 or, where it is larger, of the exact one

// What a test case draws its records from. 0 stands for what taste_fill says.
typedef struct taste {
    const char *name;
    uint32_t key_dim, value_dim, heads, layers, layer;
    uint32_t query_heads, queries;
    bkv_dtype_t dtype, q_dtype, out_dtype;
    uint8_t bits[6]; // which key and value bits there are; ends with 0
    bool same_bits;  // of key and value
    uint32_t tokens_min, tokens_max;
    bool unweighted;
    double key_scale, value_scale; // of elements
    double outlier;                // added to the zeros of a few key channels
} taste_t;

static void or_else(uint32_t *field, uint32_t value) {
    *field = *field != 0 ? *field : value;
}

static taste_t taste_fill(const taste_t *from) {
    taste_t taste = *from;
    or_else(&taste.key_dim, 128);
    or_else(&taste.value_dim, 128);
    or_else(&taste.heads, 2);
    or_else(&taste.query_heads, 8);
    or_else(&taste.queries, 1);
    or_else(&taste.tokens_min, 1);
    or_else(&taste.tokens_max, 100);
    taste.layers = 2;
    taste.layer = 1;
    taste.dtype = taste.dtype ? taste.dtype : BKV_BF16;
    taste.q_dtype = taste.q_dtype ? taste.q_dtype : BKV_BF16;
    taste.out_dtype = taste.out_dtype ? taste.out_dtype : BKV_FP32;
    taste.key_scale = taste.key_scale > 0 ? taste.key_scale : 0.7;
    taste.value_scale = taste.value_scale > 0 ? taste.value_scale : 1;
    return taste;
}

typedef struct batch {
    uint32_t sequences, count;
    uint32_t *first;
    uint8_t **records; // on the host
    const void **on_device;
} batch_t;

static void *take(size_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 127) / 64 * 64);
    REQUIRE(memory, "memory: %zu bytes", bytes);
    memset(memory, 0, (bytes + 127) / 64 * 64);
    return memory;
}

static uint32_t draw_below(draw_t *draw, uint32_t below) {
    return (uint32_t)(draw_unit(draw) * below);
}

static void element_draw(draw_t *draw, bkv_dtype_t dtype, double scale, uint8_t *at) {
    float value = (float)(scale * draw_gauss(draw));
    uint16_t bits = dtype == BKV_BF16 ? bkv_float_to_bf16(value) : bkv_float_to_half(value);
    memcpy(at, dtype == BKV_FP32 ? (void *)&value : (void *)&bits, bkv_dtype_bytes(dtype));
}

// Codes, or native elements, and params of a plane. Quantised values are spread evenly over their range.
static void rows_draw(draw_t *draw, const taste_t *taste, bool value, uint8_t bits, uint32_t m, uint64_t groups,
                      uint8_t *params, uint8_t *codes, uint64_t bytes) {
    double scale = value ? taste->value_scale : taste->key_scale;
    if (bits == BKV_BITS_NATIVE) {
        uint64_t step = bkv_dtype_bytes(taste->dtype);
        for (uint64_t i = 0; i < bytes; i += step) {
            element_draw(draw, taste->dtype, scale, codes + i);
        }
        return;
    }
    for (uint64_t i = 0; i < bytes; i++) {
        codes[i] = (uint8_t)draw_below(draw, 256);
    }
    uint64_t count = value ? m * groups : groups * taste->key_dim;
    for (uint64_t i = 0; i < count; i++) {
        double width = scale * (0.5 + draw_unit(draw)) * 3.5 / ((1 << bits) - 1);
        double zero = scale * (0.5 * draw_gauss(draw) - 1.75) + (!value && i % 37 == 5 ? taste->outlier : 0);
        uint16_t pair[2] = {bkv_float_to_half((float)width), bkv_float_to_half((float)zero)};
        memcpy(params + 4 * i, pair, 4);
    }
}

static void index_draw(draw_t *draw, const bkv_section_view_t *view, uint8_t *plane) {
    uint32_t left = view->tokens, n = 0;
    for (uint32_t t = 0; t < view->source_tokens && view->index_kind != BKV_INDEX_ALL; t++) {
        if (draw_below(draw, view->source_tokens - t) >= left) {
            continue;
        }
        left--;
        if (view->index_kind == BKV_INDEX_LIST) {
            memcpy(plane + 4ull * n++, &t, 4);
        } else {
            plane[t / 8] = (uint8_t)(plane[t / 8] | 1u << t % 8);
        }
    }
}

static void section_draw(draw_t *draw, const taste_t *taste, uint8_t *record, uint32_t layer, uint32_t head) {
    bkv_section_view_t view;
    bkv_record_section(record, layer, head, &view);
    uint8_t *keys = (uint8_t *)(uintptr_t)view.key_plane, *values = (uint8_t *)(uintptr_t)view.value_plane;
    const bkv_plane_layout_t *at = &view.layout;
    index_draw(draw, &view, keys);
    if (view.has_weights) {
        uint16_t range[2] = {bkv_float_to_half((float)(draw_unit(draw) - 0.5)), bkv_float_to_half((float)draw_unit(draw) / 80)};
        memcpy(keys + at->weights, range, 4);
        for (uint32_t t = 0; t < view.tokens; t++) {
            keys[at->weights + 4 + t] = (uint8_t)draw_below(draw, 256);
        }
    }
    rows_draw(draw, taste, false, view.key_bits, view.tokens, at->key_groups, keys + at->key_params, keys + at->key_codes,
              (uint64_t)view.tokens * at->key_row);
    rows_draw(draw, taste, true, view.value_bits, view.tokens, at->value_groups, values, values + at->value_codes,
              (uint64_t)view.tokens * at->value_row);
}

static uint8_t bits_draw(draw_t *draw, const taste_t *taste) {
    uint32_t count = 0;
    while (count < 6 && taste->bits[count] != 0) {
        count++;
    }
    return taste->bits[draw_below(draw, count)];
}

static uint8_t *record_draw(draw_t *draw, const taste_t *taste) {
    uint32_t most = taste->tokens_min + draw_below(draw, taste->tokens_max - taste->tokens_min + 1);
    uint32_t source = most + (draw_below(draw, 3) == 0 ? 0 : draw_below(draw, 40 * most));
    bkv_shape_t shape = {taste->layers, taste->heads, source, taste->key_dim, taste->value_dim, taste->dtype};
    bkv_record_id_t id = {.tenant = 3};
    size_t preamble = (size_t)bkv_record_preamble(shape.layers, shape.heads), room = preamble;
    uint8_t *record = take(preamble);
    bkv_record_init(record, &shape, &id, BKV_CODEC_BALANCE,
                    (uint8_t)(BKV_RECORD_FOLD | (!taste->unweighted ? BKV_RECORD_WEIGHTS : 0)));
    for (uint32_t i = 0; i < shape.layers * shape.heads; i++) {
        bkv_section_t *section = &bkv_record_directory(record)[i];
        section->tokens = most - (most > 4 ? draw_below(draw, most / 4) : 0);
        section->key_bits = bits_draw(draw, taste);
        section->value_bits = taste->same_bits ? section->key_bits : bits_draw(draw, taste);
        section->index_kind = (uint8_t)bkv_index_choose(source, section->tokens);
    }
    room = (size_t)bkv_record_place(record);
    uint8_t *whole = take(room);
    memcpy(whole, record, preamble);
    free(record);
    for (uint32_t i = 0; i < shape.layers * shape.heads; i++) {
        section_draw(draw, taste, whole, i / shape.heads, i % shape.heads);
    }
    bkv_error_t err;
    REQUIRE(bkv_record_check(whole, room, &err) == BKV_OK, "a made-up record: %s", err.message);
    return whole;
}

// `counts` [sequences] records each, in device memory of exactly their size.
static void batch_draw(draw_t *draw, const taste_t *taste, const uint32_t *counts, uint32_t sequences, batch_t *batch) {
    *batch = (batch_t){.sequences = sequences, .first = take((sequences + 1) * sizeof(uint32_t))};
    for (uint32_t b = 0; b < sequences; b++) {
        batch->first[b] = batch->count;
        batch->count += counts[b];
    }
    batch->first[sequences] = batch->count;
    batch->records = take(batch->count * sizeof(void *));
    batch->on_device = take(batch->count * sizeof(void *));
    for (uint32_t i = 0; i < batch->count; i++) {
        batch->records[i] = record_draw(draw, taste);
        size_t length = (size_t)((const bkv_record_header_t *)batch->records[i])->length;
        void *there = device_take(length);
        device_put(there, batch->records[i], length);
        batch->on_device[i] = there;
    }
}

static void batch_free(batch_t *batch) {
    for (uint32_t i = 0; i < batch->count; i++) {
        bkv_gpu_free((void *)(uintptr_t)batch->on_device[i], NULL);
        free(batch->records[i]);
    }
    free(batch->records);
    free(batch->on_device);
    free(batch->first);
}

// Attention of one query over one sequence in float64.
static double attend_exact(const batch_t *batch, uint32_t sequence, const taste_t *taste, uint32_t head, const float *q,
                           double *out) {
    double top = -INFINITY, sum = 0;
    memset(out, 0, taste->value_dim * sizeof(double));
    for (uint32_t r = batch->first[sequence]; r < batch->first[sequence + 1]; r++) {
        bkv_section_view_t view;
        bkv_record_section(batch->records[r], taste->layer, head, &view);
        float *k = take((size_t)view.tokens * view.key_dim * 4), *v = take((size_t)view.tokens * view.value_dim * 4);
        float *logw = take(view.tokens * 4ull);
        bkv_section_read(&view, k, v, logw, NULL);
        for (uint32_t t = 0; t < view.tokens; t++) {
            double logit = 0;
            for (uint32_t i = 0; i < view.key_dim; i++) {
                logit += (double)q[i] * (double)k[(size_t)t * view.key_dim + i];
            }
            logit = logit / sqrt(view.key_dim) + (double)logw[t];
            double shrink = logit > top ? exp(top - logit) : 1;
            top = logit > top ? logit : top;
            double p = exp(logit - top);
            sum = sum * shrink + p;
            for (uint32_t i = 0; i < view.value_dim; i++) {
                out[i] = out[i] * shrink + p * (double)v[(size_t)t * view.value_dim + i];
            }
        }
        free(k);
        free(v);
        free(logw);
    }
    for (uint32_t i = 0; i < taste->value_dim && sum > 0; i++) {
        out[i] /= sum;
    }
    return sum > 0 ? top + log(sum) : -INFINITY;
}

static float element_get(bkv_dtype_t dtype, const uint8_t *base, size_t i) {
    uint16_t bits;
    float value;
    if (dtype == BKV_FP32) {
        memcpy(&value, base + 4 * i, 4);
        return value;
    }
    memcpy(&bits, base + 2 * i, 2);
    return dtype == BKV_BF16 ? bkv_bf16_to_float(bits) : bkv_half_to_float(bits);
}

// One call: queries, results, workspace, all with room for nothing else.
typedef struct call {
    bkv_cuda_attend_args_t args;
    size_t rows, out_bytes, workspace_bytes;
    uint8_t *q, *out; // on the host
    float *lse;
    void *workspace;
} call_t;

static void call_make(const bkv_cuda_t *cuda, draw_t *draw, const taste_t *taste, const batch_t *batch, call_t *call) {
    size_t rows = (size_t)batch->sequences * taste->query_heads * taste->queries;
    size_t q_bytes = rows * taste->key_dim * bkv_dtype_bytes(taste->q_dtype);
    *call = (call_t){.rows = rows, .out_bytes = rows * taste->value_dim * bkv_dtype_bytes(taste->out_dtype)};
    call->q = take(q_bytes);
    call->out = take(call->out_bytes);
    call->lse = take(rows * sizeof(float));
    for (size_t i = 0; i < rows * taste->key_dim; i++) {
        element_draw(draw, taste->q_dtype, 1.3, call->q + i * bkv_dtype_bytes(taste->q_dtype));
    }
    void *q = device_take(q_bytes), *records = device_take((batch->count + 1) * sizeof(void *));
    void *first = device_take((batch->sequences + 1) * sizeof(uint32_t));
    device_put(q, call->q, q_bytes);
    device_put(records, batch->on_device, batch->count * sizeof(void *));
    device_put(first, batch->first, (batch->sequences + 1) * sizeof(uint32_t));
    call->args = (bkv_cuda_attend_args_t){.q = q,
                                          .records = records,
                                          .first = first,
                                          .out = device_take(call->out_bytes),
                                          .lse = device_take(rows * sizeof(float)),
                                          .q_dtype = taste->q_dtype,
                                          .out_dtype = taste->out_dtype,
                                          .dtype = taste->dtype,
                                          .batch = batch->sequences,
                                          .max_records = batch->count,
                                          .layer = taste->layer,
                                          .heads = taste->heads,
                                          .query_heads = taste->query_heads,
                                          .queries = taste->queries,
                                          .key_dim = taste->key_dim,
                                          .value_dim = taste->value_dim};
    call->workspace_bytes = bkv_cuda_attend_workspace(cuda, &call->args);
    call->workspace = device_take(call->workspace_bytes);
}

// Runs it over memory that is filled with `poison` before.
static void call_run(const bkv_cuda_t *cuda, call_t *call, int poison) {
    uint8_t *filled = take(call->workspace_bytes > call->out_bytes ? call->workspace_bytes : call->out_bytes);
    memset(filled, poison, call->workspace_bytes > call->out_bytes ? call->workspace_bytes : call->out_bytes);
    device_put(call->workspace, filled, call->workspace_bytes);
    device_put(call->args.out, filled, call->out_bytes);
    device_put(call->args.lse, filled, call->rows * sizeof(float));
    bkv_error_t err;
    bkv_status_t status = bkv_cuda_attend(cuda, &call->args, call->workspace, NULL, &err);
    REQUIRE(status == BKV_OK, "attention: %s", err.message);
    device_get(call->out, call->args.out, call->out_bytes);
    device_get(call->lse, call->args.lse, call->rows * sizeof(float));
    free(filled);
}

static void call_free(call_t *call) {
    void *there[] = {(void *)(uintptr_t)call->args.q,
                     (void *)(uintptr_t)call->args.records,
                     (void *)(uintptr_t)call->args.first,
                     call->args.out,
                     call->args.lse,
                     call->workspace};
    for (size_t i = 0; i < sizeof(there) / sizeof(there[0]); i++) {
        bkv_gpu_free(there[i], NULL);
    }
    free(call->q);
    free(call->out);
    free(call->lse);
}

// What float32 and the output's type round away on top.
static double out_tolerance(bkv_dtype_t dtype) {
    return dtype == BKV_BF16 ? ERROR_MAX + 4e-3 : ERROR_MAX;
}

static void call_check(const call_t *call, const taste_t *taste, const batch_t *batch) {
    double difference = 0, size = 0, lse_worst = 0;
    double *exact = take(taste->value_dim * sizeof(double));
    float *q = take(taste->key_dim * sizeof(float));
    for (size_t row = 0; row < call->rows; row++) {
        uint32_t sequence = (uint32_t)(row / taste->queries / taste->query_heads);
        uint32_t query_head = (uint32_t)(row / taste->queries % taste->query_heads);
        for (uint32_t i = 0; i < taste->key_dim; i++) {
            q[i] = element_get(taste->q_dtype, call->q, row * taste->key_dim + i);
        }
        double lse = attend_exact(batch, sequence, taste, query_head / (taste->query_heads / taste->heads), q, exact);
        if (lse == -(double)INFINITY) {
            check_that(call->lse[row] == -INFINITY, "row %zu: no records, but lse %g", row, (double)call->lse[row]);
        } else {
            double off = fabs((double)call->lse[row] - lse) / fmax(1, fabs(lse));
            lse_worst = off <= lse_worst ? lse_worst : off; // NaN stays
        }
        for (uint32_t i = 0; i < taste->value_dim; i++) {
            double got = (double)element_get(taste->out_dtype, call->out, row * taste->value_dim + i);
            difference += (got - exact[i]) * (got - exact[i]);
            size += exact[i] * exact[i];
        }
    }
    double error = size > 0 ? sqrt(difference / size) : sqrt(difference);
    check_that(error <= out_tolerance(taste->out_dtype), "relative error %.3g", error);
    check_that(lse_worst <= LSE_MAX, "log-sum-exp off by %.3g", lse_worst);
    printf("  %-50s error %.2e  lse %.2e\n", taste->name, error, lse_worst);
    free(exact);
    free(q);
}

static void check_case(const bkv_cuda_t *cuda, const taste_t *from, const uint32_t *counts, uint32_t sequences, uint64_t seed) {
    draw_t draw = {seed};
    taste_t filled = taste_fill(from), *taste = &filled;
    batch_t batch;
    call_t call;
    check_begin(taste->name);
    batch_draw(&draw, taste, counts, sequences, &batch);
    call_make(cuda, &draw, taste, &batch, &call);
    call_run(cuda, &call, 0xff);
    call_check(&call, taste, &batch);
    uint8_t *before = take(call.out_bytes);
    memcpy(before, call.out, call.out_bytes);
    call_run(cuda, &call, 0);
    check_that(memcmp(before, call.out, call.out_bytes) == 0, "another run gives other bytes");
    free(before);
    call_free(&call);
    batch_free(&batch);
}

// A record of another shape makes its own sequence NaN and no other.
static void check_broken(const bkv_cuda_t *cuda, const taste_t *from) {
    taste_t filled = taste_fill(from), *taste = &filled;
    static const uint32_t counts[] = {2, 3, 2};
    draw_t draw = {77};
    batch_t batch;
    call_t call;
    check_begin("a record of another shape");
    batch_draw(&draw, taste, counts, 3, &batch);
    call_make(cuda, &draw, taste, &batch, &call);
    taste_t other = *taste;
    other.value_dim += 8;
    uint8_t *record = record_draw(&draw, &other);
    size_t length = (size_t)((const bkv_record_header_t *)record)->length;
    void *there = device_take(length);
    device_put(there, record, length);
    const void *own = batch.on_device[3];
    batch.on_device[3] = there;
    device_put((void *)(uintptr_t)call.args.records, batch.on_device, batch.count * sizeof(void *));
    call_run(cuda, &call, 0);
    size_t rows = call.rows / 3;
    for (size_t row = 0; row < call.rows; row++) {
        float out = element_get(taste->out_dtype, call.out, row * taste->value_dim);
        bool broken = row / rows == 1;
        check_that(isnan(call.lse[row]) == broken && isnan(out) == broken, "row %zu: lse %g, out %g", row,
                   (double)call.lse[row], (double)out);
    }
    batch.on_device[3] = own;
    bkv_gpu_free(there, NULL);
    free(record);
    call_free(&call);
    batch_free(&batch);
}

static void check_arguments(const bkv_cuda_t *cuda) {
    check_begin("arguments that cannot be");
    bkv_cuda_attend_args_t good = {.q_dtype = BKV_BF16,
                                   .out_dtype = BKV_BF16,
                                   .dtype = BKV_BF16,
                                   .batch = 1,
                                   .max_records = 1,
                                   .heads = 2,
                                   .query_heads = 4,
                                   .queries = 1,
                                   .key_dim = 128,
                                   .value_dim = 128};
    check_that(bkv_cuda_attend_workspace(cuda, &good) > 0, "good arguments are refused");
    bkv_cuda_attend_args_t bad[8];
    for (size_t i = 0; i < 8; i++) {
        bad[i] = good;
    }
    bad[0].query_heads = 3;
    bad[1].key_dim = 100;
    bad[2].q_dtype = (bkv_dtype_t)9;
    bad[3].batch = 0;
    bad[4].queries = 0;
    bad[5].layer = BKV_MAX_LAYERS;
    bad[6].scale = NAN;
    bad[7].queries = 1u << 20;
    for (size_t i = 0; i < 8; i++) {
        bkv_error_t err = {0};
        check_that(bkv_cuda_attend_workspace(cuda, &bad[i]) == 0, "workspace for bad arguments %zu", i);
        check_that(bkv_cuda_attend(cuda, &bad[i], NULL, NULL, &err) == BKV_INVALID_ARGUMENT, "bad arguments %zu are accepted",
                   i);
    }
}

#define NATIVE BKV_BITS_NATIVE
static const taste_t tastes[] = {
    {.name = "3 bits", .bits = {3}},
    {.name = "3 bits, 70 tokens", .bits = {3}, .tokens_min = 70, .tokens_max = 70},
    {.name = "2 bits", .bits = {2}},
    {.name = "4 bits", .bits = {4}},
    {.name = "8 bits", .bits = {8}},
    {.name = "bfloat16", .bits = {NATIVE}},
    {.name = "float16", .bits = {NATIVE}, .dtype = BKV_FP16, .q_dtype = BKV_FP16},
    {.name = "bfloat16 with float32 queries", .bits = {NATIVE}, .q_dtype = BKV_FP32},
    {.name = "all bits mixed, no weights", .bits = {2, 3, 4, 8, NATIVE}, .unweighted = true, .tokens_max = 300},
    {.name = "all bits mixed, 8 queries a head", .bits = {2, 3, 4, 8, NATIVE}, .query_heads = 16, .tokens_max = 700},
    {.name = "3 queries a head", .bits = {3, 4}, .query_heads = 6},
    {.name = "1 query a head, bf16 out", .bits = {3, 4}, .query_heads = 2, .out_dtype = BKV_BF16},
    {.name = "16 queries a head", .bits = {3}, .query_heads = 32},
    {.name = "5 tokens ask, 4 heads each", .bits = {3, NATIVE}, .queries = 5},
    {.name = "tiny values, large keys", .bits = {3, 8, NATIVE}, .value_scale = 3e-5, .key_scale = 3},
    {.name = "huge values", .bits = {2, 3, 4}, .value_scale = 7e3},
    {.name = "outlying key channels", .bits = {3, 4}, .outlier = 20},
    {.name = "64", .key_dim = 64, .value_dim = 64, .bits = {2, 3, 4, 8, NATIVE}},
    {.name = "64, 8 queries a head", .key_dim = 64, .value_dim = 64, .bits = {2, 3, 4, 8, NATIVE}, .query_heads = 16},
    {.name = "96", .key_dim = 96, .value_dim = 96, .bits = {2, 3, 4, 8, NATIVE}},
    {.name = "192 and 128", .key_dim = 192, .value_dim = 128, .bits = {2, 3, 4, 8, NATIVE}},
    {.name = "192 and 128, 8 queries a head", .key_dim = 192, .value_dim = 128, .bits = {3, 4, NATIVE}, .query_heads = 16},
    {.name = "256", .key_dim = 256, .value_dim = 256, .bits = {2, 3, 4, 8, NATIVE}, .query_heads = 12},
    {.name = "80 and 40", .key_dim = 80, .value_dim = 40, .bits = {2, 3, 4, 8, NATIVE}},
    {.name = "float32 sources", .bits = {3, 8, NATIVE}, .dtype = BKV_FP32, .q_dtype = BKV_FP32},
    {.name = "576 and 512", .key_dim = 576, .value_dim = 512, .bits = {3, 4, NATIVE}, .heads = 1, .query_heads = 16},
};

int main(int argc, char **argv) {
    bool small = argc > 1 && strcmp(argv[1], "--small") == 0;
    bkv_cuda_t *cuda;
    bkv_error_t err;
    if (bkv_cuda_open(0, &cuda, &err) != BKV_OK) {
        printf("skipped: %s\n", err.message);
        return 0;
    }
    static const uint32_t few[] = {2, 0, 1}, many[] = {3, 0, 1, 40, 100};
    for (size_t i = 0; i < sizeof(tastes) / sizeof(tastes[0]); i++) {
        check_case(cuda, &tastes[i], small ? few : many, small ? 3 : 5, 100 + i);
    }
    if (!small) {
        taste_t long_ones = tastes[8];
        long_ones.name = "few long records";
        long_ones.tokens_min = 3000;
        long_ones.tokens_max = 9000;
        static const uint32_t one[] = {1, 2};
        check_case(cuda, &long_ones, one, 2, 9);
        taste_t crowd = tastes[0];
        crowd.name = "many short sequences";
        uint32_t counts[400];
        for (uint32_t b = 0; b < 400; b++) {
            counts[b] = b % 7 == 3 ? 0 : b % 4;
        }
        check_case(cuda, &crowd, counts, 400, 10);
    }
    check_broken(cuda, &tastes[0]);
    check_arguments(cuda);
    bkv_cuda_close(cuda);
    return check_end();
}
