// asking.h - a daemon that asks other members, for tests: a store with records whose bytes follow from a number, its peers, and
// questions that wait for their answers.
#ifndef BKV_TEST_ASKING_H
#define BKV_TEST_ASKING_H

#include "daemon/cluster/peer/peers.h"
#include "impostor.h"

#include <semaphore.h>

#define ASKING_NAMES 8192

// Of peers, in ms: to be waited for, but not too short for a good answer on a busy machine.
#ifdef __SANITIZE_THREAD__
#define ASKING_TIMEOUT 2000
#else
#define ASKING_TIMEOUT 1000
#endif

typedef struct asking {
    bkv_store_t *store;
    bkv_peers_t *peers;
    bkv_peer_t *peer; // the one that is asked
} asking_t;

// Peers that know one member, at that port. timeout_ms, max_batch 0: ASKING_TIMEOUT, 4096.
void asking_open(asking_t *asking, uint16_t port, uint32_t timeout_ms, uint32_t max_batch);
void asking_close(asking_t *asking); // gives the peer back, ends the peers, and checks that nothing is pinned

bkv_peers_config_t asking_config(const asking_t *asking, uint32_t timeout_ms, uint32_t max_batch);
bkv_store_t *asking_store(void);

bkv_name_t record_name(uint64_t number);
void record_make(uint8_t *record, uint64_t number, uint64_t length, uint64_t tenant); // sealed; length: a multiple of 16
bool record_matches(const uint8_t *record, uint64_t number, uint64_t length);
void record_put(bkv_store_t *store, uint64_t number, uint64_t length, uint64_t ttl_ms);
uint64_t store_pinned(bkv_store_t *store);

// What came of a question. refused: it was not even started.
typedef struct told {
    bkv_error_t error;
    bool refused;
    uint64_t took_ms;
    uint64_t bytes[ASKING_NAMES];       // Have
    bkv_status_t results[ASKING_NAMES]; // Store
    bool had[ASKING_NAMES];             // Forget
    bkv_drain_progress_t progress;      // Drain
} told_t;

// About the names of records first, first + 1, ... The answer is static, good until the next question.
const told_t *ask_have(asking_t *asking, uint64_t first, uint32_t count, uint32_t within_ms);
const told_t *ask_store(asking_t *asking, uint64_t first, uint32_t count, uint32_t within_ms);
const told_t *ask_forget(asking_t *asking, uint64_t first, uint32_t count, uint32_t within_ms);
const told_t *ask_drain(asking_t *asking, bkv_drain_order_t order, uint32_t within_ms);

// A fetch of such names, and what its sink was told.
typedef struct fetching {
    uint32_t count;
    bkv_name_t names[ASKING_NAMES];
    bkv_peer_call_t *call;
    bkv_error_t error; // of the whole
    bool refused, over;
    bkv_status_t ended[ASKING_NAMES];
    char why[ASKING_NAMES][64];
    uint32_t begins[ASKING_NAMES], ends[ASKING_NAMES];
    uint64_t lengths[ASKING_NAMES], tenants[ASKING_NAMES], ttls[ASKING_NAMES];
    uint8_t *memory[ASKING_NAMES];
    bool unwanted[ASKING_NAMES]; // begin says so
    uint32_t cancel_at;          // gives up from inside the begin of that index; 0: never
    sem_t done;
} fetching_t;

// Starts one; fetching is zeroed but for what the sink is to do.
void fetch_start(asking_t *asking, fetching_t *fetching, uint64_t first, uint32_t count, uint32_t within_ms);
void fetch_wait(fetching_t *fetching); // checks that each index has ended once, and all before done
void fetch_clear(fetching_t *fetching);
fetching_t *fetching_new(void);

bool becomes(bool (*condition)(void *subject), void *subject, uint32_t within_ms);
bool becomes_suspected(asking_t *asking, bool suspected, uint32_t within_ms);
void pause_ms(uint32_t ms);

#endif
