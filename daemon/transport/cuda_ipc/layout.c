// layout.c - see layout.h. Every sum and product of a client's numbers is checked for overflow here, once, in
// bkv_ipc_layout_check; what comes after it may count on that.
#include "daemon/transport/cuda_ipc/layout.h"

#include <assert.h>

#define ALIGN     16
#define FAIL(...) bkv_fail(err, BKV_INVALID_ARGUMENT, __VA_ARGS__)

typedef unsigned long long ull; // for messages

// ---- spans ----

const bkv_ipc_span_t *bkv_ipc_span_find(const bkv_ipc_spans_t *spans, uint64_t offset) {
    uint32_t low = 0, high = spans->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const bkv_ipc_span_t *span = &spans->list[middle];
        if (offset < span->first) {
            high = middle;
        } else if (offset - span->first >= span->bytes) {
            low = middle + 1;
        } else {
            return span;
        }
    }
    return NULL;
}

uint8_t *bkv_ipc_span_address(const bkv_ipc_spans_t *spans, uint64_t offset, uint64_t bytes) {
    const bkv_ipc_span_t *span = bkv_ipc_span_find(spans, offset);
    if (span == NULL || bytes > span->bytes - (offset - span->first)) {
        return NULL;
    }
    return span->base + (offset - span->first);
}

// ---- the check ----

uint32_t bkv_ipc_layout_pages(const bkv_device_layout_t *layout) {
    return layout->page_count > 0 ? layout->page_count : 1;
}

uint32_t bkv_ipc_layout_page_tokens(const bkv_device_layout_t *layout, const bkv_shape_t *shape) {
    return layout->page_count > 0 ? layout->page_tokens : shape->tokens;
}

static bkv_status_t check_counts(const bkv_device_layout_t *layout, const bkv_shape_t *shape, bkv_error_t *err) {
    if (layout->layers != shape->layers) {
        return FAIL("place.layout.keys: of %u layers, the spec has %u", layout->layers, shape->layers);
    }
    if (layout->page_count == 0) {
        return layout->page_tokens == 0 ? BKV_OK
                                        : FAIL("place.layout.page_tokens: %u, but there are no pages", layout->page_tokens);
    }
    if (layout->page_tokens == 0) {
        return FAIL("place.layout.page_tokens: 0, but there are %u pages", layout->page_count);
    }
    uint64_t wanted = ((uint64_t)shape->tokens + layout->page_tokens - 1) / layout->page_tokens;
    if (layout->page_count != wanted) {
        return FAIL("place.layout.pages: %u of %u tokens, but %u tokens take %llu", layout->page_count, layout->page_tokens,
                    shape->tokens, (ull)wanted);
    }
    return BKV_OK;
}

static bkv_status_t check_strides(const bkv_device_layout_t *layout, bkv_error_t *err) {
    const struct {
        const char *name;
        uint64_t stride;
    } strides[] = {{"page_stride", layout->page_stride},
                   {"token_stride", layout->token_stride},
                   {"head_stride", layout->head_stride},
                   {"value_token_stride", layout->value_token_stride},
                   {"value_head_stride", layout->value_head_stride}};
    for (size_t i = 0; i < sizeof(strides) / sizeof(strides[0]); i++) {
        if (strides[i].stride % ALIGN != 0) {
            return FAIL("place.layout.%s: %llu is not a multiple of %d", strides[i].name, (ull)strides[i].stride, ALIGN);
        }
    }
    return BKV_OK;
}

// How far what is read reaches, from the first byte of a page's first token and head on. False: beyond 64 bits.
static bool page_reach(const bkv_shape_t *shape, uint32_t tokens, uint64_t token_stride, uint64_t head_stride, uint32_t dim,
                       uint64_t *reach) {
    uint64_t heads;
    bool over = __builtin_mul_overflow(head_stride, (uint64_t)(shape->heads - 1), &heads);
    over = __builtin_mul_overflow(token_stride, (uint64_t)(tokens - 1), reach) || over;
    over = __builtin_add_overflow(*reach, heads, reach) || over;
    return !(__builtin_add_overflow(*reach, (uint64_t)dim * bkv_dtype_bytes(shape->dtype), reach) || over);
}

// Offsets of the first and of the last page.
static bool page_range(const bkv_device_layout_t *layout, uint64_t *least, uint64_t *most) {
    uint64_t low = 0, high = 0;
    for (uint32_t i = 0; i < layout->page_count; i++) {
        low = i == 0 || layout->pages[i] < low ? layout->pages[i] : low;
        high = i == 0 || layout->pages[i] > high ? layout->pages[i] : high;
    }
    bool over = __builtin_mul_overflow(low, layout->page_stride, least);
    return !(__builtin_mul_overflow(high, layout->page_stride, most) || over);
}

// One tensor of every layer: from the first byte read to the last, all pages, within one span.
static bkv_status_t check_tensor(const bkv_device_layout_t *layout, bool value, uint64_t least, uint64_t length,
                                 const bkv_ipc_spans_t *spans, bkv_error_t *err) {
    const uint64_t *offsets = value ? layout->values : layout->keys;
    const char *name = value ? "values" : "keys";
    for (uint32_t layer = 0; layer < layout->layers; layer++) {
        uint64_t first;
        if (offsets[layer] % ALIGN != 0) {
            return FAIL("place.layout.%s[%u]: %llu is not a multiple of %d", name, layer, (ull)offsets[layer], ALIGN);
        }
        if (__builtin_add_overflow(offsets[layer], least, &first) || bkv_ipc_span_address(spans, first, length) == NULL) {
            return FAIL("place.layout.%s[%u]: %llu: what is read from there on does not lie within one allocation", name, layer,
                        (ull)offsets[layer]);
        }
    }
    return BKV_OK;
}

bkv_status_t bkv_ipc_layout_check(const bkv_device_layout_t *layout, const bkv_shape_t *shape, const bkv_ipc_spans_t *spans,
                                  bkv_error_t *err) {
    assert(shape->tokens > 0 && shape->heads > 0);
    bkv_status_t status = check_counts(layout, shape, err);
    if (status == BKV_OK) {
        status = check_strides(layout, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    uint64_t least, most, keys, values;
    uint32_t tokens = bkv_ipc_layout_page_tokens(layout, shape);
    tokens = tokens < shape->tokens ? tokens : shape->tokens;
    if (!page_range(layout, &least, &most)) {
        return FAIL("place.layout.pages: a page lies beyond 64 bits");
    }
    if (!page_reach(shape, tokens, layout->token_stride, layout->head_stride, shape->key_dim, &keys) ||
        !page_reach(shape, tokens, layout->value_token_stride, layout->value_head_stride, shape->value_dim, &values) ||
        __builtin_add_overflow(keys, most - least, &keys) || __builtin_add_overflow(values, most - least, &values)) {
        return FAIL("place.layout: strides reach beyond 64 bits");
    }
    status = check_tensor(layout, false, least, keys, spans, err);
    return status == BKV_OK ? check_tensor(layout, true, least, values, spans, err) : status;
}

// ---- addresses ----

static uint8_t *tensor_at(const bkv_device_layout_t *layout, const bkv_ipc_spans_t *spans, bool value, uint32_t layer,
                          uint32_t page) {
    uint64_t offset = (value ? layout->values : layout->keys)[layer];
    offset += layout->page_count > 0 ? layout->pages[page] * layout->page_stride : 0;
    uint8_t *address = bkv_ipc_span_address(spans, offset, 1);
    assert(address != NULL && "the layout was checked");
    return address;
}

static bool pages_in_a_row(const bkv_device_layout_t *layout) {
    for (uint32_t i = 1; i < layout->page_count; i++) {
        if (layout->pages[i] != layout->pages[0] + i) {
            return false;
        }
    }
    // Neither product overflows where there are two pages: the check has followed them further.
    return layout->page_count < 2 || (layout->page_stride == layout->page_tokens * layout->token_stride &&
                                      layout->page_stride == layout->page_tokens * layout->value_token_stride);
}

static bool evenly_spaced(const bkv_device_layout_t *layout, const bkv_ipc_spans_t *spans, bool value, int64_t *stride) {
    *stride = 0;
    const uint8_t *before = tensor_at(layout, spans, value, 0, 0);
    for (uint32_t layer = 1; layer < layout->layers; layer++) {
        const uint8_t *at = tensor_at(layout, spans, value, layer, 0);
        int64_t step = (int64_t)((uintptr_t)at - (uintptr_t)before);
        if (layer > 1 && step != *stride) {
            return false;
        }
        *stride = step;
        before = at;
    }
    return true;
}

bool bkv_ipc_layout_direct(const bkv_device_layout_t *layout, const bkv_shape_t *shape, const bkv_ipc_spans_t *spans,
                           bkv_block_t *block) {
    int64_t keys, values;
    if (!pages_in_a_row(layout) || !evenly_spaced(layout, spans, false, &keys) ||
        !evenly_spaced(layout, spans, true, &values)) {
        return false;
    }
    // A stride that nothing is reached by has not been checked, and may be anything.
    bool heads = shape->heads > 1, tokens = shape->tokens > 1;
    *block = (bkv_block_t){
        .shape = *shape,
        .keys = tensor_at(layout, spans, false, 0, 0),
        .values = tensor_at(layout, spans, true, 0, 0),
        .key_stride = {keys, heads ? (int64_t)layout->head_stride : 0, tokens ? (int64_t)layout->token_stride : 0},
        .value_stride = {values, heads ? (int64_t)layout->value_head_stride : 0,
                         tokens ? (int64_t)layout->value_token_stride : 0},
    };
    return true;
}

void bkv_ipc_layout_tables(const bkv_device_layout_t *layout, const bkv_shape_t *shape, const bkv_ipc_spans_t *spans,
                           uint64_t *bases, uint64_t *pages) {
    assert(layout->layers == shape->layers);
    // Pages count from the first one that is read: a tensor itself may begin before its span does, its pages do not.
    uint64_t least = 0;
    for (uint32_t i = 0; i < layout->page_count; i++) {
        uint64_t offset = layout->pages[i] * layout->page_stride;
        least = i == 0 || offset < least ? offset : least;
    }
    for (uint32_t i = 0; i < bkv_ipc_layout_pages(layout); i++) {
        pages[i] = layout->page_count > 0 ? layout->pages[i] * layout->page_stride - least : 0;
    }
    for (uint32_t i = 0; i < 2 * shape->layers; i++) {
        uint64_t offset = (i % 2 != 0 ? layout->values : layout->keys)[i / 2] + least;
        uint8_t *address = bkv_ipc_span_address(spans, offset, 1);
        assert(address != NULL && "the layout was checked");
        bases[i] = (uint64_t)(uintptr_t)address;
    }
}
