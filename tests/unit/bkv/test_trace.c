// test_trace.c - client/bkv/trace.c: which files are traces, how they are cut, and what lands in a payload.
#include "client/bkv/trace.h"
#include "synthetic.h"

static const uint32_t gaps[] = {0, 2, 10};

Test(bkv_trace, reads_shapes_and_layer_order) {
    char path[64];
    bkv_trace_t trace;
    synthetic_trace(scratch_path(path), gaps, 3, 2, 40, 16, 8, BKV_TENSOR_BF16, true, 1);
    cr_assert_eq(bkv_trace_init(&trace, path, NULL), BKV_OK);
    cr_expect(trace.shape.layers == 3 && trace.shape.heads == 2 && trace.shape.tokens == 40 && trace.shape.key_dim == 16 &&
              trace.shape.value_dim == 8 && trace.shape.dtype == BKV_BF16);
    // By number, not by name: "k.10" sorts before "k.2".
    cr_expect(trace.layer_numbers[0] == 0 && trace.layer_numbers[1] == 2 && trace.layer_numbers[2] == 10);
    cr_expect_str_eq(trace.keys[2]->name, "k.10");
    cr_expect_not_null(trace.ids);
    cr_expect_eq(strncmp(trace.name, "bkv-test-", 9), 0);
    bkv_trace_deinit(&trace);
    unlink(path);
}

// Writes a file with one wrong thing and expects a complaint about it.
static void expect_refused(const bkv_tensor_t *tensors, size_t count, const char *named) {
    char path[64];
    static const uint8_t zeros[1 << 16];
    bkv_trace_t trace;
    bkv_safetensors_writer_t *writer;
    bkv_error_t err = {.status = BKV_OK};
    cr_assert_eq(bkv_safetensors_create(scratch_path(path), tensors, count, NULL, 0, &writer, NULL), BKV_OK);
    for (size_t i = 0; i < count; i++) {
        size_t bytes = bkv_tensor_type_bytes(tensors[i].type);
        for (uint32_t d = 0; d < tensors[i].rank; d++) {
            bytes *= tensors[i].shape[d];
        }
        cr_assert_eq(bkv_safetensors_write(writer, zeros, bytes, NULL), BKV_OK);
    }
    cr_assert_eq(bkv_safetensors_finish(writer, NULL), BKV_OK);
    cr_expect_eq(bkv_trace_init(&trace, path, &err), BKV_INVALID_ARGUMENT, "%s", named);
    cr_expect_not_null(strstr(err.message, named), "\"%s\" does not name %s", err.message, named);
    bkv_trace_deinit(&trace);
    unlink(path);
}

#define F16(n, ...)                                                                                                            \
    {                                                                                                                          \
        .name = n, .type = BKV_TENSOR_F16, .rank = 3, .shape = { __VA_ARGS__ }                                                 \
    }

Test(bkv_trace, refuses_what_is_no_trace) {
    const bkv_tensor_t nothing[] = {F16("q.0", 1, 4, 8)};
    expect_refused(nothing, 1, "k.N");
    const bkv_tensor_t no_value[] = {F16("k.0", 1, 4, 8)};
    expect_refused(no_value, 1, "v.0: missing");
    const bkv_tensor_t no_key[] = {F16("k.0", 1, 4, 8), F16("v.0", 1, 4, 8), F16("v.1", 1, 4, 8)};
    expect_refused(no_key, 3, "there is no k.1");
    const bkv_tensor_t tokens[] = {F16("k.0", 1, 4, 8), F16("v.0", 1, 5, 8)};
    expect_refused(tokens, 2, "v.0");
    const bkv_tensor_t dims[] = {F16("k.0", 1, 4, 8), F16("k.1", 1, 4, 16), F16("v.0", 1, 4, 8), F16("v.1", 1, 4, 8)};
    expect_refused(dims, 4, "k.1");
    const bkv_tensor_t rank[] = {{.name = "k.0", .type = BKV_TENSOR_F16, .rank = 2, .shape = {4, 8}}, F16("v.0", 1, 4, 8)};
    expect_refused(rank, 2, "k.0.shape");
    const bkv_tensor_t dtype[] = {{.name = "k.0", .type = BKV_TENSOR_I32, .rank = 3, .shape = {1, 4, 8}}, F16("v.0", 1, 4, 8)};
    expect_refused(dtype, 2, "k.0.dtype");
    const bkv_tensor_t mixed[] = {F16("k.0", 1, 4, 8), {.name = "v.0", .type = BKV_TENSOR_F32, .rank = 3, .shape = {1, 4, 8}}};
    expect_refused(mixed, 2, "v.0");
    const bkv_tensor_t empty[] = {F16("k.0", 1, 0, 8), F16("v.0", 1, 0, 8)};
    expect_refused(empty, 2, "k.0.shape");
    const bkv_tensor_t odd[] = {F16("k.0", 1, 4, 12), F16("v.0", 1, 4, 8)};
    expect_refused(odd, 2, "key_dim");
    const bkv_tensor_t ids[] = {
        F16("k.0", 1, 4, 8), F16("v.0", 1, 4, 8), {.name = "ids", .type = BKV_TENSOR_I32, .rank = 1, .shape = {3}}};
    expect_refused(ids, 3, "ids");
}

Test(bkv_trace, gathers_a_block) {
    char path[64];
    bkv_trace_t trace;
    synthetic_trace(scratch_path(path), gaps, 3, 2, 40, 16, 8, BKV_TENSOR_F16, false, 2);
    cr_assert_eq(bkv_trace_init(&trace, path, NULL), BKV_OK);
    bkv_span_t span = {.position = 7, .tokens = 5};
    bkv_shape_t shape = bkv_trace_block_shape(&trace, &span);
    uint16_t *payload = malloc(bkv_shape_bytes(&shape)), *at = payload;
    bkv_trace_gather(&trace, &span, payload);
    for (uint32_t layer = 0; layer < 3; layer++) {
        for (uint32_t part = 0; part < 2; part++) {
            const bkv_tensor_t *tensor = part == 0 ? trace.keys[layer] : trace.values[layer];
            uint64_t dim = tensor->shape[2];
            for (uint64_t head = 0; head < 2; head++) {
                for (uint64_t t = 7; t < 12; t++) {
                    for (uint64_t i = 0; i < dim; i++) {
                        uint16_t bits;
                        memcpy(&bits, tensor->data + 2 * ((head * 40 + t) * dim + i), 2);
                        cr_assert_eq(*at++, bits);
                    }
                }
            }
        }
    }
    cr_expect_eq((size_t)(at - payload) * 2, bkv_shape_bytes(&shape));
    free(payload);
    bkv_trace_deinit(&trace);
    unlink(path);
}

Test(bkv_trace, cuts_into_blocks) {
    const bkv_shape_t shape = {.layers = 1, .heads = 1, .tokens = 1000, .key_dim = 64, .value_dim = 64, .dtype = BKV_BF16};
    const bkv_codec_params_t dense = {.codec = BKV_CODEC_DENSE4}, balance = {.codec = BKV_CODEC_BALANCE, .rate = 16};
    bkv_span_t *spans;
    cr_assert_eq(bkv_trace_plan(&shape, 600, 256, &dense, &spans), 3);
    cr_expect(spans[0].tokens == 256 && spans[1].position == 256 && spans[2].position == 512 && spans[2].tokens == 88);
    free(spans);
    cr_assert_eq(bkv_trace_plan(&shape, 512, 256, &dense, &spans), 2);
    cr_expect_eq(spans[1].tokens, 256);
    free(spans);
    // A last block of one token keeps no rate: it shares with the one before. Others stay as they are.
    cr_assert_eq(bkv_trace_plan(&shape, 513, 256, &balance, &spans), 3);
    cr_expect_eq(spans[0].tokens, 256);
    cr_expect(spans[1].position == 256 && spans[1].tokens == 129 && spans[2].position == 385 && spans[2].tokens == 128);
    free(spans);
    cr_assert_eq(bkv_trace_plan(&shape, 513, 256, &dense, &spans), 3);
    cr_expect_eq(spans[2].tokens, 1, "a codec without a rate has no such worry");
    free(spans);
    cr_assert_eq(bkv_trace_plan(&shape, 1, 256, &balance, &spans), 1);
    cr_expect_eq(spans[0].tokens, 1);
    free(spans);
}

static void chain(const char *path, bkv_key_t keys[2]) {
    bkv_trace_t trace;
    const bkv_spec_id_t id = {.bytes = {1, 2, 3}};
    const bkv_span_t spans[2] = {{.position = 0, .tokens = 20}, {.position = 20, .tokens = 20}};
    cr_assert_eq(bkv_trace_init(&trace, path, NULL), BKV_OK);
    for (int i = 0; i < 2; i++) {
        bkv_shape_t shape = bkv_trace_block_shape(&trace, &spans[i]);
        void *payload = aligned_alloc(64, (bkv_shape_bytes(&shape) + 63) / 64 * 64);
        bkv_trace_gather(&trace, &spans[i], payload);
        cr_assert_eq(bkv_trace_key(&trace, &spans[i], payload, &id, i == 0 ? NULL : &keys[0], &keys[i], NULL), BKV_OK);
        free(payload);
    }
    bkv_trace_deinit(&trace);
}

Test(bkv_trace, keys_follow_ids_or_contents) {
    char path[64];
    bkv_key_t first[2], again[2], other[2];
    // With ids: what the tensors hold does not matter, the ids do, as bkv_key_next would have it.
    synthetic_trace(scratch_path(path), gaps, 1, 1, 40, 8, 8, BKV_TENSOR_F16, true, 1);
    chain(path, first);
    synthetic_trace(path, gaps, 1, 1, 40, 8, 8, BKV_TENSOR_F16, true, 2);
    chain(path, again);
    cr_expect_eq(memcmp(first, again, sizeof first), 0);
    uint32_t ids[20];
    bkv_key_t expected;
    const bkv_spec_id_t id = {.bytes = {1, 2, 3}};
    for (uint32_t t = 0; t < 20; t++) {
        ids[t] = (20 + t) * 7919 % 8192;
    }
    bkv_key_next(&id, &first[0], ids, 20, &expected);
    cr_expect_eq(memcmp(&first[1], &expected, sizeof expected), 0);
    // Without: the contents decide.
    synthetic_trace(path, gaps, 1, 1, 40, 8, 8, BKV_TENSOR_F16, false, 1);
    chain(path, first);
    chain(path, again);
    cr_expect_eq(memcmp(first, again, sizeof first), 0);
    synthetic_trace(path, gaps, 1, 1, 40, 8, 8, BKV_TENSOR_F16, false, 2);
    chain(path, other);
    cr_expect_neq(memcmp(&first[0], &other[0], sizeof *first), 0);
    cr_expect_neq(memcmp(&first[1], &other[1], sizeof *first), 0);
    unlink(path);
}

Test(bkv_trace, refuses_ids_that_are_none) {
    const int64_t wrong[] = {-1, INT64_C(1) << 32};
    const bkv_spec_id_t id = {.bytes = {0}};
    for (size_t i = 0; i < 2; i++) {
        bkv_tensor_t ids = {.name = "ids", .type = BKV_TENSOR_I64, .rank = 1, .shape = {1}, .data = (const uint8_t *)&wrong[i]};
        bkv_trace_t trace = {.ids = &ids};
        bkv_span_t span = {.tokens = 1};
        bkv_key_t key;
        cr_expect_eq(bkv_trace_key(&trace, &span, NULL, &id, NULL, &key, NULL), BKV_INVALID_ARGUMENT);
    }
}
