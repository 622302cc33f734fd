// call.h - one call from its arrival to its end, and what the server's files share.
//
// The path of a call:
//   armed      gRPC may hand the next call of this method to it
//   accepted   it has one: the next is armed, bounds are checked, then the handler runs: at once for a client stream, else
//              when the request has been read
//   running    the handler's; it reads and sends, or waits for the pipeline
//   ending     the last batch (status out, close in) is on its way; its completion is the one clean-up
// The state only increases.
//
// All workers take events from one completion queue, so a call's events may run on any of them; but at most one batch of a call
// is in flight, so no two threads meet in a call (health's Watch, which has two, brings a lock). A handler gives the call to
// gRPC or to the pipeline, and touches it again when that calls back. Pipeline callbacks come on compute threads; they may
// send or finish. The sweep alone looks at calls that it does not own: only at what is written before the call enters the
// list, under the list's lock, which a call takes to leave.
//
// Every function here that starts a batch must be the last that its caller does with the call.
#ifndef BKV_RPC_CALL_H
#define BKV_RPC_CALL_H

#include "daemon/rpc/bump.h"
#include "daemon/rpc/server.h"
#include "daemon/rpc/wire.h"

#include <grpc/grpc.h>
#include <pthread.h>
#include <stdatomic.h>

typedef struct bkv_call bkv_call_t;
typedef struct bkv_worker bkv_worker_t;

// What to do next with the owner of a tag, mostly a call; on the thread of `worker`.
typedef void (*bkv_step_t)(bkv_worker_t *worker, void *owner, bool ok);

// What the completion queue hands back: the function to run and what to run it on.
typedef struct bkv_tag {
    bkv_step_t run;
    void *owner;
} bkv_tag_t;

// Methods: X(id, path, handler, client stream, answered also while draining and over max_calls)
#define BKV_METHODS(X)                                                                                                         \
    X(OPEN, "/balancekv.v1.BalanceKV/Open", bkv_handle_open, false, false)                                                     \
    X(LOOKUP, "/balancekv.v1.BalanceKV/Lookup", bkv_handle_lookup, false, false)                                               \
    X(PUT, "/balancekv.v1.BalanceKV/Put", bkv_handle_put, true, false)                                                         \
    X(GET, "/balancekv.v1.BalanceKV/Get", bkv_handle_get, false, false)                                                        \
    X(FOLD, "/balancekv.v1.BalanceKV/Fold", bkv_handle_fold, false, false)                                                     \
    X(ATTEND, "/balancekv.v1.BalanceKV/Attend", bkv_handle_attend, false, false)                                               \
    X(WARM, "/balancekv.v1.BalanceKV/Warm", bkv_handle_warm, false, false)                                                     \
    X(PIN, "/balancekv.v1.BalanceKV/Pin", bkv_handle_pin, false, false)                                                        \
    X(UNPIN, "/balancekv.v1.BalanceKV/Unpin", bkv_handle_unpin, false, false)                                                  \
    X(DROP, "/balancekv.v1.BalanceKV/Drop", bkv_handle_drop, false, false)                                                     \
    X(ATTACH, "/balancekv.v1.BalanceKV/Attach", bkv_handle_attach, false, false)                                               \
    X(DETACH, "/balancekv.v1.BalanceKV/Detach", bkv_handle_detach, false, false)                                               \
    X(CLUSTER, "/balancekv.v1.BalanceKV/Cluster", bkv_handle_cluster, false, true)                                             \
    X(WHERE, "/balancekv.v1.BalanceKV/Where", bkv_handle_where, false, true)                                                   \
    X(DRAIN, "/balancekv.v1.BalanceKV/Drain", bkv_handle_drain, false, true)                                                   \
    X(PEER_HAVE, "/balancekv.cluster.v1.Peer/Have", bkv_handle_peer_have, false, true)                                         \
    X(PEER_FETCH, "/balancekv.cluster.v1.Peer/Fetch", bkv_handle_peer_fetch, false, false)                                     \
    X(PEER_STORE, "/balancekv.cluster.v1.Peer/Store", bkv_handle_peer_store, true, false)                                      \
    X(PEER_FORGET, "/balancekv.cluster.v1.Peer/Forget", bkv_handle_peer_forget, false, false)                                  \
    X(PEER_DRAIN, "/balancekv.cluster.v1.Peer/Drain", bkv_handle_peer_drain, false, true)                                      \
    X(PEER_LINK, "/balancekv.cluster.v1.Peer/Link", bkv_handle_peer_link, false, false)                                        \
    X(PEER_LOCATE, "/balancekv.cluster.v1.Peer/Locate", bkv_handle_peer_locate, false, false)                                  \
    X(STATS, "/balancekv.v1.BalanceKV/Stats", bkv_handle_stats, false, true)                                                   \
    X(HEALTH_CHECK, "/grpc.health.v1.Health/Check", bkv_handle_health_check, false, true)                                      \
    X(HEALTH_WATCH, "/grpc.health.v1.Health/Watch", bkv_handle_health_watch, false, true)

typedef enum bkv_method_id {
#define X(id, path, handler, client_stream, always) BKV_METHOD_##id,
    BKV_METHODS(X)
#undef X
        BKV_METHOD_COUNT // also stands for every method that is none of these
} bkv_method_id_t;

typedef enum bkv_call_state { BKV_CALL_ARMED, BKV_CALL_ACCEPTED, BKV_CALL_RUNNING, BKV_CALL_ENDING } bkv_call_state_t;

struct bkv_call {
    bkv_tag_t tag; // of the batch in flight
    bkv_server_t *server;
    bkv_call_t *older, *newer; // accepted calls; under server->lock
    bkv_method_id_t method;
    bkv_call_state_t state;
    grpc_call *grpc;
    gpr_timespec client_deadline;
    grpc_metadata_array metadata;
    grpc_call_details details; // of methods that are not registered
    uint64_t id;               // request id, in log lines and trailing metadata
    uint64_t accepted_ms;
    uint64_t deadline_ms;      // UINT64_MAX: none
    _Atomic bool expired;      // the deadline has passed and the call was cancelled for it
    bool started;              // initial metadata has been sent
    bool broken;               // reading or sending broke off: the peer is probably gone
    bool counted;              // in server->open
    int cancelled;             // what RECV_CLOSE said
    grpc_byte_buffer *message; // received last, NULL: none
    grpc_byte_buffer *reply;   // being sent
    bkv_error_t error;         // how the call ends

    void *body; // the handler's own; body_free frees it in the clean-up
    void (*body_free)(void *body);
    void (*refresh)(bkv_call_t *call); // NULL, or called ten times a second or so, under server->lock
};

// A thread that runs events.
struct bkv_worker {
    bkv_server_t *server;
    pthread_t thread;
    bool running;    // there is a thread to join
    bkv_bump_t bump; // for the present event; reset after it
};

struct bkv_server {
    bkv_server_config_t config; // version, backend and sources are copies
    grpc_server *grpc;
    grpc_completion_queue *queue;
    void *methods[BKV_METHOD_COUNT]; // gRPC's handles
    bkv_worker_t *workers;
    uint32_t worker_count;
    int lock_fd; // of the socket's lock file; -1: none
    int port;
    uint64_t started_ms;
    bkv_tag_t stopped; // of the shutdown

    _Atomic uint64_t last_id, op_timeout_ms;
    _Atomic uint64_t swept_ms; // when deadlines were last looked at
    _Atomic bool draining, stopping;
    _Atomic uint32_t accepted; // calls with a grpc_call, watches included
    _Atomic uint32_t open;     // of these, the ones that a drain waits for
    _Atomic uint64_t calls_total, calls_failed_total, calls_cancelled_total, bytes_received_total, bytes_sent_total;

    // Everything that must be over before the server can be freed: armed and accepted calls, records on their way out, the
    // shutdown itself. Whoever takes away the last one says so.
    _Atomic uint64_t holds;
    pthread_mutex_t lock; // protects the following
    pthread_cond_t changed;
    bool idle;         // nothing is held any more
    bkv_call_t *calls; // accepted ones, newest first
};

void bkv_server_hold(bkv_server_t *server);
void bkv_server_release(bkv_server_t *server);

// Largest message of a request that carries only keys: room for twice max_batch of them, so that a few too many get the
// better message.
size_t bkv_server_request_most(const bkv_server_t *server);

// ---- life ----

// Lets gRPC hand one more call of this method to us.
void bkv_call_arm(bkv_server_t *server, bkv_method_id_t method);

// Cancels calls whose deadline has passed and refreshes those that want it. server->lock is held.
void bkv_call_sweep(bkv_server_t *server, uint64_t now_ms);

// ---- for handlers ----

// Reads the next message into call->message: NULL when the client has sent its last or is gone. ok is false, the message NULL
// and the call already broken off by gRPC when it was larger than max_message.
void bkv_call_read(bkv_call_t *call, bkv_step_t then);

// Frees call->message early.
void bkv_call_drop_message(bkv_call_t *call);

// Sends a message, which it takes over. ok is false when the peer is gone.
void bkv_call_send(bkv_call_t *call, grpc_byte_buffer *message, bkv_step_t then);

// The same for a small message with another to follow soon: it may wait for that one and go out with it.
void bkv_call_send_with_next(bkv_call_t *call, grpc_byte_buffer *message, bkv_step_t then);

// Ends the call with call->error, sending `last` (taken over, may be NULL) before the status.
void bkv_call_finish(bkv_call_t *call, grpc_byte_buffer *last);

// Ends the call with that status; or successfully with that one reply.
void bkv_call_fail(bkv_call_t *call, const bkv_error_t *error);
void bkv_call_reply(bkv_call_t *call, const ProtobufCMessage *reply);

// Frees a call whose close has come already (Watch); every other call gets there by bkv_call_finish.
void bkv_call_end(bkv_call_t *call);

// Unpacks call->message, the whole of it, into bump. On failure the call has been ended: return.
const ProtobufCMessage *bkv_call_request(bkv_call_t *call, const ProtobufCMessageDescriptor *type, bkv_bump_t *bump);

// The same of a message that may have `most` bytes.
const ProtobufCMessage *bkv_call_long_request(bkv_call_t *call, const ProtobufCMessageDescriptor *type, size_t most,
                                              bkv_bump_t *bump);

// Whether the client came by the unix socket, and so is on this host.
bool bkv_call_is_local(const bkv_call_t *call);

// A reference to a session that a place names. FAILED_PRECONDITION: there is none such.
bkv_status_t bkv_call_find_session(const bkv_server_t *server, const bkv_session_id_t *id, bkv_session_t **session,
                                   bkv_error_t *err);

// Starts a batch of any operations; for those that the above do not cover. An empty batch completes at once, from any thread.
void bkv_call_batch(bkv_call_t *call, const grpc_op *ops, size_t count, bkv_tag_t *tag);

// The handlers. bump is the running worker's: nothing in it outlives the handler's return.
#define X(id, path, handler, client_stream, always) void handler(bkv_call_t *call, bkv_bump_t *bump);
BKV_METHODS(X)
#undef X

#endif
