// device.h - internal: GPU memory shared with the daemon. device.c has what is shared and the session of it, link.c how
// the daemon gets it, put.c and get.c the calls.
#ifndef BKV_CLIENT_DEVICE_H
#define BKV_CLIENT_DEVICE_H

#include "client/bkv_device.h"
#include "client/client.h"
#include "kernels/cuda/share.h"

#define BKV_DEVICE_SESSION 16
#define BKV_DEVICE_TRIES   3 // of a synchronous call, whose session the daemon does not know

// An allocation, or a chunk of one. Ascending by address, and so they follow one another in the session's memory.
typedef struct bkv_device_extent {
    const uint8_t *base;
    uint64_t whole;         // bytes
    uint64_t bytes, offset; // that are shared, in whole units of 64; in the session's memory
    bool chunk;
    uint8_t handle[BKV_GPU_HANDLE_BYTES]; // where it is no chunk
} bkv_device_extent_t;

// What the daemon knows the memory by. Counted by the calls that name it.
typedef struct bkv_device_session {
    uint8_t id[BKV_DEVICE_SESSION];
    int connection;   // to the fd socket; holds the session
    uint32_t holders; // under the device's lock
} bkv_device_session_t;

// An event that the daemon can wait for, and its name. Used again when the call has ended.
typedef struct bkv_device_event {
    struct bkv_device_event *next;
    void *event;
    uint8_t handle[BKV_GPU_HANDLE_BYTES];
} bkv_device_event_t;

struct bkv_device {
    bkv_client_t *client;
    bkv_client_endpoint_t *endpoint; // a daemon on this host: all calls go there
    int ordinal;
    uint8_t uuid[BKV_GPU_UUID_BYTES];
    bkv_device_extent_t *extents;
    uint32_t count;
    uint64_t bytes; // of all

    pthread_mutex_t attaching;     // held while a session is made
    pthread_mutex_t lock;          // of what follows
    bkv_device_session_t *session; // NULL: none
    bkv_device_event_t *events;    // that no call has
};

// What a call of either kind has of it.
typedef struct bkv_device_use {
    bkv_device_t *device;
    bkv_device_session_t *session; // held
    bkv_device_event_t *event;     // recorded
} bkv_device_use_t;

// Finds or makes the session, and records an event on the stream. The use is to be ended in every case.
bkv_status_t bkv_device_use_begin(bkv_device_use_t *use, bkv_device_t *device, void *stream, uint32_t timeout_ms,
                                  bkv_error_t *err);
void bkv_device_use_end(bkv_device_use_t *use);

// Whether the error of a call says that the daemon does not know the session; it is then forgotten.
bool bkv_device_use_lost(const bkv_device_use_t *use, const bkv_error_t *error);

void bkv_device_use_describe(const bkv_device_use_t *use, Balancekv__V1__Place *place);

// Where [address, address + bytes) lies in the session's memory; false where it is not shared in one piece.
bool bkv_device_offset(const bkv_device_t *device, const void *address, uint64_t bytes, uint64_t *offset);

// Attaches: asks for a session and gives it the descriptors. link.c.
bkv_status_t bkv_device_attach(bkv_device_t *device, uint32_t timeout_ms, bkv_device_session_t **session, bkv_error_t *err);
void bkv_device_leave(bkv_device_session_t *session); // closes the connection and frees

#endif
