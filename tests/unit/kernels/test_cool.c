// test_cool.c - kernels/cool.c: profiles as text, what a plan promises for any input, and the tree's shape and cost.
#include "cool.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define BLOCKS 200

static const bkv_shape_t shape = {.layers = 4, .heads = 2, .tokens = 1, .key_dim = 64, .value_dim = 64, .dtype = BKV_BF16};

// Bytes of a token as bf16, all layers and heads.
#define TOKEN_BYTES (2u * 4 * 2 * 128)

static uint32_t draw(uint64_t *state, uint32_t below) {
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)((*state >> 33) % below);
}

// ---- profiles ----

Test(cool, profiles_are_text) {
    const char *const texts[] = {"",
                                 ":16",
                                 "512:4,:32",
                                 "512:4,2048:8,8192:16,:32",
                                 "1:1,2:1024,16777216:3,:1",
                                 "1:1,2:2,3:3,4:4,5:5,6:6,16777216:1024,:1024"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        bkv_profile_t profile;
        bkv_error_t err = {0};
        char text[BKV_PROFILE_TEXT];
        cr_assert_eq(bkv_profile_parse(texts[i], &profile, &err), BKV_OK, "%s: %s", texts[i], err.message);
        bkv_profile_format(&profile, text);
        cr_assert_str_eq(text, texts[i]);
    }
    bkv_profile_t profile;
    cr_assert_eq(bkv_profile_parse("512:4,:32", &profile, NULL), BKV_OK);
    cr_assert(profile.count == 2 && profile.bands[0].age == 512 && profile.bands[0].rate == 4);
    cr_assert(profile.bands[1].age == 0 && profile.bands[1].rate == 32);
}

Test(cool, bad_profiles_are_named) {
    const struct {
        const char *text, *field;
    } bad[] = {
        {"512:4", "profile[0].age: 512"},
        {":0", "profile[0].rate: 0"},
        {":1025", "profile[0].rate: 1025"},
        {"512:4,512:8,:32", "profile[1].age: 512"},
        {"512:4,256:8,:32", "profile[1].age: 256"},
        {":4,512:8,:32", "profile[0].age: 0"},
        {"16777217:4,:8", "profile[0].age: 16777217"},
        {"1:1,2:1,3:1,4:1,5:1,6:1,7:1,8:1,:1", "profile: \"1:1,2:1"},
        {"0:4", "profile: band 0"},
        {"512", "profile: band 0"},
        {"512:", "profile: band 0"},
        {"512:4,", "profile: band 0"},
        {",:4", "profile: band 0"},
        {"512:4;:8", "profile: band 0"},
        {"512:4,:-8", "profile: band 1"},
        {"512:4,: 8", "profile: band 1"},
        {"512:4,:8x", "profile: band 1"},
        {"999999999:4,:8", "profile: band 0"},
        {"512:99999999999999999999,:8", "profile: band 0"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        bkv_profile_t profile;
        bkv_error_t err = {0};
        cr_assert_eq(bkv_profile_parse(bad[i].text, &profile, &err), BKV_INVALID_ARGUMENT, "%s", bad[i].text);
        cr_assert_eq(strncmp(err.message, bad[i].field, strlen(bad[i].field)), 0, "%s: %s", bad[i].text, err.message);
    }
    bkv_profile_t many = {.count = 9};
    bkv_error_t err;
    cr_assert_eq(bkv_profile_check(&many, &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(err.message, "profile: 9 bands", 16), 0, "%s", err.message);
}

Test(cool, every_rate_has_a_profile) {
    for (uint32_t rate = 1; rate < 200; rate++) {
        bkv_profile_t profile;
        bkv_profile_for_rate(rate, &profile);
        cr_assert(profile.count > 1 && bkv_profile_check(&profile, NULL) == BKV_OK);
        for (uint32_t i = 1; i < profile.count; i++) {
            cr_assert_gt(profile.bands[i].rate, profile.bands[i - 1].rate, "older is thinner");
        }
    }
}

// ---- plans ----

static void draw_profile(uint64_t *state, bkv_profile_t *profile) {
    uint32_t age = 0, rate = 1;
    profile->count = 1 + draw(state, BKV_MAX_BANDS);
    for (uint32_t i = 0; i < profile->count; i++) {
        age += 1 + draw(state, 900);
        rate += 1 + draw(state, 12);
        profile->bands[i] = (bkv_band_t){.age = i + 1 < profile->count ? age : 0, .rate = rate};
    }
}

// Whole blocks as int4 or as less, the last one short now and then.
static uint32_t draw_blocks(uint64_t *state, bkv_cool_block_t *blocks) {
    uint32_t count = 1 + draw(state, BLOCKS);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t tokens = i + 1 < count ? 64 : 1 + draw(state, 64);
        blocks[i] = (bkv_cool_block_t){.tokens = tokens, .bytes = 1024 + (uint64_t)tokens * TOKEN_BYTES / (3 + draw(state, 6))};
    }
    return count;
}

// Every block in exactly one band, in order; sums right.
static void assert_cut(const bkv_cool_block_t *blocks, uint32_t block_count, const bkv_cool_band_t *bands, uint32_t count) {
    uint32_t next = 0;
    cr_assert(count >= 1 && count <= BKV_FOLD_RECORDS);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t tokens = 0;
        cr_assert(bands[i].first == next && bands[i].count > 0);
        for (uint32_t j = 0; j < bands[i].count; j++) {
            tokens += blocks[next++].tokens;
        }
        cr_assert_eq(bands[i].tokens, tokens);
    }
    cr_assert_eq(next, block_count);
}

static uint64_t held(const bkv_cool_block_t *blocks, const bkv_cool_band_t *band) {
    uint64_t bytes = 0;
    for (uint32_t j = 0; j < band->count; j++) {
        bytes += blocks[band->first + j].bytes;
    }
    return bytes;
}

static uint64_t sum(const bkv_cool_band_t *bands, uint32_t count) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < count; i++) {
        bytes += bands[i].budget;
    }
    return bytes;
}

Test(cool, plans_keep_their_promises) {
    uint64_t state = 7;
    uint32_t planned = 0, refused = 0, filled = 0;
    for (uint32_t trial = 0; trial < 3000; trial++) {
        bkv_cool_block_t blocks[BLOCKS];
        bkv_cool_band_t bands[BKV_FOLD_RECORDS];
        bkv_profile_t profile;
        bkv_error_t err = {0};
        uint32_t count, block_count = draw_blocks(&state, blocks);
        draw_profile(&state, &profile);
        uint64_t budget = 1 + draw(&state, 1u << (8 + draw(&state, 16)));
        if (bkv_cool_plan(&shape, blocks, block_count, &profile, budget, bands, &count, &err) != BKV_OK) {
            cr_assert_eq(strncmp(err.message, "budget_bytes: ", 14), 0, "%s", err.message);
            refused++;
            continue;
        }
        planned++;
        assert_cut(blocks, block_count, bands, count);
        uint64_t total = sum(bands, count);
        cr_assert_leq(total, budget);
        bool free_band = false; // that could take more
        for (uint32_t i = 0; i < count; i++) {
            bool full = bands[i].budget >= held(blocks, &bands[i]);
            bool newer_full = i + 1 < count && bands[i + 1].budget >= held(blocks, &bands[i + 1]);
            bool floor = bands[i].budget < 20000; // may be what a smallest record takes
            free_band = free_band || !full;
            if (i + 1 < count && !newer_full && !floor) {
                cr_assert_leq(bands[i].budget / bands[i].tokens, bands[i + 1].budget / bands[i + 1].tokens + 1,
                              "trial %u: an older band is denser", trial);
            }
        }
        if (free_band && total > 400000) { // smallest records apart, the shares come within one step of the budget
            cr_assert_geq((double)total * 1.05 + 8 * 16, (double)budget, "trial %u", trial);
            filled++;
        }
    }
    cr_assert(planned > 1000 && refused > 100 && filled > 100, "%u planned, %u refused, %u filled", planned, refused, filled);
}

// Where the budget is less than the rates come to, what is old keeps its rate, and the densest bands are alike; where it is
// more, all are denser by the same factor.
Test(cool, the_densest_give_way_first) {
    bkv_profile_t profile;
    cr_assert_eq(bkv_profile_parse("512:4,1024:8,:32", &profile, NULL), BKV_OK);
    bkv_cool_block_t blocks[16];
    bkv_cool_band_t bands[BKV_FOLD_RECORDS];
    uint32_t count;
    for (uint32_t i = 0; i < 16; i++) {
        blocks[i] = (bkv_cool_block_t){.tokens = 256, .bytes = 256 * TOKEN_BYTES}; // no cap
    }
    const uint64_t unit = 512 * (uint64_t)TOKEN_BYTES, old = unit * 6 / 32, nominal = old + unit / 8 + unit / 4;
    cr_assert_eq(bkv_cool_plan(&shape, blocks, 16, &profile, nominal, bands, &count, NULL), BKV_OK);
    cr_assert(count == 3 && bands[0].budget == old && bands[1].budget == unit / 8 && bands[2].budget == unit / 4);
    cr_assert_eq(bkv_cool_plan(&shape, blocks, 16, &profile, old + unit / 8 + unit / 6, bands, &count, NULL), BKV_OK);
    cr_assert(bands[0].budget == old && bands[1].budget == unit / 8, "only the newest gives way");
    cr_assert_leq(bands[2].budget, unit / 6);
    cr_assert_geq(bands[2].budget, unit / 6 * 99 / 100);
    cr_assert_eq(bkv_cool_plan(&shape, blocks, 16, &profile, old + unit / 8, bands, &count, NULL), BKV_OK);
    cr_assert(bands[0].budget == old && bands[1].budget < unit / 8, "then both");
    cr_assert_leq(bands[2].budget, bands[1].budget * 105 / 100 + 16);
    cr_assert_eq(bkv_cool_plan(&shape, blocks, 16, &profile, old, bands, &count, NULL), BKV_OK);
    cr_assert(bands[0].budget < old && bands[0].budget > old / 2, "then all");
    cr_assert_eq(bkv_cool_plan(&shape, blocks, 16, &profile, 2 * nominal, bands, &count, NULL), BKV_OK);
    cr_assert(bands[0].budget == 2 * old && bands[1].budget == unit / 4, "twice as much for each");
}

static const char *const ages = "512:4,2048:8,8192:16,:32";

// A block is never thinner than its age says, and a band at most a quarter and a block longer.
Test(cool, cuts_lie_at_their_ages) {
    bkv_profile_t profile;
    cr_assert_eq(bkv_profile_parse(ages, &profile, NULL), BKV_OK);
    bkv_cool_block_t blocks[BLOCKS];
    bkv_cool_band_t bands[BKV_FOLD_RECORDS];
    for (uint32_t n = 1; n <= BLOCKS; n++) {
        uint32_t count;
        blocks[n - 1] = (bkv_cool_block_t){.tokens = 256, .bytes = 256 * TOKEN_BYTES / 3};
        cr_assert_eq(bkv_cool_plan(&shape, blocks, n, &profile, 0, bands, &count, NULL), BKV_OK);
        assert_cut(blocks, n, bands, count);
        for (uint32_t i = 0; i < 3 && i + 1 < count; i++) { // the end of the band before the newest, and so on
            const bkv_cool_band_t *older = &bands[count - 2 - i];
            uint32_t age = profile.bands[i].age, cut = 256 * (n - older->first - older->count);
            cr_assert(cut >= age && cut <= age + age / 4 + 256, "%u blocks: cut %u for age %u", n, cut, age);
        }
    }
}

// The oldest band comes in runs of a power of two times 4,096 tokens, the largest first, and what is left.
Test(cool, the_oldest_band_comes_in_runs) {
    bkv_profile_t profile;
    cr_assert_eq(bkv_profile_parse(":16", &profile, NULL), BKV_OK);
    bkv_cool_block_t blocks[BLOCKS];
    bkv_cool_band_t bands[BKV_FOLD_RECORDS];
    uint32_t count;
    for (uint32_t i = 0; i < BLOCKS; i++) {
        blocks[i] = (bkv_cool_block_t){.tokens = 256, .bytes = 256 * TOKEN_BYTES / 3};
    }
    cr_assert_eq(bkv_cool_plan(&shape, blocks, 1 + 16 * (8 + 2 + 1), &profile, 0, bands, &count, NULL), BKV_OK);
    cr_assert(count == 4 && bands[0].count == 128 && bands[1].count == 32 && bands[2].count == 16 && bands[3].count == 1);
    // Blocks of another size: a run ends where a block does.
    for (uint32_t i = 0; i < BLOCKS; i++) {
        blocks[i].tokens = 100;
    }
    cr_assert_eq(bkv_cool_plan(&shape, blocks, 130, &profile, 0, bands, &count, NULL), BKV_OK);
    assert_cut(blocks, 130, bands, count);
    cr_assert(count == 3 && bands[0].count == 81 && bands[1].count == 41, "%u, %u of %u", bands[0].count, bands[1].count,
              count);
    // The most that there can be: one bit each, and a rest.
    bkv_cool_block_t *many = calloc(4096, sizeof *many);
    for (uint32_t i = 0; i < 4096; i++) {
        many[i] = (bkv_cool_block_t){.tokens = i < 4095 ? 4096 : 4095, .bytes = 1 << 20};
    }
    cr_assert_eq(bkv_profile_parse("1:1,2:2,3:3,4:4,5:5,6:6,7:7,:8", &profile, NULL), BKV_OK);
    cr_assert_eq(bkv_cool_plan(&shape, many, 4096, &profile, 0, bands, &count, NULL), BKV_OK);
    cr_assert(count >= 12 && count <= BKV_FOLD_RECORDS);
    bkv_error_t err;
    many[4095].tokens = 4097;
    cr_assert_eq(bkv_cool_plan(&shape, many, 4096, &profile, 0, bands, &count, &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(err.message, "keys: 16777217 tokens", 21), 0, "%s", err.message);
    free(many);
}

// With nothing but nominal rates, one more block changes little: all blocks of bands that were not there before, per block
// appended, are a logarithm on average.
Test(cool, old_bands_stay) {
    enum { MANY = 4000 };
    bkv_profile_t profile;
    cr_assert_eq(bkv_profile_parse("512:4,2048:8,:24", &profile, NULL), BKV_OK);
    bkv_cool_block_t *blocks = calloc(MANY, sizeof *blocks);
    bkv_cool_band_t bands[BKV_FOLD_RECORDS], before[BKV_FOLD_RECORDS];
    uint32_t count = 0, had = 0;
    uint64_t changed = 0;
    for (uint32_t n = 1; n <= MANY; n++) {
        blocks[n - 1] = (bkv_cool_block_t){.tokens = 256, .bytes = 256 * TOKEN_BYTES / 3};
        cr_assert_eq(bkv_cool_plan(&shape, blocks, n, &profile, 0, bands, &count, NULL), BKV_OK);
        for (uint32_t i = 0; i < count; i++) {
            bool same = false;
            for (uint32_t j = 0; j < had && !same; j++) {
                same = before[j].first == bands[i].first && before[j].count == bands[i].count &&
                       before[j].budget == bands[i].budget;
            }
            changed += same ? 0 : bands[i].count;
        }
        memcpy(before, bands, sizeof bands);
        had = count;
    }
    // 2 or 3 blocks in the newest band and 6 to 8 in the next with each one, 16 at most of the rest of the oldest every other
    // time, and log2(4,000 / 16) doublings of its runs.
    cr_assert_leq(changed, (uint64_t)MANY * (3 + 8 + 8 + 8), "%llu", (unsigned long long)changed);
    free(blocks);
}

// ---- the tree ----

// Walks everything below a run; returns the bytes read, and counts nodes.
static uint64_t walk(const uint64_t *before, uint32_t first, uint32_t count, uint64_t node_bytes, uint32_t *nodes,
                     uint32_t *leaves) {
    bkv_cool_part_t parts[BLOCKS];
    uint32_t n = bkv_cool_parts(before, first, count, node_bytes, parts), next = first;
    uint64_t read = 0;
    cr_assert(n >= 1 && n <= count);
    for (uint32_t i = 0; i < n; i++) {
        cr_assert_eq(parts[i].first, next);
        next += parts[i].count;
        uint64_t bytes = before[next] - before[parts[i].first];
        if (parts[i].count == 1) {
            read += bytes;
            (*leaves)++;
            continue;
        }
        cr_assert(parts[i].count < count && bytes >= 2 * node_bytes, "a node is smaller than the run, and halves it");
        cr_assert((parts[i].count & (parts[i].count - 1)) == 0 && parts[i].first % parts[i].count == 0, "and aligned");
        (*nodes)++;
        read += node_bytes + walk(before, parts[i].first, parts[i].count, node_bytes, nodes, leaves);
    }
    cr_assert_eq(next, first + count);
    return read;
}

Test(cool, the_tree_covers_every_record_once) {
    uint64_t state = 3;
    for (uint32_t trial = 0; trial < 300; trial++) {
        uint64_t before[BLOCKS + 1] = {0};
        uint32_t count = 1 + draw(&state, BLOCKS), nodes = 0, leaves = 0;
        for (uint32_t i = 0; i < count; i++) {
            before[i + 1] = before[i] + 100 + draw(&state, 1000);
        }
        uint64_t node_bytes = bkv_cool_node_bytes(1 + draw(&state, 20000));
        walk(before, 0, count, node_bytes, &nodes, &leaves);
        cr_assert_eq(leaves, count);
    }
    const uint64_t before[] = {0, 10, 20, 30, 40};
    bkv_cool_part_t parts[4];
    cr_assert_eq(bkv_cool_parts(before, 0, 4, 1000, parts), 4, "little data has no nodes");
    cr_assert_eq(bkv_cool_parts(before, 0, 4, 10, parts), 2, "the run itself is none");
    cr_assert(parts[1].first == 2 && parts[1].count == 2);
}

Test(cool, nodes_have_two_to_four_times_the_budget) {
    for (uint64_t budget = 1; budget < 100000; budget += 37) {
        uint64_t bytes = bkv_cool_node_bytes(budget);
        cr_assert(bytes >= 2 * budget && bytes < 4 * budget && (bytes & (bytes - 1)) == 0);
    }
    cr_assert_gt(bkv_cool_node_bytes(UINT64_MAX), UINT64_C(1) << 60);
}

// With every node of the prefix before at hand, one more record costs O(log n) reads of a node's bytes.
Test(cool, an_appended_record_costs_a_logarithm) {
    enum { COUNT = 4096 };
    static uint64_t before[COUNT + 1];
    static bkv_cool_part_t parts[COUNT];
    const uint64_t node_bytes = 4000, block = 1000;
    for (uint32_t i = 0; i < COUNT; i++) {
        before[i + 1] = before[i] + block;
    }
    uint64_t total = 0;
    for (uint32_t n = 1; n <= COUNT; n++) {
        uint64_t read = 0;
        uint32_t log2n = 0, count = bkv_cool_parts(before, 0, n, node_bytes, parts), fresh = 0;
        while (1u << (log2n + 1) <= n) {
            log2n++;
        }
        for (uint32_t i = 0; i < count; i++) {
            read += parts[i].count == 1 ? block : node_bytes;
            fresh += parts[i].count > 1 && parts[i].first + parts[i].count == n; // it ends with the new record
        }
        cr_assert_leq(fresh, 1);
        read += (uint64_t)fresh * log2n * 4 * node_bytes; // it, and those below it that end there too
        cr_assert_leq(read, 5 * node_bytes * (log2n + 2), "%u records: %llu bytes", n, (unsigned long long)read);
        total += read;
    }
    cr_assert_leq(total, COUNT * 2 * 12 * node_bytes);
}
