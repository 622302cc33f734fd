// unit_fixture.h - the verbs transport without gRPC: a store, a pipeline and the transports as in the daemon, and clients that
// are one end of a link with a window each, in the same process. All of it on one RDMA device.
#ifndef BKV_TEST_RDMA_FIXTURE_H
#define BKV_TEST_RDMA_FIXTURE_H

#include "daemon/transport/transport.h"

#include <semaphore.h>

#define BLOCK    (UINT64_C(2) << 20) // a payload: 256 tokens; two work requests
#define WINDOW   (UINT64_C(8) << 20)
#define SESSIONS 3
#define SOON_MS  3000

typedef struct daemon {
    bkv_store_t *store;
    bkv_pipeline_t *pipeline;
    bkv_transports_t *transports;
    bkv_model_t model;
} daemon_t;

typedef struct client {
    bkv_verbs_device_t *device;
    uint8_t *window;
    struct ibv_mr *region;
    bkv_verbs_link_t link;
    bkv_verbs_end_t end;
    bkv_session_id_t session;
} client_t;

typedef struct outcome {
    sem_t called;
    unsigned calls;
    bkv_error_t error;
    bkv_ingest_result_t put;
} outcome_t;

// The device of what is opened from now on; "rxe0" before.
void fixture_device(const char *name);

// The daemon's clock.
uint64_t fixture_now(void);
void fixture_advance(uint64_t ms);

bkv_transports_config_t fixture_config(const daemon_t *daemon);
void daemon_open(daemon_t *daemon);
void daemon_close(daemon_t *daemon); // asserts that nothing is held any more
uint32_t daemon_sessions(const daemon_t *daemon);

void client_open(client_t *client);
bkv_status_t client_attach(client_t *client, daemon_t *daemon, bkv_error_t *error);
void client_start(client_t *client, daemon_t *daemon); // both, and asserts that they worked
void client_close(client_t *client);

// A key that is different for each number, and a payload likewise.
bkv_key_t fixture_key(uint32_t number);
void fixture_fill(uint8_t *to, uint64_t bytes, uint32_t seed);

// A Put of the BLOCK bytes at the window's offset, and a Get of the record to there. On BKV_OK the outcome is to be waited for;
// else outcome->error says why. The delivery is to be released then.
bkv_status_t put_begin(daemon_t *daemon, const client_t *client, uint32_t key, bkv_codec_t codec, uint64_t offset,
                       outcome_t *outcome);
bkv_status_t get_begin(daemon_t *daemon, const client_t *client, uint32_t key, const bkv_deliver_range_t *range,
                       uint64_t offset, bkv_delivery_t *delivery, outcome_t *outcome);
void outcome_wait(outcome_t *outcome); // asserts that it is called exactly once so far

// Puts the payload of this number, and asserts that it worked. Gets a record, and asserts that it and nothing else was written.
void put_block(daemon_t *daemon, client_t *client, uint32_t key, bkv_codec_t codec);
void get_and_compare(daemon_t *daemon, client_t *client, uint32_t key, const bkv_deliver_range_t *range);

#endif
