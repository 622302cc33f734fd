// call.h - one call of the API, from its start to its completion, over as many attempts as it takes.
//
// Each operation embeds a bkv_call_t as its first member and describes itself by a bkv_call_kind_t. call.c does what is
// common: it makes an attempt (one gRPC call, attempt.h) at one of the client's endpoints, and decides when that has ended whether it
// is the result, or to try again, after a pause or elsewhere, or to open the spec first.
//
// Threads: a call is started by its caller's thread and then driven by one thread at a time (drive.c).
#ifndef BKV_CLIENT_CALL_H
#define BKV_CLIENT_CALL_H

#include "client/balancekv.h"
#include "client/memory/window.h"
#include "client/wire.h"
#include "proto/exchange.h"

#include <grpc/grpc.h>
#include <pthread.h>
#include <semaphore.h>

typedef struct bkv_call bkv_call_t;
typedef struct bkv_client_endpoint bkv_client_endpoint_t;

#define BKV_CALL_OWNERS 4 // as many as a block may have

typedef struct bkv_call_kind {
    const char *method; // "/package.Service/Method"
    bkv_exchange_shape_t shape;
    bool names_spec; // call->spec_id means something
    bool may_miss;   // NOT_FOUND may also be about a key
    bool fail_fast;  // UNAVAILABLE is a result, not a reason to wait and try again
    bool one_has_it; // NOT_FOUND is a reason to ask another daemon

    // Forgets what an earlier attempt has left. Optional.
    void (*reset)(bkv_call_t *call);
    // The next message to send, the caller's to destroy; *last when none follows it. For UPLOAD, and for others whose message
    // is not call->request alone.
    grpc_byte_buffer *(*next)(bkv_call_t *call, bool *last);
    // Takes in one response, which stays the caller's. Anything but BKV_OK ends the call with that status.
    bkv_status_t (*take)(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err);
    // An attempt has ended. answered: by the daemon's own word, which then is done with all memory that the attempt has named; else
    // the daemon may still be at it. call->window is the attempt's. Optional.
    void (*settle)(bkv_call_t *call, bool answered);
    // Runs on the thread that takes the completion, so that long work does not hold up others. May change call->error.
    // Optional.
    void (*finish)(bkv_call_t *call);
    // Frees what the operation owns. Optional.
    void (*clean)(bkv_call_t *call);
    // In the place of a first attempt, of a call that is made of others (endpoints/route.h). Optional.
    void (*start)(bkv_call_t *call);
} bkv_call_kind_t;

typedef struct bkv_attempt bkv_attempt_t; // attempt.h

struct bkv_call {
    const bkv_call_kind_t *kind;
    bkv_client_t *client;
    bkv_queue_t *queue; // where the completion goes; NULL: to the waiting caller
    uint64_t user_tag;
    bkv_spec_id_t spec_id;
    uint32_t timeout_ms;
    uint64_t started_ns, deadline_ns;
    grpc_slice request;   // empty where kind->next makes the messages
    uint64_t place_bytes; // where `places`: moved in one piece
    bkv_error_t error;    // of the latest attempt; in the end the result
    bool places; // moves payloads or records, through memory shared with the daemon where that makes sense (memory/link.h)

    // Where it goes (endpoints/endpoint.h). Written by whoever drives the call, under the client's lock.
    bool bound;                                     // goes nowhere else than where it went
    bool moving;                                    // the attempt was cancelled, so that the call can go elsewhere
    bkv_client_endpoint_t *endpoint;                // of the attempt, or the next
    bkv_client_endpoint_t *owners[BKV_CALL_OWNERS]; // to be asked before all others, in this order
    uint32_t owner_count, owner_next;
    uint32_t tried;                 // the listed endpoints that were, in this round: a bit for each
    uint32_t busy;                  // how often the endpoint has said that it is
    uint32_t asked_next;            // because it was not found (one_has_it)
    uint64_t begun_ns;              // of the attempt, the wait for a window included
    bkv_call_t *parent;             // that this one is a part of (route.h); NULL: none
    void (*over)(bkv_call_t *call); // of a call that nobody waits for: takes it when it has its result

    uint32_t attempts;
    uint32_t rejoined;   // how often the daemon did not know its session
    uint64_t spec_epoch; // boot epoch of the endpoint at which the spec was open when the attempt started; 0: not known to be
    bool reopening;      // the attempt is an Open
    bool reopened;       // there has been one
    bkv_error_t missed;  // the NOT_FOUND that led to it

    bkv_client_window_t *window; // of the attempt, counted; NULL: everything goes inline

    // Under the client's lock.
    bkv_attempt_t *attempt; // NULL between two
    bool cancelled;         // by the caller
    bool paused;            // on the client's list of timers until due_ns
    bool joining;           // and until the client has a window
    uint64_t due_ns;
    bkv_call_t *live_next, *live_previous;
    bkv_call_t *timer_next;

    // Of a synchronous call, under the client's lock (drive.c).
    _Atomic bool done; // may be read without it by the caller
    bool leads;        // the caller drives
    bool follows;      // the caller waits for `turn`, in the client's list of followers
    pthread_t caller;
    bkv_call_t *follower_next;
    sem_t turn;

    bkv_call_t *done_next; // a link of the queue's list, under the queue's lock
};

// Allocates `size` zeroed bytes that start with a bkv_call_t. NULL: out of memory. id may be NULL.
void *bkv_call_new(size_t size, const bkv_call_kind_t *kind, bkv_client_t *client, const bkv_spec_id_t *id,
                   uint32_t timeout_ms);
void bkv_call_free(bkv_call_t *call);

// Synchronous: starts the call, waits for it, finishes it. It is then still the caller's to read and free. NULL (out of
// memory) is allowed.
bkv_status_t bkv_call_run(bkv_call_t *call, bkv_error_t *err);

// Asynchronous: the call is the queue's from here on, also on failure. NULL (out of memory) is allowed.
bkv_status_t bkv_call_submit(bkv_call_t *call, bkv_queue_t *queue, uint64_t tag);

// Starts the call; `over` gets it when it has its result, on the thread that drives, and may free it. Its kind's `finish` is not
// run. With a queue or without, as set by the caller: it is cancelled with that queue, but is no completion of it.
void bkv_call_detach(bkv_call_t *call, void (*over)(bkv_call_t *call));

// Before the start: all attempts are to go to this endpoint.
void bkv_call_bind(bkv_call_t *call, bkv_client_endpoint_t *endpoint);

// Starts an attempt: for client.c's loop, of a call whose pause is over and which is off the timers.
void bkv_call_start(bkv_call_t *call);

// Its endpoint does not answer, and it has no attempt under way: tries elsewhere.
void bkv_call_move(bkv_call_t *call);

// An attempt has its result. The call goes on, or is gone, without it.
void bkv_call_attempted(bkv_attempt_t *attempt);

// Reports a call with what is in call->error. The call may be gone afterwards.
void bkv_call_conclude(bkv_call_t *call);

#endif
