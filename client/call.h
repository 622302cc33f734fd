// call.h - one call of the API, from its start to its completion, over as many attempts as it takes.
//
// Each operation embeds a bkv_call_t as its first member and describes itself by a bkv_call_kind_t. call.c does what is
// common: it makes an attempt (one gRPC call), feeds it messages, takes in responses, and decides when the attempt has ended
// whether that is the result, or to try again after a pause, or to open the spec again first.
//
// Life of a call: new -> RUNNING <-> PAUSED -> HELD -> DONE. HELD: the result is known, but gRPC still refers to the caller's
// memory (a payload that a blocked socket has not taken). A call is reported only when that has ended.
//
// Threads: a call is started by its caller's thread and then driven by the client's thread alone. The last reference to a
// payload may go on any thread, so what that does (bkv_call_release) takes only leaf locks and never calls gRPC.
#ifndef BKV_CLIENT_CALL_H
#define BKV_CLIENT_CALL_H

#include "balancekv.h"
#include "wire.h"

#include <grpc/grpc.h>
#include <pthread.h>
#include <stdatomic.h>

typedef struct bkv_call bkv_call_t;

typedef enum bkv_call_shape {
    BKV_CALL_UNARY,    // one message each way
    BKV_CALL_UPLOAD,   // many out, one back
    BKV_CALL_DOWNLOAD, // one out, many back
} bkv_call_shape_t;

typedef struct bkv_call_kind {
    const char *method; // "/package.Service/Method"
    bkv_call_shape_t shape;
    bool names_spec; // call->spec_id means something
    bool may_miss;   // NOT_FOUND may also be about a key
    bool fail_fast;  // UNAVAILABLE is a result, not a reason to try again

    // Forgets what an earlier attempt has left. Optional.
    void (*reset)(bkv_call_t *call);
    // The next message to send, the callee's to destroy; *last when none follows it. Optional but for UPLOAD: without it
    // call->request is the one message.
    grpc_byte_buffer *(*next)(bkv_call_t *call, bool *last);
    // Takes in one response, which stays the caller's. Anything but BKV_OK ends the call with that status.
    bkv_status_t (*take)(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err);
    // Runs on the thread that takes the completion, so that long work does not hold up others. May change call->error.
    // Optional.
    void (*finish)(bkv_call_t *call);
    // Frees what the operation owns. Optional.
    void (*clean)(bkv_call_t *call);
} bkv_call_kind_t;

typedef enum bkv_call_stage { BKV_CALL_RUNNING, BKV_CALL_PAUSED, BKV_CALL_HELD, BKV_CALL_DONE } bkv_call_stage_t;

// A batch of gRPC operations under way: what the completion queue hands back.
typedef struct bkv_call_tag {
    void (*run)(bkv_call_t *call, bool ok);
    bkv_call_t *call;
} bkv_call_tag_t;

struct bkv_call {
    const bkv_call_kind_t *kind;
    bkv_client_t *client;
    bkv_queue_t *queue; // where the completion goes; NULL: to the waiting caller
    uint64_t user_tag;
    bkv_spec_id_t spec_id;
    uint32_t timeout_ms;
    uint64_t started_ns, deadline_ns;
    grpc_slice request; // empty where kind->next makes the messages
    bkv_error_t error;  // the result

    // One attempt. Set up by whoever starts it, then the client thread's.
    bkv_call_tag_t status_tag, send_tag, receive_tag;
    uint32_t batches; // not yet reported
    grpc_metadata_array initial, trailing;
    grpc_status_code code;
    grpc_slice details;
    grpc_byte_buffer *sending, *received;
    bool sent_last;
    bool ended;          // its status has come
    bool answered;       // a response has come
    bkv_error_t fault;   // what was wrong with a response
    uint64_t spec_epoch; // boot epoch at which the spec was open when the attempt started
    bool reopening;      // this attempt is an Open
    bool reopened;       // there has been one
    bkv_error_t missed;  // the NOT_FOUND that led to it
    uint32_t attempts;

    // Under the client's lock.
    bkv_call_stage_t stage;
    grpc_call *grpc;     // NULL between attempts
    uint64_t connection; // the number of the connection that the attempt uses
    bool cancelled;      // by its caller, for good
    bool interrupted;    // the attempt's connection was given up
    uint64_t due_ns;     // PAUSED: when to try again; HELD: when to give the connection up
    bkv_call_t *live_next, *live_previous;
    bkv_call_t *timer_next;

    // 1 until the result is known, plus one for each slice of the caller's memory that gRPC refers to.
    atomic_uint holds;

    // Completion: of a waiting caller, or a link of the queue's list (under the queue's lock).
    pthread_mutex_t mutex;
    pthread_cond_t cond;
    bool done;
    bkv_call_t *done_next;
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

// Starts an attempt: for client.c's loop, of a PAUSED call that is due and off the timers.
void bkv_call_start(bkv_call_t *call);

// Reports a call with what is in call->error. The call may be gone afterwards. Any thread.
void bkv_call_conclude(bkv_call_t *call);

// A message that ends with `length` bytes of the caller's memory, not copied. `head` is taken over. The call is not reported
// before gRPC has let go of the bytes.
grpc_byte_buffer *bkv_call_message(bkv_call_t *call, grpc_slice head, const void *bytes, size_t length);

// gRPC's queues are opaque to ThreadSanitizer: what is written before a batch is seen by who gets its tag.
#if defined(__SANITIZE_THREAD__)
void __tsan_acquire(void *address);
void __tsan_release(void *address);
#define BKV_CALL_ACQUIRE(tag) __tsan_acquire(tag)
#define BKV_CALL_RELEASE(tag) __tsan_release(tag)
#else
#define BKV_CALL_ACQUIRE(tag) (void)(tag)
#define BKV_CALL_RELEASE(tag) (void)(tag)
#endif

#endif
