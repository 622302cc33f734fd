// codec.c - the public entry points: they check what came from outside, then hand on to a backend. The raw codec, which
// has no arithmetic, is done here.
#include "codec.h"

#include "backend.h"
#include "convert.h"

#include <assert.h>

#define FAIL(...) bkv_fail(err, BKV_INVALID_ARGUMENT, __VA_ARGS__)

bkv_status_t bkv_codec_check(const bkv_codec_params_t *params, bkv_error_t *err) {
    if (!bkv_codec_name(params->codec)) {
        return FAIL("codec: %d is none of raw, dense8, dense4, balance", (int)params->codec);
    }
    if (params->codec == BKV_CODEC_BALANCE && (params->rate < BKV_MIN_RATE || params->rate > BKV_MAX_RATE)) {
        return FAIL("rate: %u is not in %d..%d", params->rate, BKV_MIN_RATE, BKV_MAX_RATE);
    }
    return BKV_OK;
}

static uint64_t uniform_bytes(const bkv_shape_t *shape, const bkv_section_t *section, bool weights) {
    bkv_plane_layout_t layout;
    bkv_plane_layout(shape->tokens, section->tokens, shape->key_dim, shape->value_dim, section->key_bits, section->value_bits,
                     (bkv_index_kind_t)section->index_kind, weights, shape->dtype, &layout);
    return bkv_record_preamble(shape->layers, shape->heads) +
           (layout.key_bytes + layout.value_bytes) * shape->layers * shape->heads;
}

uint64_t bkv_codec_bound(const bkv_shape_t *shape, const bkv_codec_params_t *params) {
    bkv_section_t section = {.tokens = shape->tokens, .index_kind = BKV_INDEX_ALL};
    bool weights = false;
    switch (params->codec) {
    case BKV_CODEC_RAW:
        section.key_bits = section.value_bits = BKV_BITS_NATIVE;
        break;
    case BKV_CODEC_DENSE8:
        section.key_bits = section.value_bits = 8;
        break;
    case BKV_CODEC_DENSE4:
        section.key_bits = section.value_bits = 4;
        break;
    case BKV_CODEC_BALANCE: {
        uint64_t budget = bkv_balance_budget(shape, params->rate);
        if (bkv_balance_fits(shape, budget)) {
            return budget;
        }
        // Nothing fits the rate: what the smallest record would take.
        section = (bkv_section_t){.tokens = 1, .key_bits = 2, .value_bits = 2, .index_kind = BKV_INDEX_LIST};
        section.index_kind = (uint8_t)bkv_index_choose(shape->tokens, 1);
        break;
    }
    }
    return uniform_bytes(shape, &section, weights);
}

size_t bkv_raw_payload(const bkv_shape_t *shape) {
    return (size_t)bkv_record_preamble(shape->layers, shape->heads);
}

void bkv_block_from_payload(const bkv_shape_t *shape, const void *payload, bkv_block_t *block) {
    int64_t element = (int64_t)bkv_dtype_bytes(shape->dtype);
    int64_t key_token = element * shape->key_dim, value_token = element * shape->value_dim;
    int64_t key_head = key_token * shape->tokens, value_head = value_token * shape->tokens;
    int64_t layer = (key_head + value_head) * shape->heads;
    block->shape = *shape;
    block->keys = payload;
    block->values = (const uint8_t *)payload + key_head * shape->heads;
    block->key_stride = (bkv_stride_t){.layer = layer, .head = key_head, .token = key_token};
    block->value_stride = (bkv_stride_t){.layer = layer, .head = value_head, .token = value_token};
}

static const uint8_t *row_at(const bkv_block_t *block, bool values, uint32_t layer, uint32_t head, uint32_t token) {
    const bkv_stride_t *stride = values ? &block->value_stride : &block->key_stride;
    return (const uint8_t *)(values ? block->values : block->keys) + (int64_t)layer * stride->layer +
           (int64_t)head * stride->head + (int64_t)token * stride->token;
}

// True when the tokens of a head follow one another without a gap.
static bool is_dense(const bkv_block_t *block, bool values) {
    uint32_t dim = values ? block->shape.value_dim : block->shape.key_dim;
    const bkv_stride_t *stride = values ? &block->value_stride : &block->key_stride;
    return stride->token == (int64_t)(dim * bkv_dtype_bytes(block->shape.dtype));
}

// Says which token of a head it was; the caller knows that there is one.
static bkv_status_t head_refuse(const bkv_block_t *block, bool values, uint32_t layer, uint32_t head, bool half_range,
                                bkv_error_t *err) {
    const char *tensor = values ? "v" : "k";
    uint32_t dim = values ? block->shape.value_dim : block->shape.key_dim;
    for (uint32_t token = 0; token < block->shape.tokens; token++) {
        const uint8_t *row = row_at(block, values, layer, head, token);
        if (bkv_row_exceeds(block->shape.dtype, row, dim, false)) {
            return FAIL("%s: NaN or infinity at layer %u, head %u, token %u", tensor, layer, head, token);
        }
        if (half_range && bkv_row_exceeds(block->shape.dtype, row, dim, true)) {
            return FAIL("%s: a value beyond 65504 at layer %u, head %u, token %u, which only codec raw can hold", tensor, layer,
                        head, token);
        }
    }
    assert(!"the scan of the whole head found something");
    return BKV_INTERNAL;
}

static bkv_status_t scan_head(const bkv_block_t *block, bool values, uint32_t layer, uint32_t head, bool half_range,
                              bkv_error_t *err) {
    uint32_t dim = values ? block->shape.value_dim : block->shape.key_dim;
    uint32_t tokens = block->shape.tokens, step = is_dense(block, values) ? tokens : 1;
    for (uint32_t token = 0; token < tokens; token += step) {
        if (bkv_row_exceeds(block->shape.dtype, row_at(block, values, layer, head, token), (size_t)step * dim, half_range)) {
            return head_refuse(block, values, layer, head, half_range, err);
        }
    }
    return BKV_OK;
}

bkv_status_t bkv_head_check(const bkv_block_t *block, uint32_t layer, uint32_t head, bkv_error_t *err) {
    bkv_status_t status = scan_head(block, false, layer, head, true, err);
    return status != BKV_OK ? status : scan_head(block, true, layer, head, true, err);
}

static bkv_status_t scan_block(const bkv_block_t *block, bool half_range, bkv_error_t *err) {
    for (uint32_t layer = 0; layer < block->shape.layers; layer++) {
        for (uint32_t plane = 0; plane < 2; plane++) {
            for (uint32_t head = 0; head < block->shape.heads; head++) {
                bkv_status_t status = scan_head(block, plane == 1, layer, head, half_range, err);
                if (status != BKV_OK) {
                    return status;
                }
            }
        }
    }
    return BKV_OK;
}

static void copy_head(const bkv_block_t *block, bool values, uint32_t layer, uint32_t head, uint8_t *plane) {
    size_t row = (values ? block->shape.value_dim : block->shape.key_dim) * bkv_dtype_bytes(block->shape.dtype);
    if (row_at(block, values, layer, head, 0) == plane) {
        return; // received in place
    }
    if (is_dense(block, values)) {
        memcpy(plane, row_at(block, values, layer, head, 0), row * block->shape.tokens);
        return;
    }
    for (uint32_t token = 0; token < block->shape.tokens; token++) {
        memcpy(plane + row * token, row_at(block, values, layer, head, token), row);
    }
}

size_t bkv_raw_begin(const bkv_shape_t *shape, const bkv_record_id_t *id, void *record) {
    bkv_record_init(record, shape, id, BKV_CODEC_RAW, 0);
    bkv_section_t *directory = bkv_record_directory(record);
    for (uint32_t i = 0; i < shape->layers * shape->heads; i++) {
        directory[i] = (bkv_section_t){
            .tokens = shape->tokens, .key_bits = BKV_BITS_NATIVE, .value_bits = BKV_BITS_NATIVE, .index_kind = BKV_INDEX_ALL};
    }
    return (size_t)bkv_record_place(record);
}

bool bkv_values_finite(bkv_dtype_t dtype, const void *values, size_t n) {
    return !bkv_row_exceeds(dtype, values, n, false);
}

static void raw_compress(const bkv_block_t *block, const bkv_record_id_t *id, void *record) {
    const bkv_shape_t *shape = &block->shape;
    bkv_raw_begin(shape, id, record);
    const bkv_section_t *directory = bkv_record_directory(record);
    for (uint32_t i = 0; i < shape->layers * shape->heads; i++) {
        uint8_t *bytes = record;
        copy_head(block, false, i / shape->heads, i % shape->heads, bytes + (size_t)directory[i].key_offset * BKV_RECORD_ALIGN);
        copy_head(block, true, i / shape->heads, i % shape->heads,
                  bytes + (size_t)directory[i].value_offset * BKV_RECORD_ALIGN);
    }
}

bkv_status_t bkv_codec_check_shape(const bkv_codec_params_t *params, const bkv_shape_t *shape, bkv_error_t *err) {
    uint64_t budget = params->codec == BKV_CODEC_BALANCE ? bkv_balance_budget(shape, params->rate) : 0;
    if (params->codec == BKV_CODEC_BALANCE && !bkv_balance_fits(shape, budget)) {
        return FAIL("tokens: %u are too few for rate %u, whose %llu bytes hold no record", shape->tokens, params->rate,
                    (unsigned long long)budget);
    }
    uint64_t bound = bkv_codec_bound(shape, params);
    if (bound > BKV_RECORD_MAX) {
        return FAIL("tokens: %u make a record of %llu bytes, above %llu", shape->tokens, (unsigned long long)bound,
                    (unsigned long long)BKV_RECORD_MAX);
    }
    return BKV_OK;
}

static bkv_status_t check_compress(const bkv_block_t *block, const bkv_codec_params_t *params, const bkv_record_id_t *id,
                                   size_t capacity, bkv_error_t *err) {
    bkv_status_t status = bkv_shape_check(&block->shape, err);
    if (status != BKV_OK) {
        return status;
    }
    status = bkv_codec_check(params, err);
    if (status != BKV_OK) {
        return status;
    }
    if (id->position > UINT64_MAX - block->shape.tokens) {
        return FAIL("position: %llu leaves no room for %u tokens", (unsigned long long)id->position, block->shape.tokens);
    }
    status = bkv_codec_check_shape(params, &block->shape, err);
    if (status != BKV_OK) {
        return status;
    }
    uint64_t bound = bkv_codec_bound(&block->shape, params);
    if (capacity < bound) {
        return FAIL("capacity: %zu bytes, the record may need %llu", capacity, (unsigned long long)bound);
    }
    return BKV_OK;
}

bkv_status_t bkv_compress(const bkv_backend_t *backend, const bkv_block_t *block, const bkv_codec_params_t *params,
                          const bkv_record_id_t *id, void *record, size_t capacity, void *workspace, size_t *length,
                          bkv_error_t *err) {
    assert((uintptr_t)record % BKV_RECORD_ALIGN == 0);
    bkv_status_t status = check_compress(block, params, id, capacity, err);
    if (status != BKV_OK) {
        return status;
    }
    if (params->codec == BKV_CODEC_RAW || !backend->checks_values) {
        status = scan_block(block, params->codec != BKV_CODEC_RAW, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    if (params->codec != BKV_CODEC_RAW) {
        return backend->compress(block, params, id, record, capacity, workspace, length, err);
    }
    raw_compress(block, id, record);
    *length = (size_t)((bkv_record_header_t *)record)->length;
    return BKV_OK;
}

size_t bkv_compress_workspace(const bkv_backend_t *backend, const bkv_shape_t *shape, const bkv_codec_params_t *params) {
    return params->codec == BKV_CODEC_RAW ? 1 : backend->compress_workspace(shape, params);
}

static bkv_status_t check_family(const void *const *records, uint32_t count, bkv_error_t *err) {
    if (count == 0) {
        return FAIL("records: none");
    }
    const bkv_record_header_t *first = records[0];
    for (uint32_t i = 1; i < count; i++) {
        const bkv_record_header_t *other = records[i];
        if (other->layers != first->layers || other->heads != first->heads || other->first_layer != first->first_layer ||
            other->first_head != first->first_head) {
            return FAIL("records: %u and 0 cover different layers or heads", i);
        }
        if (other->key_dim != first->key_dim || other->value_dim != first->value_dim) {
            return FAIL("records: %u and 0 have different dims", i);
        }
    }
    return BKV_OK;
}

static bkv_status_t check_fold(const void *const *records, uint32_t count, bkv_error_t *err) {
    bkv_status_t status = check_family(records, count, err);
    if (status != BKV_OK) {
        return status;
    }
    const bkv_record_header_t *first = records[0];
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < count; i++) {
        const bkv_record_header_t *header = records[i];
        if (header->position != first->position + tokens) {
            return FAIL("records: %u starts at position %llu, not at %llu where the one before it ends", i,
                        (unsigned long long)header->position, (unsigned long long)(first->position + tokens));
        }
        if (header->dtype != first->dtype) {
            return FAIL("records: %u and 0 have different dtypes", i);
        }
        tokens += header->tokens;
        if (tokens > BKV_MAX_TOKENS) {
            return FAIL("records: more than %u tokens in one fold", BKV_MAX_TOKENS);
        }
    }
    return BKV_OK;
}

bkv_status_t bkv_fold(const bkv_backend_t *backend, const void *const *records, uint32_t count, const bkv_record_id_t *id,
                      const bkv_fold_params_t *params, void *record, void *workspace, size_t *length, bkv_error_t *err) {
    assert((uintptr_t)record % BKV_RECORD_ALIGN == 0);
    bkv_status_t status = check_fold(records, count, err);
    return status != BKV_OK ? status : backend->fold(records, count, id, params, record, workspace, length, err);
}

size_t bkv_fold_workspace(const bkv_backend_t *backend, const void *const *records, uint32_t count, uint64_t budget) {
    return count == 0 ? 1 : backend->fold_workspace(records, count, budget);
}

static bkv_status_t check_attend(const void *const *records, uint32_t count, const bkv_attend_args_t *args, bkv_error_t *err) {
    bkv_status_t status = check_family(records, count, err);
    if (status != BKV_OK) {
        return status;
    }
    const bkv_record_header_t *first = records[0];
    if (args->layers == 0 || args->first_layer >= first->layers || args->layers > first->layers - args->first_layer) {
        return FAIL("layers: %u from %u on are not within the records' %u", args->layers, args->first_layer, first->layers);
    }
    if (args->query_heads == 0 || args->query_heads > UINT16_MAX || args->query_heads % first->heads != 0) {
        return FAIL("query_heads: %u is not a multiple of the %u KV heads", args->query_heads, first->heads);
    }
    if (args->queries == 0 || args->queries > BKV_MAX_TOKENS) {
        return FAIL("queries: %u is not in 1..%u", args->queries, BKV_MAX_TOKENS);
    }
    if (bkv_row_exceeds(BKV_FP32, &args->scale, 1, false)) {
        return FAIL("scale: NaN or infinity");
    }
    if (bkv_row_exceeds(BKV_FP32, args->q, (size_t)args->layers * args->query_heads * args->queries * first->key_dim, false)) {
        return FAIL("q: NaN or infinity");
    }
    return BKV_OK;
}

bkv_status_t bkv_attend(const bkv_backend_t *backend, const void *const *records, uint32_t count, const bkv_attend_args_t *args,
                        void *workspace, bkv_error_t *err) {
    bkv_status_t status = check_attend(records, count, args, err);
    return status != BKV_OK ? status : backend->attend(records, count, args, workspace, err);
}

size_t bkv_attend_workspace(const bkv_backend_t *backend, const void *const *records, uint32_t count,
                            const bkv_attend_args_t *args) {
    return count == 0 ? 1 : backend->attend_workspace(records, count, args);
}
