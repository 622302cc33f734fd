// attend_ref.c - weighted attention over records with its log-sum-exp, and the merge of partial results.
//
// One pass with an online softmax (Milakov and Gimelshein, arXiv 1805.02867): tokens come in tiles that are dequantised once
// and used by every query that shares the KV head. A token of weight w counts as w tokens: log w is added to its logit, so
// that numerator and denominator use the same weight.
#include "backend.h"

#include "convert.h"
#include "vector.h"

#include <assert.h>
#include <math.h>

#define TILE 64

typedef struct attend_scratch {
    float *k, *v;         // [TILE][dim]
    float *logw, *scores; // [TILE]
    float *sum;           // [rows]: of exp(logit - running maximum), which lse holds meanwhile
} attend_scratch_t;

// The query heads of one KV head, all their queries: one row each.
static uint64_t rows_per_head(const bkv_record_header_t *header, const bkv_attend_args_t *args) {
    return (uint64_t)(args->query_heads / header->heads) * args->queries;
}

static size_t scratch_carve(const bkv_record_header_t *header, const bkv_attend_args_t *args, void *base,
                            attend_scratch_t *attend) {
    bkv_scratch_t scratch = {.base = base};
    attend->k = bkv_scratch_take(&scratch, (uint64_t)TILE * header->key_dim * sizeof(float));
    attend->v = bkv_scratch_take(&scratch, (uint64_t)TILE * header->value_dim * sizeof(float));
    attend->logw = bkv_scratch_take(&scratch, TILE * sizeof(float));
    attend->scores = bkv_scratch_take(&scratch, TILE * sizeof(float));
    attend->sum = bkv_scratch_take(&scratch, rows_per_head(header, args) * sizeof(float));
    return scratch.used;
}

size_t bkv_ref_attend_workspace(const void *const *records, uint32_t count, const bkv_attend_args_t *args) {
    assert(count > 0);
    attend_scratch_t attend;
    return scratch_carve(records[0], args, NULL, &attend);
}

// Takes `count` dequantised tokens into one row's running result. False when a logit leaves the range of float.
static bool row_take(const attend_scratch_t *tile, uint32_t count, const float *q, float scale, uint32_t key_dim,
                     uint32_t value_dim, float *out, float *max, float *sum) {
    float top = *max;
    for (uint32_t t = 0; t < count; t++) {
        tile->scores[t] = scale * bkv_dot(q, tile->k + (size_t)t * key_dim, key_dim) + tile->logw[t];
        top = tile->scores[t] > top ? tile->scores[t] : top;
    }
    if (bkv_row_exceeds(BKV_FP32, tile->scores, count, false)) {
        return false;
    }
    if (top > *max) {
        float shrink = expf(*max - top); // 0 for the first tile, whose maximum so far is -INFINITY
        *sum *= shrink;
        for (uint32_t i = 0; i < value_dim; i++) {
            out[i] *= shrink;
        }
        *max = top;
    }
    for (uint32_t t = 0; t < count; t++) {
        float p = expf(tile->scores[t] - top);
        *sum += p;
        bkv_axpy(p, tile->v + (size_t)t * value_dim, value_dim, out);
    }
    return true;
}

static bool head_take(const void *record, uint32_t layer, uint32_t head, const bkv_attend_args_t *args, uint64_t rows,
                      const float *q, float *out, float *max, const attend_scratch_t *attend) {
    bkv_section_view_t view;
    bkv_record_section(record, layer, head, &view);
    float scale = args->scale == 0.0f ? 1.0f / sqrtf((float)view.key_dim) : args->scale;
    for (uint32_t first = 0; first < view.tokens; first += TILE) {
        uint32_t count = view.tokens - first < TILE ? view.tokens - first : TILE;
        bkv_section_read_range(&view, first, count, attend->k, attend->v, attend->logw);
        for (uint64_t row = 0; row < rows; row++) {
            if (!row_take(attend, count, q + row * view.key_dim, scale, view.key_dim, view.value_dim,
                          out + row * view.value_dim, &max[row], &attend->sum[row])) {
                return false;
            }
        }
    }
    return true;
}

bkv_status_t bkv_ref_attend(const void *const *records, uint32_t count, const bkv_attend_args_t *args, void *workspace,
                            bkv_error_t *err) {
    const bkv_record_header_t *header = records[0];
    uint64_t rows = rows_per_head(header, args);
    attend_scratch_t attend;
    scratch_carve(header, args, workspace, &attend);
    for (uint32_t i = 0; i < args->layers * header->heads; i++) {
        uint32_t layer = args->first_layer + i / header->heads, head = i % header->heads;
        const float *q = args->q + i * rows * header->key_dim;
        float *out = args->out + i * rows * header->value_dim, *lse = args->lse + i * rows;
        memset(out, 0, rows * header->value_dim * sizeof(float));
        for (uint64_t row = 0; row < rows; row++) {
            lse[row] = -INFINITY;
            attend.sum[row] = 0;
        }
        for (uint32_t r = 0; r < count; r++) {
            if (!head_take(records[r], layer, head, args, rows, q, out, lse, &attend)) {
                return bkv_fail(err, BKV_INVALID_ARGUMENT, "q: a logit at layer %u, head %u is beyond the range of float32",
                                layer, head);
            }
        }
        for (uint64_t row = 0; row < rows; row++) {
            float inverse = 1.0f / attend.sum[row]; // every section has a token, whose largest term is 1
            for (uint32_t d = 0; d < header->value_dim; d++) {
                out[row * header->value_dim + d] *= inverse;
            }
            lse[row] += logf(attend.sum[row]);
        }
    }
    return BKV_OK;
}

void bkv_attend_merge(float *out_a, float *lse_a, const float *out_b, const float *lse_b, size_t rows, uint32_t value_dim) {
    for (size_t row = 0; row < rows; row++, out_a += value_dim, out_b += value_dim) {
        if (lse_b[row] == -INFINITY) {
            continue;
        }
        if (lse_a[row] == -INFINITY) {
            memcpy(out_a, out_b, value_dim * sizeof(float));
            lse_a[row] = lse_b[row];
            continue;
        }
        float top = lse_a[row] > lse_b[row] ? lse_a[row] : lse_b[row];
        float a = expf(lse_a[row] - top), b = expf(lse_b[row] - top);
        float inverse = 1.0f / (a + b);
        for (uint32_t i = 0; i < value_dim; i++) {
            out_a[i] = (out_a[i] * a + out_b[i] * b) * inverse;
        }
        lse_a[row] = top + logf(a + b);
    }
}
