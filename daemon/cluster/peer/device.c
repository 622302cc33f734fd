// device.c - see device.h.
#include "daemon/cluster/peer/device.h"

#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"

bkv_status_t bkv_peer_device_open(bkv_peer_device_t *device, bkv_store_t *store, const char *name, uint32_t port, int gid,
                                  bkv_error_t *err) {
    *device = (bkv_peer_device_t){.store = store};
    bkv_verbs_choice_t choice;
    bkv_status_t status = bkv_verbs_choice_set(&choice, name, port, gid, err);
    if (status == BKV_OK) {
        status = bkv_verbs_open(&choice, &device->device, err);
    }
    if (status == BKV_OK) {
        pthread_mutex_init(&device->lock, NULL);
    }
    return status;
}

void bkv_peer_device_close(bkv_peer_device_t *device) {
    bkv_verbs_unregister(device->arena);
    bkv_verbs_close(device->device);
    pthread_mutex_destroy(&device->lock);
}

static void register_arena(bkv_peer_device_t *device) {
    void *memory;
    uint64_t bytes, since_ms = bkv_now_ms();
    bkv_store_memory(device->store, &memory, &bytes);
    if (bkv_verbs_register(device->device, memory, bytes, BKV_VERBS_READ, &device->arena, &device->refused) != BKV_OK) {
        bkv_log(BKV_LOG_WARN, 0, "cluster: records of other daemons come without RDMA: %s", device->refused.message);
        return;
    }
    bkv_log(BKV_LOG_INFO, 0, "cluster: the arena can be read by RDMA through %s (registered in %llu ms)", device->device->name,
            (unsigned long long)(bkv_now_ms() - since_ms));
}

bkv_status_t bkv_peer_device_arena(bkv_peer_device_t *device, struct ibv_mr **arena, bkv_error_t *err) {
    pthread_mutex_lock(&device->lock);
    if (device->arena == NULL && device->refused.status == BKV_OK) {
        register_arena(device);
    }
    *arena = device->arena;
    bkv_status_t status = *arena != NULL ? BKV_OK : bkv_fail(err, device->refused.status, "%s", device->refused.message);
    pthread_mutex_unlock(&device->lock);
    return status;
}
