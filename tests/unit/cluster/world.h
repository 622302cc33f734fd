// world.h - a script for an impostor (impostor.h) that answers as a daemon would which has the records numbered 0 to `records`.
#ifndef BKV_TEST_WORLD_H
#define BKV_TEST_WORLD_H

#include "asking.h"

#include <stdatomic.h>

#define WORLD_STORED 4096

typedef struct intake_count {
    uint32_t records;
    uint64_t bytes, last_ttl_ms;
    bool wrong; // a record came otherwise than it was made
} intake_count_t;

typedef struct world {
    uint32_t records; // below ASKING_NAMES
    uint64_t length;  // of each record; 0: 1,024
    uint64_t ttl_ms;
    uint32_t max_batch; // 0: any
    _Atomic uint32_t delay_ms;
    _Atomic bool silent; // says nothing to anybody
    // What it was asked.
    _Atomic uint32_t haves, probes, fetches, stores, forgets, drains, largest, hushed;
    // Store: what came, whole records only. Answers follow from the number: each third ALREADY_EXISTS, each seventh DATA_LOSS.
    pthread_mutex_t lock;
    intake_count_t taken;   // [lock]
    uint32_t read_delay_ms; // before each message of a Store is read
} world_t;

intake_count_t world_taken(world_t *world);

void world_init(world_t *world, uint32_t records);
void world_script(impostor_call_t *call, void *world);

// Whatever the names are: which numbers they have; ASKING_NAMES: none of these.
uint32_t world_number(const bkv_name_t *name);

// A record's chunk, as a daemon sends it: `bytes` of it from `at`.
bool world_chunk(impostor_call_t *call, uint32_t index, const uint8_t *record, uint64_t length, uint64_t at, uint64_t bytes,
                 uint64_t ttl_ms);
bool world_missing(impostor_call_t *call, uint32_t index, uint32_t code);

#endif
