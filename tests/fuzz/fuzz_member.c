// fuzz_member.c - records in etcd as another version, or anybody who may write there, may have left them: a member's, and what
// all members agree on.
//
// The first byte chooses. A member's record is read as the one of the id that it names, so that what is behind that is reached
// too. Whatever is taken passes the check, is what protobuf-c reads, and comes out the same once it has been packed again.
#include "daemon/cluster/members/member.h"

#include "cluster.pb-c.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// A mistake of ours must be seen also where no sanitizer looks.
static void require(bool condition) {
    if (!condition) {
        abort();
    }
}

// All of a text's room is used as member.h says: text, a NUL, zeros. It is `said`, up to its first NUL.
static void check_text(const char *text, size_t room, const char *said) {
    size_t length = strnlen(text, room);
    require(length < room && strcmp(text, said) == 0);
    for (size_t i = length; i < room; i++) {
        require(text[i] == '\0');
    }
}

static void check_texts(const bkv_member_t *member, const Balancekv__Cluster__V1__Member *said) {
    check_text(member->place.id, sizeof(member->place.id), said->id);
    check_text(member->place.domain, sizeof(member->place.domain), said->domain);
    check_text(member->version, sizeof(member->version), said->version);
    require(member->address_count == said->n_addresses && member->address_count <= BKV_MEMBER_ADDRESSES_MAX);
    require(member->transport_count == said->n_transports && member->transport_count <= BKV_MEMBER_TRANSPORTS_MAX);
    for (uint32_t i = 0; i < BKV_MEMBER_ADDRESSES_MAX; i++) {
        check_text(member->addresses[i], sizeof(member->addresses[i]), i < said->n_addresses ? said->addresses[i] : "");
    }
    for (uint32_t i = 0; i < BKV_MEMBER_TRANSPORTS_MAX; i++) {
        check_text(member->transports[i], sizeof(member->transports[i]), i < said->n_transports ? said->transports[i] : "");
    }
}

static void check_again(const bkv_member_t *member) {
    uint8_t record[BKV_MEMBER_RECORD_MAX];
    bkv_member_t again;
    bkv_error_t err;
    size_t length = bkv_member_pack(member, record);
    require(length <= sizeof(record));
    require(bkv_member_parse(record, length, member->place.id, &again, &err) == BKV_OK && bkv_member_equal(&again, member));
    require(bkv_member_parse(record, length, "another/id", &again, &err) == BKV_INVALID_ARGUMENT);
}

static void fuzz_member(const uint8_t *data, size_t size) {
    Balancekv__Cluster__V1__Member *said = balancekv__cluster__v1__member__unpack(NULL, size, data);
    bkv_member_t member;
    bkv_error_t err = {.status = BKV_OK};
    bkv_status_t status = bkv_member_parse(data, size, said != NULL ? said->id : "node", &member, &err);
    require(status == err.status && (status == BKV_OK || (status == BKV_INVALID_ARGUMENT && err.message[0] != '\0')));
    if (status == BKV_OK) {
        require(said != NULL && size <= BKV_MEMBER_RECORD_MAX && bkv_member_check(&member, &err) == BKV_OK);
        require(member.place.epoch == said->epoch && member.capacity_bytes == said->capacity_bytes);
        require(member.place.weight == said->weight && member.place.weight <= BKV_WEIGHT_MAX);
        require(member.place.draining == (said->draining != 0));
        check_texts(&member, said);
        check_again(&member);
    }
    if (said != NULL) {
        balancekv__cluster__v1__member__free_unpacked(said, NULL);
    }
}

static void fuzz_config(const uint8_t *data, size_t size) {
    bkv_cluster_config_t config, again;
    bkv_error_t err;
    if (bkv_cluster_config_parse(data, size, &config, &err) != BKV_OK) {
        return;
    }
    require(size <= BKV_CLUSTER_CONFIG_MAX && config.replicas >= 1 && config.replicas <= BKV_REPLICAS_MAX);
    uint8_t record[BKV_CLUSTER_CONFIG_MAX];
    size_t length = bkv_cluster_config_pack(&config, record);
    require(length <= sizeof(record) && bkv_cluster_config_parse(record, length, &again, &err) == BKV_OK);
    require(again.seed == config.seed && again.replicas == config.replicas);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1) {
        return 0;
    }
    uint8_t *record = malloc(size); // of its own, so that a read past its end is seen
    require(record != NULL);
    memcpy(record, data + 1, size - 1);
    if (data[0] % 4 == 0) {
        fuzz_config(record, size - 1);
    } else {
        fuzz_member(record, size - 1);
    }
    free(record);
    return 0;
}
