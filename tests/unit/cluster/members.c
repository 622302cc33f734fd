// members.c - see members.h.
#include "members.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

uint64_t random_next(uint64_t *state) {
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

bkv_key_t key_number(uint64_t number) {
    bkv_key_t key;
    for (size_t i = 0; i < sizeof(key.bytes); i += 8) {
        uint64_t word = random_next(&number);
        memcpy(&key.bytes[i], &word, 8);
    }
    return key;
}

void members_add(members_t *members, uint32_t weight, uint32_t domain, uint32_t domains) {
    bkv_placement_member_t member = {.epoch = 1, .weight = weight};
    cr_assert_lt(members->count, 256);
    snprintf(member.id, sizeof(member.id), "node-%u", (members->born++ * 37) % 1000); // not in order of birth
    if (domains > 0) {
        snprintf(member.domain, sizeof(member.domain), "rack-%u", domain % domains);
    }
    uint32_t to = members->count++;
    for (; to > 0 && strcmp(members->at[to - 1].id, member.id) > 0; to--) {
        members->at[to] = members->at[to - 1];
    }
    members->at[to] = member;
}

void members_remove(members_t *members, uint32_t index) {
    cr_assert_lt(index, members->count);
    members->count--;
    memmove(&members->at[index], &members->at[index + 1], (members->count - index) * sizeof(members->at[0]));
}

bkv_placement_t *place(const members_t *members, uint32_t replicas, bool table, const bkv_placement_t *previous) {
    const bkv_placement_config_t config = {
        .members = members->at, .count = members->count, .replicas = replicas, .seed = 7, .table = table};
    bkv_placement_t *placement = NULL;
    bkv_error_t err;
    cr_assert_eq(bkv_placement_create(&config, previous, &placement, &err), BKV_OK);
    return placement;
}
