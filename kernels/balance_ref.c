// balance_ref.c - the balance codec over one block: for each (layer, head) the selection (select_ref.c, walk_ref.c), then
// its planes. plan.c says how many tokens and bits the rate allows.
#include "balance.h"

#include "convert.h"
#include "quant.h"

#include <assert.h>
#include <math.h>

static void block_source_read(const bkv_source_t *source, uint32_t first, uint32_t count, float *k, float *v) {
    if (k) {
        bkv_block_read(source->from, false, source->layer, source->head, first, count, k);
    }
    if (v) {
        bkv_block_read(source->from, true, source->layer, source->head, first, count, v);
    }
}

static void write_index(const bkv_selection_t *selection, uint32_t tokens, const uint32_t *position, uint8_t kind,
                        uint64_t index_bytes, uint8_t *plane) {
    memset(plane, 0, (size_t)index_bytes);
    uint32_t written = 0;
    for (uint32_t t = 0; t < tokens && kind != BKV_INDEX_ALL; t++) {
        if (selection->fate[t] == BKV_DROPPED) {
            continue;
        }
        uint32_t at = position ? position[t] : t;
        if (kind == BKV_INDEX_LIST) {
            memcpy(plane + 4 * (size_t)written++, &at, sizeof(at));
        } else {
            plane[at / 8] = (uint8_t)(plane[at / 8] | 1u << at % 8);
        }
    }
}

// Log weights as base + step * code: half a step of error at most. A base of 0, which the protected tokens of a block have,
// is exact.
static void write_weights(const bkv_selection_t *selection, uint32_t tokens, uint32_t m, uint8_t *at) {
    float low = INFINITY, high = -INFINITY;
    for (uint32_t t = 0; t < tokens; t++) {
        if (selection->fate[t] != BKV_DROPPED) {
            float logw = logf(selection->weight[t]);
            low = logw < low ? logw : low;
            high = logw > high ? logw : high;
        }
    }
    uint16_t base_half = bkv_float_to_half(low);
    float base = bkv_half_expand(base_half);
    uint16_t step_half = bkv_float_to_half(high > base ? (high - base) / 255.0f : 0.0f);
    float step = bkv_half_expand(step_half), inverse = step > 0 ? 1.0f / step : 0.0f;
    memset(at, 0, (4 + (size_t)m + 3) / 4 * 4);
    bkv_store_u16(at, base_half);
    bkv_store_u16(at + 2, step_half);
    at += 4;
    for (uint32_t t = 0; t < tokens; t++) {
        if (selection->fate[t] != BKV_DROPPED) {
            float code = (logf(selection->weight[t]) - base) * inverse + 0.5f;
            *at++ = (uint8_t)(code < 0 ? 0 : code > 255 ? 255 : code);
        }
    }
}

// Quantises one key group's worth of gathered rows at a time.
static void write_rows(const bkv_source_t *source, const bkv_selection_t *selection, const bkv_section_view_t *view,
                       uint8_t *key_plane, uint8_t *value_plane) {
    const bkv_plane_layout_t *layout = &view->layout;
    uint32_t token = 0;
    for (uint32_t group = 0; group < layout->key_groups; group++) {
        uint32_t first = group * layout->key_group_tokens, count = 0;
        uint32_t wanted = view->tokens - first < layout->key_group_tokens ? view->tokens - first : layout->key_group_tokens;
        for (; count < wanted; token++) {
            if (selection->fate[token] != BKV_DROPPED) {
                source->read(source, token, 1, selection->k + (size_t)count * view->key_dim,
                             selection->v + (size_t)count * view->value_dim);
                count++;
            }
        }
        bkv_quant_key_group(selection->k, count, view->key_dim, view->key_bits,
                            key_plane + layout->key_params + 4ull * group * view->key_dim,
                            key_plane + layout->key_codes + (size_t)first * layout->key_row, selection->ranges);
        for (uint32_t t = 0; t < count; t++) {
            bkv_quant_value_row(selection->v + (size_t)t * view->value_dim, view->value_dim, view->value_bits,
                                value_plane + 4ull * (first + t) * layout->value_groups,
                                value_plane + layout->value_codes + (size_t)(first + t) * layout->value_row);
        }
    }
}

void bkv_selection_write(const bkv_source_t *source, const bkv_selection_t *selection, void *record, const uint32_t *position) {
    bkv_section_view_t view;
    bkv_record_section(record, source->layer, source->head, &view);
    const bkv_section_t *section =
        &bkv_record_directory(record)[(size_t)source->layer * ((bkv_record_header_t *)record)->heads + source->head];
    uint8_t *key_plane = bkv_record_plane(record, section->key_offset, view.layout.key_bytes);
    uint8_t *value_plane = bkv_record_plane(record, section->value_offset, view.layout.value_bytes);
    write_index(selection, source->tokens, position, view.index_kind, view.layout.index_bytes, key_plane);
    if (view.has_weights) {
        write_weights(selection, source->tokens, view.tokens, key_plane + view.layout.weights);
    }
    write_rows(source, selection, &view, key_plane, value_plane);
}

size_t bkv_ref_balance_workspace(const bkv_shape_t *shape, const bkv_codec_params_t *params) {
    (void)params;
    bkv_scratch_t scratch = {0};
    bkv_selection_t selection;
    bkv_selection_carve(&scratch, shape->tokens, shape->key_dim, shape->value_dim, &selection);
    return scratch.used;
}

// Tokens of the block that lie below the sequence's sink positions.
static uint32_t sink_tokens(const bkv_block_t *block, const bkv_codec_params_t *params, const bkv_record_id_t *id) {
    uint64_t sink = params->sink > id->position ? params->sink - id->position : 0;
    return sink < block->shape.tokens ? (uint32_t)sink : block->shape.tokens;
}

bkv_status_t bkv_ref_compress_balance(const bkv_block_t *block, const bkv_codec_params_t *params, const bkv_record_id_t *id,
                                      void *record, void *workspace, bkv_error_t *err) {
    const bkv_shape_t *shape = &block->shape;
    bkv_section_t section;
    bool weights;
    if (!bkv_balance_plan(shape, bkv_balance_budget(shape, params->rate), &section, &weights)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "rate: %u leaves no room for a token", params->rate);
    }
    bkv_record_init(record, shape, id, BKV_CODEC_BALANCE, weights ? BKV_RECORD_WEIGHTS : 0);
    bkv_record_header_t *header = record;
    header->rate = (uint8_t)params->rate;
    header->seed = params->seed;
    uint32_t sections = shape->layers * shape->heads;
    for (uint32_t i = 0; i < sections; i++) {
        bkv_record_directory(record)[i] = section;
    }
    bkv_record_place(record);

    bkv_scratch_t scratch = {.base = workspace};
    bkv_selection_t selection;
    bkv_selection_carve(&scratch, shape->tokens, shape->key_dim, shape->value_dim, &selection);
    for (uint32_t i = 0; i < sections; i++) {
        bkv_source_t source = {.tokens = shape->tokens,
                               .key_dim = shape->key_dim,
                               .value_dim = shape->value_dim,
                               .read = block_source_read,
                               .from = block,
                               .layer = i / shape->heads,
                               .head = i % shape->heads};
        bkv_random_t random = {.state = params->seed};
        bkv_random_mix(&random, id->position);
        bkv_random_mix(&random, i);
        for (uint32_t t = 0; t < shape->tokens; t++) {
            selection.weight[t] = 1;
        }
        bkv_select(&source, sink_tokens(block, params, id), section.tokens, &random, &selection);
        bkv_selection_write(&source, &selection, record, NULL);
    }
    return BKV_OK;
}
