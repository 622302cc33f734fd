// client.h - the client's own state: its endpoints, one completion queue and who drives it, the calls in flight, the specs that
// were opened.
//
// One lock protects all of it. It is a leaf: gRPC is never called, and no other lock taken, while it is held.
//
// This room is the course of a call and what all calls use. Beside it:
//   operations/  Open, Put, Get, ...: what is sent, and what comes back
//   endpoints/   which daemons there are, which of them work, and which a call goes to
//   memory/      memory shared with a daemon, through which payloads and records move without messages
//   device/      a worker's GPU memory
#ifndef BKV_CLIENT_CLIENT_H
#define BKV_CLIENT_CLIENT_H

#include "client/buffer.h"
#include "client/call.h"
#include "client/endpoints/endpoint.h"
#include "client/endpoints/route.h"
#include "client/pool.h"

// Where a spec is open, as far as we know.
typedef struct bkv_client_opened {
    bool known;
    uint64_t boot_epoch; // at which it was
} bkv_client_opened_t;

// A spec that was opened, to be opened at other daemons, and again after a restart.
typedef struct bkv_client_spec {
    bkv_spec_id_t id;
    grpc_slice request;          // the packed OpenRequest
    bkv_shape_t shape;           // of a full block; tokens 0: not known
    uint64_t record_bytes;       // of a full block's record, lately at most; 0: not known
    bkv_client_opened_t *opened; // by the endpoint's number
    uint32_t opened_count;
    struct bkv_client_spec *next;
} bkv_client_spec_t;

struct bkv_client {
    // Fixed.
    bkv_client_options_t options; // as given; the strings are the client's own
    uint32_t timeout_ms;
    uint32_t listed; // endpoints that the options name: the first ones, the preferred before the others
    bool local;      // one of them is on this host
    bool watched;    // there may be several endpoints (watch.c)
    bkv_client_transport_t transport;
    grpc_completion_queue *completions;
    bkv_client_pool_t *pool;       // of what is sent
    bkv_client_buffers_t *buffers; // for what is received
    pthread_t thread;
    _Atomic uint64_t jitter; // state of the random pauses

    pthread_mutex_t lock;
    pthread_cond_t changed; // live_count is 0, or thread_ended
    bkv_call_t *live;       // all that have not been reported
    size_t live_count;      // and whoever else needs the client
    bkv_call_t *timers;     // those on a pause, in no order
    bkv_client_spec_t *specs;
    bkv_client_shared_t *shared;
    bkv_client_endpoint_t *endpoints[BKV_ENDPOINTS_MAX]; // entries do not change once they are there
    uint32_t endpoint_count;
    bkv_client_route_t route;
    bool closing; // no new attempts

    // Looking after the endpoints (endpoints/watch.c).
    _Atomic uint64_t watch_ns; // when there is something to do; UINT64_MAX: nothing
    uint64_t tick_ns;          // the next look at the calls; UINT64_MAX: none
    uint32_t quiet_ticks;

    // Who drives (drive.c).
    bool driven;
    pthread_t driver;      // where driven
    uint64_t turns;        // how often that has changed
    size_t queued;         // live calls of queues
    size_t callers;        // synchronous ones that wait, or are about to
    bkv_call_t *followers; // those of them that sleep, the latest first
    pthread_cond_t work;   // the client's thread is to drive
    bool ending;           // no more calls
    bool thread_ended;
    bool abandoned; // the thread frees the client
};

// CLOCK_MONOTONIC, which is also what GPR_CLOCK_MONOTONIC reads.
uint64_t bkv_client_now_ns(void);
gpr_timespec bkv_client_timespec(uint64_t ns);

// drive.c: what the client's thread runs; a caller's wait for its call, which has been entered and started; and the end of that
// wait, after which the call may be gone.
void *bkv_client_drive(void *client);
void bkv_client_await(bkv_client_t *client, bkv_call_t *call);
void bkv_client_tell(bkv_client_t *client, bkv_call_t *call);

// For the driver: starts every attempt that is due and returns when there will be more. And for the client's thread, at its end.
uint64_t bkv_client_run_timers(bkv_client_t *client);
void bkv_client_free(bkv_client_t *client);

// Enters a call among the live, a synchronous one with its caller, who must await it; and takes it out again in two steps: after
// the first nobody can cancel it, after the second the client may be gone.
void bkv_client_enter(bkv_client_t *client, bkv_call_t *call);
void bkv_client_remove(bkv_client_t *client, bkv_call_t *call);
void bkv_client_leave(bkv_client_t *client);

// Puts a call on the timers. False: it has been cancelled. After true the call may be gone.
bool bkv_client_pause(bkv_client_t *client, bkv_call_t *call, uint64_t due_ns);

// The same under the lock, which must be held, for a call that waits for a window and has not been cancelled. With the lock
// released, the caller must then wake whoever drives, who might sleep past due_ns, and leave.
void bkv_client_park(bkv_client_t *client, bkv_call_t *call, uint64_t due_ns);
void bkv_client_wake(bkv_client_t *client);

// Takes the calls that wait for a window of the endpoint off the timers: a list by timer_next. The lock must be held.
bkv_call_t *bkv_client_unpark(bkv_client_t *client, const bkv_client_endpoint_t *endpoint);

// Starts a thread with all signals blocked. False: there is none. thread NULL: nobody joins it.
bool bkv_client_spawn(void *(*run)(void *), void *argument, pthread_t *thread);

// Cancels the calls of a queue (NULL: all calls). Those on a pause are concluded here, the others by whoever drives.
void bkv_client_cancel(bkv_client_t *client, const bkv_queue_t *queue);

// Of a response to a call: which boot of its endpoint it came from, and that the call's spec is open there.
void bkv_client_saw_epoch(bkv_client_t *client, const bkv_call_t *call, uint64_t boot_epoch);

// operations/specs.c. The lock must be held for these two. Opened: what is known of the spec at an endpoint.
bkv_client_spec_t *bkv_client_spec_find(bkv_client_t *client, const bkv_spec_id_t *id);
bkv_client_opened_t bkv_client_spec_opened(const bkv_client_spec_t *spec, const bkv_client_endpoint_t *endpoint);
void bkv_client_specs_free(bkv_client_t *client);

// Room for the records of `count` blocks of a spec, of which `range` is wanted: a guess from what its records were lately. 0:
// nothing is known about the spec. And what to guess from: the largest record of whole blocks that a call has brought.
uint64_t bkv_client_spec_room(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_range_t *range, size_t count);
void bkv_client_spec_saw(bkv_client_t *client, const bkv_spec_id_t *id, uint64_t record_bytes);

// The shape of a spec's full blocks. False: nothing is known about the spec.
bool bkv_client_spec_shape(bkv_client_t *client, const bkv_spec_id_t *id, bkv_shape_t *shape);

// Bytes of `count` full blocks as bf16; 0: nothing is known about the spec.
uint64_t bkv_client_spec_bf16(bkv_client_t *client, const bkv_spec_id_t *id, size_t count);

// The answer to an Open that call.c made again: BKV_OK with *boot_epoch, and the spec is known to be open at it.
bkv_status_t bkv_client_spec_reopened(bkv_call_t *call, grpc_byte_buffer *message, uint64_t *boot_epoch, bkv_error_t *err);

// operations/put.c. Takes in the answer to a Put of `count` blocks, whose keys key_of knows; results may be NULL.
typedef const bkv_key_t *(*bkv_client_put_key_t)(const bkv_call_t *call, size_t i);
bkv_status_t bkv_client_put_results(bkv_call_t *call, grpc_byte_buffer *message, bkv_client_put_key_t key_of, size_t count,
                                    bkv_put_result_t *results, bkv_error_t *err);

#define BKV_CLIENT_SERVICE "/balancekv.v1.BalanceKV/"

// monitor.c. A call that asks the health service, and is BUSY where the daemon does not serve. NULL: out of memory.
bkv_call_t *bkv_client_ping_new(bkv_client_t *client, uint32_t timeout_ms);

// queue.c. Reserves room for one more call; BKV_BUSY when the queue is full.
bkv_status_t bkv_queue_admit(bkv_queue_t *queue);
// Hands a completed call over; it is the queue's from here on.
void bkv_queue_deliver(bkv_queue_t *queue, bkv_call_t *call);
bkv_client_t *bkv_queue_client(const bkv_queue_t *queue);

#endif
