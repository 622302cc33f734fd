// record_read.c - reading a validated record: its shape, one section, its tokens as attention sees them.
// record_check.c must have accepted the record; slices are made in record_write.c.
#include "record.h"

#include "convert.h"
#include "quant.h"

#include <assert.h>
#include <string.h>

void bkv_record_shape(const void *record, bkv_shape_t *shape) {
    const bkv_record_header_t *header = record;
    *shape = (bkv_shape_t){.layers = header->layers,
                           .heads = header->heads,
                           .tokens = header->tokens,
                           .key_dim = header->key_dim,
                           .value_dim = header->value_dim,
                           .dtype = (bkv_dtype_t)header->dtype};
}

void bkv_record_section(const void *record, uint32_t layer, uint32_t head, bkv_section_view_t *view) {
    const bkv_record_header_t *header = record;
    assert(layer < header->layers && head < header->heads);
    const bkv_section_t *section = &bkv_record_directory_const(record)[(size_t)layer * header->heads + head];
    view->key_plane = (const uint8_t *)record + (size_t)section->key_offset * BKV_RECORD_ALIGN;
    view->value_plane = (const uint8_t *)record + (size_t)section->value_offset * BKV_RECORD_ALIGN;
    bkv_record_layout(header, section, &view->layout);
    view->tokens = section->tokens;
    view->source_tokens = header->tokens;
    view->key_dim = header->key_dim;
    view->value_dim = header->value_dim;
    view->key_bits = section->key_bits;
    view->value_bits = section->value_bits;
    view->index_kind = section->index_kind;
    view->has_weights = (header->flags & BKV_RECORD_WEIGHTS) != 0;
    view->dtype = (bkv_dtype_t)header->dtype;
}

static void read_index(const bkv_section_view_t *view, uint32_t *index) {
    if (view->index_kind == BKV_INDEX_ALL) {
        for (uint32_t t = 0; t < view->tokens; t++) {
            index[t] = t;
        }
    } else if (view->index_kind == BKV_INDEX_LIST) {
        memcpy(index, view->key_plane, (size_t)view->tokens * sizeof(uint32_t));
    } else {
        uint32_t n = 0;
        for (uint32_t word = 0; word < (view->source_tokens + 31) / 32; word++) {
            uint32_t bits;
            memcpy(&bits, view->key_plane + 4 * (size_t)word, sizeof(bits));
            for (; bits; bits &= bits - 1) {
                index[n++] = word * 32 + (uint32_t)__builtin_ctz(bits);
            }
        }
        assert(n == view->tokens);
    }
}

static void read_weights(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *logw) {
    if (!view->has_weights) {
        memset(logw, 0, count * sizeof(float));
        return;
    }
    const uint8_t *at = view->key_plane + view->layout.weights;
    float base = bkv_half_expand(bkv_load_u16(at)), step = bkv_half_expand(bkv_load_u16(at + 2));
    for (uint32_t t = 0; t < count; t++) {
        logw[t] = base + step * (float)at[4 + (size_t)first + t];
    }
}

void bkv_ref_read_keys(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *k) {
    const bkv_plane_layout_t *layout = &view->layout;
    uint32_t dim = view->key_dim;
    const uint8_t *rows = view->key_plane + layout->key_codes;
    float params[2 * BKV_MAX_DIM], scale[BKV_MAX_DIM], zero[BKV_MAX_DIM];
    uint8_t codes[BKV_MAX_DIM];
    uint32_t loaded = UINT32_MAX;
    for (uint32_t t = first; t < first + count; t++, k += dim) {
        uint32_t group = t / layout->key_group_tokens;
        if (group != loaded) {
            bkv_halves_to_float(view->key_plane + layout->key_params + 4ull * group * dim, 2 * (size_t)dim, params);
            for (uint32_t i = 0; i < dim; i++) {
                scale[i] = params[2 * i];
                zero[i] = params[2 * i + 1];
            }
            loaded = group;
        }
        bkv_codes_unpack(rows + (size_t)t * layout->key_row, dim, view->key_bits, codes);
        for (uint32_t i = 0; i < dim; i++) {
            k[i] = zero[i] + scale[i] * (float)codes[i];
        }
    }
}

void bkv_ref_read_values(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *v) {
    const bkv_plane_layout_t *layout = &view->layout;
    uint32_t dim = view->value_dim;
    const uint8_t *rows = view->value_plane + layout->value_codes;
    uint8_t codes[BKV_MAX_DIM];
    const uint8_t *params = view->value_plane + 4ull * first * layout->value_groups;
    for (uint32_t t = first; t < first + count; t++, v += dim) {
        bkv_codes_unpack(rows + (size_t)t * layout->value_row, dim, view->value_bits, codes);
        for (uint32_t start = 0; start < dim; start += BKV_VALUE_GROUP_DIMS, params += 4) {
            float scale = bkv_half_expand(bkv_load_u16(params)), zero = bkv_half_expand(bkv_load_u16(params + 2));
            uint32_t end = start + BKV_VALUE_GROUP_DIMS < dim ? start + BKV_VALUE_GROUP_DIMS : dim;
            for (uint32_t i = start; i < end; i++) {
                v[i] = zero + scale * (float)codes[i];
            }
        }
    }
}

#if defined(__x86_64__)
// Whether record_read_avx2.c can run here, as the compiler's own start-up code found it.
static bool has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); // with FMA comes float16 conversion
}
#endif

static void read_keys(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *k) {
    if (view->key_bits == BKV_BITS_NATIVE) {
        const uint8_t *rows = view->key_plane + view->layout.key_codes + (size_t)first * view->layout.key_row;
        bkv_row_to_float(view->dtype, rows, (size_t)count * view->key_dim, k);
        return;
    }
#if defined(__x86_64__)
    if (has_avx2()) {
        bkv_avx2_read_keys(view, first, count, k);
        return;
    }
#endif
    bkv_ref_read_keys(view, first, count, k);
}

static void read_values(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *v) {
    if (view->value_bits == BKV_BITS_NATIVE) {
        const uint8_t *rows = view->value_plane + view->layout.value_codes + (size_t)first * view->layout.value_row;
        bkv_row_to_float(view->dtype, rows, (size_t)count * view->value_dim, v);
        return;
    }
#if defined(__x86_64__)
    if (has_avx2()) {
        bkv_avx2_read_values(view, first, count, v);
        return;
    }
#endif
    bkv_ref_read_values(view, first, count, v);
}

void bkv_section_read_range(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *k, float *v, float *logw) {
    assert(first <= view->tokens && count <= view->tokens - first);
    if (k) {
        read_keys(view, first, count, k);
    }
    if (v) {
        read_values(view, first, count, v);
    }
    if (logw) {
        read_weights(view, first, count, logw);
    }
}

void bkv_section_read(const bkv_section_view_t *view, float *k, float *v, float *logw, uint32_t *index) {
    bkv_section_read_range(view, 0, view->tokens, k, v, logw);
    if (index) {
        read_index(view, index);
    }
}
