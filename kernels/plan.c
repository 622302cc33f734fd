// plan.c - how many bytes a balance record may have, and what they are spent on: each section's share, the tokens it keeps and
// the bits of an element. balance.c and fold.c then choose the tokens.
//
// Which sections the bytes go to matters more than anything else. In the real model of the quality bench (8 layers, 2 KV heads)
// one of the 16 sections carries nearly all the loss: compressing it alone at 24x moves the text's next-token distribution by
// 0.059 nats, all the others together by 0.009. Mean NLL above exact, contexts of 4096 tokens, blocks of 256, newest 64 exact:
//
//                                                                          8x      16x     32x
//   equal shares (24 contexts)                                             0.024   0.055   0.099
//   shares = sqrt(loss of the section alone), measured once on other text  0.002   0.009   0.014   (16 contexts)
//   shares = sqrt(mean square of the block's centred values)               0.005   0.009   0.059   (6, 6 and 4 contexts)
//
// The last needs no calibration, but no principle says that it holds for another model, so shares are the caller's to give.
#include "backend.h"

#include <assert.h>

// Bits of a section that cannot keep every token. Measured at equal bytes on a real model (8 layers, 4096 tokens in blocks of
// 256, window 64; attention error of the next 64 queries at 8x, 16x, 32x): 4 bits 0.200, 0.268, 0.326; 3 bits 0.179, 0.255,
// 0.320; 2 bits 0.219, 0.286, 0.337; different bits for keys and values lie between.
#define FEW_BITS 3

// The most that a share may be, and what each section has where none are given.
#define SHARE_MAX 255

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

// All `available` tokens at the most bits that `bytes` allow. False where they allow none.
static bool keep_all(const bkv_shape_t *shape, uint32_t available, bool weights, uint64_t bytes, bkv_section_t *section) {
    static const uint8_t whole[][2] = {{8, 8}, {8, 4}, {4, 4}, {4, 3}, {3, 3}};
    for (size_t i = 0; i < sizeof(whole) / sizeof(whole[0]); i++) {
        if (section_bytes(shape, available, whole[i][0], whole[i][1], weights) <= bytes) {
            *section = (bkv_section_t){.tokens = available, .key_bits = whole[i][0], .value_bits = whole[i][1]};
            return true;
        }
    }
    return false;
}

// As many tokens as `bytes` hold; fewer bits only where there would be none. A section keeps a token in any case.
static void keep_some(const bkv_shape_t *shape, uint32_t available, uint64_t bytes, bkv_section_t *section) {
    *section = (bkv_section_t){.tokens = 1, .key_bits = 2, .value_bits = 2};
    for (uint8_t bits = FEW_BITS; bits >= 2; bits--) {
        uint32_t fit = tokens_fit(shape, available, bytes, bits);
        if (fit > 0) {
            *section = (bkv_section_t){.tokens = fit, .key_bits = bits, .value_bits = bits};
            return;
        }
    }
}

// Least bytes of a section: one token of two bits.
static uint64_t least_bytes(const bkv_shape_t *shape) {
    return section_bytes(shape, 1, 2, 2, true);
}

bool bkv_balance_fits(const bkv_shape_t *shape, uint64_t budget) {
    uint64_t sections = (uint64_t)shape->layers * shape->heads;
    return budget >= bkv_record_preamble(shape->layers, shape->heads) + sections * least_bytes(shape);
}

// More than half, as the refit makes up for walked tokens but not for a needle lost. Equal shares, codes found of 48 at 16x and
// 32x with the attention error: 1/2: 44 (0.247), 38 (0.302); 5/8: 48 (0.249), 41 (0.304); 3/4: 48 (0.253), 44 (0.313); 7/8: 48
// (0.267), 44 (0.334).
uint32_t bkv_protect_count(uint32_t n, uint32_t m) {
    return m >= n / 5 ? m * 5 / 8 : m * 3 / 4;
}

static uint32_t share_of(const uint8_t *shares, uint32_t section) {
    return shares ? shares[section] : SHARE_MAX;
}

// One pass over the sections, the largest shares first, as what one of them cannot spend goes to those after it; whatever is
// spent leaves its one token to each section that is yet to come. A section's key_offset is what it has to choose from. Returns
// whether every token is kept.
static bool spend(const bkv_shape_t *shape, bool weights, uint64_t bytes, const uint8_t *shares, bkv_section_t *sections) {
    uint32_t count = shape->layers * shape->heads, to_come = count;
    uint64_t least = least_bytes(shape), shares_to_come = 0, last = 0;
    const bkv_section_t *same = NULL; // what `last` bytes were spent on: mostly, the next section has as many
    for (uint32_t i = 0; i < count; i++) {
        shares_to_come += share_of(shares, i);
    }
    bool all = true;
    for (uint32_t share = SHARE_MAX; share > 0 && to_come > 0; share--) {
        for (uint32_t i = 0; i < count; i++) {
            if (share_of(shares, i) != share) {
                continue;
            }
            uint64_t mine = bytes * share / shares_to_come, most = bytes - least * (to_come - 1);
            mine = mine < least ? least : mine < most ? mine : most;
            mine = mine / BKV_RECORD_ALIGN * BKV_RECORD_ALIGN;
            uint32_t available = sections[i].key_offset;
            if (same && mine == last && available == same->key_offset) {
                sections[i] = *same;
            } else if (!keep_all(shape, available, weights, mine, &sections[i])) {
                keep_some(shape, available, mine, &sections[i]);
                all = false;
            }
            same = &sections[i];
            last = mine;
            sections[i].key_offset = available;
            sections[i].index_kind = (uint8_t)bkv_index_choose(shape->tokens, sections[i].tokens);
            bytes -= section_bytes(shape, sections[i].tokens, sections[i].key_bits, sections[i].value_bits, weights);
            shares_to_come -= share;
            to_come--;
        }
    }
    assert(to_come == 0 && "shares are 1 to 255");
    return all;
}

bool bkv_balance_plan(const bkv_shape_t *shape, bool weighted, uint64_t budget, const uint8_t *shares, bkv_section_t *sections,
                      bool *weights) {
    if (!bkv_balance_fits(shape, budget)) {
        return false;
    }
    budget = budget < BKV_RECORD_MAX ? budget : BKV_RECORD_MAX;
    uint64_t bytes = budget - bkv_record_preamble(shape->layers, shape->heads);
    for (uint32_t i = 0; i < shape->layers * shape->heads; i++) {
        sections[i].key_offset = sections[i].tokens; // until bkv_record_place gives the planes their places
    }
    *weights = !spend(shape, weighted, bytes, shares, sections) || weighted;
    if (*weights != weighted) {
        spend(shape, true, bytes, shares, sections); // again, as weights take bytes too
    }
    return true;
}
