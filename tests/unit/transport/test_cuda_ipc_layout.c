// Where blocks lie in a client's GPU memory: what is refused, and that what is accepted is read where the formula of
// DeviceLayout (proto/balancekv.proto) says. Host memory stands in for the GPU's, which is all the same to arithmetic.
#include "daemon/transport/cuda_ipc/layout.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define SPAN_BYTES 65536

// Two spans, mapped in the opposite order and apart, as allocations are.
typedef struct memory {
    uint8_t *bytes;
    bkv_ipc_span_t list[2];
    bkv_ipc_spans_t spans;
} memory_t;

static void memory_make(memory_t *memory) {
    size_t bytes = 3 * SPAN_BYTES;
    memory->bytes = aligned_alloc(256, bytes);
    for (size_t i = 0; i < bytes / 8; i++) {
        ((uint64_t *)(void *)memory->bytes)[i] = i * 0x9e3779b97f4a7c15u;
    }
    memory->list[0] = (bkv_ipc_span_t){.first = 0, .bytes = SPAN_BYTES, .base = memory->bytes + 2 * SPAN_BYTES};
    memory->list[1] = (bkv_ipc_span_t){.first = SPAN_BYTES, .bytes = SPAN_BYTES, .base = memory->bytes};
    memory->spans = (bkv_ipc_spans_t){memory->list, 2};
}

static const bkv_shape_t shape = {.layers = 2, .heads = 3, .tokens = 10, .key_dim = 16, .value_dim = 8, .dtype = BKV_BF16};
enum { KEY_ROW = 32, VALUE_ROW = 16 };

// [layer][head][token] in one piece: 2 layers of K in the first span, of V in the second.
static const uint64_t plain_keys[] = {0, 3 * 10 * KEY_ROW}, plain_values[] = {SPAN_BYTES, SPAN_BYTES + 3 * 10 * VALUE_ROW};

static bkv_device_layout_t plain(void) {
    return (bkv_device_layout_t){.keys = plain_keys,
                                 .values = plain_values,
                                 .layers = 2,
                                 .token_stride = KEY_ROW,
                                 .head_stride = 10 * KEY_ROW,
                                 .value_token_stride = VALUE_ROW,
                                 .value_head_stride = 10 * VALUE_ROW};
}

// Pages of 4 tokens, [page][token][head], K and V of a layer in one span, layers of different distances.
static const uint64_t paged_keys[] = {1024, 16384}, paged_values[] = {SPAN_BYTES + 512, SPAN_BYTES + 32768};
static const uint64_t scattered[] = {7, 0, 3}, in_a_row[] = {4, 5, 6};

static bkv_device_layout_t paged(const uint64_t *pages) {
    return (bkv_device_layout_t){.keys = paged_keys,
                                 .values = paged_values,
                                 .layers = 2,
                                 .pages = pages,
                                 .page_count = 3,
                                 .page_tokens = 4,
                                 .page_stride = 4 * 3 * KEY_ROW,
                                 .token_stride = 3 * KEY_ROW,
                                 .head_stride = KEY_ROW,
                                 .value_token_stride = 3 * KEY_ROW,
                                 .value_head_stride = VALUE_ROW};
}

// The formula, by hand.
static const uint8_t *expected(const memory_t *memory, const bkv_device_layout_t *layout, bool value, uint32_t layer,
                               uint32_t head, uint32_t token) {
    uint64_t at = (value ? layout->values : layout->keys)[layer];
    uint64_t token_stride = value ? layout->value_token_stride : layout->token_stride;
    at += head * (value ? layout->value_head_stride : layout->head_stride);
    at += layout->page_count == 0
              ? token * token_stride
              : layout->pages[token / layout->page_tokens] * layout->page_stride + token % layout->page_tokens * token_stride;
    return at < SPAN_BYTES ? memory->bytes + 2 * SPAN_BYTES + at : memory->bytes + (at - SPAN_BYTES);
}

// What bkv_gpu_gather does with the tables.
static const uint8_t *gathered(const bkv_device_layout_t *layout, const uint64_t *bases, const uint64_t *pages, bool value,
                               uint32_t layer, uint32_t head, uint32_t token) {
    uint32_t page_tokens = bkv_ipc_layout_page_tokens(layout, &shape);
    return (const uint8_t *)(uintptr_t)bases[2 * layer + value] + pages[token / page_tokens] +
           head * (value ? layout->value_head_stride : layout->head_stride) +
           token % page_tokens * (value ? layout->value_token_stride : layout->token_stride);
}

// What bkv_cuda_compress does with strides.
static const uint8_t *strided(const bkv_block_t *block, bool value, uint32_t layer, uint32_t head, uint32_t token) {
    const bkv_stride_t *stride = value ? &block->value_stride : &block->key_stride;
    return (const uint8_t *)(value ? block->values : block->keys) + layer * stride->layer + head * stride->head +
           token * stride->token;
}

static void assert_read_right(const bkv_device_layout_t *layout, bool wants_direct) {
    memory_t memory;
    memory_make(&memory);
    bkv_error_t err = {0};
    cr_assert_eq(bkv_ipc_layout_check(layout, &shape, &memory.spans, &err), BKV_OK, "%s", err.message);
    uint64_t bases[4], pages[3];
    bkv_block_t block;
    cr_assert_leq(bkv_ipc_layout_pages(layout), 3);
    bkv_ipc_layout_tables(layout, &shape, &memory.spans, bases, pages);
    bool direct = bkv_ipc_layout_direct(layout, &shape, &memory.spans, &block);
    cr_assert_eq(direct, wants_direct);
    for (uint32_t i = 0; i < 2 * 2 * 3 * 10; i++) {
        bool value = i % 2;
        uint32_t layer = i / 2 % 2, head = i / 4 % 3, token = i / 12;
        const uint8_t *at = expected(&memory, layout, value, layer, head, token);
        cr_assert_eq(gathered(layout, bases, pages, value, layer, head, token), at);
        cr_assert(!direct || strided(&block, value, layer, head, token) == at);
    }
    free(memory.bytes);
}

Test(cuda_ipc_layout, what_lies_in_one_piece_is_read_directly) {
    bkv_device_layout_t layout = plain();
    assert_read_right(&layout, true);
}

Test(cuda_ipc_layout, scattered_pages_are_gathered) {
    bkv_device_layout_t layout = paged(scattered);
    assert_read_right(&layout, false);
}

Test(cuda_ipc_layout, pages_in_a_row_are_one_piece) {
    bkv_device_layout_t layout = paged(in_a_row);
    assert_read_right(&layout, true);
    layout.page_stride += 16; // but not with a gap after each
    assert_read_right(&layout, false);
}

Test(cuda_ipc_layout, layers_anywhere_are_gathered) {
    bkv_shape_t three = shape;
    three.layers = 3;
    const uint64_t keys[] = {0, 4096, 16384}, values[] = {SPAN_BYTES, SPAN_BYTES + 4096, SPAN_BYTES + 8192};
    bkv_device_layout_t layout = plain();
    layout.keys = keys;
    layout.values = values;
    layout.layers = 3;
    memory_t memory;
    memory_make(&memory);
    bkv_block_t block;
    cr_assert_eq(bkv_ipc_layout_check(&layout, &three, &memory.spans, NULL), BKV_OK);
    cr_assert(!bkv_ipc_layout_direct(&layout, &three, &memory.spans, &block));
    uint64_t bases[6], page;
    bkv_ipc_layout_tables(&layout, &three, &memory.spans, bases, &page);
    for (uint32_t i = 0; i < 6; i++) {
        uint64_t offset = (i % 2 ? values : keys)[i / 2];
        cr_assert_eq((uint8_t *)(uintptr_t)bases[i], bkv_ipc_span_address(&memory.spans, offset, 1));
    }
    cr_assert_eq(page, 0);
    free(memory.bytes);
}

// Layers in different allocations lie wherever those are mapped: also downwards, and that is a stride like any other.
Test(cuda_ipc_layout, layers_in_two_allocations_are_evenly_spaced_if_their_addresses_are) {
    const uint64_t keys[] = {4096, SPAN_BYTES + 4096}, values[] = {8192, SPAN_BYTES + 8192};
    bkv_device_layout_t layout = plain();
    layout.keys = keys;
    layout.values = values;
    assert_read_right(&layout, true);
    memory_t memory;
    memory_make(&memory);
    bkv_block_t block;
    cr_assert(bkv_ipc_layout_direct(&layout, &shape, &memory.spans, &block));
    cr_assert_eq(block.key_stride.layer, -2 * SPAN_BYTES);
    free(memory.bytes);
}

Test(cuda_ipc_layout, a_stride_that_nothing_is_reached_by_may_be_anything) {
    bkv_shape_t one = {.layers = 1, .heads = 1, .tokens = 1, .key_dim = 16, .value_dim = 8, .dtype = BKV_BF16};
    bkv_device_layout_t layout = plain();
    layout.layers = 1;
    layout.token_stride = layout.head_stride = layout.value_token_stride = layout.value_head_stride = UINT64_MAX - 15;
    memory_t memory;
    memory_make(&memory);
    bkv_block_t block;
    cr_assert_eq(bkv_ipc_layout_check(&layout, &one, &memory.spans, NULL), BKV_OK);
    cr_assert(bkv_ipc_layout_direct(&layout, &one, &memory.spans, &block));
    cr_assert_eq(block.key_stride.token | block.key_stride.head | block.value_stride.token | block.value_stride.head, 0);
    free(memory.bytes);
}

// ---- what is refused ----

static void assert_refused(const bkv_device_layout_t *layout, const char *message) {
    memory_t memory;
    memory_make(&memory);
    bkv_error_t err = {0};
    cr_assert_eq(bkv_ipc_layout_check(layout, &shape, &memory.spans, &err), BKV_INVALID_ARGUMENT, "expected: %s", message);
    cr_assert_eq(strncmp(err.message, message, strlen(message)), 0, "%s, not %s", err.message, message);
    free(memory.bytes);
}

Test(cuda_ipc_layout, counts_that_do_not_match_are_refused) {
    bkv_device_layout_t layout = plain();
    layout.layers = 1;
    assert_refused(&layout, "place.layout.keys: of 1 layers, the spec has 2");
    layout = plain();
    layout.page_tokens = 4;
    assert_refused(&layout, "place.layout.page_tokens: 4, but there are no pages");
    layout = paged(scattered);
    layout.page_tokens = 0;
    assert_refused(&layout, "place.layout.page_tokens: 0, but there are 3 pages");
    layout = paged(scattered);
    layout.page_count = 2;
    assert_refused(&layout, "place.layout.pages: 2 of 4 tokens, but 10 tokens take 3");
    layout = paged(scattered);
    layout.page_tokens = UINT32_MAX;
    assert_refused(&layout, "place.layout.pages: 3 of 4294967295 tokens, but 10 tokens take 1");
}

Test(cuda_ipc_layout, what_is_not_aligned_is_refused) {
    bkv_device_layout_t layout = paged(scattered);
    layout.page_stride += 8;
    assert_refused(&layout, "place.layout.page_stride: ");
    layout = plain();
    layout.token_stride += 8;
    assert_refused(&layout, "place.layout.token_stride: ");
    layout = plain();
    layout.value_head_stride += 1;
    assert_refused(&layout, "place.layout.value_head_stride: ");
    const uint64_t odd[] = {0, 8};
    layout = plain();
    layout.keys = odd;
    assert_refused(&layout, "place.layout.keys[1]: 8 is not");
    layout = plain();
    layout.values = odd;
    assert_refused(&layout, "place.layout.values[1]: 8 is not");
}

// The last byte that is read may be the last of a span, and no further.
Test(cuda_ipc_layout, a_tensor_ends_with_its_allocation_at_the_latest) {
    const uint64_t last = SPAN_BYTES - (3 * 10 * KEY_ROW);
    uint64_t keys[] = {last, last};
    bkv_device_layout_t layout = plain();
    layout.keys = keys;
    memory_t memory;
    memory_make(&memory);
    cr_assert_eq(bkv_ipc_layout_check(&layout, &shape, &memory.spans, NULL), BKV_OK);
    keys[1] += 16; // into the next allocation, which is mapped elsewhere
    assert_refused(&layout, "place.layout.keys[1]: ");
    uint64_t values[] = {SPAN_BYTES, 2 * SPAN_BYTES - 3 * 10 * VALUE_ROW};
    keys[1] = last;
    layout.values = values;
    cr_assert_eq(bkv_ipc_layout_check(&layout, &shape, &memory.spans, NULL), BKV_OK);
    values[1] += 16;
    assert_refused(&layout, "place.layout.values[1]: ");
    values[1] = 2 * SPAN_BYTES;
    assert_refused(&layout, "place.layout.values[1]: ");
    free(memory.bytes);
}

// Numbers whose sums and products wrap around to something that lies within.
Test(cuda_ipc_layout, what_wraps_around_is_refused) {
    const uint64_t huge[] = {UINT64_MAX - 15, 0};
    bkv_device_layout_t layout = plain();
    layout.keys = huge;
    assert_refused(&layout, "place.layout.keys[0]: ");
    layout = plain();
    layout.token_stride = (uint64_t)1 << 61; // times 9 wraps to 2^61
    assert_refused(&layout, "place.layout: strides reach beyond 64 bits");
    layout = plain();
    layout.head_stride = (uint64_t)1 << 63; // times 2 wraps to 0
    assert_refused(&layout, "place.layout: strides reach beyond 64 bits");
    layout = plain();
    layout.value_head_stride = (uint64_t)1 << 63;
    assert_refused(&layout, "place.layout: strides reach beyond 64 bits");
    const uint64_t far[] = {(uint64_t)1 << 60, 0, 1};
    layout = paged(far);
    layout.page_stride = 4096; // wraps to 0
    assert_refused(&layout, "place.layout.pages: a page lies beyond 64 bits");
    const uint64_t edge[] = {UINT64_MAX / 16, 0, 1};
    layout = paged(edge);
    layout.page_stride = 16;
    assert_refused(&layout, "place.layout: strides reach beyond 64 bits");
}

Test(cuda_ipc_layout, nothing_lies_in_no_memory) {
    bkv_ipc_spans_t none = {NULL, 0};
    bkv_device_layout_t layout = plain();
    cr_assert_eq(bkv_ipc_layout_check(&layout, &shape, &none, NULL), BKV_INVALID_ARGUMENT);
    cr_assert_null(bkv_ipc_span_find(&none, 0));
    cr_assert_null(bkv_ipc_span_address(&none, 0, 0));
}

Test(cuda_ipc_layout, spans_are_found_by_every_offset_in_them) {
    memory_t memory;
    memory_make(&memory);
    cr_assert_eq(bkv_ipc_span_find(&memory.spans, 0), &memory.list[0]);
    cr_assert_eq(bkv_ipc_span_find(&memory.spans, SPAN_BYTES - 1), &memory.list[0]);
    cr_assert_eq(bkv_ipc_span_find(&memory.spans, SPAN_BYTES), &memory.list[1]);
    cr_assert_eq(bkv_ipc_span_find(&memory.spans, 2 * SPAN_BYTES - 1), &memory.list[1]);
    cr_assert_null(bkv_ipc_span_find(&memory.spans, 2 * SPAN_BYTES));
    cr_assert_null(bkv_ipc_span_find(&memory.spans, UINT64_MAX));
    cr_assert_eq(bkv_ipc_span_address(&memory.spans, SPAN_BYTES + 5, SPAN_BYTES - 5), memory.bytes + 5);
    cr_assert_null(bkv_ipc_span_address(&memory.spans, SPAN_BYTES + 5, SPAN_BYTES - 4));
    cr_assert_null(bkv_ipc_span_address(&memory.spans, SPAN_BYTES - 1, 2));
    cr_assert_null(bkv_ipc_span_address(&memory.spans, 0, UINT64_MAX));
    free(memory.bytes);
}
