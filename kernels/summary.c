// summary.c - sizes, limits and names of the stored format. record_check.c validates records, record_read.c reads them.
#include "summary.h"

#include <assert.h>
#include <string.h>

static uint64_t round_up(uint64_t bytes, uint64_t step) {
    return (bytes + step - 1) / step * step;
}

size_t bkv_dtype_bytes(bkv_dtype_t dtype) {
    assert(dtype == BKV_BF16 || dtype == BKV_FP16 || dtype == BKV_FP32);
    return dtype == BKV_FP32 ? 4 : 2;
}

const char *bkv_dtype_name(bkv_dtype_t dtype) {
    switch (dtype) {
    case BKV_BF16:
        return "bf16";
    case BKV_FP16:
        return "fp16";
    case BKV_FP32:
        return "fp32";
    }
    return NULL;
}

const char *bkv_codec_name(bkv_codec_t codec) {
    switch (codec) {
    case BKV_CODEC_RAW:
        return "raw";
    case BKV_CODEC_DENSE8:
        return "dense8";
    case BKV_CODEC_DENSE4:
        return "dense4";
    case BKV_CODEC_BALANCE:
        return "balance";
    }
    return NULL;
}

bool bkv_dtype_parse(const char *text, bkv_dtype_t *dtype) {
    for (int i = BKV_BF16; i <= BKV_FP32; i++) {
        if (strcmp(text, bkv_dtype_name((bkv_dtype_t)i)) == 0) {
            *dtype = (bkv_dtype_t)i;
            return true;
        }
    }
    return false;
}

bool bkv_codec_parse(const char *text, bkv_codec_t *codec) {
    for (int i = BKV_CODEC_RAW; i <= BKV_CODEC_BALANCE; i++) {
        if (strcmp(text, bkv_codec_name((bkv_codec_t)i)) == 0) {
            *codec = (bkv_codec_t)i;
            return true;
        }
    }
    return false;
}

static bkv_status_t dim_check(const char *name, uint32_t dim, bkv_error_t *err) {
    if (dim == 0 || dim > BKV_MAX_DIM || dim % BKV_DIM_STEP != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %u is not a multiple of %d in %d..%d", name, dim, BKV_DIM_STEP,
                        BKV_DIM_STEP, BKV_MAX_DIM);
    }
    return BKV_OK;
}

bkv_status_t bkv_shape_check(const bkv_shape_t *shape, bkv_error_t *err) {
    if (shape->layers == 0 || shape->layers > BKV_MAX_LAYERS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "layers: %u is not in 1..%d", shape->layers, BKV_MAX_LAYERS);
    }
    if (shape->heads == 0 || shape->heads > BKV_MAX_HEADS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "heads: %u is not in 1..%d", shape->heads, BKV_MAX_HEADS);
    }
    if (shape->layers * shape->heads > BKV_MAX_SECTIONS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "layers * heads: %u is above %d", shape->layers * shape->heads,
                        BKV_MAX_SECTIONS);
    }
    if (shape->tokens == 0 || shape->tokens > BKV_MAX_TOKENS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "tokens: %u is not in 1..%u", shape->tokens, BKV_MAX_TOKENS);
    }
    bkv_status_t status = dim_check("key_dim", shape->key_dim, err);
    if (status != BKV_OK) {
        return status;
    }
    status = dim_check("value_dim", shape->value_dim, err);
    if (status != BKV_OK) {
        return status;
    }
    if (!bkv_dtype_name(shape->dtype)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "dtype: %d is none of bf16, fp16, fp32", (int)shape->dtype);
    }
    return BKV_OK;
}

uint64_t bkv_shape_bytes(const bkv_shape_t *shape) {
    // At most 2^16 sections of 2^24 tokens of 2^11 elements of 4 bytes: 2^53, no overflow.
    return (uint64_t)shape->layers * shape->heads * shape->tokens * (shape->key_dim + shape->value_dim) *
           bkv_dtype_bytes(shape->dtype);
}

bkv_index_kind_t bkv_index_choose(uint32_t source_tokens, uint32_t m) {
    if (m == source_tokens) {
        return BKV_INDEX_ALL;
    }
    return m < (source_tokens + 31) / 32 ? BKV_INDEX_LIST : BKV_INDEX_BITMAP;
}

static void key_layout(uint64_t params_at, uint32_t m, uint32_t dim, uint8_t bits, bkv_dtype_t dtype,
                       bkv_plane_layout_t *layout) {
    layout->key_params = params_at;
    if (bits == BKV_BITS_NATIVE) {
        layout->key_groups = 0;
        layout->key_group_tokens = 0;
        layout->key_row = dim * (uint32_t)bkv_dtype_bytes(dtype);
    } else {
        uint32_t groups = (m + BKV_KEY_GROUP_TOKENS / 2) / BKV_KEY_GROUP_TOKENS;
        groups = groups == 0 ? 1 : groups;
        layout->key_groups = groups;
        layout->key_group_tokens = (m + groups - 1) / groups;
        layout->key_row = dim * bits / 8;
    }
    layout->key_codes = params_at + 4ull * layout->key_groups * dim;
    layout->key_bytes = round_up(layout->key_codes + (uint64_t)m * layout->key_row, BKV_RECORD_ALIGN);
}

static void value_layout(uint32_t m, uint32_t dim, uint8_t bits, bkv_dtype_t dtype, bkv_plane_layout_t *layout) {
    bool native = bits == BKV_BITS_NATIVE;
    layout->value_groups = native ? 0 : (dim + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS;
    layout->value_row = native ? dim * (uint32_t)bkv_dtype_bytes(dtype) : dim * bits / 8;
    layout->value_codes = 4ull * m * layout->value_groups;
    layout->value_bytes = round_up(layout->value_codes + (uint64_t)m * layout->value_row, BKV_RECORD_ALIGN);
}

void bkv_plane_layout(uint32_t source_tokens, uint32_t m, uint32_t key_dim, uint32_t value_dim, uint8_t key_bits,
                      uint8_t value_bits, bkv_index_kind_t index_kind, bool has_weights, bkv_dtype_t dtype,
                      bkv_plane_layout_t *layout) {
    assert(m > 0 && m <= source_tokens && source_tokens <= BKV_MAX_TOKENS);
    switch (index_kind) {
    case BKV_INDEX_ALL:
        layout->index_bytes = 0;
        break;
    case BKV_INDEX_BITMAP:
        layout->index_bytes = (source_tokens + 31ull) / 32 * 4;
        break;
    case BKV_INDEX_LIST:
        layout->index_bytes = 4ull * m;
        break;
    }
    layout->weights = layout->index_bytes;
    uint64_t weight_bytes = has_weights ? round_up(4 + (uint64_t)m, 4) : 0;
    key_layout(layout->weights + weight_bytes, m, key_dim, key_bits, dtype, layout);
    value_layout(m, value_dim, value_bits, dtype, layout);
}
