// attend_avx512.c - attention with AVX-512: the course of a call, which attend_amx.c shares, and the products with VNNI.
// attend_avx512.h has the idea and says which file does what.
//
// One KV head and up to eight of its query rows at a time. The sections' tokens come in batches: the logits of a whole batch,
// one step of an online softmax (Milakov and Gimelshein, arXiv 1805.02867), then its values. Logits read only key planes and
// values only value planes, so during the one the memory fetches what the other needs next.
#include "attend_avx512.h"

#if defined(__x86_64__)

#include "attend_float.h"

#include <assert.h>
#include <math.h>

#define LINE    64
#define QUAD    4
#define COLUMNS 16

// Logits are written sixteen at a time, and the last of them may be padding.
#define STRIDE (BKV_ATTEND_BATCH + 16)

typedef struct attend {
    const void *const *records;
    uint32_t count, layer, head;
    bkv_keys_t keys;
    bkv_values_t values;
    bkv_batch_t *batch[2];
    float *logits; // [BKV_ATTEND_ROWS][STRIDE]
} attend_t;

// Where in the records the next batch starts.
typedef struct place {
    uint32_t record, token;
} place_t;

static uint64_t rows_per_head(const bkv_record_header_t *header, const bkv_attend_args_t *args) {
    return (uint64_t)(args->query_heads / header->heads) * args->queries;
}

static size_t attend_carve(const void *const *records, void *workspace, attend_t *attend) {
    const bkv_record_header_t *header = records[0];
    bkv_scratch_t scratch = {.base = workspace};
    attend->batch[0] = bkv_scratch_take(&scratch, sizeof(bkv_batch_t));
    attend->batch[1] = bkv_scratch_take(&scratch, sizeof(bkv_batch_t));
    attend->logits = bkv_scratch_take(&scratch, (uint64_t)BKV_ATTEND_ROWS * STRIDE * sizeof(float));
    bkv_keys_carve(&attend->keys, header->key_dim, &scratch);
    bkv_values_carve(&attend->values, header->value_dim, &scratch);
    return scratch.used;
}

size_t bkv_wide_attend_workspace(const void *const *records, uint32_t count, const bkv_attend_args_t *args) {
    (void)count, (void)args;
    attend_t attend;
    return attend_carve(records, NULL, &attend);
}

void bkv_ahead_start(bkv_ahead_t *ahead, const bkv_batch_t *batch, bool values, uint64_t steps) {
    uint64_t lines = (values ? batch->value_bytes : batch->key_bytes) / LINE + batch->count;
    *ahead = (bkv_ahead_t){.batch = batch, .values = values, .lines = (uint32_t)((lines + steps - 1) / steps)};
}

void bkv_ahead_step(bkv_ahead_t *ahead) {
    for (uint32_t i = 0; i < ahead->lines; i++, ahead->at += LINE) {
        if (ahead->at >= ahead->end) {
            if (ahead->piece == ahead->batch->count) {
                return;
            }
            const bkv_piece_t *piece = &ahead->batch->pieces[ahead->piece++];
            ahead->at = ahead->values ? piece->values_ahead : piece->keys_ahead;
            ahead->end = ahead->values ? piece->values + (size_t)piece->count * piece->value_row
                                       : piece->keys + (size_t)piece->count * piece->key_row;
        }
        __builtin_prefetch(ahead->at, 0, 2);
    }
}

// The piece of a section that starts at token `first`: what is left of its key group, or of a section of native keys.
static void piece_cut(const bkv_section_view_t *view, uint32_t first, bkv_piece_t *piece) {
    const bkv_plane_layout_t *layout = &view->layout;
    bool native = view->key_bits == BKV_BITS_NATIVE;
    uint32_t group_tokens = native ? BKV_KEY_GROUP_TOKENS : layout->key_group_tokens, group = first / group_tokens;
    uint32_t end = (group + 1) * group_tokens < view->tokens ? (group + 1) * group_tokens : view->tokens;
    const uint8_t *keys = view->key_plane + layout->key_codes, *values = view->value_plane + layout->value_codes;
    *piece = (bkv_piece_t){.keys = keys + (size_t)first * layout->key_row,
                           .key_params = view->key_plane + layout->key_params + 4ull * group * view->key_dim,
                           .weights = view->has_weights ? view->key_plane + layout->weights : NULL,
                           .values = values + (size_t)first * layout->value_row,
                           .value_params = view->value_plane + 4ull * first * layout->value_groups,
                           .values_end = view->value_plane + layout->value_bytes,
                           .first = first,
                           .count = end - first,
                           .key_row = layout->key_row,
                           .value_row = layout->value_row,
                           .key_bits = view->key_bits,
                           .value_bits = view->value_bits,
                           .dtype = view->dtype};
    piece->keys_ahead = first == 0 ? view->key_plane : piece->keys;
    piece->values_ahead = first == 0 ? view->value_plane : piece->values;
}

// How many records ahead their directories are fetched: more than a batch takes of sections of usual size.
#define DIRECTORY_AHEAD 16

static void directory_fetch(const attend_t *attend, uint32_t record) {
    if (record < attend->count) {
        const bkv_record_header_t *header = attend->records[record];
        const bkv_record_header_t *alike = attend->records[0];
        __builtin_prefetch(header);
        __builtin_prefetch((const uint8_t *)header + 64);
        __builtin_prefetch(&bkv_record_directory_const(header)[(size_t)attend->layer * alike->heads + attend->head]);
    }
}

// As many pieces as fit, all of one value width. None when the records are at their end.
static void batch_gather(const attend_t *attend, place_t *place, bkv_batch_t *batch) {
    batch->count = batch->tokens = 0;
    batch->key_bytes = batch->value_bytes = 0;
    for (; place->record < attend->count; place->record++, place->token = 0) {
        bkv_section_view_t view;
        directory_fetch(attend, place->record + DIRECTORY_AHEAD);
        bkv_record_section(attend->records[place->record], attend->layer, attend->head, &view);
        if (batch->count > 0 && view.value_bits != batch->pieces[0].value_bits) {
            return;
        }
        while (place->token < view.tokens) {
            bkv_piece_t piece;
            piece_cut(&view, place->token, &piece);
            assert(piece.count <= BKV_ATTEND_PIECE);
            if (batch->tokens + piece.count > BKV_ATTEND_BATCH) {
                return;
            }
            piece.at = batch->tokens;
            batch->key_bytes += (uint64_t)(piece.keys - piece.keys_ahead) + (uint64_t)piece.count * piece.key_row;
            batch->value_bytes += (uint64_t)(piece.values - piece.values_ahead) + (uint64_t)piece.count * piece.value_row;
            batch->pieces[batch->count++] = piece;
            batch->tokens += (piece.count + BKV_ATTEND_STEP - 1) / BKV_ATTEND_STEP * BKV_ATTEND_STEP;
            place->token += piece.count;
        }
    }
}

// The batch's logits become probabilities relative to each row's largest logit so far; shrink is what the earlier ones lose.
static void softmax_step(const bkv_batch_t *batch, uint32_t rows, float *logits, float *max, float *sum, float *shrink,
                         bkv_ahead_t *ahead) {
    uint32_t whole = (batch->tokens + 63) / 64 * 64;
    for (uint32_t r = 0; r < rows; r++) {
        float *row = logits + (size_t)r * STRIDE;
        for (uint32_t t = batch->tokens; t < whole; t++) {
            row[t] = -INFINITY;
        }
        float top = bkv_float_top(row, whole);
        top = top > max[r] ? top : max[r];
        shrink[r] = top > max[r] ? expf(max[r] - top) : 1; // 0 for the first batch, whose maximum so far is -INFINITY
        max[r] = top;
        sum[r] = sum[r] * shrink[r] + bkv_float_exp(row, whole, top);
        bkv_ahead_step(ahead);
        bkv_ahead_step(ahead);
    }
}

// Up to BKV_ATTEND_ROWS rows of one head. False when a logit leaves the range of float.
static bool rows_attend(attend_t *attend, const float *q, uint32_t rows, float scale, const bkv_products_t *products,
                        float *out, float *lse) {
    float max[BKV_ATTEND_ROWS], sum[BKV_ATTEND_ROWS] = {0}, shrink[BKV_ATTEND_ROWS];
    for (uint32_t r = 0; r < rows; r++) {
        max[r] = -INFINITY;
    }
    bkv_keys_start(&attend->keys, q, rows, scale);
    bkv_values_start(&attend->values, rows);
    place_t place = {0, 0};
    batch_gather(attend, &place, attend->batch[0]);
    for (uint32_t turn = 0; attend->batch[turn]->count > 0; turn ^= 1) {
        const bkv_batch_t *batch = attend->batch[turn];
        bkv_ahead_t ahead;
        bkv_ahead_start(&ahead, batch, true, bkv_keys_steps(batch));
        products->scores_begin();
        for (uint32_t i = 0; i < batch->count; i++) {
            if (!bkv_keys_score(&attend->keys, products, &batch->pieces[i], attend->logits, STRIDE, &ahead)) {
                products->end();
                return false;
            }
        }
        batch_gather(attend, &place, attend->batch[turn ^ 1]);
        bkv_ahead_start(&ahead, attend->batch[turn ^ 1], false, bkv_values_steps(&attend->values, batch));
        softmax_step(batch, rows, attend->logits, max, sum, shrink, &ahead);
        products->values_begin((rows + QUAD - 1) / QUAD);
        bkv_values_add(&attend->values, products, batch, attend->logits, STRIDE, shrink, &ahead);
    }
    products->end();
    float inverse[BKV_ATTEND_ROWS];
    for (uint32_t r = 0; r < rows; r++) {
        inverse[r] = 1.0f / sum[r]; // every section has a token, whose largest term is 1
        lse[r] = max[r] + logf(sum[r]);
    }
    bkv_values_finish(&attend->values, inverse, out);
    return true;
}

static bool head_attend(attend_t *attend, const bkv_attend_args_t *args, uint64_t rows, const bkv_products_t *products,
                        const float *q, float *out, float *lse) {
    uint32_t key_dim = attend->keys.dim, value_dim = attend->values.dim;
    float scale = args->scale == 0.0f ? 1.0f / sqrtf((float)key_dim) : args->scale;
    for (uint64_t row = 0; row < rows; row += BKV_ATTEND_ROWS) {
        uint32_t some = rows - row < BKV_ATTEND_ROWS ? (uint32_t)(rows - row) : BKV_ATTEND_ROWS;
        if (!rows_attend(attend, q + row * key_dim, some, scale, products, out + row * value_dim, lse + row)) {
            return false;
        }
    }
    return true;
}

bkv_status_t bkv_wide_attend(const bkv_products_t *products, const void *const *records, uint32_t count,
                             const bkv_attend_args_t *args, void *workspace, bkv_error_t *err) {
    const bkv_record_header_t *header = records[0];
    uint64_t rows = rows_per_head(header, args);
    attend_t attend = {.records = records, .count = count};
    attend_carve(records, workspace, &attend);
    bkv_status_t status = BKV_OK;
    for (uint32_t i = 0; status == BKV_OK && i < args->layers * header->heads; i++) {
        attend.layer = args->first_layer + i / header->heads;
        attend.head = i % header->heads;
        if (!head_attend(&attend, args, rows, products, args->q + i * rows * header->key_dim,
                         args->out + i * rows * header->value_dim, args->lse + i * rows)) {
            status = bkv_fail(err, BKV_INVALID_ARGUMENT, "q: a logit at layer %u, head %u is beyond the range of float32",
                              attend.layer, attend.head);
        }
    }
    return status;
}

static void nothing(void) {}

static void vnni_values_begin(uint32_t quads) {
    (void)quads;
}

// The digits of four slots, beside a broadcast of one token's four codes: sixteen columns at once.
static void vnni_scores(const uint8_t *codes, const uint8_t *digits, uint32_t tiles, uint32_t steps, uint32_t quads,
                        int32_t *sums) {
    for (uint32_t i = 0; i < tiles * quads * 2; i++) { // eight tokens at a time
        uint32_t tile = i / (2 * quads), quad = i / 2 % quads, first = i % 2 * 8;
        __m512i sum[8];
        for (uint32_t t = 0; t < 8; t++) {
            sum[t] = _mm512_setzero_si512();
        }
        for (uint32_t step = 0; step < steps; step++) {
            const uint8_t *left = codes + ((size_t)(tile * steps + step) * 16 + first) * LINE;
            const uint8_t *right = digits + (size_t)(step * quads + quad) * 16 * LINE;
            for (uint32_t slot = 0; slot < LINE; slot += 4) {
                __m512i columns = _mm512_load_si512(right + (size_t)slot * 16);
                for (uint32_t t = 0; t < 8; t++) {
                    int32_t four;
                    memcpy(&four, left + (size_t)t * LINE + slot, sizeof(four));
                    sum[t] = _mm512_dpbusd_epi32(sum[t], _mm512_set1_epi32(four), columns);
                }
            }
        }
        for (uint32_t t = 0; t < 8; t++) {
            _mm512_store_si512(sums + ((size_t)(tile * quads + quad) * 16 + first + t) * COLUMNS, sum[t]);
        }
    }
}

static void vnni_clear(uint32_t sets, uint32_t phases, int32_t *sums) {
    memset(sums, 0, (size_t)sets * phases * 256 * sizeof(int32_t));
}

// The codes of sixteen slots and four tokens, beside a broadcast of one row's digits for those tokens.
static void vnni_take(uint32_t set, const uint8_t *digits, const uint8_t *codes, uint32_t phases, uint32_t quads,
                      int32_t *sums) {
    for (uint32_t i = 0; i < phases * quads; i++) { // eight rows at a time
        uint32_t phase = i / quads, first = i % quads * 8;
        int32_t *out = sums + ((size_t)(set * phases + phase) * 16 + first) * 16;
        __m512i sum[8];
        for (uint32_t r = 0; r < 8; r++) {
            sum[r] = _mm512_load_si512(out + (size_t)r * 16);
        }
        for (uint32_t token = 0; token < LINE; token += 4) {
            __m512i slots = _mm512_load_si512(codes + ((size_t)phase * LINE + token) * 16);
            for (uint32_t r = 0; r < 8; r++) {
                int32_t four;
                memcpy(&four, digits + (size_t)(first + r) * LINE + token, sizeof(four));
                sum[r] = _mm512_dpbusd_epi32(sum[r], slots, _mm512_set1_epi32(four));
            }
        }
        for (uint32_t r = 0; r < 8; r++) {
            _mm512_store_si512(out + (size_t)r * 16, sum[r]);
        }
    }
}

static void vnni_give(uint32_t sets, uint32_t phases, int32_t *sums) {
    (void)sets, (void)phases, (void)sums; // in their place already
}

static const bkv_products_t vnni_products = {.scores_begin = nothing,
                                             .scores = vnni_scores,
                                             .values_begin = vnni_values_begin,
                                             .clear = vnni_clear,
                                             .take = vnni_take,
                                             .give = vnni_give,
                                             .end = nothing};

bkv_status_t bkv_avx512_attend(const void *const *records, uint32_t count, const bkv_attend_args_t *args, void *workspace,
                               bkv_error_t *err) {
    return bkv_wide_attend(&vnni_products, records, count, args, workspace, err);
}

size_t bkv_avx512_attend_workspace(const void *const *records, uint32_t count, const bkv_attend_args_t *args) {
    return bkv_wide_attend_workspace(records, count, args);
}

#endif
