// verbs.c - windows of clients on other hosts, by RDMA: a payload is READ from the client's window straight into where the
// pipeline wants it, a record WRITTEN to it from where it lies in the arena. The client's NIC does its part alone; the client
// never writes to memory of ours, and gets no key for it.
//
// The arena and the staging memory are registered once, when the daemon starts. Each session is one reliable connection of its
// own: whatever its client does, or suffers, breaks that one and no other. How transfers share the device: work.c.
#include "daemon/transport/verbs/verbs.h"

#include "daemon/observe/log.h"

#include <errno.h>
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>

#define SMALL_RECORD 262144 // up to here summing takes less time than handing it to another thread is worth

// ---- the transport ----

static void verbs_close(void *self) {
    bkv_verbs_t *verbs = self;
    bkv_verbs_watch_stop(verbs);
    if (verbs->completions != NULL) {
        ibv_destroy_cq(verbs->completions);
    }
    if (verbs->channel != NULL) {
        ibv_destroy_comp_channel(verbs->channel);
    }
    bkv_verbs_unregister(verbs->staging);
    bkv_verbs_unregister(verbs->arena);
    bkv_verbs_close(verbs->device);
    bkv_verbs_work_deinit(verbs);
    pthread_mutex_destroy(&verbs->lock);
    free(verbs);
}

static uint32_t least(uint64_t a, uint64_t b) {
    return (uint32_t)(a < b ? a : b);
}

static bkv_status_t choose(const bkv_transports_config_t *config, bkv_verbs_choice_t *choice, bkv_error_t *err) {
    *choice = (bkv_verbs_choice_t){.port = config->verbs_port, .gid = config->verbs_gid};
    if (strcmp(config->verbs_device, "auto") == 0) {
        return BKV_OK;
    }
    if (strlen(config->verbs_device) >= sizeof(choice->device)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "a device's name has at most %d characters", BKV_VERBS_NAME - 1);
    }
    memcpy(choice->device, config->verbs_device, strlen(config->verbs_device));
    return BKV_OK;
}

static bkv_status_t register_memory(bkv_verbs_t *verbs, bkv_error_t *err) {
    const bkv_transports_config_t *config = bkv_transports_config_of(verbs->transports);
    void *memory;
    uint64_t bytes;
    bkv_store_memory(config->store, &memory, &bytes);
    bkv_status_t status = bkv_verbs_register(verbs->device, memory, bytes, false, &verbs->arena, err);
    if (status == BKV_OK) {
        bkv_pipeline_staging(config->pipeline, &memory, &bytes);
        status = bkv_verbs_register(verbs->device, memory, bytes, false, &verbs->staging, err);
    }
    return status;
}

// One completion queue for all links, with room for all that may be posted at once, and for as much that comes late: some
// devices may leave completions of a queue pair behind that has been destroyed.
static bkv_status_t make_queue(bkv_verbs_t *verbs, bkv_error_t *err) {
    const bkv_verbs_device_t *device = verbs->device;
    verbs->max_sessions = least(bkv_transports_config_of(verbs->transports)->verbs_sessions, device->links);
    verbs->link_work = least(BKV_VERBS_LINK_WORK, device->link_work);
    verbs->piece = least(BKV_VERBS_PIECE, device->port.message_bytes);
    uint32_t work = least((uint64_t)verbs->max_sessions * verbs->link_work, BKV_VERBS_WORK);
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

static bkv_status_t prepare(bkv_verbs_t *verbs, bkv_error_t *err) {
    bkv_verbs_choice_t choice;
    bkv_status_t status = choose(bkv_transports_config_of(verbs->transports), &choice, err);
    if (status == BKV_OK) {
        status = bkv_verbs_open(&choice, &verbs->device, err);
    }
    if (status == BKV_OK) {
        status = register_memory(verbs, err);
    }
    if (status == BKV_OK) {
        status = make_queue(verbs, err);
    }
    return status == BKV_OK ? bkv_verbs_watch_start(verbs, err) : status;
}

// A device that was asked for by name must be there; with "auto" it is not to be had then.
static bkv_status_t explain(const bkv_transports_config_t *config, const bkv_verbs_t *verbs, const bkv_error_t *cause,
                            bkv_error_t *err) {
    if (strcmp(config->verbs_device, "auto") != 0) {
        bkv_status_t status = cause->status == BKV_UNIMPLEMENTED ? BKV_FAILED_PRECONDITION : cause->status;
        return bkv_fail(err, status, "transport.verbs: %.230s", cause->message);
    }
    if (verbs->device != NULL) {
        bkv_log(BKV_LOG_WARN, 0, "verbs: there is a device, but no use of it: %s", cause->message);
    }
    return bkv_fail(err, BKV_UNIMPLEMENTED, "%s", cause->message);
}

static bkv_status_t verbs_open(bkv_transports_t *transports, void **self, bkv_error_t *err) {
    const bkv_transports_config_t *config = bkv_transports_config_of(transports);
    if (config->verbs_device == NULL || strcmp(config->verbs_device, "off") == 0 || config->verbs_sessions == 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "turned off (transport.verbs, transport.verbs_sessions)");
    }
    bkv_verbs_t *verbs = calloc(1, sizeof(*verbs));
    if (verbs == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for the transports");
    }
    verbs->transports = transports;
    verbs->wake = -1;
    pthread_mutex_init(&verbs->lock, NULL);
    bkv_error_t cause;
    if (prepare(verbs, &cause) != BKV_OK) {
        bkv_status_t status = explain(config, verbs, &cause, err);
        verbs_close(verbs);
        return status;
    }
    bkv_log(BKV_LOG_INFO, 0, "verbs: %s, port %u, GID index %u; %u sessions at most", verbs->device->name,
            verbs->device->port.number, verbs->device->port.gid_index, verbs->max_sessions);
    *self = verbs;
    return BKV_OK;
}

// ---- sessions ----

static bkv_status_t check_window(const bkv_verbs_end_t *end, bkv_error_t *err) {
    if (end->bytes == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs.bytes: 0 are no window");
    }
    if (end->reads == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs.reads: 0, but payloads are taken by RDMA READ");
    }
    return BKV_OK;
}

static bkv_status_t admit(bkv_verbs_t *verbs, bkv_error_t *err) {
    if (atomic_load(&verbs->gone)) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "verbs: %s has failed and waits for a restart of the daemon",
                        verbs->device->name);
    }
    pthread_mutex_lock(&verbs->lock);
    bool full = verbs->session_count >= verbs->max_sessions;
    verbs->session_count += full ? 0 : 1;
    pthread_mutex_unlock(&verbs->lock);
    return full ? bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%u clients have RDMA connections already (transport.verbs_sessions)",
                           verbs->max_sessions)
                : BKV_OK;
}

static void leave(bkv_verbs_t *verbs) {
    pthread_mutex_lock(&verbs->lock);
    verbs->session_count--;
    pthread_mutex_unlock(&verbs->lock);
}

static bkv_status_t make_link(bkv_verbs_session_t *session, bkv_error_t *err) {
    bkv_verbs_t *verbs = session->verbs;
    bkv_status_t status = bkv_verbs_link_init(&session->link, verbs->device, verbs->completions, verbs->link_work, false, err);
    if (status == BKV_OK) {
        status = bkv_verbs_link_connect(&session->link, &session->window, err);
    }
    if (status != BKV_OK) {
        bkv_verbs_link_deinit(&session->link);
    }
    return status;
}

static void enlist(bkv_verbs_session_t *session) {
    bkv_verbs_t *verbs = session->verbs;
    pthread_mutex_lock(&verbs->lock);
    session->next = verbs->sessions;
    session->prev = &verbs->sessions;
    if (session->next != NULL) {
        session->next->prev = &session->next;
    }
    verbs->sessions = session;
    pthread_mutex_unlock(&verbs->lock);
}

static bkv_status_t verbs_attach(void *self, const bkv_attach_args_t *args, bkv_attach_result_t *result, void **state,
                                 bkv_error_t *err) {
    bkv_verbs_t *verbs = self;
    bkv_status_t status = check_window(&args->verbs, err);
    if (status == BKV_OK) {
        status = admit(verbs, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    bkv_verbs_session_t *session = calloc(1, sizeof(*session));
    if (session == NULL) {
        leave(verbs);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a session");
    }
    session->verbs = verbs;
    session->window = args->verbs;
    bkv_verbs_list_init(&session->transfers);
    status = make_link(session, err);
    if (status != BKV_OK) {
        free(session);
        leave(verbs);
        return status;
    }
    bkv_verbs_link_describe(&session->link, NULL, &result->verbs);
    result->bytes = args->verbs.bytes;
    enlist(session);
    *state = session;
    return BKV_OK;
}

static void verbs_end(void *self, void *state) {
    bkv_verbs_t *verbs = self;
    bkv_verbs_session_t *session = state;
    pthread_mutex_lock(&verbs->lock);
    session->until_ms = bkv_transports_config_of(verbs->transports)->now_ms() + BKV_VERBS_END_MS;
    pthread_mutex_unlock(&verbs->lock);
}

static void verbs_detach(void *self, void *state) {
    bkv_verbs_t *verbs = self;
    bkv_verbs_session_t *session = state;
    pthread_mutex_lock(&verbs->lock);
    *session->prev = session->next;
    if (session->next != NULL) {
        session->next->prev = session->prev;
    }
    pthread_mutex_unlock(&verbs->lock);
    bkv_verbs_link_deinit(&session->link);
    free(session);
    leave(verbs);
}

// What it reads of the session is only looked at here: a link that breaks right now is noticed with the next transfer.
static bool verbs_alive(void *self, void *state) {
    bkv_verbs_t *verbs = self;
    if (state == NULL) {
        return !atomic_load(&verbs->gone) && !atomic_load(&verbs->port_down);
    }
    bkv_verbs_session_t *session = state;
    pthread_mutex_lock(&verbs->lock);
    bool alive = session->broken.status == BKV_OK;
    pthread_mutex_unlock(&verbs->lock);
    return alive;
}

// ---- fetch ----

typedef struct fetch {
    bkv_verbs_transfer_t transfer; // first: work.c knows only this
    bkv_ingest_t *ingest;
    bkv_ingest_done_t done;
    void *user;
} fetch_t;

static void give_up(const fetch_t *fetch, const bkv_error_t *error) {
    bkv_ingest_abort(fetch->ingest);
    fetch->done(fetch->user, error, &(bkv_ingest_result_t){0});
}

static void on_fetched(bkv_verbs_transfer_t *transfer, const bkv_error_t *error) {
    const fetch_t fetch = *(fetch_t *)transfer;
    free(transfer);
    if (error->status != BKV_OK) {
        give_up(&fetch, error);
        return;
    }
    bkv_error_t cause;
    bkv_ingest_filled(fetch.ingest);
    if (bkv_ingest_commit(fetch.ingest, fetch.done, fetch.user, &cause) != BKV_OK) {
        give_up(&fetch, &cause);
    }
}

// Registered memory is the arena's and the staging memory's.
static bkv_status_t local_key(const bkv_verbs_t *verbs, const void *memory, uint64_t bytes, uint32_t *key, bkv_error_t *err) {
    const struct ibv_mr *regions[] = {verbs->arena, verbs->staging};
    for (size_t i = 0; i < sizeof(regions) / sizeof(regions[0]); i++) {
        uintptr_t first = (uintptr_t)regions[i]->addr, at = (uintptr_t)memory;
        if (at >= first && at - first <= regions[i]->length && bytes <= regions[i]->length - (at - first)) {
            *key = regions[i]->lkey;
            return BKV_OK;
        }
    }
    return bkv_fail(err, BKV_INTERNAL, "memory that no RDMA device knows");
}

static bkv_status_t begin_fetch(bkv_verbs_session_t *session, const fetch_t *wanted, bkv_error_t *err) {
    fetch_t *fetch = malloc(sizeof(*fetch));
    if (fetch == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a transfer");
    }
    *fetch = *wanted;
    bkv_status_t status = bkv_verbs_begin(session, &fetch->transfer, err);
    if (status != BKV_OK) {
        free(fetch);
    }
    return status;
}

static bkv_status_t verbs_fetch(void *self, void *state, const bkv_place_t *place, bkv_ingest_t *ingest, bkv_ingest_done_t done,
                                void *user, bkv_error_t *err) {
    const bkv_verbs_t *verbs = self;
    uint8_t *memory = bkv_ingest_memory(ingest);
    if (memory == NULL) { // the key is resident
        bkv_ingest_filled(ingest);
        return bkv_ingest_commit(ingest, done, user, err);
    }
    fetch_t fetch = {
        .transfer =
            {.read = true, .local = memory, .offset = place->offset, .bytes = bkv_ingest_bytes(ingest), .over = on_fetched},
        .ingest = ingest,
        .done = done,
        .user = user,
    };
    bkv_status_t status = local_key(verbs, memory, fetch.transfer.bytes, &fetch.transfer.local_key, err);
    return status == BKV_OK ? begin_fetch(state, &fetch, err) : status;
}

// ---- deliver ----

typedef struct deliver {
    bkv_job_t job; // first: the pool knows only this
    bkv_verbs_transfer_t transfer;
    bkv_verbs_session_t *session;
    const bkv_delivery_t *delivery;
    bkv_delivered_t done;
    void *user;
} deliver_t;

static deliver_t *deliver_of(bkv_verbs_transfer_t *transfer) {
    return (deliver_t *)(void *)((uint8_t *)transfer - offsetof(deliver_t, transfer));
}

static void deliver_done(deliver_t *deliver, const bkv_error_t *error) {
    bkv_delivered_t done = deliver->done;
    void *user = deliver->user;
    free(deliver);
    done(user, error);
}

static void on_delivered(bkv_verbs_transfer_t *transfer, const bkv_error_t *error) {
    deliver_done(deliver_of(transfer), error);
}

// Sums the record where it lies, then lets the NIC take it.
static bkv_status_t verify_and_begin(deliver_t *deliver, bkv_error_t *err) {
    const bkv_transports_config_t *config = bkv_transports_config_of(deliver->session->verbs->transports);
    bkv_status_t status = bkv_delivery_verify(config->pipeline, deliver->delivery, err);
    return status == BKV_OK ? bkv_verbs_begin(deliver->session, &deliver->transfer, err) : status;
}

static void deliver_run(bkv_job_t *job, bkv_scratch_t *scratch) {
    (void)scratch;
    bkv_error_t error;
    if (verify_and_begin((deliver_t *)job, &error) != BKV_OK) {
        deliver_done((deliver_t *)job, &error);
    }
}

static void deliver_cancel(bkv_job_t *job) {
    bkv_error_t error;
    bkv_fail(&error, BKV_CANCELLED, "the daemon stopped before the record was verified");
    deliver_done((deliver_t *)job, &error);
}

static bkv_status_t begin_deliver(deliver_t *deliver, bkv_error_t *err) {
    const bkv_delivery_t *delivery = deliver->delivery;
    const bkv_verbs_t *verbs = deliver->session->verbs;
    bkv_status_t status = local_key(verbs, delivery->data, delivery->length, &deliver->transfer.local_key, err);
    if (status != BKV_OK) {
        return status;
    }
    return delivery->length <= SMALL_RECORD
               ? verify_and_begin(deliver, err)
               : bkv_pipeline_submit(bkv_transports_config_of(verbs->transports)->pipeline, &deliver->job, err);
}

static bkv_status_t verbs_deliver(void *self, void *state, const bkv_place_t *place, const bkv_delivery_t *delivery,
                                  bkv_delivered_t done, void *user, bkv_error_t *err) {
    (void)self;
    deliver_t *deliver = malloc(sizeof(*deliver));
    if (deliver == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a transfer");
    }
    *deliver = (deliver_t){
        .job = {.run = deliver_run, .cancel = deliver_cancel},
        // what is registered is only ever read for a WRITE
        .transfer = {.local = (uint8_t *)(uintptr_t)delivery->data,
                     .offset = place->offset,
                     .bytes = delivery->length,
                     .over = on_delivered},
        .session = state,
        .delivery = delivery,
        .done = done,
        .user = user,
    };
    bkv_status_t status = begin_deliver(deliver, err);
    if (status != BKV_OK) {
        free(deliver);
    }
    return status;
}

const bkv_transport_ops_t bkv_transport_verbs = {
    .name = "verbs",
    .open = verbs_open,
    .close = verbs_close,
    .attach = verbs_attach,
    .end = verbs_end,
    .detach = verbs_detach,
    .alive = verbs_alive,
    .fetch = verbs_fetch,
    .deliver = verbs_deliver,
};
