// member.c - see member.h.
#include "daemon/cluster/members/member.h"

#include "cluster.pb-c.h"

#include <assert.h>
#include <string.h>

typedef Balancekv__Cluster__V1__Member record_t;

// ---- checks ----

static bool is_letter(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
}

// 1 to room - 1 characters, all letters, digits or among `others`.
static bool is_word(const char *text, const char *others, size_t room) {
    size_t length = strnlen(text, room);
    for (size_t i = 0; i < length && length < room; i++) {
        if (!is_letter(text[i]) && strchr(others, text[i]) == NULL) {
            return false;
        }
    }
    return length > 0 && length < room;
}

bool bkv_member_id_valid(const char *id) {
    return is_word(id, "._-", BKV_MEMBER_NAME_MAX);
}

#define ADDRESS_OTHERS   "._-:/[]%"
#define DOMAIN_OTHERS    "._-:/"
#define TRANSPORT_OTHERS "_-"
#define VERSION_OTHERS   "._-+~"

bkv_status_t bkv_member_check(const bkv_member_t *member, bkv_error_t *err) {
    if (!bkv_member_id_valid(member->place.id)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "id: must be 1 to %d letters, digits, '.', '_' or '-'",
                        BKV_MEMBER_NAME_MAX - 1);
    }
    if (member->place.domain[0] != '\0' && !is_word(member->place.domain, DOMAIN_OTHERS, BKV_MEMBER_NAME_MAX)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "domain: at most %d letters, digits, '.', '_', '-', ':' or '/'",
                        BKV_MEMBER_NAME_MAX - 1);
    }
    if (member->place.weight > BKV_WEIGHT_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "weight: %u, at most %u", member->place.weight, BKV_WEIGHT_MAX);
    }
    if (member->address_count > BKV_MEMBER_ADDRESSES_MAX || member->transport_count > BKV_MEMBER_TRANSPORTS_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "addresses, transports: more than %d or %d", BKV_MEMBER_ADDRESSES_MAX,
                        BKV_MEMBER_TRANSPORTS_MAX);
    }
    for (uint32_t i = 0; i < member->address_count; i++) {
        if (!is_word(member->addresses[i], ADDRESS_OTHERS, BKV_MEMBER_ADDRESS_MAX)) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "addresses: number %u is none", i + 1);
        }
    }
    for (uint32_t i = 0; i < member->transport_count; i++) {
        if (!is_word(member->transports[i], TRANSPORT_OTHERS, BKV_MEMBER_TRANSPORT_MAX)) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "transports: number %u is none", i + 1);
        }
    }
    if (member->version[0] != '\0' && !is_word(member->version, VERSION_OTHERS, BKV_MEMBER_VERSION_MAX)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "version: is none");
    }
    return BKV_OK;
}

bool bkv_member_equal(const bkv_member_t *a, const bkv_member_t *b) {
    const bkv_placement_member_t *p = &a->place, *q = &b->place;
    return strcmp(p->id, q->id) == 0 && strcmp(p->domain, q->domain) == 0 && p->epoch == q->epoch && p->weight == q->weight &&
           p->draining == q->draining && a->capacity_bytes == b->capacity_bytes && a->address_count == b->address_count &&
           a->transport_count == b->transport_count && memcmp(a->addresses, b->addresses, sizeof(a->addresses)) == 0 &&
           memcmp(a->transports, b->transports, sizeof(a->transports)) == 0 && strcmp(a->version, b->version) == 0;
}

// ---- records ----

size_t bkv_member_pack(const bkv_member_t *member, uint8_t record[BKV_MEMBER_RECORD_MAX]) {
    record_t message = BALANCEKV__CLUSTER__V1__MEMBER__INIT;
    char *addresses[BKV_MEMBER_ADDRESSES_MAX], *transports[BKV_MEMBER_TRANSPORTS_MAX];
    for (uint32_t i = 0; i < member->address_count; i++) {
        addresses[i] = (char *)member->addresses[i];
    }
    for (uint32_t i = 0; i < member->transport_count; i++) {
        transports[i] = (char *)member->transports[i];
    }
    message.id = (char *)member->place.id;
    message.epoch = member->place.epoch;
    message.addresses = addresses;
    message.n_addresses = member->address_count;
    message.transports = transports;
    message.n_transports = member->transport_count;
    message.capacity_bytes = member->capacity_bytes;
    message.weight = member->place.weight;
    message.domain = (char *)member->place.domain;
    message.draining = member->place.draining;
    message.version = (char *)member->version;
    assert(protobuf_c_message_get_packed_size(&message.base) <= BKV_MEMBER_RECORD_MAX);
    return protobuf_c_message_pack(&message.base, record);
}

// Copies as much as there is room for: what is longer fails the check, for want of a NUL.
static void take_text(const char *text, char *out, size_t room) {
    size_t length = strnlen(text, room);
    memcpy(out, text, length);
}

static bkv_status_t take_record(const record_t *message, bkv_member_t *member, bkv_error_t *err) {
    if (message->n_addresses > BKV_MEMBER_ADDRESSES_MAX || message->n_transports > BKV_MEMBER_TRANSPORTS_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "addresses, transports: more than %d or %d", BKV_MEMBER_ADDRESSES_MAX,
                        BKV_MEMBER_TRANSPORTS_MAX);
    }
    take_text(message->id, member->place.id, sizeof(member->place.id));
    take_text(message->domain, member->place.domain, sizeof(member->place.domain));
    take_text(message->version, member->version, sizeof(member->version));
    for (size_t i = 0; i < message->n_addresses; i++) {
        take_text(message->addresses[i], member->addresses[i], sizeof(member->addresses[i]));
    }
    for (size_t i = 0; i < message->n_transports; i++) {
        take_text(message->transports[i], member->transports[i], sizeof(member->transports[i]));
    }
    member->address_count = (uint32_t)message->n_addresses;
    member->transport_count = (uint32_t)message->n_transports;
    member->place.epoch = message->epoch;
    member->place.weight = message->weight;
    member->place.draining = message->draining;
    member->capacity_bytes = message->capacity_bytes;
    return bkv_member_check(member, err);
}

bkv_status_t bkv_member_parse(const void *record, size_t length, const char *id, bkv_member_t *member, bkv_error_t *err) {
    if (length > BKV_MEMBER_RECORD_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%zu bytes, at most %d", length, BKV_MEMBER_RECORD_MAX);
    }
    record_t *message = balancekv__cluster__v1__member__unpack(NULL, length, record);
    if (message == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "not a message");
    }
    memset(member, 0, sizeof(*member));
    bkv_status_t status = take_record(message, member, err);
    balancekv__cluster__v1__member__free_unpacked(message, NULL);
    if (status == BKV_OK && strcmp(member->place.id, id) != 0) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "id: it is %s's", member->place.id);
    }
    return status;
}

// ---- config ----

size_t bkv_cluster_config_pack(const bkv_cluster_config_t *config, uint8_t record[BKV_CLUSTER_CONFIG_MAX]) {
    Balancekv__Cluster__V1__Config message = BALANCEKV__CLUSTER__V1__CONFIG__INIT;
    message.seed = config->seed;
    message.replicas = config->replicas;
    assert(protobuf_c_message_get_packed_size(&message.base) <= BKV_CLUSTER_CONFIG_MAX);
    return protobuf_c_message_pack(&message.base, record);
}

bkv_status_t bkv_cluster_config_parse(const void *record, size_t length, bkv_cluster_config_t *config, bkv_error_t *err) {
    Balancekv__Cluster__V1__Config *message =
        length <= BKV_CLUSTER_CONFIG_MAX ? balancekv__cluster__v1__config__unpack(NULL, length, record) : NULL;
    if (message == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "not a message");
    }
    *config = (bkv_cluster_config_t){.seed = message->seed, .replicas = message->replicas};
    balancekv__cluster__v1__config__free_unpacked(message, NULL);
    if (config->replicas < 1 || config->replicas > BKV_REPLICAS_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "replicas: %u, must be 1 to %d", config->replicas, BKV_REPLICAS_MAX);
    }
    return BKV_OK;
}
