// fixture.h - small stores and records whose bytes follow from a number, for the tests of this room.
#ifndef BKV_TEST_STORE_FIXTURE_H
#define BKV_TEST_STORE_FIXTURE_H

#include "daemon/store/internal.h"

#define KIB 1024ull
#define MIB (1024ull * KIB)

#define TENANT 7u
#define NOW    1000u

extern const bkv_spec_id_t fixture_spec;

uint64_t fixture_random(uint64_t *state); // splitmix64

bkv_store_config_t fixture_config(uint64_t arena_bytes, uint64_t slab_bytes);
bkv_store_t *fixture_store(const bkv_store_config_t *config); // must succeed

bkv_key_t fixture_key(uint64_t number);

// A sealed raw record of `length` bytes (a multiple of 16, at least 160) whose key and payload follow from number.
void fixture_fill(uint8_t *data, uint64_t number, uint64_t length, uint64_t tenant);

// Whether the bytes are those that fixture_fill made.
bool fixture_matches(const uint8_t *data, uint64_t number, uint64_t length);

// Reserve, fill, publish.
bkv_status_t fixture_put(bkv_store_t *store, uint64_t number, uint64_t length, uint64_t tenant, uint64_t ttl_ms,
                         uint64_t now_ms, bkv_error_t *err);
// The same, must succeed, with TENANT, without TTL, at NOW.
void fixture_add(bkv_store_t *store, uint64_t number, uint64_t length);

// Pin, compare with what fixture_fill made, unpin.
bkv_status_t fixture_get(bkv_store_t *store, uint64_t number, uint64_t now_ms);

bool fixture_has(bkv_store_t *store, uint64_t number); // at NOW

bkv_store_metrics_t fixture_metrics(bkv_store_t *store);

// Asserts that everything the store counts agrees with what is really there: entries, queues, slots, tenants. Nothing may be
// going on in other threads.
void fixture_audit(bkv_store_t *store);

// A path for an arena that does not exist yet, on tmpfs if there is one. The caller unlinks it.
void fixture_path(char *path, size_t size);

#endif
