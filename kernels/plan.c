// plan.c - how many bytes a balance record may have, and what they are spent on: tokens kept and bits per element.
// balance_ref.c and fold_ref.c then choose the tokens.
#include "backend.h"

#include <assert.h>

// Bits of a record that cannot keep every token. Measured at equal bytes on a real model (8 layers, 4096 tokens in blocks of
// 256, window 64; attention error of the next 64 queries at 8x, 16x, 32x): 4 bits 0.200, 0.268, 0.326; 3 bits 0.179, 0.255,
// 0.320; 2 bits 0.219, 0.286, 0.337; different bits for keys and values lie between.
#define FEW_BITS 3

static uint64_t bf16_bytes(const bkv_shape_t *shape) {
    return bkv_shape_bytes(shape) / bkv_dtype_bytes(shape->dtype) * 2;
}

uint64_t bkv_balance_budget(const bkv_shape_t *shape, uint32_t rate) {
    return bf16_bytes(shape) / rate / BKV_RECORD_ALIGN * BKV_RECORD_ALIGN;
}

static uint64_t section_bytes(const bkv_shape_t *shape, uint32_t m, uint8_t key_bits, uint8_t value_bits, bool weights) {
    bkv_plane_layout_t layout;
    bkv_plane_layout(shape->tokens, m, shape->key_dim, shape->value_dim, key_bits, value_bits,
                     bkv_index_choose(shape->tokens, m), weights, shape->dtype, &layout);
    return layout.key_bytes + layout.value_bytes;
}

// The most of `available` tokens that fit, all but one of them at most; 0 where not even one does.
static uint32_t tokens_fit(const bkv_shape_t *shape, uint32_t available, uint64_t bytes, uint8_t bits) {
    uint32_t fit = 0, beyond = available;
    while (beyond - fit > 1) {
        uint32_t middle = fit + (beyond - fit) / 2;
        if (section_bytes(shape, middle, bits, bits, true) <= bytes) {
            fit = middle;
        } else {
            beyond = middle;
        }
    }
    return fit;
}

bool bkv_balance_plan(const bkv_shape_t *shape, uint32_t available, bool weighted, uint64_t budget, bkv_section_t *section,
                      bool *weights) {
    static const uint8_t whole[][2] = {{8, 8}, {8, 4}, {4, 4}, {4, 3}, {3, 3}};
    uint64_t preamble = bkv_record_preamble(shape->layers, shape->heads);
    if (budget < preamble) {
        return false;
    }
    budget = budget < BKV_RECORD_MAX ? budget : BKV_RECORD_MAX;
    uint64_t bytes = (budget - preamble) / (shape->layers * shape->heads) / BKV_RECORD_ALIGN * BKV_RECORD_ALIGN;
    *section = (bkv_section_t){.tokens = available, .index_kind = (uint8_t)bkv_index_choose(shape->tokens, available)};
    *weights = weighted;
    for (size_t i = 0; i < sizeof(whole) / sizeof(whole[0]); i++) {
        section->key_bits = whole[i][0];
        section->value_bits = whole[i][1];
        if (section_bytes(shape, available, whole[i][0], whole[i][1], weighted) <= bytes) {
            return true;
        }
    }
    *weights = true;
    for (uint8_t bits = FEW_BITS; bits >= 2; bits--) {
        section->key_bits = section->value_bits = bits;
        section->tokens = tokens_fit(shape, available, bytes, bits);
        if (section->tokens > 0) {
            section->index_kind = (uint8_t)bkv_index_choose(shape->tokens, section->tokens);
            return true;
        }
    }
    return false;
}
