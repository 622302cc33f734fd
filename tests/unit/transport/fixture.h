// fixture.h - transports over a real store and pipeline, with a fake clock and a folder of their own; and what a client does.
#ifndef BKV_TEST_TRANSPORT_FIXTURE_H
#define BKV_TEST_TRANSPORT_FIXTURE_H

#include "daemon/transport/session.h"

#include <semaphore.h>

#define FIXTURE_TOKENS 1024 // of the largest block: 768 KiB as raw
#define FIXTURE_SHM    (UINT64_C(8) << 20)
#define FIXTURE_WINDOW (UINT64_C(2) << 20)

typedef struct fixture {
    bkv_store_t *store;
    bkv_pipeline_t *pipeline;
    bkv_transports_t *transports;
    bkv_transports_config_t config;
    bkv_model_t model;
    char folder[64], socket[80], fd_socket[96];
} fixture_t;

// Idle sessions end after 1,000 ms, at most 16 sessions, 2 compute threads with max_jobs waiting jobs.
void fixture_open(fixture_t *fixture, uint32_t max_jobs);
void fixture_close(fixture_t *fixture); // asserts that nothing is held, besides sessions

uint64_t fixture_now(void);
void fixture_advance(uint64_t ms);

bkv_transport_metrics_t fixture_metrics(fixture_t *fixture);
uint64_t fixture_pinned(fixture_t *fixture);
size_t open_descriptors(void); // of this process

// An shm session of `bytes` bytes, without a window in the client yet.
bkv_session_id_t fixture_attach(fixture_t *fixture, uint64_t bytes);
bkv_session_t *fixture_find(fixture_t *fixture, const bkv_session_id_t *id);

// K and V of a block, floats from the seed, into `to`; and how many bytes they are.
uint64_t fixture_fill(const fixture_t *fixture, uint32_t tokens, uint32_t seed, void *to);
bkv_ingest_t *fixture_begin(fixture_t *fixture, uint32_t key, uint32_t tokens, bkv_codec_t codec);
void fixture_put(fixture_t *fixture, uint32_t key, uint32_t tokens); // raw, by bkv_ingest_write
bkv_delivery_t fixture_deliver(fixture_t *fixture, uint32_t key);

// What a callback said.
typedef struct outcome {
    sem_t called;
    bkv_error_t error;
    bkv_ingest_result_t put;
} outcome_t;

void outcome_init(outcome_t *outcome);
void outcome_wait(outcome_t *outcome);
void outcome_put_done(void *user, const bkv_error_t *error, const bkv_ingest_result_t *result);
void outcome_delivered(void *user, const bkv_error_t *error);

// A job that keeps a compute thread until it is released.
typedef struct blocker {
    bkv_job_t job;
    sem_t running, release;
} blocker_t;

void blocker_start(blocker_t *blocker, fixture_t *fixture); // returns once it runs

// ---- the client's end of the fd socket ----

int peer_connect(const fixture_t *fixture); // with a receive timeout of 5 s
bkv_fd_message_t peer_message(bkv_fd_op_t op, const bkv_session_id_t *id);
void peer_send(int peer, const void *bytes, size_t length, const int *fds, size_t count);

// The answer and the descriptor that came with it (-1: none). False: the daemon has closed the connection.
bool peer_receive(int peer, bkv_fd_message_t *answer, int *fd);

// TAKE: a connection that holds the session, and its window mapped; both are the caller's.
int peer_take(const fixture_t *fixture, const bkv_session_id_t *id, uint64_t bytes, uint8_t **window);

// Waits up to 5 s for what another thread is about to do.
#define WAIT_UNTIL(condition)                                                                                                  \
    do {                                                                                                                       \
        for (int waited_ = 0; !(condition) && waited_ < 1000; waited_++) {                                                     \
            usleep(5000);                                                                                                      \
        }                                                                                                                      \
        cr_assert(condition);                                                                                                  \
    } while (0)

#endif
