// test_summarize.c - client/bkv/summarize.c and unpack.c: the same records as compressing each block by hand, and the same
// tensors as reading those records by hand.
#include "client/bkv/summarize.h"
#include "client/bkv/unpack.h"
#include "synthetic.h"

#include <math.h>

#define HEADS     2
#define TOKENS    300
#define KEY_DIM   64
#define VALUE_DIM 32
#define BLOCK     128
#define WINDOW    20

static const uint32_t numbers[] = {3, 7};

static bkv_summarize_t options_of(bkv_codec_t codec, uint32_t rate) {
    return (bkv_summarize_t){
        .params = {.codec = codec, .rate = rate, .sink = 4, .seed = 11},
        .block_tokens = BLOCK,
        .window = WINDOW,
        .threads = 2,
        .backend = bkv_backend_get("ref"),
        .quiet = true,
    };
}

static void open_trace(bkv_trace_t *trace, char *path, bkv_tensor_type_t type) {
    synthetic_trace(scratch_path(path), numbers, 2, HEADS, TOKENS, KEY_DIM, VALUE_DIM, type, true, 5);
    cr_assert_eq(bkv_trace_init(trace, path, NULL), BKV_OK);
    unlink(path);
}

// Block `position` of the trace by hand: from the mapped tensors, with strides instead of a gathered payload.
static void *compress_by_hand(const bkv_trace_t *trace, uint32_t position, uint32_t tokens, const bkv_codec_params_t *params,
                              size_t *length) {
    bkv_shape_t shape = trace->shape;
    shape.tokens = tokens;
    size_t element = bkv_dtype_bytes(shape.dtype);
    // Layers lie apart by the same number of bytes in these files: k.3, v.3, k.7, v.7.
    bkv_block_t block = {
        .shape = shape,
        .keys = trace->keys[0]->data + position * KEY_DIM * element,
        .values = trace->values[0]->data + position * VALUE_DIM * element,
        .key_stride = {trace->keys[1]->data - trace->keys[0]->data, (int64_t)(TOKENS * KEY_DIM * element),
                       (int64_t)(KEY_DIM * element)},
        .value_stride = {trace->values[1]->data - trace->values[0]->data, (int64_t)(TOKENS * VALUE_DIM * element),
                         (int64_t)(VALUE_DIM * element)},
    };
    const bkv_backend_t *backend = bkv_backend_get("ref");
    bkv_record_id_t id = {.position = position};
    size_t capacity = bkv_codec_bound(&shape, params);
    void *record = aligned_alloc(64, (capacity + 63) / 64 * 64);
    void *workspace = aligned_alloc(64, (bkv_compress_workspace(backend, &shape, params) + 63) / 64 * 64);
    bkv_error_t err;
    cr_assert_eq(bkv_compress(backend, &block, params, &id, record, capacity, workspace, length, &err), BKV_OK, "%s",
                 err.message);
    free(workspace);
    bkv_record_seal(record);
    return record;
}

Test(bkv_summarize, makes_the_records_of_its_blocks) {
    const bkv_codec_t codecs[] = {BKV_CODEC_RAW, BKV_CODEC_DENSE8, BKV_CODEC_DENSE4, BKV_CODEC_BALANCE};
    const bkv_tensor_type_t types[] = {BKV_TENSOR_F16, BKV_TENSOR_BF16, BKV_TENSOR_F32};
    const uint32_t positions[] = {0, 128, 256}, tokens[] = {128, 128, 24};
    for (size_t c = 0; c < 4; c++) {
        for (size_t d = 0; d < 3; d++) {
            char path[64];
            bkv_trace_t trace;
            bkv_summaries_t summaries;
            bkv_error_t err;
            bkv_summarize_t options = options_of(codecs[c], 4);
            uint64_t sum = 0;
            open_trace(&trace, path, types[d]);
            cr_assert_eq(bkv_summarize_trace(&trace, &options, &summaries, &err), BKV_OK, "%s", err.message);
            cr_assert_eq(summaries.count, 3);
            for (size_t i = 0; i < 3; i++) {
                size_t length;
                void *record = compress_by_hand(&trace, positions[i], tokens[i], &options.params, &length);
                cr_expect_eq(((bkv_record_header_t *)summaries.records[i])->length, length);
                cr_expect_eq(memcmp(record, summaries.records[i], length), 0, "codec %zu, type %zu, block %zu", c, d, i);
                sum += length;
                free(record);
            }
            cr_expect_eq(summaries.stored_bytes, sum);
            cr_expect_eq(summaries.raw_bytes, 2u * 2 * HEADS * (TOKENS - WINDOW) * (KEY_DIM + VALUE_DIM));
            bkv_summaries_deinit(&summaries);
            bkv_trace_deinit(&trace);
        }
    }
}

static uint32_t tokens_of(const bkv_summaries_t *summaries, uint32_t layer, uint32_t head) {
    uint32_t sum = 0;
    for (size_t i = 0; i < summaries->count; i++) {
        bkv_section_view_t view;
        bkv_record_section(summaries->records[i], layer, head, &view);
        sum += view.tokens;
    }
    return sum;
}

Test(bkv_summarize, shares_divide_the_bytes_of_blocks_and_folds) {
    const uint8_t shares[] = {10, 30, 30, 100};
    char path[64];
    bkv_trace_t trace;
    bkv_error_t err;
    open_trace(&trace, path, BKV_TENSOR_F16);
    for (int fold = 0; fold < 2; fold++) {
        bkv_summaries_t equal, shared;
        bkv_summarize_t options = options_of(fold ? BKV_CODEC_DENSE4 : BKV_CODEC_BALANCE, 8);
        options.fold_rate = fold ? 12 : 0;
        cr_assert_eq(bkv_summarize_trace(&trace, &options, &equal, &err), BKV_OK, "%s", err.message);
        options.params.shares = shares;
        cr_assert_eq(bkv_summarize_trace(&trace, &options, &shared, &err), BKV_OK, "%s", err.message);
        cr_expect_leq(shared.stored_bytes, shared.raw_bytes / (fold ? 12 : 8));
        cr_expect_gt(shared.stored_bytes, equal.stored_bytes * 9 / 10);
        cr_expect_lt(tokens_of(&shared, 0, 0), tokens_of(&equal, 0, 0));
        cr_expect_lt(tokens_of(&shared, 0, 0), tokens_of(&shared, 0, 1));
        cr_expect_lt(tokens_of(&shared, 1, 0), tokens_of(&shared, 1, 1));
        cr_expect_gt(tokens_of(&shared, 1, 1), tokens_of(&equal, 1, 1));
        bkv_summaries_deinit(&equal);
        bkv_summaries_deinit(&shared);
    }
    bkv_trace_deinit(&trace);
}

Test(bkv_summarize, does_not_depend_on_threads) {
    char path[64];
    bkv_trace_t trace;
    bkv_summaries_t one, many;
    bkv_summarize_t options = options_of(BKV_CODEC_BALANCE, 4);
    open_trace(&trace, path, BKV_TENSOR_F16);
    options.threads = 1;
    cr_assert_eq(bkv_summarize_trace(&trace, &options, &one, NULL), BKV_OK);
    options.threads = 16;
    cr_assert_eq(bkv_summarize_trace(&trace, &options, &many, NULL), BKV_OK);
    cr_assert_eq(one.count, many.count);
    for (size_t i = 0; i < one.count; i++) {
        cr_expect_eq(memcmp(one.records[i], many.records[i], ((bkv_record_header_t *)one.records[i])->length), 0);
    }
    bkv_summaries_deinit(&one);
    bkv_summaries_deinit(&many);
    bkv_trace_deinit(&trace);
}

Test(bkv_summarize, holds_the_rate_or_fails) {
    char path[64];
    bkv_trace_t trace;
    bkv_summaries_t summaries;
    bkv_error_t err;
    const uint32_t rates[] = {2, 4, 8};
    open_trace(&trace, path, BKV_TENSOR_F32);
    for (size_t i = 0; i < 3; i++) {
        bkv_summarize_t options = options_of(BKV_CODEC_BALANCE, rates[i]);
        cr_assert_eq(bkv_summarize_trace(&trace, &options, &summaries, &err), BKV_OK, "%s", err.message);
        cr_expect_geq(summaries.raw_bytes, summaries.stored_bytes * rates[i]);
        bkv_summaries_deinit(&summaries);
    }
    // Nine tokens at rate 64 leave 27 bytes per head, less than a directory entry and one token.
    bkv_summarize_t options = options_of(BKV_CODEC_BALANCE, 64);
    options.window = TOKENS - 9;
    cr_expect_eq(bkv_summarize_trace(&trace, &options, &summaries, &err), BKV_INVALID_ARGUMENT);
    bkv_summaries_deinit(&summaries);
    options.window = TOKENS;
    cr_expect_eq(bkv_summarize_trace(&trace, &options, &summaries, &err), BKV_INVALID_ARGUMENT);
    cr_expect_not_null(strstr(err.message, "window"));
    bkv_summaries_deinit(&summaries);
    bkv_trace_deinit(&trace);
}

Test(bkv_summarize, refuses_nan_and_says_where) {
    char path[64];
    bkv_trace_t trace;
    bkv_summaries_t summaries;
    bkv_error_t err;
    bkv_summarize_t options = options_of(BKV_CODEC_BALANCE, 4);
    scratch_path(path);
    synthetic_trace(path, numbers, 2, HEADS, TOKENS, KEY_DIM, VALUE_DIM, BKV_TENSOR_F16, false, 5);
    FILE *file = fopen(path, "r+b");
    const uint16_t nan_bits = 0x7e00;
    fseek(file, -(long)(2 * VALUE_DIM * (WINDOW + 10)), SEEK_END); // in v.7, last head, second block
    cr_assert_eq(fwrite(&nan_bits, 2, 1, file), 1);
    fclose(file);
    cr_assert_eq(bkv_trace_init(&trace, path, NULL), BKV_OK);
    cr_expect_eq(bkv_summarize_trace(&trace, &options, &summaries, &err), BKV_INVALID_ARGUMENT);
    cr_expect_not_null(strstr(err.message, "tokens 256..279"), "%s", err.message);
    bkv_summaries_deinit(&summaries);
    bkv_trace_deinit(&trace);
    unlink(path);
}

// One head of one layer as it was written, against what its records' sections say.
static void expect_head(const bkv_safetensors_t *file, const bkv_trace_t *trace, const bkv_summaries_t *summaries,
                        uint32_t layer, uint32_t head) {
    char name[16];
    snprintf(name, sizeof name, "k.%u", numbers[layer]);
    const bkv_tensor_t *k = bkv_safetensors_find(file, name);
    snprintf(name, sizeof name, "v.%u", numbers[layer]);
    const bkv_tensor_t *v = bkv_safetensors_find(file, name);
    snprintf(name, sizeof name, "logw.%u", numbers[layer]);
    const bkv_tensor_t *logw = bkv_safetensors_find(file, name);
    snprintf(name, sizeof name, "index.%u", numbers[layer]);
    const bkv_tensor_t *index = bkv_safetensors_find(file, name);
    cr_assert(k && v && logw && index);
    uint64_t rows = k->shape[1], row = head * rows;
    cr_assert(k->shape[0] == HEADS && k->shape[2] == KEY_DIM && v->shape[2] == VALUE_DIM && logw->shape[1] == rows);
    const uint16_t *ks = (const void *)k->data, *vs = (const void *)v->data;
    const float *ws = (const void *)logw->data;
    const int32_t *is = (const void *)index->data;
    for (size_t r = 0; r < summaries->count; r++) {
        bkv_section_view_t view;
        static float fk[TOKENS * KEY_DIM], fv[TOKENS * VALUE_DIM], fw[TOKENS];
        static uint32_t fi[TOKENS];
        bkv_record_section(summaries->records[r], layer, head, &view);
        bkv_section_read(&view, fk, fv, fw, fi);
        for (uint32_t t = 0; t < view.tokens; t++, row++) {
            cr_assert_eq(is[row], (int32_t)(r * BLOCK + fi[t]));
            cr_assert_eq(ws[row], fw[t]);
            for (uint32_t i = 0; i < KEY_DIM; i++) {
                cr_assert_eq(ks[row * KEY_DIM + i], bkv_float_to_half(fk[t * KEY_DIM + i]));
            }
            for (uint32_t i = 0; i < VALUE_DIM; i++) {
                cr_assert_eq(vs[row * VALUE_DIM + i], bkv_float_to_half(fv[t * VALUE_DIM + i]));
            }
        }
    }
    for (uint32_t t = TOKENS - WINDOW; t < TOKENS; t++, row++) {
        const uint8_t *exact = trace->keys[layer]->data + 2 * ((uint64_t)head * TOKENS + t) * KEY_DIM;
        cr_assert_eq(is[row], (int32_t)t);
        cr_assert_eq(ws[row], 0);
        cr_assert_eq(memcmp(ks + row * KEY_DIM, exact, 2 * KEY_DIM), 0, "the window is exact");
    }
    for (; row < (head + 1) * rows; row++) {
        cr_assert(isinf(ws[row]) && ws[row] < 0 && is[row] == -1 && ks[row * KEY_DIM] == 0 && vs[row * VALUE_DIM] == 0);
    }
}

Test(bkv_unpack, writes_what_attention_sees) {
    const bkv_codec_t codecs[] = {BKV_CODEC_DENSE8, BKV_CODEC_BALANCE};
    for (size_t c = 0; c < 2; c++) {
        char path[64];
        bkv_trace_t trace;
        bkv_summaries_t summaries;
        bkv_safetensors_t *file;
        bkv_summarize_t options = options_of(codecs[c], 4);
        open_trace(&trace, path, BKV_TENSOR_F16);
        cr_assert_eq(bkv_summarize_trace(&trace, &options, &summaries, NULL), BKV_OK);
        const char *const metadata[][2] = {{"a", "b"}};
        bkv_unpack_t unpack = {.records = (const void *const *)summaries.records,
                               .count = summaries.count,
                               .layer_numbers = numbers,
                               .trace = &trace,
                               .window = WINDOW,
                               .metadata = metadata,
                               .metadata_count = 1};
        cr_assert_eq(bkv_unpack_write(&unpack, scratch_path(path), NULL), BKV_OK);
        cr_expect_eq(unpack.saturated, 0);
        cr_assert_eq(bkv_safetensors_open(path, &file, NULL), BKV_OK);
        cr_expect_str_eq(bkv_safetensors_metadata(file, "a"), "b");
        cr_expect_eq(bkv_safetensors_count(file), 8);
        for (uint32_t layer = 0; layer < 2; layer++) {
            for (uint32_t head = 0; head < HEADS; head++) {
                expect_head(file, &trace, &summaries, layer, head);
            }
        }
        bkv_safetensors_close(file);
        bkv_summaries_deinit(&summaries);
        bkv_trace_deinit(&trace);
        unlink(path);
    }
}

Test(bkv_unpack, refuses_records_that_do_not_go_together) {
    char path[64];
    bkv_trace_t trace;
    bkv_summaries_t summaries;
    bkv_summarize_t options = options_of(BKV_CODEC_DENSE4, 0);
    open_trace(&trace, path, BKV_TENSOR_F16);
    cr_assert_eq(bkv_summarize_trace(&trace, &options, &summaries, NULL), BKV_OK);
    size_t length;
    cr_assert_eq(bkv_record_slice(summaries.records[1], 0, 1, 0, HEADS, NULL, &length, NULL), BKV_OK);
    void *slice = aligned_alloc(64, (length + 63) / 64 * 64);
    cr_assert_eq(bkv_record_slice(summaries.records[1], 0, 1, 0, HEADS, slice, &length, NULL), BKV_OK);
    const void *records[] = {summaries.records[0], slice};
    bkv_unpack_t unpack = {.records = records, .count = 2, .layer_numbers = numbers};
    cr_expect_eq(bkv_unpack_write(&unpack, scratch_path(path), NULL), BKV_INVALID_ARGUMENT);
    cr_expect_neq(access(path, F_OK), 0);
    unpack.count = 0;
    cr_expect_eq(bkv_unpack_write(&unpack, path, NULL), BKV_INVALID_ARGUMENT);
    free(slice);
    bkv_summaries_deinit(&summaries);
    bkv_trace_deinit(&trace);
}

Test(bkv_summarize, folds_into_the_budget) {
    char path[64];
    bkv_trace_t trace;
    bkv_summaries_t summaries;
    bkv_error_t err;
    bkv_summarize_t options = options_of(BKV_CODEC_BALANCE, 4);
    options.budget = 12000;
    open_trace(&trace, path, BKV_TENSOR_F16);
    cr_assert_eq(bkv_summarize_trace(&trace, &options, &summaries, &err), BKV_OK, "%s", err.message);
    const bkv_record_header_t *header = summaries.records[0];
    cr_assert_eq(summaries.count, 1);
    cr_expect(header->flags & BKV_RECORD_FOLD);
    cr_expect_eq(header->tokens, TOKENS - WINDOW);
    cr_expect_leq(summaries.stored_bytes, 12000);
    cr_expect_eq(summaries.stored_bytes, header->length);
    cr_expect_eq(bkv_record_check(header, header->length, NULL), BKV_OK);
    cr_expect_eq(bkv_record_verify(header, header->length, NULL), BKV_OK);
    bkv_summaries_deinit(&summaries);
    bkv_trace_deinit(&trace);
}

Test(bkv_summarize, cools_with_age) {
    char path[64];
    bkv_trace_t trace;
    bkv_summaries_t summaries, again;
    bkv_error_t err;
    bkv_summarize_t options = options_of(BKV_CODEC_DENSE8, 0);
    options.block_tokens = 40;
    options.fold_rate = 8;
    cr_assert_eq(bkv_profile_parse("60:4,:16", &options.profile, &err), BKV_OK);
    open_trace(&trace, path, BKV_TENSOR_F16);
    cr_assert_eq(bkv_summarize_trace(&trace, &options, &summaries, &err), BKV_OK, "%s", err.message);
    cr_assert_eq(summaries.count, 2);
    cr_expect_leq(summaries.stored_bytes, summaries.raw_bytes / 8);
    const bkv_record_header_t *older = summaries.records[0], *newer = summaries.records[1];
    cr_expect_eq(newer->tokens, 80, "two blocks of 40 are the first that reach to age 60");
    cr_expect_eq(older->position + older->tokens, newer->position);
    cr_expect_eq(older->tokens + newer->tokens, TOKENS - WINDOW);
    cr_expect_gt(newer->length * older->tokens, older->length * newer->tokens);
    for (size_t i = 0; i < 2; i++) {
        const bkv_record_header_t *header = summaries.records[i];
        cr_expect_eq(bkv_record_check(header, header->length, NULL), BKV_OK);
        cr_expect_eq(bkv_record_verify(header, header->length, NULL), BKV_OK);
    }
    options.budget = summaries.raw_bytes / 8; // the same, in bytes
    options.fold_rate = 0;
    cr_assert_eq(bkv_summarize_trace(&trace, &options, &again, &err), BKV_OK, "%s", err.message);
    cr_assert_eq(again.count, 2);
    cr_expect_eq(memcmp(newer, again.records[1], newer->length), 0);
    bkv_summaries_deinit(&again);
    options.budget = 600;
    cr_expect_eq(bkv_summarize_trace(&trace, &options, &again, &err), BKV_INVALID_ARGUMENT);
    cr_expect_eq(strncmp(err.message, "budget_bytes: 600", 17), 0, "%s", err.message);
    bkv_summaries_deinit(&again);
    bkv_summaries_deinit(&summaries);
    bkv_trace_deinit(&trace);
}
