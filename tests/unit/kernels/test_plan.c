// test_plan.c - kernels/plan.c: what the sections of a balance record get of its bytes.
#include "backend.h"

#include <criterion/criterion.h>
#include <string.h>

static const bkv_shape_t shape = {.layers = 4, .heads = 2, .tokens = 256, .key_dim = 128, .value_dim = 128, .dtype = BKV_BF16};

#define SECTIONS 8

// Bytes of one planned section, and of all with header and directory.
static uint64_t bytes_of(const bkv_section_t *section, bool weights) {
    bkv_plane_layout_t layout;
    bkv_plane_layout(shape.tokens, section->tokens, shape.key_dim, shape.value_dim, section->key_bits, section->value_bits,
                     (bkv_index_kind_t)section->index_kind, weights, shape.dtype, &layout);
    return layout.key_bytes + layout.value_bytes;
}

static uint64_t plan(uint64_t budget, const uint8_t *shares, bkv_section_t *sections) {
    memset(sections, 0, SECTIONS * sizeof(*sections));
    for (uint32_t i = 0; i < SECTIONS; i++) {
        sections[i].tokens = shape.tokens;
    }
    bool weights;
    cr_assert(bkv_balance_plan(&shape, false, budget, shares, sections, &weights));
    uint64_t sum = bkv_record_preamble(shape.layers, shape.heads);
    bool all = true;
    for (uint32_t i = 0; i < SECTIONS; i++) {
        cr_assert(sections[i].tokens >= 1 && sections[i].tokens <= shape.tokens);
        all = all && sections[i].tokens == shape.tokens;
        sum += bytes_of(&sections[i], weights);
    }
    cr_assert(weights || all, "whoever drops tokens keeps weights");
    cr_assert(sum <= budget, "%zu bytes of %zu", (size_t)sum, (size_t)budget);
    return sum;
}

Test(plan, equal_shares_are_what_is_meant_by_none) {
    uint8_t equal[SECTIONS];
    memset(equal, 7, sizeof(equal));
    for (uint32_t rate = 2; rate <= 64; rate++) {
        bkv_section_t none[SECTIONS], given[SECTIONS];
        uint64_t budget = bkv_balance_budget(&shape, rate);
        cr_assert_eq(plan(budget, NULL, none), plan(budget, equal, given));
        cr_assert_eq(memcmp(none, given, sizeof(none)), 0);
    }
}

Test(plan, bytes_follow_the_shares) {
    const uint8_t shares[SECTIONS] = {20, 40, 20, 80, 20, 10, 40, 20};
    bkv_section_t sections[SECTIONS];
    uint64_t budget = bkv_balance_budget(&shape, 16);
    uint64_t sum = plan(budget, shares, sections);
    cr_assert(sum * 100 >= budget * 97, "only %zu of %zu bytes are used", (size_t)sum, (size_t)budget);
    for (uint32_t i = 0; i < SECTIONS; i++) {
        double fair = (double)(budget - bkv_record_preamble(4, 2)) * shares[i] / 250,
               has = (double)bytes_of(&sections[i], true);
        cr_assert(has > 0.85 * fair - 128 && has < 1.15 * fair + 128, "section %u has %g bytes, not %g", i, has, fair);
    }
}

Test(plan, what_a_section_cannot_use_goes_to_the_others) {
    const uint8_t shares[SECTIONS] = {255, 1, 1, 1, 1, 1, 1, 1};
    bkv_section_t sections[SECTIONS];
    uint64_t budget = bkv_balance_budget(&shape, 8);
    uint64_t sum = plan(budget, shares, sections);
    cr_assert_eq(sections[0].tokens, shape.tokens);
    cr_assert_eq(sections[0].key_bits, 8);
    cr_assert(sections[1].tokens >= 16, "%u tokens", sections[1].tokens);
    cr_assert(sum * 100 >= budget * 95);
}

Test(plan, the_smallest_share_keeps_a_token_and_less_than_that_is_refused) {
    const uint8_t shares[SECTIONS] = {255, 255, 255, 255, 255, 255, 255, 1};
    bkv_section_t sections[SECTIONS];
    uint64_t least = 0;
    while (!bkv_balance_fits(&shape, least)) {
        least += BKV_RECORD_ALIGN;
    }
    for (uint64_t budget = least; budget < least + 4096; budget += 112) {
        plan(budget, shares, sections);
    }
    bool weights;
    cr_assert(!bkv_balance_plan(&shape, false, least - 1, shares, sections, &weights));
}

Test(plan, no_section_keeps_more_than_there_is) {
    for (uint64_t budget = 3000; budget < 200000; budget += 1777) {
        const uint8_t shares[SECTIONS] = {9, 8, 7, 6, 5, 4, 3, 2};
        bkv_section_t sections[SECTIONS] = {{0}};
        for (uint32_t i = 0; i < SECTIONS; i++) {
            sections[i].tokens = 5 * i + 1;
        }
        bool weights;
        if (!bkv_balance_plan(&shape, true, budget, shares, sections, &weights)) {
            continue;
        }
        cr_assert(weights, "what has weights keeps them");
        for (uint32_t i = 0; i < SECTIONS; i++) {
            cr_assert(sections[i].tokens >= 1 && sections[i].tokens <= 5 * i + 1);
        }
    }
}
