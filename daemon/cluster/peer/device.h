// device.h - the RDMA device that this daemon and other daemons read each other's arenas with, and this daemon's arena as it knows
// it: for others to read, and for what is read from them to go to. Both ends share it: serve.c answers, verbs.c asks.
//
// Registering an arena takes all of its memory for good, and time; so it is done when it is first needed. Others may read all of
// the arena and write nothing. Clients' sessions have a device of their own (daemon/transport/verbs.c).
#ifndef BKV_PEER_DEVICE_H
#define BKV_PEER_DEVICE_H

#include "daemon/store/store.h"
#include "daemon/verbs/verbs.h"

#include <pthread.h>

typedef struct bkv_peer_device {
    bkv_store_t *store;
    bkv_verbs_device_t *device;
    pthread_mutex_t lock;
    struct ibv_mr *arena; // [lock] NULL: not registered
    bkv_error_t refused;  // [lock] why it cannot be; BKV_OK: nobody has tried, or it is
} bkv_peer_device_t;

// name: "auto" or a device's, with port and GID as in [transport]. UNIMPLEMENTED: there is none such.
bkv_status_t bkv_peer_device_open(bkv_peer_device_t *device, bkv_store_t *store, const char *name, uint32_t port, int gid,
                                  bkv_error_t *err);
void bkv_peer_device_close(bkv_peer_device_t *device);

// The arena, registered by the first call of this, which may take seconds. FAILED_PRECONDITION: it cannot be; this is said in the
// log once and not tried again.
bkv_status_t bkv_peer_device_arena(bkv_peer_device_t *device, struct ibv_mr **arena, bkv_error_t *err);

#endif
