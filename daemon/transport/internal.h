// internal.h - what the files of transport/ share; nobody else includes it.
#ifndef BKV_TRANSPORT_INTERNAL_H
#define BKV_TRANSPORT_INTERNAL_H

#include "daemon/transport/transport.h"

#include <pthread.h>
#include <stdatomic.h>

// One kind of memory. `self` is what open returned, `state` what attach did.
typedef struct bkv_transport_ops {
    const char *name;
    bool local;     // for peers on this host alone
    bool on_device; // payloads lie in GPU memory

    // Opens the transport. UNIMPLEMENTED: this machine has none, the message says why. *self may stay NULL.
    bkv_status_t (*open)(bkv_transports_t *transports, void **self, bkv_error_t *err);
    void (*close)(void *self); // no session is left

    // A session's own part; result->id and idle_ms are filled in by the caller.
    bkv_status_t (*attach)(void *self, const bkv_attach_args_t *args, bkv_attach_result_t *result, void **state,
                           bkv_error_t *err);
    // Stops new transfers of the session and makes those under way end soon, in failure if need be. Optional; once.
    void (*end)(void *self, void *state);
    void (*detach)(void *self, void *state); // after the last transfer; once

    // Whether a session's link still works, which can no longer be mended once it does not: bkv_session_find ends it then. state
    // NULL: whether the transport is to be had just now, or its device has gone. NULL: always. Must not block.
    bool (*alive)(void *self, void *state);

    // As bkv_session_fetch and _deliver; the caller has checked a place that is one range (layout NULL) against the session's
    // bytes, and holds a reference to the session until `done`, which these must call exactly once after BKV_OK.
    bkv_status_t (*fetch)(void *self, void *state, const bkv_place_t *place, bkv_ingest_t *ingest, bkv_ingest_done_t done,
                          void *user, bkv_error_t *err);
    bkv_status_t (*deliver)(void *self, void *state, const bkv_place_t *place, const bkv_delivery_t *delivery,
                            bkv_delivered_t done, void *user, bkv_error_t *err);

    // The fd socket: a descriptor for the client (the caller does not close it), or one from it (taken over). NULL: refused.
    bkv_status_t (*take_fd)(void *self, void *state, int *fd, uint64_t *bytes, bkv_error_t *err);
    bkv_status_t (*give_fd)(void *self, void *state, uint32_t index, int fd, bkv_error_t *err);
} bkv_transport_ops_t;

extern const bkv_transport_ops_t bkv_transport_shm, bkv_transport_cuda_ipc, bkv_transport_verbs;

const bkv_transports_config_t *bkv_transports_config_of(const bkv_transports_t *transports);

// For gauges that a transport keeps itself.
void bkv_transports_count_window(bkv_transports_t *transports, int64_t bytes);

#endif
