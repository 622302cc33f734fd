// internal.h - what the client's files share; nobody else includes it.
//
// Files: etcd.c (create, destroy, the thread, posts, timers), channel.c (options, TLS, channels), call.c (a call:
// attempts, failover, the login), kv.c (requests and replies), watch.c (listing, stream, resuming).
//
// The lock guards what posts and the end need (marked below) and is a leaf. All else is the thread's alone.
#ifndef BKV_ETCD_INTERNAL_H
#define BKV_ETCD_INTERNAL_H

#include "daemon/cluster/etcd/etcd.h"
#include "proto/exchange.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <protobuf-c/protobuf-c.h>
#include <pthread.h>

#define BKV_ETCD_TOKEN_MAX 4096

typedef struct bkv_etcd_posted {
    bkv_etcd_run_t run;
    void *user;
    struct bkv_etcd_posted *next;
} bkv_etcd_posted_t;

typedef struct bkv_etcd_call bkv_etcd_call_t;

struct bkv_etcd {
    // Fixed.
    grpc_channel *channels[BKV_ETCD_ENDPOINTS_MAX]; // each reconnects by itself
    char *endpoints[BKV_ETCD_ENDPOINTS_MAX];
    uint32_t endpoint_count;
    uint32_t attempt_ms;
    char *user, *password; // NULL: no login
    grpc_completion_queue *completions;
    pthread_t thread;

    pthread_mutex_t lock;
    pthread_cond_t changed;                // quiet, ended
    bkv_etcd_posted_t *posts, **posts_end; // [lock]
    uint32_t post_count;                   // [lock]
    bool waking, closing;                  // [lock]
    bool quiet, ended, abandoned;          // [lock] no more callbacks; no more thread; the thread frees the client

    bkv_batch_tag_t wake_tag;
    uint32_t current;                   // endpoint in use
    uint32_t call_count, attempt_count; // attempts: those that gRPC has not given back, streams of watches included
    bool shutting;                      // no new attempts
    bkv_etcd_call_t *calls;
    bkv_etcd_timer_t *timers; // in no order
    bkv_etcd_watch_t *watches;
    char *token;            // NULL: no login yet, or none needed
    bkv_etcd_call_t *login; // under way
    uint64_t jitter;
};

// ---- etcd.c ----

gpr_timespec bkv_etcd_timespec(uint64_t ms); // of a bkv_now_ms

// A pause before attempt number `attempt` (1: the second): doubles from 50 ms to 1 s, half of it random.
uint64_t bkv_etcd_pause_ms(bkv_etcd_t *etcd, uint32_t attempt);

// Fills the metadata that every call begins with; returns how many. The token is copied.
#define BKV_ETCD_METADATA 2
size_t bkv_etcd_metadata(const bkv_etcd_t *etcd, grpc_metadata metadata[BKV_ETCD_METADATA]);
void bkv_etcd_metadata_free(grpc_metadata *metadata, size_t count);

grpc_byte_buffer *bkv_etcd_pack(const ProtobufCMessage *message);
ProtobufCMessage *bkv_etcd_unpack(const ProtobufCMessageDescriptor *type, grpc_byte_buffer *message); // NULL: is none

// An endpoint has failed a call or a stream: if it is the one in use, the next one is from now on, and watches move there.
void bkv_etcd_endpoint_failed(bkv_etcd_t *etcd, uint32_t endpoint);

// ---- channel.c ----

bkv_status_t bkv_etcd_connect(bkv_etcd_t *etcd, const bkv_etcd_options_t *options, bkv_error_t *err);

// ---- call.c ----

// An operation: where it goes, and how its response becomes a reply. `finish` calls done, with the reply or, if the response
// makes none, with an error; response is NULL where error is one already.
typedef struct bkv_etcd_kind {
    const char *method;
    const ProtobufCMessageDescriptor *response;
    void (*finish)(bkv_etcd_call_t *call, const bkv_error_t *error, const ProtobufCMessage *response);
    bool is_login;
} bkv_etcd_kind_t;

typedef struct bkv_etcd_attempt bkv_etcd_attempt_t;

struct bkv_etcd_call {
    const bkv_etcd_kind_t *kind;
    bkv_etcd_t *etcd;
    bkv_etcd_done_t done;
    void *user;
    int64_t lease; // of grant, keep and revoke
    grpc_byte_buffer *request;
    uint64_t deadline_ms;
    uint32_t timeout_ms, attempts, logins;
    bool waits_for_login;
    bkv_error_t last;            // what the last attempt ended with
    bkv_etcd_attempt_t *attempt; // NULL: between two
    bkv_etcd_timer_t timer;
    bkv_etcd_call_t *next, *previous;
};

// Starts a call; `request` is packed. The call ends with kind->finish, after which it is gone.
bkv_status_t bkv_etcd_call_start(bkv_etcd_t *etcd, const bkv_etcd_kind_t *kind, const ProtobufCMessage *request, int64_t lease,
                                 uint32_t timeout_ms, bkv_etcd_done_t done, void *user, bkv_error_t *err);
void bkv_etcd_calls_cancel(bkv_etcd_t *etcd);

// Ends a call with what etcd has answered; NULL: with nothing. The message stays the caller's.
void bkv_etcd_call_answer(bkv_etcd_call_t *call, grpc_byte_buffer *message);

// gRPC's code and message, and what they mean here.
typedef enum bkv_etcd_verdict { BKV_ETCD_FINAL, BKV_ETCD_RETRY, BKV_ETCD_LOGIN } bkv_etcd_verdict_t;
bkv_etcd_verdict_t bkv_etcd_judge(grpc_status_code code, grpc_slice details, bkv_error_t *error);

// ---- kv.c ----

// Whether etcd may have counted so far: it begins with 1, and behind every revision there is a next one.
bool bkv_etcd_is_revision(int64_t revision);

// The first key that is none with this prefix: its last byte, plus one. A prefix of 0xff alone has none; "\0" then means "to
// the end". Returns its length.
size_t bkv_etcd_prefix_end(bkv_etcd_text_t prefix, uint8_t end[BKV_ETCD_KEY_MAX]);

// ---- watch.c ----

// Takes in a message of a watch's stream, which stays the caller's.
void bkv_etcd_watch_take(bkv_etcd_watch_t *watch, grpc_byte_buffer *message);

void bkv_etcd_watches_move(bkv_etcd_t *etcd, uint32_t endpoint); // away from it
void bkv_etcd_watches_end(bkv_etcd_t *etcd);

#endif
