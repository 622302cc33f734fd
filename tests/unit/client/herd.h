// herd.h - several fake daemons for one client, each of which does as a test says while it runs.
#ifndef BKV_TEST_CLIENT_HERD_H
#define BKV_TEST_CLIENT_HERD_H

#include "fake.h"

#define HERD_MOST 4

// What a daemon does with everything but Check and Open.
typedef enum herd_mood {
    HERD_SERVES,
    HERD_DRAINS, // as to Check and Open, too
    HERD_BUSY,
    HERD_WORKS, // answers only when the mood has changed
    HERD_MUTE,  // the same with Check and Open, too
} herd_mood_t;

typedef struct herd_daemon {
    fake_place_t place;
    char endpoint[80]; // of it, as in the client's list
    fake_server_t *server;
    uint64_t epoch;
    const struct herd *herd;
    atomic_int mood;     // herd_mood_t
    atomic_bool forgets; // specs: until the next Open
    atomic_uint relents; // the Lookup from which on one that is busy serves; 0: none
    atomic_uint opens, lookups, puts, checks, unpins, clusters, gets;
    _Atomic uint64_t lease; // that it knows
    atomic_uint keys;       // of Lookups and Gets
    atomic_uint strays;     // those of them that another owns first
} herd_daemon_t;

typedef struct herd {
    uint32_t count;
    herd_daemon_t daemons[HERD_MOST];
    char endpoints[HERD_MOST * 80]; // all, separated by commas

    // As all of them tell it: members "n0", "n1", ... of weight 1.
    _Atomic uint64_t seed, view;
    atomic_uint replicas; // 0: no cluster
    atomic_uint members;  // the first so many daemons
} herd_t;

// Daemons on unix sockets or, with tcp, on ports of 127.0.0.1, which are made but not started; boot epochs 11, 12, ...
void herd_make(herd_t *herd, uint32_t count, bool tcp);
void herd_start(herd_t *herd, uint32_t number);
void herd_stop(herd_t *herd, uint32_t number); // not running: nothing
void herd_end(herd_t *herd);

// A client of all of them, inline alone.
bkv_client_t *herd_client(const herd_t *herd, uint32_t timeout_ms);

#endif
