// test_compress.c - bkv_cuda_compress against the reference backend and against attention in float64.
//
//   test_compress [--small] [trace.safetensors]
//
// --small: few and small shapes, for compute-sanitizer. Without a device it says that it skips, and succeeds.
#include "support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const layout_names[LAYOUT_COUNT] = {"payload", "heads last", "tokens", "latent"};

static bkv_codec_params_t balance(uint32_t rate, uint64_t seed) {
    return (bkv_codec_params_t){.codec = BKV_CODEC_BALANCE, .rate = rate, .sink = 20, .seed = seed};
}

// Where every token is kept, all backends write the same bytes.
static void check_same_bytes(const bkv_cuda_t *cuda, const bkv_shape_t *shape, layout_t layout, bkv_codec_params_t params) {
    char name[96];
    snprintf(name, sizeof(name), "%s/%u as ref: %ux%ux%u, %u+%u, %s, %s", bkv_codec_name(params.codec), params.rate,
             shape->layers, shape->heads, shape->tokens, shape->key_dim, shape->value_dim, bkv_dtype_name(shape->dtype),
             layout_names[layout]);
    check_begin(name);
    blocks_t blocks;
    blocks_make(shape, 3, layout, 5, &blocks);
    size_t stride, length;
    uint64_t status[3];
    uint8_t *records = compress_device(cuda, &blocks, &params, &stride, &length, status);
    for (uint32_t i = 0; i < 3; i++) {
        size_t ref_length = 0;
        bkv_error_t err = {0};
        uint8_t *ref = compress_host("ref", &blocks, i, &params, &ref_length, &err);
        REQUIRE(ref, "ref: %s", err.message);
        const uint8_t *record = records + i * stride;
        if (ref[7] & BKV_RECORD_WEIGHTS) { // this rate drops tokens: check_balance judges that
            free(ref);
            continue;
        }
        size_t at = 0;
        while (at < length && at < ref_length && record[at] == ref[at]) {
            at++;
        }
        check_that(length == ref_length, "record %u has %zu bytes, ref's %zu", i, length, ref_length);
        check_that(at == ref_length, "record %u differs at byte %zu of %zu", i, at, ref_length);
        check_that(record[length] == 0xa5, "record %u: a byte after its end was written", i);
        check_that(bkv_cuda_compress_check(shape, status[i], &err) == BKV_OK, "record %u: %s", i, err.message);
        free(ref);
    }
    free(records);
    blocks_free(&blocks);
}

static double weights_sum(const void *record, uint32_t layer, uint32_t head, uint32_t *kept, uint8_t *marks) {
    bkv_section_view_t view;
    bkv_record_section(record, layer, head, &view);
    float *logw = malloc(view.tokens * sizeof(float));
    uint32_t *index = malloc(view.tokens * sizeof(uint32_t));
    double sum = 0;
    bkv_section_read(&view, NULL, NULL, logw, index);
    for (uint32_t i = 0; i < view.tokens; i++) {
        sum += exp((double)logw[i]);
        marks[index[i]] |= (uint8_t)(1 + (logw[i] < 1e-3f)); // bit 1: weight 1, as what is protected has
    }
    *kept = view.tokens;
    free(logw);
    free(index);
    return sum;
}

// A record of our own choice of tokens: valid, of the right weight, with what ref protects, and attention as near.
static void check_section(const blocks_t *blocks, uint32_t i, const uint8_t *record, const uint8_t *ref, uint32_t layer,
                          uint32_t head, const float *q, uint32_t queries, double errors[3]) {
    uint32_t n = blocks->at_host[i].shape.tokens, kept, ref_kept, common = 0, ref_protected = 0;
    uint8_t *marks = calloc(n, 1), *ref_marks = calloc(n, 1);
    double sum = weights_sum(record, layer, head, &kept, marks);
    weights_sum(ref, layer, head, &ref_kept, ref_marks);
    for (uint32_t t = 0; t < n; t++) {
        ref_protected += (ref_marks[t] & 2) != 0;
        common += (ref_marks[t] & 2) != 0 && marks[t] != 0;
    }
    check_that(kept == ref_kept, "block %u (%u, %u): %u tokens kept, ref keeps %u", i, layer, head, kept, ref_kept);
    check_that(fabs(sum / n - 1) < 0.02, "block %u (%u, %u): weights sum to %.2f of %u", i, layer, head, sum, n);
    check_that(common * 10 >= ref_protected * 9, "block %u (%u, %u): %u of ref's %u protected tokens kept", i, layer, head,
               common, ref_protected);
    attention_error(&blocks->at_host[i], record, layer, head, q, queries, &errors[0], &errors[2]);
    double exact = 0;
    attention_error(&blocks->at_host[i], ref, layer, head, q, queries, &errors[1], &exact);
    free(marks);
    free(ref_marks);
}

static void check_records(const bkv_cuda_t *cuda, const blocks_t *blocks, bkv_codec_params_t params, const float *q,
                          uint32_t queries, double tolerance) {
    const bkv_shape_t *shape = &blocks->at_host[0].shape;
    size_t stride, length, ref_length;
    uint64_t *status = calloc(blocks->count, sizeof(uint64_t));
    uint8_t *records = compress_device(cuda, blocks, &params, &stride, &length, status);
    double errors[3] = {0};
    for (uint32_t i = 0; i < blocks->count; i++) {
        bkv_error_t err = {0};
        uint8_t *ref = compress_host("ref", blocks, i, &params, &ref_length, &err);
        const uint8_t *record = records + i * stride;
        REQUIRE(ref, "ref: %s", err.message);
        check_that(length == ref_length, "%zu bytes, ref has %zu", length, ref_length);
        bool valid = bkv_record_check(record, length, &err) == BKV_OK;
        check_that(valid, "record %u: %s", i, err.message);
        check_that(memcmp(record, ref, 128 + 16 * (size_t)shape->layers * shape->heads) == 0, "record %u: another preamble", i);
        check_that(record[length] == 0xa5, "record %u: a byte after its end was written", i);
        check_that(bkv_cuda_compress_check(shape, status[i], &err) == BKV_OK, "record %u: %s", i, err.message);
        for (uint32_t s = 0; valid && s < shape->layers * shape->heads; s++) {
            check_section(blocks, i, record, ref, s / shape->heads, s % shape->heads, q, queries, errors);
        }
        free(ref);
    }
    double error = sqrt(errors[0] / errors[2]), ref_error = sqrt(errors[1] / errors[2]);
    check_that(error <= tolerance * ref_error, "attention error %.4f, ref's %.4f", error, ref_error);
    printf("    attention error %.4f, ref's %.4f\n", error, ref_error);
    free(records);
    free(status);
}

// Every stage on Gaussian blocks, with queries like the keys.
static void check_balance(const bkv_cuda_t *cuda, const bkv_shape_t *shape, layout_t layout, uint32_t rate, bool shares) {
    char name[96];
    snprintf(name, sizeof(name), "balance/%u%s: %ux%ux%u, %u+%u, %s, %s", rate, shares ? ", shares" : "", shape->layers,
             shape->heads, shape->tokens, shape->key_dim, shape->value_dim, bkv_dtype_name(shape->dtype), layout_names[layout]);
    check_begin(name);
    blocks_t blocks;
    blocks_make(shape, 2, layout, 11 + rate, &blocks);
    enum { QUERIES = 4 };
    float *q = malloc(QUERIES * shape->key_dim * sizeof(float));
    draw_t draw = {3};
    for (uint32_t i = 0; i < QUERIES * shape->key_dim; i++) {
        q[i] = (float)draw_gauss(&draw);
    }
    static const uint8_t unequal[] = {255, 20, 90, 130, 60, 200, 40, 10};
    bkv_codec_params_t params = balance(rate, 1);
    params.shares = shares ? unequal : NULL;
    check_records(cuda, &blocks, params, q, QUERIES, 1.25);
    free(q);
    blocks_free(&blocks);
}

// The KV of a real model and its own queries, all layers in one measure.
static void check_trace(const bkv_cuda_t *cuda, const char *path, uint32_t rate) {
    char name[96];
    snprintf(name, sizeof(name), "balance/%u: %s", rate, "the real trace");
    check_begin(name);
    for (uint32_t layer = 1; layer <= 7; layer += 2) {
        trace_t trace;
        if (!trace_read(path, layer, &trace)) {
            printf("SKIPPED the real trace: no %s\n", path);
            return;
        }
        bkv_shape_t shape = {1, trace.heads, 256, trace.dim, trace.dim, BKV_FP16};
        blocks_t blocks;
        blocks_fill(&shape, trace.tokens / shape.tokens, trace.keys, trace.values, &blocks);
        check_records(cuda, &blocks, balance(rate, 1), trace.q, 8, 1.15);
        blocks_free(&blocks);
        free(trace.keys);
        free(trace.values);
        free(trace.q);
    }
}

// The same bytes again, alone, and in another order; other bytes with another seed.
static void check_batch(const bkv_cuda_t *cuda, const bkv_shape_t *shape) {
    check_begin("a block's record depends on the block alone");
    blocks_t blocks;
    blocks_make(shape, 5, LAYOUT_TOKENS, 21, &blocks);
    bkv_codec_params_t params = balance(16, 1);
    size_t stride, length;
    uint64_t status[5];
    uint8_t *all = compress_device(cuda, &blocks, &params, &stride, &length, status);
    uint8_t *again = compress_device(cuda, &blocks, &params, &stride, &length, status);
    for (uint32_t i = 0; i < blocks.count; i++) {
        check_that(memcmp(all + i * stride, again + i * stride, length) == 0, "block %u: other bytes the second time", i);
        blocks_t one = blocks;
        one.count = 1;
        one.at_device += i;
        one.at_host += i;
        one.ids += i;
        uint8_t *alone = compress_device(cuda, &one, &params, &stride, &length, status);
        check_that(memcmp(all + i * stride, alone, length) == 0, "block %u: other bytes alone", i);
        free(alone);
    }
    params.seed = 2;
    uint8_t *other = compress_device(cuda, &blocks, &params, &stride, &length, status);
    check_that(memcmp(all + 128, other + 128, length - 128) != 0, "the seed changes nothing");
    free(all);
    free(again);
    free(other);
    blocks_free(&blocks);
}

// What no record may hold is found and named as codec.h does it.
static void check_findings(const bkv_cuda_t *cuda, const bkv_shape_t *shape) {
    check_begin("values that no record may hold");
    static const bkv_codec_params_t all[] = {
        {.codec = BKV_CODEC_RAW}, {.codec = BKV_CODEC_DENSE4}, {.codec = BKV_CODEC_BALANCE, .rate = 16, .sink = 4, .seed = 1}};
    for (int i = 0; i < 24; i++) {
        const bkv_codec_params_t *params = &all[i % 3];
        uint32_t layer = (uint32_t)i % shape->layers, head = (uint32_t)i / 2 % shape->heads,
                 token = (uint32_t)(i * 37) % shape->tokens;
        bool value = i / 3 % 2, beyond = i / 6 % 2 && shape->dtype != BKV_FP16;
        blocks_t blocks;
        blocks_make(shape, 2, LAYOUT_PAYLOAD, 31, &blocks);
        blocks_poke(&blocks, 1, value, layer, head, token, (uint32_t)i % 8, beyond ? -1e5f : i % 2 ? INFINITY : NAN);
        blocks_poke(&blocks, 1, true, shape->layers - 1, shape->heads - 1, shape->tokens - 1, 3, NAN); // a later one
        size_t stride, length;
        uint64_t status[2];
        free(compress_device(cuda, &blocks, params, &stride, &length, status));
        bkv_error_t err = {0}, ref_err = {0};
        check_that(bkv_cuda_compress_check(shape, status[0], &err) == BKV_OK, "a clean block: %s", err.message);
        check_that(bkv_cuda_compress_check(shape, status[1], &err) == BKV_INVALID_ARGUMENT, "%d: not found", i);
        uint8_t *ref = compress_host("ref", &blocks, 1, params, &length, &ref_err);
        check_that(!ref && strcmp(err.message, ref_err.message) == 0, "\"%s\", ref: \"%s\"", err.message, ref_err.message);
        free(ref);
        blocks_free(&blocks);
    }
}

// The backend "cuda": the same records from host memory, whatever the strides.
static void check_backend(const bkv_cuda_t *cuda, const bkv_shape_t *shape) {
    check_begin("backend cuda from host memory");
    for (int layout = 0; layout < LAYOUT_LATENT; layout++) {
        blocks_t blocks;
        blocks_make(shape, 2, (layout_t)layout, 41, &blocks);
        bkv_codec_params_t params = balance(16, 9);
        size_t stride, length, host_length = 0;
        uint64_t status[2];
        uint8_t *records = compress_device(cuda, &blocks, &params, &stride, &length, status);
        for (uint32_t i = 0; i < 2; i++) {
            bkv_error_t err = {0};
            uint8_t *host = compress_host("cuda", &blocks, i, &params, &host_length, &err);
            check_that(host && host_length == length && memcmp(host, records + i * stride, length) == 0, "%s: other bytes, %s",
                       layout_names[layout], err.message);
            free(host);
        }
        free(records);
        blocks_free(&blocks);
    }
}

int main(int argc, char **argv) {
    bool small = argc > 1 && strcmp(argv[1], "--small") == 0;
    const char *trace = argc > 1 + small ? argv[1 + small] : "tests/data/trace.safetensors";
    bkv_cuda_t *cuda;
    bkv_error_t err = {0};
    if (bkv_cuda_open(0, &cuda, &err) != BKV_OK) {
        printf("SKIPPED the GPU tests of compression: %s\n", err.message);
        return 0;
    }
    static const bkv_shape_t shapes[] = {{2, 2, 256, 128, 128, BKV_BF16},  {1, 2, 200, 64, 128, BKV_FP16},
                                         {1, 3, 193, 72, 40, BKV_FP16},    {3, 2, 100, 128, 64, BKV_FP32},
                                         {1, 1, 1100, 128, 128, BKV_BF16}, {2, 1, 64, 576, 512, BKV_BF16}};
    uint32_t count = small ? 3 : sizeof(shapes) / sizeof(shapes[0]);
    for (uint32_t i = 0; i < count; i++) {
        layout_t layout = i == 0 ? LAYOUT_HEADS_LAST : i == 5 ? LAYOUT_LATENT : LAYOUT_TOKENS;
        check_same_bytes(cuda, &shapes[i], layout, (bkv_codec_params_t){.codec = BKV_CODEC_RAW});
        check_same_bytes(cuda, &shapes[i], layout, (bkv_codec_params_t){.codec = BKV_CODEC_DENSE8});
        check_same_bytes(cuda, &shapes[i], layout, (bkv_codec_params_t){.codec = BKV_CODEC_DENSE4});
        check_same_bytes(cuda, &shapes[i], layout, balance(2, 1));
        check_same_bytes(cuda, &shapes[i], layout, balance(4, 1));
        for (uint32_t rate = 8; rate <= (small ? 16 : 32); rate *= 2) {
            check_balance(cuda, &shapes[i], layout, rate, false);
        }
    }
    static const bkv_shape_t short_ones[] = {
        {1, 2, 17, 64, 64, BKV_BF16}, {1, 2, 40, 128, 128, BKV_FP16}, {4, 2, 256, 64, 64, BKV_BF16}};
    for (uint32_t i = 0; i < 3; i++) {
        check_balance(cuda, &short_ones[i], LAYOUT_PAYLOAD, i == 2 ? 6 : 8, false);
    }
    check_balance(cuda, &shapes[0], LAYOUT_TOKENS, 8, true);
    check_balance(cuda, &short_ones[2], LAYOUT_PAYLOAD, 12, true);
    check_balance(cuda, &shapes[2], LAYOUT_TOKENS, 10, true);
    for (uint32_t rate = 8; !small && rate <= 32; rate *= 2) {
        check_trace(cuda, trace, rate);
    }
    check_batch(cuda, &shapes[0]);
    check_batch(cuda, &shapes[2]);
    check_findings(cuda, &shapes[0]);
    check_findings(cuda, &shapes[2]);
    if (!small) {
        check_findings(cuda, &shapes[3]);
    }
    check_backend(cuda, &shapes[0]);
    bkv_cuda_close(cuda);
    return check_end();
}
