// internal.h - what the files of this room share; nobody else includes it.
//
// Files: peers.c (create, destroy, the table of peers), peer.c (one of them: its channel, what becomes of its health), lane.c (the
// threads, who was silent for too long, probes), call.c (a call), attempt.c (how it is put), ask.c (Have, Forget, Drain, and any
// other single question), fetch.c (records by stream, and what their sink is told), store.c (records on their way out), pulse.h
// (how a peer answers, in numbers), verbs.h and link.h (one-sided reads, the asking end), serve.h and holds.h (the answering one),
// device.h (what both share).
//
// A call is one question of a caller's, from its start to its `done`. It is put as one or more attempts, each a gRPC call, one
// after the other: a question about more names than go into one message has several parts. An attempt may outlive its call (see
// proto/exchange.h), so a record that is being sent counts its own holders.
//
// Threads. A lane is a completion queue and the thread that takes from it, and all of a call happens on one lane: so its
// callbacks come one after the other, and only what marks itself [lock] below needs one. Locks are leaves: none is held while gRPC
// or another file's lock is called, as gRPC may let go of any slice, and so of a pin, whenever it is called.
#ifndef BKV_PEERS_INTERNAL_H
#define BKV_PEERS_INTERNAL_H

#include "daemon/cluster/peer/peers.h"
#include "daemon/cluster/peer/pulse.h"
#include "proto/exchange.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <protobuf-c/protobuf-c.h>
#include <pthread.h>
#include <stdatomic.h>

#define BKV_PEER_SERVICE   "/balancekv.cluster.v1.Peer/"
#define BKV_PEER_LANES     4    // at most
#define BKV_PEER_CALLS_MAX 1024 // in flight to one peer; more are refused with BUSY
#define BKV_PEER_BUCKETS   1024 // of the table

typedef struct bkv_peers_counters {
#define X(name, is_counter, help) _Atomic uint64_t name;
    BKV_PEERS_METRICS(X)
#undef X
} bkv_peers_counters_t;

typedef struct bkv_peer_lane {
    bkv_peers_t *peers;
    grpc_completion_queue *completions;
    pthread_t thread;
    pthread_mutex_t lock;
    bkv_peer_call_t *calls; // [lock] under way
} bkv_peer_lane_t;

struct bkv_peers {
    // Fixed.
    bkv_store_t *store;
    uint64_t record_max; // bytes
    uint32_t timeout_ms, max_batch;
    char *tls_name; // NULL: no TLS
    grpc_channel_credentials *credentials;
    struct bkv_peers_verbs *verbs; // verbs.c's: the device; NULL: none

    bkv_peer_lane_t lanes[BKV_PEER_LANES];
    uint32_t lane_count, lanes_running;
    _Atomic uint32_t next_lane;
    bkv_peers_counters_t counters; // gauges are in use as well

    pthread_mutex_t lock;
    pthread_cond_t idle;                   // live has become 0
    bkv_peer_t *buckets[BKV_PEER_BUCKETS]; // [lock] by member
    _Atomic bool closing;                  // set under the lock, may be read without: no new calls
    uint64_t live;                         // [lock] calls, attempts, and records that gRPC refers to
};

struct bkv_peer {
    // Fixed.
    bkv_peers_t *peers;
    char id[BKV_MEMBER_NAME_MAX];
    uint64_t epoch;
    bool offers_verbs; // among its transports
    grpc_channel *channel;

    _Atomic uint32_t refs;  // callers, calls, and one for the table
    _Atomic bool closed;    // in no view any more
    _Atomic uint32_t calls; // in flight
    _Atomic uint64_t fetched_bytes, stored_bytes, failures;
    bkv_pulse_t pulse;
    struct bkv_peer_verbs *verbs; // verbs.c's: the link; NULL: none. Its own lock guards it, or it is set once
    bkv_peer_t *next;             // in its bucket, under peers->lock
};

// ---- calls (call.c) ----

// An operation. All of these run on the call's lane, but the first `next` of a call, which its starter runs.
typedef struct bkv_peer_kind {
    const char *method;
    bkv_exchange_shape_t shape;
    bool probes; // is put to a suspected peer
    bool small;  // the time that it takes is the peer's latency
    bool raw;    // its error is the peer's own, and none of those that peers.h names
    // The next message of the part that is due, the caller's to destroy; *last when none of this part follows. NULL: there was
    // none left, with *last; without, no memory for it. A part of no messages at all is not put to the peer.
    grpc_byte_buffer *(*next)(bkv_peer_call_t *call, bool *last);
    // Takes in a response, which stays the caller's. Anything but BKV_OK ends the call with that.
    bkv_status_t (*take)(bkv_peer_call_t *call, grpc_byte_buffer *message, bkv_error_t *err);
    // The part that was due has ended well. True: there is another one. NULL: there never is. May fail the call: call->error.
    bool (*more)(bkv_peer_call_t *call);
    // The call is over, with call->error: tells who asked.
    void (*finish)(bkv_peer_call_t *call);
    void (*clean)(bkv_peer_call_t *call); // frees what the operation owns. NULL: nothing
} bkv_peer_kind_t;

struct bkv_peer_call {
    const bkv_peer_kind_t *kind;
    bkv_peer_t *peer; // counted
    bkv_peer_lane_t *lane;
    uint64_t deadline_ms; // UINT64_MAX: none
    bkv_error_t error;
    _Atomic bool cancelled;
    struct bkv_peer_attempt *attempt;       // [lane->lock] NULL: between two
    bkv_peer_call_t *next_call, **previous; // [lane->lock] among the lane's
};

// One exchange of a call, which may outlive it (proto/exchange.h). Set up by whoever starts it, then its lane's.
typedef struct bkv_peer_attempt {
    bkv_exchange_t exchange;
    bkv_peers_t *peers;
    bkv_peer_call_t *call; // until it is over
    uint64_t started_us;
    _Atomic uint64_t progress_ms; // when something last came of it
    _Atomic uint64_t way_ms;      // how long what it has sent may be on its way, beyond the timeout
    bool silent;                  // nothing came for too long: it was given up
    bkv_error_t fault;            // of a message that came, or that could not be made
} bkv_peer_attempt_t;

// Zeroed memory of that size, which begins with a call. NULL: no memory.
void *bkv_peer_call_new(size_t size, const bkv_peer_kind_t *kind, bkv_peer_t *peer, uint64_t deadline_ms);
void bkv_peer_call_free(bkv_peer_call_t *call); // of one that was not admitted

// Whether the peer may be asked now. From a BKV_OK on the call is under way, and ends with kind->finish on its lane, or with
// bkv_peer_call_conclude. Otherwise it is still the caller's to free.
bkv_status_t bkv_peer_call_admit(bkv_peer_call_t *call, bkv_error_t *err);

// Puts the part that is due (attempt.c). On RESOURCE_EXHAUSTED nothing has begun, and the call is still to be concluded or freed.
bkv_status_t bkv_peer_call_attempt(bkv_peer_call_t *call, bkv_error_t *err);

// Admits and puts it. On failure the call has been freed.
bkv_status_t bkv_peer_call_start(bkv_peer_call_t *call, bkv_error_t *err);

// Ends an admitted call, of which no attempt is under way, with call->error. On a thread of the peers'.
void bkv_peer_call_conclude(bkv_peer_call_t *call);

// Takes back an admission: the call was not begun, and is the caller's to free.
void bkv_peer_call_withdraw(bkv_peer_call_t *call);

// Cancels the attempt under way, if there is one; from any thread, and without the lane's lock.
void bkv_peer_call_cancel(bkv_peer_call_t *call);

// Cancels all calls of a peer on all lanes; NULL: of all peers.
void bkv_peer_calls_cancel(bkv_peers_t *peers, const bkv_peer_t *peer);

// Has whatever the attempts have waited for since before now_ms - timeout_ms given up. For the lane's thread.
void bkv_peer_calls_watch(bkv_peer_lane_t *lane, uint64_t now_ms);

// ---- lane.c ----

bkv_status_t bkv_peer_lanes_start(bkv_peers_t *peers, bkv_error_t *err);
void bkv_peer_lanes_end(bkv_peers_t *peers); // nothing is under way on them

// ---- peers.c ----

// Counts something that destroy has to wait for; false: it has begun, nothing new.
bool bkv_peers_enter(bkv_peers_t *peers);
void bkv_peers_hold(bkv_peers_t *peers); // of who is in already
void bkv_peers_leave(bkv_peers_t *peers);

// Puts a question to each suspected peer whose time it is.
void bkv_peers_probe(bkv_peers_t *peers, uint64_t now_ms);

gpr_timespec bkv_peers_timespec(uint64_t ms); // of a bkv_now_ms

// ---- peer.c ----

// A peer with one reference. NULL: no memory, or no usable address.
bkv_peer_t *bkv_peer_new(bkv_peers_t *peers, const bkv_member_t *member);

// What is to be said and counted of a peer's ways, from any thread.
void bkv_peer_heard(bkv_peer_t *peer, uint64_t now_ms);
void bkv_peer_unheard(bkv_peer_t *peer, uint64_t since_ms, uint64_t now_ms);
void bkv_peer_unreachable(bkv_peer_t *peer, uint64_t now_ms, const char *why);

// ---- ask.c ----

grpc_byte_buffer *bkv_peer_pack(const ProtobufCMessage *message);
ProtobufCMessage *bkv_peer_unpack(const ProtobufCMessageDescriptor *type, grpc_byte_buffer *message); // NULL: is none

// response NULL where error->status is not BKV_OK; both are gone after the return.
typedef void (*bkv_peer_answer_t)(void *user, const bkv_error_t *error, const ProtobufCMessage *response);

// Any single question, with its answer as it came: statuses are the peer's own. method: BKV_PEER_SERVICE "Locate". The request
// is packed at once. Also from callbacks.
bkv_status_t bkv_peer_ask(bkv_peer_t *peer, const char *method, const ProtobufCMessage *request,
                          const ProtobufCMessageDescriptor *response, uint64_t deadline_ms, bkv_peer_answer_t done, void *user,
                          bkv_error_t *err);

void bkv_peer_probe(bkv_peer_t *peer); // a question of no names, whatever the answer

// ---- fetch.c ----

typedef enum bkv_fetch_state {
    BKV_FETCH_DUE,   // nothing has been said of it
    BKV_FETCH_BEGUN, // its sink has given memory for it
    BKV_FETCH_KEPT,  // so it has, but nothing came: it is to come by stream
    BKV_FETCH_ENDED,
} bkv_fetch_state_t;

typedef struct bkv_peer_fetch {
    bkv_peer_call_t call;
    const bkv_fetch_sink_t *sink;
    void *user;
    uint32_t count, ended;
    uint8_t *states;   // [count] bkv_fetch_state_t
    uint64_t *lengths; // [count] of those begun
    void **kept;       // [count] where those kept are to go; NULL: there never was one
    // By stream: the part that is due asks for rest[at..at + part).
    uint32_t *rest; // [count] indices, of those that were due when the stream began
    uint32_t rest_count, at, part;
    uint32_t position; // in the part: of the record that comes, or comes next
    uint8_t *memory;   // of the record that comes; NULL: it is not wanted
    uint64_t bytes, received;
    bool coming;
    bkv_name_t names[]; // [count]
} bkv_peer_fetch_t;

// One record of a fetch, from whichever source: asks its sink where it is to go. NULL: nowhere, and it has ended.
void *bkv_peer_fetch_begin(bkv_peer_fetch_t *fetch, uint32_t index, uint64_t tenant, uint64_t bytes, uint64_t ttl_ms);

// One that has begun did not come: it is to come by stream after all, to the same memory, which nothing else writes to any more.
void bkv_peer_fetch_keep(bkv_peer_fetch_t *fetch, uint32_t index, void *memory);

// Ends one that has not ended; after bkv_peer_fetch_begin its memory is the sink's again. BKV_OK counts it.
void bkv_peer_fetch_end(bkv_peer_fetch_t *fetch, uint32_t index, const bkv_error_t *error);

// Goes on by stream with all that have not ended (those begun are to be ended or kept first), or ends the fetch where all have. On a
// thread of the peers' that is not in one of the fetch's callbacks.
void bkv_peer_fetch_rest(bkv_peer_fetch_t *fetch);

#endif
