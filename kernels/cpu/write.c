// write.c - from chosen tokens to the planes of a section: index, weights, refit values, codes.
#include "balance.h"

#include "convert.h"

#include <assert.h>
#include <math.h>

// Least mass that a refit divides by. A row's own share is at least 1 / BKV_KEY_GROUP_MAX of its weight but for rounding.
#define MASS_MIN 1e-20f

// The kept tokens in selection->list, and the log of what each weighs in selection->score. Returns how many.
static uint32_t kept_list(const bkv_selection_t *selection, uint32_t tokens) {
    uint32_t m = 0;
    for (uint32_t t = 0; t < tokens; t++) {
        selection->list[m] = t;
        m += selection->fate[t] != BKV_DROPPED;
    }
    for (uint32_t r = 0; r < m; r++) {
        float weight = selection->weight[selection->list[r]];
        selection->score[r] = weight == 1.0f ? 0.0f : logf(weight); // the protected tokens of a block weigh 1
    }
    return m;
}

static void write_index(const bkv_selection_t *selection, uint32_t m, const uint32_t *position, uint8_t kind,
                        uint64_t index_bytes, uint8_t *plane) {
    memset(plane, 0, (size_t)index_bytes);
    for (uint32_t r = 0; r < m && kind != BKV_INDEX_ALL; r++) {
        uint32_t token = selection->list[r], at = position ? position[token] : token;
        if (kind == BKV_INDEX_LIST) {
            memcpy(plane + 4 * (size_t)r, &at, sizeof(at));
        } else {
            plane[at / 8] = (uint8_t)(plane[at / 8] | 1u << at % 8);
        }
    }
}

// Log weights as base + step * code: half a step of error at most. A base of 0, which the protected tokens of a block have,
// is exact.
static void write_weights(const float *logw, uint32_t m, uint8_t *at) {
    float low = INFINITY, high = -INFINITY;
    for (uint32_t r = 0; r < m; r++) {
        low = logw[r] < low ? logw[r] : low;
        high = logw[r] > high ? logw[r] : high;
    }
    uint16_t base_half = bkv_float_to_half(low);
    float base = bkv_half_expand(base_half);
    uint16_t step_half = bkv_float_to_half(high > base ? (high - base) / 255.0f : 0.0f);
    float step = bkv_half_expand(step_half), inverse = step > 0 ? 1.0f / step : 0.0f;
    memset(at, 0, (4 + (size_t)m + 3) / 4 * 4);
    bkv_store_u16(at, base_half);
    bkv_store_u16(at + 2, step_half);
    for (uint32_t r = 0; r < m; r++) {
        float code = (logw[r] - base) * inverse + 0.5f;
        at[4 + (size_t)r] = (uint8_t)(code < 0 ? 0 : code > 255 ? 255 : code);
    }
}

// The walked rows of a group: their keys about a common centre, which no softmax below notices and rounding does, and half
// their squared norms. Returns how many.
static uint32_t anchors_load(const bkv_source_t *source, const uint32_t *token, uint32_t count,
                             const bkv_selection_t *selection) {
    const bkv_lanes_t *lanes = source->lanes;
    uint32_t rows = 0, dim = source->key_dim;
    float *centre = selection->walk.mean;
    memset(centre, 0, dim * sizeof(float));
    for (uint32_t r = 0; r < count; r++) {
        if (selection->fate[token[r]] == BKV_WALKED) {
            const float *row = selection->k + (size_t)r * dim;
            memcpy(selection->anchors + (size_t)rows * dim, row, dim * sizeof(float));
            lanes->axpy(1, row, dim, centre);
            selection->half[rows] = 0.5f * lanes->dot(row, row, dim);
            selection->walked[rows++] = r;
        }
    }
    for (uint32_t r = rows; r < bkv_tile_pad(rows); r++) {
        selection->half[r] = INFINITY;
    }
    for (uint32_t r = 0; r < rows; r++) {
        lanes->axpy(-1.0f / (float)rows, centre, dim, selection->anchors + (size_t)r * dim);
    }
    return rows;
}

// Hands tokens [first, first + count) out to the walked rows: each by a softmax of exp(-|key - row|^2 / (2 sqrt d)), whose
// |key|^2 and the anchors' centre cancel; a protected token stands for itself and is not handed out.
static void tokens_share(const bkv_source_t *source, uint32_t first, uint32_t count, uint32_t rows,
                         const bkv_selection_t *selection) {
    const bkv_lanes_t *lanes = source->lanes;
    const float *k = bkv_source_keys(source, first, count, selection->walk.k);
    const float *v = bkv_source_values(source, first, count, selection->walk.v);
    uint32_t stride = bkv_tile_pad(rows);
    for (uint32_t t = 0; t < count; t++) {
        selection->share[t] = selection->fate[first + t] == BKV_PROTECTED ? 0.0f : selection->source_weight[first + t];
    }
    const bkv_rows_t tokens = {.rows = k, .n = count, .dim = source->key_dim};
    const bkv_rows_t anchors = {.rows = selection->anchors, .n = rows, .dim = source->key_dim};
    lanes->products(&tokens, &anchors, selection->parts, stride, selection->walk.products);
    lanes->shares(selection->parts, count, rows, stride, selection->half, 1.0f / sqrtf((float)source->key_dim),
                  selection->share, selection->mass);
    lanes->mix(selection->parts, count, rows, stride, v, source->value_dim, selection->fit, selection->walk.products);
}

// Refit: each walked row's value becomes the mean of all values it stands for, those of [first, end) that are not
// protected, each shared out by responsibility. Weights stay the walk's and keys their own: weights from responsibilities
// changed little (16x: error 0.238 for 0.247, NLL 0.058 for 0.050), mean keys made both worse (0.274, 0.071).
static void rows_refit(const bkv_source_t *source, uint32_t first, uint32_t end, const uint32_t *token, uint32_t count,
                       const bkv_selection_t *selection) {
    uint32_t rows = anchors_load(source, token, count, selection), value_dim = source->value_dim, step = selection->walk.limit;
    if (rows == 0) {
        return;
    }
    memset(selection->fit, 0, (size_t)bkv_tile_pad(rows) * value_dim * sizeof(float));
    memset(selection->mass, 0, bkv_tile_pad(rows) * sizeof(float));
    for (uint32_t t = first; t < end; t += step) {
        tokens_share(source, t, end - t < step ? end - t : step, rows, selection);
    }
    for (uint32_t r = 0; r < rows; r++) {
        float *value = selection->v + (size_t)selection->walked[r] * value_dim;
        if (!(selection->mass[r] > MASS_MIN)) {
            continue; // only where keys are so large that a row is not its own nearest: the value stays its own
        }
        float inverse = 1.0f / selection->mass[r];
        for (uint32_t i = 0; i < value_dim; i++) {
            value[i] = selection->fit[(size_t)r * value_dim + i] * inverse;
        }
    }
}

// One key group's worth of tokens at a time. A group's walked rows are refit to the tokens from the group's beginning to
// the next one's, so that the cost stays linear in the tokens.
static void write_rows(const bkv_source_t *source, const bkv_selection_t *selection, const bkv_section_view_t *view,
                       uint8_t *key_plane, uint8_t *value_plane) {
    const bkv_lanes_t *lanes = source->lanes;
    const bkv_plane_layout_t *layout = &view->layout;
    uint32_t done = 0;
    for (uint32_t group = 0; group < layout->key_groups; group++) {
        uint32_t first = group * layout->key_group_tokens, count = bkv_key_group_count(layout, view->tokens, group);
        const uint32_t *token = selection->list + first;
        uint32_t end = first + count < view->tokens ? token[count] : source->tokens;
        bkv_source_gather(source, token, count, selection->k, selection->v);
        rows_refit(source, done, end, token, count, selection);
        done = end;
        lanes->quant_keys(selection->k, count, view->key_dim, view->key_bits,
                          key_plane + layout->key_params + 4ull * group * view->key_dim,
                          key_plane + layout->key_codes + (size_t)first * layout->key_row, selection->ranges);
        lanes->quant_values(selection->v, count, view->value_dim, view->value_bits,
                            value_plane + 4ull * first * layout->value_groups,
                            value_plane + layout->value_codes + (size_t)first * layout->value_row);
    }
}

void bkv_selection_write(const bkv_source_t *source, const uint32_t *position, const bkv_selection_t *selection, void *record) {
    bkv_section_view_t view;
    bkv_record_section(record, source->layer, source->head, &view);
    const bkv_section_t *section =
        &bkv_record_directory(record)[(size_t)source->layer * ((bkv_record_header_t *)record)->heads + source->head];
    uint8_t *key_plane = bkv_record_plane(record, section->key_offset, view.layout.key_bytes);
    uint8_t *value_plane = bkv_record_plane(record, section->value_offset, view.layout.value_bytes);
    uint32_t m = kept_list(selection, source->tokens);
    assert(m == view.tokens);
    write_index(selection, m, position, view.index_kind, view.layout.index_bytes, key_plane);
    if (view.has_weights) {
        write_weights(selection->score, m, key_plane + view.layout.weights);
    }
    write_rows(source, selection, &view, key_plane, value_plane);
}
