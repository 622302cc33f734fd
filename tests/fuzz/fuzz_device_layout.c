// fuzz_device_layout.c - what a local client may say of where a block lies in its GPU memory. Of a layout that is accepted every row
// must lie within the client's allocations, by the tables of a gather and by the strides of a block alike; and they must agree.
//
// Addresses are only computed with, so memory need not be there: the spans of the input lie anywhere.
#include "daemon/transport/cuda_ipc/layout.h"

#include <assert.h>
#include <string.h>

#define LAYERS 4
#define PAGES  8
#define SPANS  4

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct input {
    const uint8_t *data;
    size_t left;
} input_t;

// The next number: a byte says of how many bits, so that small ones are as likely as large ones.
static uint64_t number(input_t *input) {
    uint64_t value = 0;
    if (input->left < 9) {
        return 0;
    }
    memcpy(&value, input->data + 1, sizeof(value));
    unsigned bits = input->data[0] % 65;
    input->data += 9;
    input->left -= 9;
    return bits == 64 ? value : value & (((uint64_t)1 << bits) - 1);
}

static bool inside(const bkv_ipc_spans_t *spans, uint64_t address, uint64_t bytes) {
    for (uint32_t i = 0; i < spans->count; i++) {
        uint64_t base = (uint64_t)(uintptr_t)spans->list[i].base;
        if (address >= base && address - base < spans->list[i].bytes && bytes <= spans->list[i].bytes - (address - base)) {
            return true;
        }
    }
    return false;
}

static void check_rows(const bkv_device_layout_t *layout, const bkv_shape_t *shape, const bkv_ipc_spans_t *spans) {
    uint64_t bases[2 * LAYERS], pages[PAGES];
    bkv_block_t block;
    bkv_ipc_layout_tables(layout, shape, spans, bases, pages);
    bool direct = bkv_ipc_layout_direct(layout, shape, spans, &block);
    uint32_t page_tokens = bkv_ipc_layout_page_tokens(layout, shape);
    for (uint32_t i = 0; i < 2 * shape->layers * shape->heads * shape->tokens; i++) {
        bool value = i % 2;
        uint32_t layer = i / 2 % shape->layers, head = i / 2 / shape->layers % shape->heads;
        uint32_t token = i / 2 / shape->layers / shape->heads;
        uint64_t row = (uint64_t)(value ? shape->value_dim : shape->key_dim) * 2;
        uint64_t at = bases[2 * layer + value] + pages[token / page_tokens] +
                      head * (value ? layout->value_head_stride : layout->head_stride) +
                      token % page_tokens * (value ? layout->value_token_stride : layout->token_stride);
        assert(inside(spans, at, row));
        const bkv_stride_t *stride = value ? &block.value_stride : &block.key_stride;
        uint64_t base = (uint64_t)(uintptr_t)(value ? block.values : block.keys);
        assert(!direct ||
               at == base + (uint64_t)stride->layer * layer + (uint64_t)stride->head * head + (uint64_t)stride->token * token);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input_t input = {data, size};
    bkv_ipc_span_t list[SPANS];
    bkv_ipc_spans_t spans = {.list = list, .count = (uint32_t)(number(&input) % (SPANS + 1))};
    uint64_t offset = 0, address = 4096;
    for (uint32_t i = 0; i < spans.count; i++) { // apart from one another, as mappings are
        uint64_t bytes = 1 + number(&input) % ((uint64_t)1 << 42);
        address += number(&input) % ((uint64_t)1 << 40) / 256 * 256;
        list[i] = (bkv_ipc_span_t){.first = offset, .bytes = bytes, .base = (uint8_t *)(uintptr_t)address};
        offset += bytes;
        address += bytes + 1;
    }
    const bkv_shape_t shape = {.layers = 1 + (uint32_t)(number(&input) % LAYERS),
                               .heads = 1 + (uint32_t)(number(&input) % 4),
                               .tokens = 1 + (uint32_t)(number(&input) % 40),
                               .key_dim = 8 + 8 * (uint32_t)(number(&input) % 16),
                               .value_dim = 8 + 8 * (uint32_t)(number(&input) % 16),
                               .dtype = BKV_BF16};
    uint64_t keys[LAYERS], values[LAYERS], pages[PAGES];
    for (uint32_t i = 0; i < LAYERS; i++) {
        keys[i] = number(&input);
        values[i] = number(&input);
    }
    for (uint32_t i = 0; i < PAGES; i++) {
        pages[i] = number(&input);
    }
    const bkv_device_layout_t layout = {.keys = keys,
                                        .values = values,
                                        .layers = (uint32_t)(number(&input) % 8) == 7 ? LAYERS : shape.layers,
                                        .pages = pages,
                                        .page_count = (uint32_t)(number(&input) % (PAGES + 1)),
                                        .page_tokens = (uint32_t)number(&input),
                                        .page_stride = number(&input),
                                        .token_stride = number(&input),
                                        .head_stride = number(&input),
                                        .value_token_stride = number(&input),
                                        .value_head_stride = number(&input)};
    if (bkv_ipc_layout_check(&layout, &shape, &spans, NULL) == BKV_OK) {
        check_rows(&layout, &shape, &spans);
    }
    return 0;
}
