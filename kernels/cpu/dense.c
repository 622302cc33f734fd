// dense.c - dense8 and dense4: every token, quantised, for engines that must get full-length blocks back.
#include "backend.h"

#include <assert.h>

void bkv_block_read(const bkv_lanes_t *lanes, const bkv_block_t *block, bool values, uint32_t layer, uint32_t head,
                    uint32_t first, uint32_t count, float *out) {
    const bkv_stride_t *stride = values ? &block->value_stride : &block->key_stride;
    uint32_t dim = values ? block->shape.value_dim : block->shape.key_dim;
    const uint8_t *from = (const uint8_t *)(values ? block->values : block->keys) + (int64_t)layer * stride->layer +
                          (int64_t)head * stride->head + (int64_t)first * stride->token;
    if (stride->token == (int64_t)(dim * bkv_dtype_bytes(block->shape.dtype))) {
        lanes->to_float(block->shape.dtype, from, (size_t)count * dim, out);
        return;
    }
    for (uint32_t t = 0; t < count; t++) {
        lanes->to_float(block->shape.dtype, from + (int64_t)t * stride->token, dim, out + (size_t)t * dim);
    }
}

typedef struct dense_scratch {
    float *rows;   // [BKV_KEY_GROUP_MAX][larger dim]
    float *ranges; // [4][key_dim]
} dense_scratch_t;

static size_t scratch_carve(const bkv_shape_t *shape, void *base, dense_scratch_t *dense) {
    bkv_scratch_t scratch = {.base = base};
    uint32_t dim = shape->key_dim > shape->value_dim ? shape->key_dim : shape->value_dim;
    dense->rows = bkv_scratch_take(&scratch, (uint64_t)BKV_KEY_GROUP_MAX * dim * sizeof(float));
    dense->ranges = bkv_scratch_take(&scratch, 4ull * shape->key_dim * sizeof(float));
    return scratch.used;
}

size_t bkv_dense_scratch(const bkv_shape_t *shape) {
    dense_scratch_t dense;
    return scratch_carve(shape, NULL, &dense);
}

// One section, a key group's worth of tokens at a time, so that the float rows stay in the nearest cache.
static void compress_section(const bkv_lanes_t *lanes, const bkv_block_t *block, uint32_t layer, uint32_t head,
                             const bkv_section_view_t *view, uint8_t *key_plane, uint8_t *value_plane,
                             const dense_scratch_t *dense) {
    const bkv_plane_layout_t *layout = &view->layout;
    uint32_t step = layout->key_group_tokens;
    assert(step <= BKV_KEY_GROUP_MAX);
    for (uint32_t group = 0; group < layout->key_groups; group++) {
        uint32_t first = group * step, count = bkv_key_group_count(layout, view->tokens, group);
        bkv_block_read(lanes, block, false, layer, head, first, count, dense->rows);
        lanes->quant_keys(dense->rows, count, view->key_dim, view->key_bits,
                          key_plane + layout->key_params + 4ull * group * view->key_dim,
                          key_plane + layout->key_codes + (size_t)first * layout->key_row, dense->ranges);
        bkv_block_read(lanes, block, true, layer, head, first, count, dense->rows);
        lanes->quant_values(dense->rows, count, view->value_dim, view->value_bits,
                            value_plane + 4ull * first * layout->value_groups,
                            value_plane + layout->value_codes + (size_t)first * layout->value_row);
    }
}

bkv_status_t bkv_dense_compress(const bkv_lanes_t *lanes, const bkv_block_t *block, const bkv_codec_params_t *params,
                                const bkv_record_id_t *id, void *record, void *scratch, bkv_error_t *err) {
    const bkv_shape_t *shape = &block->shape;
    uint8_t bits = params->codec == BKV_CODEC_DENSE8 ? 8 : 4;
    bkv_record_init(record, shape, id, params->codec, 0);
    for (uint32_t i = 0; i < shape->layers * shape->heads; i++) {
        bkv_record_directory(record)[i] =
            (bkv_section_t){.tokens = shape->tokens, .key_bits = bits, .value_bits = bits, .index_kind = BKV_INDEX_ALL};
    }
    bkv_record_place(record);
    dense_scratch_t dense;
    scratch_carve(shape, scratch, &dense);
    for (uint32_t i = 0; i < shape->layers * shape->heads; i++) {
        bkv_status_t status = bkv_head_check(block, i / shape->heads, i % shape->heads, err);
        if (status != BKV_OK) {
            return status;
        }
        bkv_section_view_t view;
        bkv_record_section(record, i / shape->heads, i % shape->heads, &view);
        uint8_t *key_plane = bkv_record_plane(record, bkv_record_directory(record)[i].key_offset, view.layout.key_bytes);
        uint8_t *value_plane = bkv_record_plane(record, bkv_record_directory(record)[i].value_offset, view.layout.value_bytes);
        compress_section(lanes, block, i / shape->heads, i % shape->heads, &view, key_plane, value_plane, &dense);
    }
    return BKV_OK;
}
