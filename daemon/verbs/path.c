// path.c - the start and the end of the device's use, and of each path.
#include "daemon/verbs/internal.h"

#include <errno.h>
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>

static uint32_t least(uint64_t a, uint64_t b) {
    return (uint32_t)(a < b ? a : b);
}

// ---- all ----

void bkv_verbs_destroy(bkv_verbs_t *verbs) {
    if (verbs == NULL) {
        return;
    }
    bkv_verbs_watch_stop(verbs);
    if (verbs->completions != NULL) {
        ibv_destroy_cq(verbs->completions);
    }
    if (verbs->channel != NULL) {
        ibv_destroy_comp_channel(verbs->channel);
    }
    bkv_verbs_work_deinit(verbs);
    pthread_mutex_destroy(&verbs->lock);
    free(verbs);
}

// One completion queue for all paths, with room for all that may be posted at once, and for as much that comes late: some
// devices may leave completions of a queue pair behind that has been destroyed.
static bkv_status_t make_queue(bkv_verbs_t *verbs, bkv_error_t *err) {
    const bkv_verbs_device_t *device = verbs->config.device;
    verbs->max_paths = least(verbs->config.max_paths, device->links);
    verbs->link_work = least(BKV_VERBS_LINK_WORK, device->link_work);
    verbs->piece = least(BKV_VERBS_PIECE, device->port.message_bytes);
    uint32_t work = least((uint64_t)verbs->max_paths * verbs->link_work, BKV_VERBS_WORK);
    work = least(work, device->completions);
    if (work == 0 || verbs->piece == 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "%s allows of no work requests", device->name);
    }
    bkv_status_t status = bkv_verbs_work_init(verbs, work, err);
    if (status != BKV_OK) {
        return status;
    }
    verbs->channel = ibv_create_comp_channel(device->context);
    if (verbs->channel != NULL) {
        int room = (int)least(2 * (uint64_t)work, device->completions);
        verbs->completions = ibv_create_cq(device->context, room, NULL, verbs->channel, 0);
    }
    if (verbs->completions == NULL || ibv_req_notify_cq(verbs->completions, 0) != 0) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%s has no completion queue for %u requests: %s", device->name, work,
                        strerror(errno));
    }
    return BKV_OK;
}

bkv_status_t bkv_verbs_create(const bkv_verbs_config_t *config, bkv_verbs_t **verbs_out, bkv_error_t *err) {
    bkv_verbs_t *verbs = calloc(1, sizeof(*verbs));
    if (verbs == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for %s", config->device->name);
    }
    verbs->config = *config;
    verbs->wake = -1;
    pthread_mutex_init(&verbs->lock, NULL);
    bkv_status_t status = make_queue(verbs, err);
    if (status == BKV_OK) {
        status = bkv_verbs_watch_start(verbs, err);
    }
    if (status != BKV_OK) {
        bkv_verbs_destroy(verbs);
        return status;
    }
    *verbs_out = verbs;
    return BKV_OK;
}

bool bkv_verbs_usable(const bkv_verbs_t *verbs) {
    return !atomic_load(&verbs->gone) && !atomic_load(&verbs->port_down);
}

uint32_t bkv_verbs_max_paths(const bkv_verbs_t *verbs) {
    return verbs->max_paths;
}

// ---- a path ----

static bkv_status_t admit(bkv_verbs_t *verbs, bkv_error_t *err) {
    if (atomic_load(&verbs->gone)) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "verbs: %s has failed and waits for a restart of the daemon",
                        verbs->config.device->name);
    }
    pthread_mutex_lock(&verbs->lock);
    bool full = verbs->path_count >= verbs->max_paths;
    verbs->path_count += full ? 0 : 1;
    pthread_mutex_unlock(&verbs->lock);
    return full ? bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "there are %u RDMA connections already (%s)", verbs->max_paths,
                           verbs->config.words.limit)
                : BKV_OK;
}

static void leave(bkv_verbs_t *verbs) {
    pthread_mutex_lock(&verbs->lock);
    verbs->path_count--;
    pthread_mutex_unlock(&verbs->lock);
}

bkv_status_t bkv_verbs_path_init(bkv_verbs_path_t *path, bkv_verbs_t *verbs, bkv_error_t *err) {
    bkv_status_t status = admit(verbs, err);
    if (status != BKV_OK) {
        return status;
    }
    *path = (bkv_verbs_path_t){.verbs = verbs};
    bkv_verbs_list_init(&path->transfers);
    status = bkv_verbs_link_init(&path->link, verbs->config.device, verbs->completions, verbs->link_work, BKV_VERBS_OWN, err);
    if (status != BKV_OK) {
        leave(verbs);
    }
    return status;
}

bkv_status_t bkv_verbs_path_connect(bkv_verbs_path_t *path, const bkv_verbs_end_t *other, bkv_error_t *err) {
    bkv_status_t status = bkv_verbs_link_connect(&path->link, other, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_verbs_t *verbs = path->verbs;
    path->window = *other;
    pthread_mutex_lock(&verbs->lock);
    path->next = verbs->paths;
    path->prev = &verbs->paths;
    if (path->next != NULL) {
        path->next->prev = &path->next;
    }
    verbs->paths = path;
    pthread_mutex_unlock(&verbs->lock);
    return BKV_OK;
}

void bkv_verbs_path_end(bkv_verbs_path_t *path, uint64_t within_ms) {
    bkv_verbs_t *verbs = path->verbs;
    pthread_mutex_lock(&verbs->lock);
    if (path->until_ms == 0) {
        path->until_ms = verbs->config.now_ms() + within_ms;
    }
    pthread_mutex_unlock(&verbs->lock);
}

bool bkv_verbs_path_alive(const bkv_verbs_path_t *path) {
    bkv_verbs_t *verbs = path->verbs;
    pthread_mutex_lock(&verbs->lock);
    bool alive = path->prev != NULL && path->broken.status == BKV_OK;
    pthread_mutex_unlock(&verbs->lock);
    return alive;
}

void bkv_verbs_path_deinit(bkv_verbs_path_t *path) {
    bkv_verbs_t *verbs = path->verbs;
    pthread_mutex_lock(&verbs->lock);
    if (path->prev != NULL) {
        *path->prev = path->next;
        if (path->next != NULL) {
            path->next->prev = path->prev;
        }
    }
    pthread_mutex_unlock(&verbs->lock);
    bkv_verbs_link_deinit(&path->link);
    leave(verbs);
}
