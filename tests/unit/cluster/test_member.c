// test_member.c - records: what goes in comes out, and what is not as it should be is refused.
#include "members.h"

#include "cluster.pb-c.h"
#include "daemon/cluster/members/member.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static bkv_member_t sample(void) {
    bkv_member_t member = {.capacity_bytes = 1ull << 40, .address_count = 2, .transport_count = 2};
    snprintf(member.place.id, sizeof(member.place.id), "node-1.example");
    snprintf(member.place.domain, sizeof(member.place.domain), "room:2/rack-7");
    snprintf(member.addresses[0], sizeof(member.addresses[0]), "[fe80::1%%eth0]:7420");
    snprintf(member.addresses[1], sizeof(member.addresses[1]), "10.0.0.1:7420");
    snprintf(member.transports[0], sizeof(member.transports[0]), "inline");
    snprintf(member.transports[1], sizeof(member.transports[1]), "verbs");
    snprintf(member.version, sizeof(member.version), "0.1.0~rc1");
    member.place.epoch = 0xfedcba9876543210;
    member.place.weight = BKV_WEIGHT_MAX;
    member.place.draining = true;
    return member;
}

Test(member, a_record_comes_out_as_it_went_in) {
    uint8_t record[BKV_MEMBER_RECORD_MAX];
    bkv_member_t member = sample(), parsed;
    cr_assert_eq(bkv_member_check(&member, NULL), BKV_OK);
    size_t length = bkv_member_pack(&member, record);
    cr_assert_eq(bkv_member_parse(record, length, "node-1.example", &parsed, NULL), BKV_OK);
    cr_assert(bkv_member_equal(&parsed, &member));
    parsed.place.draining = false;
    cr_assert(!bkv_member_equal(&parsed, &member));
    cr_assert_eq(bkv_member_parse(record, length, "node-2", &parsed, NULL), BKV_INVALID_ARGUMENT, "it is under another's key");
}

Test(member, the_largest_record_fits) {
    uint8_t record[BKV_MEMBER_RECORD_MAX];
    bkv_member_t member = sample(), parsed;
    memset(member.place.id, 'i', BKV_MEMBER_NAME_MAX - 1);
    memset(member.place.domain, 'd', BKV_MEMBER_NAME_MAX - 1);
    memset(member.version, '9', BKV_MEMBER_VERSION_MAX - 1);
    member.address_count = BKV_MEMBER_ADDRESSES_MAX;
    member.transport_count = BKV_MEMBER_TRANSPORTS_MAX;
    for (int i = 0; i < BKV_MEMBER_ADDRESSES_MAX; i++) {
        memset(member.addresses[i], 'a', BKV_MEMBER_ADDRESS_MAX - 1);
    }
    for (int i = 0; i < BKV_MEMBER_TRANSPORTS_MAX; i++) {
        memset(member.transports[i], 't', BKV_MEMBER_TRANSPORT_MAX - 1);
    }
    member.capacity_bytes = UINT64_MAX;
    bkv_error_t err;
    cr_assert_eq(bkv_member_check(&member, &err), BKV_OK, "%s", err.message);
    size_t length = bkv_member_pack(&member, record);
    cr_assert_eq(bkv_member_parse(record, length, member.place.id, &parsed, &err), BKV_OK, "%s", err.message);
    cr_assert(bkv_member_equal(&parsed, &member));
}

Test(member, ids) {
    char longest[BKV_MEMBER_NAME_MAX + 1];
    memset(longest, 'x', sizeof(longest));
    longest[BKV_MEMBER_NAME_MAX] = '\0';
    cr_assert(bkv_member_id_valid("a") && bkv_member_id_valid("Node_1.example-2") && !bkv_member_id_valid(longest));
    longest[BKV_MEMBER_NAME_MAX - 1] = '\0';
    cr_assert(bkv_member_id_valid(longest));
    const char *const bad[] = {"", "a/b", "a b", "a\n", "\xc3\xa4", "a%", "../x"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        cr_assert(strcmp(bad[i], "../x") == 0 ? !bkv_member_id_valid("../x") : !bkv_member_id_valid(bad[i]), "%s", bad[i]);
    }
}

// A record as somebody else might write it.
static bkv_status_t parse(Balancekv__Cluster__V1__Member *message) {
    static uint8_t record[8192];
    bkv_member_t member;
    size_t length = balancekv__cluster__v1__member__get_packed_size(message);
    cr_assert_leq(length, sizeof(record));
    balancekv__cluster__v1__member__pack(message, record);
    return bkv_member_parse(record, length, "n", &member, NULL);
}

Test(member, what_is_not_as_it_should_be_is_refused) {
    static char id[] = "n", spaced[] = "a b", newline[] = "a\nb", odd[] = "\xff\xfe", large[3000], long_name[200];
    char *one[] = {id}, *bad_one[] = {newline}, *empty[] = {large}, *many[] = {id, id, id, id, id, id, id, id, id};
    memset(long_name, 'x', sizeof(long_name) - 1);
#define BAD(change)                                                                                                            \
    do {                                                                                                                       \
        Balancekv__Cluster__V1__Member message = BALANCEKV__CLUSTER__V1__MEMBER__INIT;                                         \
        message.id = id;                                                                                                       \
        message.addresses = one;                                                                                               \
        message.n_addresses = 1;                                                                                               \
        cr_assert_eq(parse(&message), BKV_OK);                                                                                 \
        change;                                                                                                                \
        cr_assert_eq(parse(&message), BKV_INVALID_ARGUMENT, #change);                                                          \
    } while (0)
    BAD(message.id = spaced);
    BAD(message.id = long_name);
    BAD(message.domain = spaced);
    BAD(message.domain = odd);
    BAD(message.domain = long_name);
    BAD(message.version = newline);
    BAD(message.weight = BKV_WEIGHT_MAX + 1);
    BAD(message.addresses = bad_one);
    BAD(message.addresses = empty);
    BAD((message.addresses = many, message.n_addresses = BKV_MEMBER_ADDRESSES_MAX + 1));
    BAD((message.transports = many, message.n_transports = BKV_MEMBER_TRANSPORTS_MAX + 1));
    BAD((message.transports = bad_one, message.n_transports = 1));
    memset(large, 'x', sizeof(large) - 1);
    BAD(message.domain = large);
#undef BAD
}

Test(member, random_bytes_do_no_harm) {
    uint8_t record[BKV_MEMBER_RECORD_MAX], changed[BKV_MEMBER_RECORD_MAX];
    uint64_t state = 5;
    bkv_member_t member = sample(), parsed;
    size_t length = bkv_member_pack(&member, record);
    for (int round = 0; round < 20000; round++) {
        memcpy(changed, record, length);
        for (uint64_t n = random_next(&state) % 4 + 1; n > 0; n--) {
            changed[random_next(&state) % length] = (uint8_t)random_next(&state);
        }
        size_t shown = round % 2 == 0 ? length : random_next(&state) % length;
        if (bkv_member_parse(changed, shown, "node-1.example", &parsed, NULL) == BKV_OK) {
            cr_assert_eq(bkv_member_check(&parsed, NULL), BKV_OK);
        }
    }
    cr_assert_eq(bkv_member_parse(record, BKV_MEMBER_RECORD_MAX + 1, "n", &parsed, NULL), BKV_INVALID_ARGUMENT);
}

Test(member, cluster_config) {
    uint8_t record[BKV_CLUSTER_CONFIG_MAX];
    bkv_cluster_config_t config = {.seed = UINT64_MAX - 5, .replicas = 3}, parsed;
    size_t length = bkv_cluster_config_pack(&config, record);
    cr_assert_eq(bkv_cluster_config_parse(record, length, &parsed, NULL), BKV_OK);
    cr_assert(parsed.seed == config.seed && parsed.replicas == 3);
    config.replicas = BKV_REPLICAS_MAX + 1;
    length = bkv_cluster_config_pack(&config, record);
    cr_assert_eq(bkv_cluster_config_parse(record, length, &parsed, NULL), BKV_INVALID_ARGUMENT);
    cr_assert_eq(bkv_cluster_config_parse(record, 0, &parsed, NULL), BKV_INVALID_ARGUMENT);
    cr_assert_eq(bkv_cluster_config_parse("\xff\xff\xff", 3, &parsed, NULL), BKV_INVALID_ARGUMENT);
}
