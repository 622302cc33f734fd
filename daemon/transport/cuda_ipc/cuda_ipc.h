// cuda_ipc.h - what the files of the cuda-ipc transport share: devices, what of them is mapped, transfers, and their threads.
//
//   cuda_ipc.c  the transport: sessions, and the start of transfers
//   device.c    a GPU: opening it, the queue of its transfers, and what becomes of it after a fault
//   memory.c    the sessions' memory, mapped
//   pin.c       our own memory, pinned piece by piece; copies between it and a device
//   gate.c      a thread for each device that waits for the events of clients
//   lane.c      a few threads for each device, each with a stream of its own, that compress and copy
//   layout.c    where a block lies
//
// A transfer goes: admitted -> [gate: its event has come] -> lane: enqueued on the stream, waited for -> done. A client's event
// is never waited for by a stream of ours: a stream that waits for a process that has died may wait for ever, and all behind
// it. Only what is known to be there already is enqueued, so a lane always comes to an end.
//
// Locks, in the order in which they may be taken: ipc->lock, device->use, device->mapping, device->lock. No callback is called
// with one held, nor with device->use.
#ifndef BKV_CUDA_IPC_H
#define BKV_CUDA_IPC_H

#include "daemon/transport/cuda_ipc/layout.h"
#include "daemon/transport/internal.h"
#include "kernels/cuda/bkv_cuda.h"
#include "kernels/cuda/share.h"

#define BKV_IPC_DEVICES 64 // most GPUs that are looked at

// With three lanes one compresses while one copies and one is being waited for.
#define BKV_IPC_LANES 3

#define BKV_IPC_UNDER_WAY 4096  // most transfers of a device that have been admitted and are not done
#define BKV_IPC_EVENT_MS  10000 // longest that a client's event is waited for
#define BKV_IPC_EVENTS    128   // of a session, kept open for the next transfers that name them

typedef struct bkv_ipc bkv_ipc_t;
typedef struct bkv_ipc_device bkv_ipc_device_t;
typedef struct bkv_ipc_session bkv_ipc_session_t;
typedef struct bkv_ipc_transfer bkv_ipc_transfer_t;
typedef struct bkv_ipc_memory bkv_ipc_memory_t;

// ---- our own memory (pin.c) ----

// The arena and the staging memory. Pinned in pieces in the background, as that takes seconds where they are large.
#define BKV_IPC_REGIONS 2
typedef struct bkv_ipc_region {
    uint8_t *memory;
    uint64_t bytes;
    uint64_t pinned; // of them, from the start; under the pins' lock
    bool refused;    // there will be no more; likewise
} bkv_ipc_region_t;

typedef struct bkv_ipc_pins {
    pthread_mutex_t lock;
    bkv_ipc_region_t regions[BKV_IPC_REGIONS];
} bkv_ipc_pins_t;

void bkv_ipc_pins_init(bkv_ipc_pins_t *pins, const bkv_transports_config_t *config);
void bkv_ipc_pins_deinit(bkv_ipc_pins_t *pins); // gives back what is pinned
void bkv_ipc_pins_forget(bkv_ipc_pins_t *pins); // a reset has given it back

// Pins the next piece. False: there is none left.
bool bkv_ipc_pins_advance(bkv_ipc_pins_t *pins);
bool bkv_ipc_pins_complete(bkv_ipc_pins_t *pins);

// Copies between a device and host memory, which may lie in a region. Returns a CUDA error.
int bkv_ipc_copy(const bkv_ipc_pins_t *pins, void *to, const void *from, uint64_t bytes, void *stream);

// ---- a client's memory (memory.c) ----

// Maps what has a handle; what has none comes by _give. INVALID_ARGUMENT names the allocation. `use` must be held, here and
// below.
bkv_status_t bkv_ipc_memory_open(bkv_ipc_device_t *device, const bkv_device_allocation_t *allocations, uint32_t count,
                                 bkv_ipc_memory_t **memory, bkv_error_t *err);
// Maps a descriptor, which it closes in every case. One thread at a time.
bkv_status_t bkv_ipc_memory_give(bkv_ipc_memory_t *memory, uint32_t index, int fd, bkv_error_t *err);
// Unmaps and frees. there: between enter and leave, and the device has not been reset since; else it only frees.
void bkv_ipc_memory_close(bkv_ipc_memory_t *memory, bool there);

uint64_t bkv_ipc_memory_bytes(const bkv_ipc_memory_t *memory);
// False while descriptors are missing; *index gets the first.
bool bkv_ipc_memory_complete(const bkv_ipc_memory_t *memory, uint32_t *index);
bkv_ipc_spans_t bkv_ipc_memory_spans(const bkv_ipc_memory_t *memory);

// ---- sessions ----

// A client's event, opened. The gate's, and after the last transfer whoever takes the session down.
typedef struct bkv_ipc_event {
    uint8_t handle[BKV_GPU_HANDLE_BYTES];
    void *event;      // NULL: a free place
    uint32_t waiting; // transfers that wait for it
} bkv_ipc_event_t;

struct bkv_ipc_session {
    bkv_ipc_device_t *device;
    bkv_ipc_memory_t *memory;
    uint32_t generation; // of the device; another one now: the memory is gone
    _Atomic bool ended;
    bkv_ipc_event_t events[BKV_IPC_EVENTS];
    uint32_t next_event; // to be replaced next
};

// FAILED_PRECONDITION where the session cannot be used any more.
bkv_status_t bkv_ipc_session_check(const bkv_ipc_session_t *session, bkv_error_t *err);

// ---- transfers ----

struct bkv_ipc_transfer {
    bkv_job_t verify; // first: a delivery is verified on a compute thread while it is copied
    bkv_ipc_transfer_t *next;
    bkv_ipc_session_t *session;
    void *user;

    bool has_event;
    uint8_t event[BKV_GPU_HANDLE_BYTES];
    bkv_ipc_event_t *awaited; // opened, by the gate
    uint64_t due_ms;          // when the gate gives it up

    // An ingest; NULL: a delivery.
    bkv_ingest_t *ingest;
    bkv_ingest_done_t ingested;
    bkv_ingest_device_t make;
    bool gathers;            // else `block` says where it lies
    bkv_block_t block;       // on the device
    bkv_gpu_gather_t gather; // but for its pointers
    uint32_t table_count;    // of `tables`: addresses of layers, then offsets of pages

    // A delivery.
    const bkv_delivery_t *delivery;
    uint64_t offset; // in the session's memory
    bkv_delivered_t delivered;
    _Atomic uint32_t parts;  // copying and verifying, each until it is done
    bool verify_here;        // by the lane, as no compute thread would take it
    bkv_error_t copy, sound; // what became of each

    uint64_t tables[];
};

// Ends a transfer: tells its owner, frees it. error.status BKV_OK for an ingest: a record of `length` bytes has been made.
void bkv_ipc_transfer_end(bkv_ipc_transfer_t *transfer, uint64_t length, const bkv_error_t *error);

// ---- devices (device.c) ----

typedef struct bkv_ipc_queue {
    bkv_ipc_transfer_t *first, **last;
    uint32_t count;
} bkv_ipc_queue_t;

typedef struct bkv_ipc_lane {
    bkv_ipc_device_t *device;
    pthread_t thread;
    // The thread's own. Made when first needed, forgotten when the device has been reset.
    uint32_t generation;
    void *stream, *event;
    uint8_t *memory, *host; // on the device; pinned
    size_t memory_bytes, host_bytes;
    // What `planned_count` blocks alike were last found to need; 0: nothing yet.
    bkv_ingest_device_t planned;
    uint32_t planned_count;
    size_t planned_bytes;
} bkv_ipc_lane_t;

struct bkv_ipc_device {
    bkv_ipc_t *ipc;
    int ordinal;
    pthread_rwlock_t use; // for reading: CUDA is being used; for writing: the device is being reset
    bkv_cuda_t *cuda;     // under `use`
    _Atomic uint32_t generation;
    _Atomic bool broken; // a fault has ended everything on it; the gate will reset it
    _Atomic bool dead;   // and that did not help

    pthread_mutex_t mapping;       // of what follows
    struct bkv_ipc_opened *opened; // allocations opened by handle, shared by the sessions that name them

    pthread_mutex_t lock;    // of what follows
    pthread_cond_t gate_has; // something for the gate
    pthread_cond_t lane_has; // something for a lane
    bkv_ipc_queue_t gated, ready;
    uint32_t under_way, sessions;
    bool stopping;

    pthread_t gate;
    bkv_ipc_lane_t lanes[BKV_IPC_LANES];
    uint32_t threads; // that were started: lanes, then the gate
};

struct bkv_ipc {
    bkv_transports_config_t config;
    bkv_ipc_pins_t pins;
    pthread_mutex_t lock; // held while a device is opened
    uint32_t count;
    uint8_t uuids[BKV_IPC_DEVICES][BKV_GPU_UUID_BYTES];
    bkv_ipc_device_t *_Atomic devices[BKV_IPC_DEVICES]; // NULL: not opened yet; never NULL again
};

// Opens a device, which makes a context on it, and starts its threads.
bkv_status_t bkv_ipc_device_open(bkv_ipc_t *ipc, int ordinal, bkv_ipc_device_t **device, bkv_error_t *err);
void bkv_ipc_device_close(bkv_ipc_device_t *device); // NULL is allowed

// Around any use of CUDA for the device: makes it the thread's, and keeps it from being reset. A session is to be checked in
// between, as its memory may have gone with a reset before. FAILED_PRECONDITION, INTERNAL: the device cannot be used.
bkv_status_t bkv_ipc_device_enter(bkv_ipc_device_t *device, int *before, bkv_error_t *err);
void bkv_ipc_device_leave(bkv_ipc_device_t *device, int before);

// Puts a CUDA error in words; where the device has failed for good, sees to it that it is reset. Between enter and leave.
bkv_status_t bkv_ipc_device_fail(bkv_ipc_device_t *device, int error, const char *what, bkv_error_t *err);

// Forgets all that was on the device, and opens it again. On the gate.
void bkv_ipc_device_reset(bkv_ipc_device_t *device);

// Counts a transfer: BUSY beyond BKV_IPC_UNDER_WAY. One that has been counted is queued or ended.
bkv_status_t bkv_ipc_device_admit(bkv_ipc_device_t *device, bkv_error_t *err);
void bkv_ipc_device_queue(bkv_ipc_device_t *device, bkv_ipc_transfer_t *transfer); // for the gate or for a lane
void bkv_ipc_device_done(bkv_ipc_device_t *device);                                // the opposite of admit

// Under device->lock.
void bkv_ipc_queue_put(bkv_ipc_queue_t *queue, bkv_ipc_transfer_t *transfer);
bkv_ipc_transfer_t *bkv_ipc_queue_take(bkv_ipc_queue_t *queue); // NULL: empty

// The threads, with a device and a lane.
void *bkv_ipc_gate_main(void *device);
void *bkv_ipc_lane_main(void *lane);

// Closes what a session has opened. Between enter and leave, unless the device has been reset since.
void bkv_ipc_events_close(bkv_ipc_session_t *session);

#endif
