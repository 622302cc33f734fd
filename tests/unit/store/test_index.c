// test_index.c - the hash table: many keys, few buckets, entries used again.
#include "fixture.h"

#include <criterion/criterion.h>
#include <string.h>

static bkv_shard_t *shard_of(const bkv_index_t *index, uint64_t number, uint64_t *hash) {
    bkv_key_t key = fixture_key(number);
    *hash = bkv_index_hash_key(index, &key);
    return bkv_index_shard(index, *hash);
}

static uint32_t find(const bkv_index_t *index, uint64_t number) {
    uint64_t hash;
    bkv_shard_t *shard = shard_of(index, number, &hash);
    bkv_key_t key = fixture_key(number);
    return bkv_index_find(index, shard, hash, &fixture_spec, &key);
}

static bkv_arena_t open_arena(uint32_t pages) {
    bkv_arena_t arena;
    bool intact;
    cr_assert_eq(bkv_arena_open(&arena, NULL, -1, (uint64_t)pages * BKV_PAGE_BYTES, 1, false, &intact, NULL), BKV_OK);
    for (uint32_t i = 0; i < pages; i++) {
        fixture_fill(bkv_arena_at(&arena, i), i, 160, TENANT);
    }
    return arena;
}

Test(store_index, links_finds_unlinks) {
    enum { COUNT = 1000 };
    static const uint32_t shard_counts[] = {1, 8, 1024};
    bkv_arena_t arena = open_arena(COUNT);
    for (size_t s = 0; s < 3; s++) {
        bkv_index_t index;
        cr_assert_eq(bkv_index_init(&index, &arena, COUNT, shard_counts[s], NULL), BKV_OK);
        uint32_t entry_of[COUNT];
        for (uint32_t i = 0; i < COUNT; i++) {
            uint32_t e = bkv_index_alloc(&index);
            cr_assert_neq(e, BKV_NO_ENTRY);
            index.entries[e].key = fixture_key(i);
            index.entries[e].page = i;
            entry_of[i] = e;
            uint64_t hash;
            bkv_shard_t *shard = shard_of(&index, i, &hash);
            bkv_index_link(&index, shard, hash, e);
        }
        cr_assert_eq(bkv_index_alloc(&index), BKV_NO_ENTRY);
        for (uint32_t i = 0; i < COUNT; i++) {
            cr_assert_eq(find(&index, i), entry_of[i]);
        }
        cr_assert_eq(find(&index, COUNT), BKV_NO_ENTRY);
        for (uint32_t i = 0; i < COUNT; i += 3) {
            uint64_t hash;
            bkv_shard_t *shard = shard_of(&index, i, &hash);
            bkv_index_unlink(&index, shard, hash, entry_of[i]);
            bkv_index_free(&index, entry_of[i]);
        }
        for (uint32_t i = 0; i < COUNT; i++) {
            cr_assert_eq(find(&index, i), i % 3 ? entry_of[i] : BKV_NO_ENTRY);
        }
        uint32_t again = bkv_index_alloc(&index);
        cr_assert_neq(again, BKV_NO_ENTRY);
        cr_assert_eq(index.entries[again].flags, 0);
        bkv_index_deinit(&index);
    }
    bkv_arena_close(&arena);
}

// Keys that differ in one byte only spread over the buckets, and differently in each process.
Test(store_index, hash_cannot_be_aimed) {
    enum { COUNT = 4096 };
    bkv_arena_t arena = open_arena(1);
    bkv_index_t index, other;
    cr_assert_eq(bkv_index_init(&index, &arena, COUNT, 16, NULL), BKV_OK);
    cr_assert_eq(bkv_index_init(&other, &arena, COUNT, 16, NULL), BKV_OK);
    uint32_t load[16] = {0};
    uint32_t buckets[COUNT] = {0};
    uint32_t same = 0;
    for (uint32_t i = 0; i < COUNT; i++) {
        bkv_key_t key = {{0}};
        memcpy(key.bytes + 28, &i, 4);
        uint64_t hash = bkv_index_hash_key(&index, &key);
        uint32_t shard = (uint32_t)(bkv_index_shard(&index, hash) - index.shards);
        load[shard]++;
        buckets[shard * (index.bucket_mask + 1) + (hash & index.bucket_mask)]++;
        same += hash == bkv_index_hash_key(&other, &key);
    }
    for (int i = 0; i < 16; i++) {
        cr_assert(load[i] > 256 - 96 && load[i] < 256 + 96, "%u in one shard", load[i]); // six sigma
    }
    for (int i = 0; i < COUNT; i++) {
        cr_assert_lt(buckets[i], 12); // P(> 11 | mean 1) * 4096 < 1e-5
    }
    cr_assert_eq(same, 0);
    bkv_index_deinit(&index);
    bkv_index_deinit(&other);
    bkv_arena_close(&arena);
}
