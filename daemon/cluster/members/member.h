// member.h - a member as its record in etcd says: packed, parsed, checked.
//
// A record may come from another version of balancekvd, or from anybody who may write to etcd. What is not as it should be is
// refused as a whole; fields that this version does not know are skipped.
#ifndef BKV_MEMBER_H
#define BKV_MEMBER_H

#include "proto/placement.h"

#define BKV_MEMBER_ADDRESSES_MAX  4
#define BKV_MEMBER_ADDRESS_MAX    128 // NUL included
#define BKV_MEMBER_TRANSPORTS_MAX 8
#define BKV_MEMBER_TRANSPORT_MAX  16
#define BKV_MEMBER_VERSION_MAX    32
#define BKV_MEMBER_RECORD_MAX     2048 // bytes, packed

// Text fields are zero behind their NUL.
typedef struct bkv_member {
    bkv_placement_member_t place; // id, domain, epoch, weight, draining
    uint64_t capacity_bytes;
    uint32_t address_count, transport_count;
    char addresses[BKV_MEMBER_ADDRESSES_MAX][BKV_MEMBER_ADDRESS_MAX];
    char transports[BKV_MEMBER_TRANSPORTS_MAX][BKV_MEMBER_TRANSPORT_MAX];
    char version[BKV_MEMBER_VERSION_MAX];
} bkv_member_t;

// Whether text may be a member's id: 1 to 63 letters, digits, '.', '_' or '-'.
bool bkv_member_id_valid(const char *id);

// Whether all of a member may go into a record: INVALID_ARGUMENT names the field.
bkv_status_t bkv_member_check(const bkv_member_t *member, bkv_error_t *err);

bool bkv_member_equal(const bkv_member_t *a, const bkv_member_t *b);

// Packs a member that has passed the check; returns the record's length.
size_t bkv_member_pack(const bkv_member_t *member, uint8_t record[BKV_MEMBER_RECORD_MAX]);

// Parses a record, whose key says that it is `id`'s. INVALID_ARGUMENT: it is none.
bkv_status_t bkv_member_parse(const void *record, size_t length, const char *id, bkv_member_t *member, bkv_error_t *err);

// What all members agree on.
typedef struct bkv_cluster_config {
    uint64_t seed;
    uint32_t replicas; // 1..BKV_REPLICAS_MAX
} bkv_cluster_config_t;

#define BKV_CLUSTER_CONFIG_MAX 64
size_t bkv_cluster_config_pack(const bkv_cluster_config_t *config, uint8_t record[BKV_CLUSTER_CONFIG_MAX]);
bkv_status_t bkv_cluster_config_parse(const void *record, size_t length, bkv_cluster_config_t *config, bkv_error_t *err);

#endif
