// shm.c - windows of host memory: a memfd of ours for each session, sealed against any change of its size and mapped here for
// the session's life. The client takes the descriptor from the fd socket.
//
// The client may write to its window at any time, also while we read or write it. Payloads are therefore copied once and only
// the copy is looked at (bkv_ingest_write); a record is summed where it lies in the arena, never in the window
// (bkv_delivery_copy). Whatever the client does to its window, it harms only itself.
#include "daemon/transport/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define WINDOW_UNIT UINT64_C(65536) // windows are multiples of this
#define SMALL_BYTES (512 << 10)     // up to here a copy takes less time than handing it to another thread is worth

typedef struct shm {
    bkv_transports_t *transports;
    uint64_t limit;        // of one window
    uint64_t total;        // of all together
    _Atomic uint64_t used; // of total
} shm_t;

typedef struct window {
    int fd;
    uint8_t *memory;
    uint64_t bytes;
} window_t;

static bkv_status_t shm_open_transport(bkv_transports_t *transports, void **self, bkv_error_t *err) {
    const bkv_transports_config_t *config = bkv_transports_config_of(transports);
    if (config->shm_bytes < WINDOW_UNIT || config->shm_window < WINDOW_UNIT) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "turned off (transport.shm, transport.shm_window)");
    }
    shm_t *shm = calloc(1, sizeof(*shm));
    if (shm == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for the transports");
    }
    *shm = (shm_t){.transports = transports, .limit = config->shm_window, .total = config->shm_bytes};
    *self = shm;
    return BKV_OK;
}

static void shm_close(void *self) {
    free(self);
}

// ---- windows ----

static void give_back(shm_t *shm, uint64_t bytes) {
    atomic_fetch_sub(&shm->used, bytes);
    bkv_transports_count_window(shm->transports, -(int64_t)bytes);
}

// As much of `wanted` as there is, in whole units; 0: not even one.
static uint64_t charge(shm_t *shm, uint64_t wanted) {
    uint64_t units = wanted / WINDOW_UNIT + (wanted % WINDOW_UNIT != 0), used = atomic_load(&shm->used), bytes;
    units = units < shm->limit / WINDOW_UNIT ? units : shm->limit / WINDOW_UNIT;
    do {
        uint64_t rest = (shm->total - used) / WINDOW_UNIT;
        bytes = (units < rest ? units : rest) * WINDOW_UNIT;
    } while (!atomic_compare_exchange_weak(&shm->used, &used, used + bytes));
    bkv_transports_count_window(shm->transports, (int64_t)bytes);
    return bytes;
}

static void window_destroy(window_t *window) {
    if (window->memory != NULL) {
        munmap(window->memory, window->bytes);
    }
    if (window->fd >= 0) {
        close(window->fd);
    }
    free(window);
}

// Neither end can change its size afterwards: a mapped page never goes away, so that no access of ours can fault.
static bkv_status_t make_memory(window_t *window, bkv_error_t *err) {
    window->fd = memfd_create("balancekv-window", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (window->fd < 0 || ftruncate(window->fd, (off_t)window->bytes) != 0 ||
        fcntl(window->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "shm.bytes: no memory for a window of %llu: %s",
                        (unsigned long long)window->bytes, strerror(errno));
    }
    void *memory = mmap(NULL, window->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, window->fd, 0);
    if (memory == MAP_FAILED) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "shm.bytes: no room to map a window of %llu: %s",
                        (unsigned long long)window->bytes, strerror(errno));
    }
    madvise(memory, window->bytes, MADV_HUGEPAGE); // fewer, cheaper faults; a system without them is fine too
    window->memory = memory;
    return BKV_OK;
}

static bkv_status_t shm_attach(void *self, const bkv_attach_args_t *args, bkv_attach_result_t *result, void **state,
                               bkv_error_t *err) {
    shm_t *shm = self;
    if (args->bytes < WINDOW_UNIT) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "shm.bytes: %llu is less than %llu", (unsigned long long)args->bytes,
                        (unsigned long long)WINDOW_UNIT);
    }
    uint64_t bytes = charge(shm, args->bytes);
    if (bytes == 0) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "shm.bytes: all %llu bytes are shared already (transport.shm)",
                        (unsigned long long)shm->total);
    }
    window_t *window = malloc(sizeof(*window));
    if (window == NULL) {
        give_back(shm, bytes);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a session");
    }
    *window = (window_t){.fd = -1, .bytes = bytes};
    bkv_status_t status = make_memory(window, err);
    if (status != BKV_OK) {
        window_destroy(window);
        give_back(shm, bytes);
        return status;
    }
    result->bytes = bytes;
    *state = window;
    return BKV_OK;
}

static void shm_detach(void *self, void *state) {
    window_t *window = state;
    uint64_t bytes = window->bytes;
    window_destroy(window);
    give_back(self, bytes);
}

static bkv_status_t shm_take_fd(void *self, void *state, int *fd, uint64_t *bytes, bkv_error_t *err) {
    (void)self, (void)err;
    const window_t *window = state;
    *fd = window->fd;
    *bytes = window->bytes;
    return BKV_OK;
}

// ---- fetch ----

typedef struct fetch {
    const uint8_t *from;
    bkv_ingest_done_t done;
    void *user;
} fetch_t;

static bkv_status_t read_window(void *source, bkv_ingest_t *ingest, bkv_error_t *err) {
    const fetch_t *fetch = source;
    return bkv_ingest_write(ingest, fetch->from, bkv_ingest_bytes(ingest), err);
}

static void on_committed(void *user, const bkv_error_t *error, const bkv_ingest_result_t *result) {
    const fetch_t fetch = *(fetch_t *)user;
    free(user);
    fetch.done(fetch.user, error, result);
}

// Copies on this thread; a raw block is published before this returns. After BUSY the same again: the bytes are here then.
static bkv_status_t fetch_now(const uint8_t *from, bkv_ingest_t *ingest, bkv_ingest_done_t done, void *user, bkv_error_t *err) {
    bkv_status_t status =
        bkv_ingest_missing(ingest) == 0 ? BKV_OK : bkv_ingest_write(ingest, from, bkv_ingest_bytes(ingest), err);
    return status == BKV_OK ? bkv_ingest_commit(ingest, done, user, err) : status;
}

static bkv_status_t shm_fetch(void *self, void *state, const bkv_place_t *place, bkv_ingest_t *ingest, bkv_ingest_done_t done,
                              void *user, bkv_error_t *err) {
    (void)self;
    const window_t *window = state;
    if (bkv_ingest_bytes(ingest) <= SMALL_BYTES) {
        return fetch_now(window->memory + place->offset, ingest, done, user, err);
    }
    fetch_t *fetch = malloc(sizeof(*fetch));
    if (fetch == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a transfer");
    }
    *fetch = (fetch_t){.from = window->memory + place->offset, .done = done, .user = user};
    bkv_status_t status = bkv_ingest_commit_from(ingest, read_window, fetch, on_committed, fetch, err);
    if (status != BKV_OK) {
        free(fetch);
    }
    return status;
}

// ---- deliver ----

typedef struct deliver {
    bkv_job_t job; // first: the pool knows only this
    bkv_pipeline_t *pipeline;
    const bkv_delivery_t *delivery;
    uint8_t *to;
    bkv_delivered_t done;
    void *user;
} deliver_t;

static void deliver_now(const deliver_t *deliver) {
    bkv_error_t error = {.status = BKV_OK};
    bkv_delivery_copy(deliver->pipeline, deliver->delivery, deliver->to, &error);
    deliver->done(deliver->user, &error);
}

static void deliver_run(bkv_job_t *job, bkv_scratch_t *scratch) {
    (void)scratch;
    deliver_now((deliver_t *)job);
    free(job);
}

static void deliver_cancel(bkv_job_t *job) {
    deliver_t *deliver = (deliver_t *)job;
    bkv_error_t error;
    bkv_fail(&error, BKV_CANCELLED, "the daemon stopped before the record was copied");
    deliver->done(deliver->user, &error);
    free(deliver);
}

static bkv_status_t shm_deliver(void *self, void *state, const bkv_place_t *place, const bkv_delivery_t *delivery,
                                bkv_delivered_t done, void *user, bkv_error_t *err) {
    const shm_t *shm = self;
    const window_t *window = state;
    const deliver_t now = {.job = {.run = deliver_run, .cancel = deliver_cancel},
                           .pipeline = bkv_transports_config_of(shm->transports)->pipeline,
                           .delivery = delivery,
                           .to = window->memory + place->offset,
                           .done = done,
                           .user = user};
    if (delivery->length <= SMALL_BYTES) {
        deliver_now(&now);
        return BKV_OK;
    }
    deliver_t *later = malloc(sizeof(*later));
    if (later == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a transfer");
    }
    *later = now;
    bkv_status_t status = bkv_pipeline_submit(now.pipeline, &later->job, err);
    if (status != BKV_OK) {
        free(later);
    }
    return status;
}

const bkv_transport_ops_t bkv_transport_shm = {
    .name = "shm",
    .local = true,
    .open = shm_open_transport,
    .close = shm_close,
    .attach = shm_attach,
    .detach = shm_detach,
    .fetch = shm_fetch,
    .deliver = shm_deliver,
    .take_fd = shm_take_fd,
};
