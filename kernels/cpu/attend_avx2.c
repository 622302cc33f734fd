// attend_avx2.c - attention with AVX2 and FMA: as attend_ref.c does it, tile by tile of dequantised tokens, but in vectors and
// over several query rows at once.
#include "backend.h"

#if defined(__x86_64__)

#include "attend_float.h"
#include "convert.h"

#include <math.h>

#define TILE 64

// Query rows whose scores of a tile are held at once.
#define ROWS 8

typedef struct attend {
    const bkv_attend_args_t *args;
    uint64_t rows;       // of one KV head
    float *k, *v, *logw; // [TILE][dim], [TILE]
    float *scores;       // [ROWS][TILE]
    float *sum;          // [rows]: of exp(logit - running maximum), which lse holds meanwhile
} attend_t;

static size_t attend_carve(const bkv_record_header_t *header, const bkv_attend_args_t *args, void *workspace,
                           attend_t *attend) {
    bkv_scratch_t scratch = {.base = workspace};
    attend->args = args;
    attend->rows = (uint64_t)(args->query_heads / header->heads) * args->queries;
    attend->k = bkv_scratch_take(&scratch, (uint64_t)TILE * header->key_dim * sizeof(float));
    attend->v = bkv_scratch_take(&scratch, (uint64_t)TILE * header->value_dim * sizeof(float));
    attend->logw = bkv_scratch_take(&scratch, TILE * sizeof(float));
    attend->scores = bkv_scratch_take(&scratch, (uint64_t)ROWS * TILE * sizeof(float));
    attend->sum = bkv_scratch_take(&scratch, attend->rows * sizeof(float));
    return scratch.used;
}

size_t bkv_avx2_attend_workspace(const void *const *records, uint32_t count, const bkv_attend_args_t *args) {
    (void)count;
    attend_t attend;
    return attend_carve(records[0], args, NULL, &attend);
}

// Takes `count` tokens into one row's running result.
static void row_take(float *scores, uint32_t count, uint32_t value_dim, float *out, float *max, float *sum) {
    uint32_t whole = bkv_wide_pad(count);
    for (uint32_t t = count; t < whole; t++) {
        scores[t] = -INFINITY;
    }
    float top = bkv_float_top(scores, whole);
    if (top > *max) {
        float shrink = expf(*max - top); // 0 for the first tile, whose maximum so far is -INFINITY
        *sum *= shrink;
        for (uint32_t i = 0; i < value_dim; i++) {
            out[i] *= shrink;
        }
        *max = top;
    }
    *sum += bkv_float_exp(scores, whole, *max);
}

// Takes the tile's tokens into all rows. False when a logit leaves the range of float.
static bool tile_take(const attend_t *attend, const bkv_section_view_t *view, uint32_t count, const float *q, float *out,
                      float *max) {
    float scale = attend->args->scale == 0.0f ? 1.0f / sqrtf((float)view->key_dim) : attend->args->scale;
    for (uint64_t first = 0; first < attend->rows; first += ROWS) {
        uint32_t rows = attend->rows - first < ROWS ? (uint32_t)(attend->rows - first) : ROWS;
        bkv_float_scores(q + first * view->key_dim, rows, attend->k, count, view->key_dim, scale, attend->logw, attend->scores,
                         TILE);
        for (uint32_t r = 0; r < rows; r++) {
            float *scores = attend->scores + (size_t)r * TILE;
            if (bkv_row_exceeds(BKV_FP32, scores, count, false)) {
                return false;
            }
            row_take(scores, count, view->value_dim, out + (first + r) * view->value_dim, &max[first + r],
                     &attend->sum[first + r]);
        }
        bkv_float_mix(attend->scores, TILE, rows, attend->v, count, view->value_dim, out + first * view->value_dim);
    }
    return true;
}

static bool head_take(const attend_t *attend, const void *record, uint32_t layer, uint32_t head, const float *q, float *out,
                      float *max) {
    bkv_section_view_t view;
    bkv_record_section(record, layer, head, &view);
    for (uint32_t first = 0; first < view.tokens; first += TILE) {
        uint32_t count = view.tokens - first < TILE ? view.tokens - first : TILE;
        bkv_section_read_range(&view, first, count, attend->k, attend->v, attend->logw);
        if (!tile_take(attend, &view, count, q, out, max)) {
            return false;
        }
    }
    return true;
}

bkv_status_t bkv_avx2_attend(const void *const *records, uint32_t count, const bkv_attend_args_t *args, void *workspace,
                             bkv_error_t *err) {
    const bkv_record_header_t *header = records[0];
    attend_t attend;
    attend_carve(header, args, workspace, &attend);
    for (uint32_t i = 0; i < args->layers * header->heads; i++) {
        uint32_t layer = args->first_layer + i / header->heads, head = i % header->heads;
        const float *q = args->q + i * attend.rows * header->key_dim;
        float *out = args->out + i * attend.rows * header->value_dim, *lse = args->lse + i * attend.rows;
        memset(out, 0, attend.rows * header->value_dim * sizeof(float));
        for (uint64_t row = 0; row < attend.rows; row++) {
            lse[row] = -INFINITY;
            attend.sum[row] = 0;
        }
        for (uint32_t r = 0; r < count; r++) {
            if (!head_take(&attend, records[r], layer, head, q, out, lse)) {
                return bkv_fail(err, BKV_INVALID_ARGUMENT, "q: a logit at layer %u, head %u is beyond the range of float32",
                                layer, head);
            }
        }
        for (uint64_t row = 0; row < attend.rows; row++) {
            float inverse = 1.0f / attend.sum[row]; // every section has a token, whose largest term is 1
            for (uint32_t d = 0; d < header->value_dim; d++) {
                out[row * header->value_dim + d] *= inverse;
            }
            lse[row] += logf(attend.sum[row]);
        }
    }
    return BKV_OK;
}

#endif
