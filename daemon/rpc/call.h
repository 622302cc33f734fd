// call.h - one call from its arrival to its end, and what the server's files share.
//
// The path of a call, on the worker thread that owns it:
//   armed      gRPC may hand the next call of this method to it
//   accepted   it has one: the next is armed, bounds are checked, then the handler runs: at once for a client stream, else
//              when the request has been read
//   running    the handler's; it reads and sends, or waits for the pipeline
//   ending     the last batch (status out, close in) is on its way; its completion is the one clean-up
// The state only increases. At most one batch of a call is in flight (health's Watch has one more), so no two threads meet
// in a call: a handler gives the call to the pipeline or to gRPC, and touches it again when that calls back. Pipeline
// callbacks come on compute threads and may send or finish; everything else, the clean-up too, happens on the owning worker.
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

// What a completion queue hands back: the function to run and what to run it on.
typedef struct bkv_tag {
    void (*run)(void *owner, bool ok);
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
    X(PIN, "/balancekv.v1.BalanceKV/Pin", bkv_handle_pin, false, false)                                                        \
    X(UNPIN, "/balancekv.v1.BalanceKV/Unpin", bkv_handle_unpin, false, false)                                                  \
    X(DROP, "/balancekv.v1.BalanceKV/Drop", bkv_handle_drop, false, false)                                                     \
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
    bkv_worker_t *worker;
    bkv_call_t *older, *newer; // the worker's accepted calls; worker thread only
    bkv_method_id_t method;
    bkv_call_state_t state;
    grpc_call *grpc;
    gpr_timespec client_deadline;
    grpc_metadata_array metadata;
    grpc_call_details details; // of methods that are not registered
    uint64_t id;               // request id, in log lines and trailing metadata
    uint64_t deadline_ms;      // UINT64_MAX: none
    bool expired;              // the deadline has passed and the call was cancelled for it
    bool started;              // initial metadata has been sent
    bool broken;               // reading or sending broke off: the peer is probably gone
    bool counted;              // in server->open
    int cancelled;             // what RECV_CLOSE said
    grpc_byte_buffer *message; // received last, NULL: none
    grpc_byte_buffer *reply;   // being sent
    bkv_error_t error;         // how the call ends

    void *body; // the handler's own; body_free frees it in the clean-up
    void (*body_free)(void *body);
    void (*refresh)(bkv_call_t *call); // NULL, or called ten times a second or so
};

struct bkv_worker {
    bkv_server_t *server;
    grpc_completion_queue *queue;
    pthread_t thread;
    bool running;      // there is a thread to join
    bkv_call_t *calls; // accepted ones, newest first
    uint64_t swept_ms; // when their deadlines were last looked at
    bkv_bump_t bump;   // for the present event; reset after it
};

struct bkv_server {
    bkv_server_config_t config; // version, backend and sources are copies
    grpc_server *grpc;
    void *methods[BKV_METHOD_COUNT]; // gRPC's handles
    bkv_worker_t *workers;
    uint32_t worker_count;
    int lock_fd; // of the socket's lock file; -1: none
    int port;
    uint64_t started_ms;
    bkv_tag_t stopped; // of the shutdown

    _Atomic uint64_t last_id, op_timeout_ms;
    _Atomic bool draining, stopping;
    _Atomic uint32_t accepted; // calls with a grpc_call, watches included
    _Atomic uint32_t open;     // of these, the ones that a drain waits for
    _Atomic uint64_t calls_total, calls_failed_total, calls_cancelled_total, bytes_received_total, bytes_sent_total;

    // Everything that must be over before the server can be freed: armed and accepted calls, records on their way out, the
    // shutdown itself. Whoever takes away the last one says so.
    _Atomic uint64_t holds;
    pthread_mutex_t lock; // protects idle
    pthread_cond_t changed;
    bool idle;
};

void bkv_server_hold(bkv_server_t *server);
void bkv_server_release(bkv_server_t *server);

// Largest message of a request that carries only keys: room for twice max_batch of them, so that a few too many get the
// better message.
size_t bkv_server_request_most(const bkv_server_t *server);

// ---- life ----

// Lets gRPC hand one more call of this method to the worker.
void bkv_call_arm(bkv_worker_t *worker, bkv_method_id_t method);

// Cancels those of the worker's calls whose deadline has passed, and refreshes those that want it.
void bkv_worker_sweep(bkv_worker_t *worker, uint64_t now_ms);

// ---- for handlers ----

// Reads the next message into call->message: NULL when the client has sent its last or is gone. ok is false, the message NULL
// and the call already broken off by gRPC when it was larger than max_message.
void bkv_call_read(bkv_call_t *call, void (*then)(void *call, bool ok));

// Frees call->message early.
void bkv_call_drop_message(bkv_call_t *call);

// Sends a message, which it takes over. ok is false when the peer is gone.
void bkv_call_send(bkv_call_t *call, grpc_byte_buffer *message, void (*then)(void *call, bool ok));

// Ends the call with call->error, sending `last` (taken over, may be NULL) before the status.
void bkv_call_finish(bkv_call_t *call, grpc_byte_buffer *last);

// Ends the call with that status; or successfully with that one reply.
void bkv_call_fail(bkv_call_t *call, const bkv_error_t *error);
void bkv_call_reply(bkv_call_t *call, const ProtobufCMessage *reply);

// Frees a call whose close has come already (Watch); every other call gets there by bkv_call_finish.
void bkv_call_end(bkv_call_t *call);

// Unpacks call->message, the whole of it, into the worker's bump. On failure the call has been ended: return.
const ProtobufCMessage *bkv_call_request(bkv_call_t *call, const ProtobufCMessageDescriptor *type);

// Starts a batch of any operations; for those that the above do not cover. An empty batch completes at once, from any thread.
void bkv_call_batch(bkv_call_t *call, const grpc_op *ops, size_t count, bkv_tag_t *tag);

#define X(id, path, handler, client_stream, always) void handler(bkv_call_t *call);
BKV_METHODS(X)
#undef X

#endif
