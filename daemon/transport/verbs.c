// verbs.c - windows of clients on other hosts, by RDMA: a payload is READ from the client's window straight into where the
// pipeline wants it, a record WRITTEN to it from where it lies in the arena. The client's NIC does its part alone; the client
// never writes to memory of ours, and gets no key for it.
//
// The arena and the staging memory are registered once, when the daemon starts. Each session is one reliable connection of its
// own. How transfers share the device, and what becomes of broken connections, is daemon/verbs/'s.
#include "daemon/verbs/verbs.h"

#include "daemon/observe/log.h"
#include "daemon/transport/internal.h"

#include <errno.h>
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>

#define SMALL_RECORD 262144 // up to here summing takes less time than handing it to another thread is worth
#define END_MS       2000   // so long may an ended session's transfers take

typedef struct transport {
    bkv_transports_t *transports;
    bkv_verbs_device_t *device;
    struct ibv_mr *arena, *staging;
    bkv_verbs_t *verbs;
} transport_t;

typedef struct session {
    bkv_verbs_path_t path;
    transport_t *transport;
} session_t;

// ---- the transport ----

static void verbs_close(void *self) {
    transport_t *transport = self;
    bkv_verbs_destroy(transport->verbs);
    bkv_verbs_unregister(transport->staging);
    bkv_verbs_unregister(transport->arena);
    bkv_verbs_close(transport->device);
    free(transport);
}

static bkv_status_t register_memory(transport_t *transport, bkv_error_t *err) {
    const bkv_transports_config_t *config = bkv_transports_config_of(transport->transports);
    void *memory;
    uint64_t bytes;
    bkv_store_memory(config->store, &memory, &bytes);
    bkv_status_t status = bkv_verbs_register(transport->device, memory, bytes, BKV_VERBS_OWN, &transport->arena, err);
    if (status == BKV_OK) {
        bkv_pipeline_staging(config->pipeline, &memory, &bytes);
        status = bkv_verbs_register(transport->device, memory, bytes, BKV_VERBS_OWN, &transport->staging, err);
    }
    return status;
}

static bkv_status_t begin_use(transport_t *transport, bkv_error_t *err) {
    const bkv_transports_config_t *config = bkv_transports_config_of(transport->transports);
    const bkv_verbs_config_t verbs = {
        .device = transport->device,
        .max_paths = config->verbs_sessions,
        .words = {.subject = "place.session: its ",
                  .remedy = "; Attach again",
                  .limit = "transport.verbs_sessions",
                  .otherwise = "clients go inline"},
        .thread_name = "bkv-verbs",
        .now_ms = config->now_ms,
    };
    return bkv_verbs_create(&verbs, &transport->verbs, err);
}

static bkv_status_t prepare(transport_t *transport, bkv_error_t *err) {
    const bkv_transports_config_t *config = bkv_transports_config_of(transport->transports);
    bkv_verbs_choice_t choice;
    bkv_status_t status = bkv_verbs_choice_set(&choice, config->verbs_device, config->verbs_port, config->verbs_gid, err);
    if (status == BKV_OK) {
        status = bkv_verbs_open(&choice, &transport->device, err);
    }
    if (status == BKV_OK) {
        status = register_memory(transport, err);
    }
    return status == BKV_OK ? begin_use(transport, err) : status;
}

// A device that was asked for by name must be there; with "auto" it is not to be had then.
static bkv_status_t explain(const bkv_transports_config_t *config, const transport_t *transport, const bkv_error_t *cause,
                            bkv_error_t *err) {
    if (strcmp(config->verbs_device, "auto") != 0) {
        bkv_status_t status = cause->status == BKV_UNIMPLEMENTED ? BKV_FAILED_PRECONDITION : cause->status;
        return bkv_fail(err, status, "transport.verbs: %.230s", cause->message);
    }
    if (transport->device != NULL) {
        bkv_log(BKV_LOG_WARN, 0, "verbs: there is a device, but no use of it: %s", cause->message);
    }
    return bkv_fail(err, BKV_UNIMPLEMENTED, "%s", cause->message);
}

static bkv_status_t verbs_open(bkv_transports_t *transports, void **self, bkv_error_t *err) {
    const bkv_transports_config_t *config = bkv_transports_config_of(transports);
    if (config->verbs_device == NULL || strcmp(config->verbs_device, "off") == 0 || config->verbs_sessions == 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "turned off (transport.verbs, transport.verbs_sessions)");
    }
    transport_t *transport = calloc(1, sizeof(*transport));
    if (transport == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for the transports");
    }
    transport->transports = transports;
    bkv_error_t cause;
    if (prepare(transport, &cause) != BKV_OK) {
        bkv_status_t status = explain(config, transport, &cause, err);
        verbs_close(transport);
        return status;
    }
    const bkv_verbs_device_t *device = transport->device;
    bkv_log(BKV_LOG_INFO, 0, "verbs: %s, port %u, GID index %u; %u sessions at most", device->name, device->port.number,
            device->port.gid_index, bkv_verbs_max_paths(transport->verbs));
    *self = transport;
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

static bkv_status_t make_path(session_t *session, const bkv_verbs_end_t *window, bkv_error_t *err) {
    bkv_status_t status = bkv_verbs_path_init(&session->path, session->transport->verbs, err);
    if (status != BKV_OK) {
        return status;
    }
    status = bkv_verbs_path_connect(&session->path, window, err);
    if (status != BKV_OK) {
        bkv_verbs_path_deinit(&session->path);
    }
    return status;
}

static bkv_status_t verbs_attach(void *self, const bkv_attach_args_t *args, bkv_attach_result_t *result, void **state,
                                 bkv_error_t *err) {
    bkv_status_t status = check_window(&args->verbs, err);
    if (status != BKV_OK) {
        return status;
    }
    session_t *session = calloc(1, sizeof(*session));
    if (session == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a session");
    }
    session->transport = self;
    status = make_path(session, &args->verbs, err);
    if (status != BKV_OK) {
        free(session);
        return status;
    }
    bkv_verbs_link_describe(&session->path.link, NULL, &result->verbs);
    result->bytes = args->verbs.bytes;
    *state = session;
    return BKV_OK;
}

static void verbs_end(void *self, void *state) {
    (void)self;
    bkv_verbs_path_end(&((session_t *)state)->path, END_MS);
}

static void verbs_detach(void *self, void *state) {
    (void)self;
    session_t *session = state;
    bkv_verbs_path_deinit(&session->path);
    free(session);
}

static bool verbs_alive(void *self, void *state) {
    const transport_t *transport = self;
    return state != NULL ? bkv_verbs_path_alive(&((const session_t *)state)->path) : bkv_verbs_usable(transport->verbs);
}

// ---- fetch ----

typedef struct fetch {
    bkv_verbs_transfer_t transfer; // first: it is all that comes back
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
static bkv_status_t local_key(const transport_t *transport, const void *memory, uint64_t bytes, uint32_t *key,
                              bkv_error_t *err) {
    const struct ibv_mr *regions[] = {transport->arena, transport->staging};
    for (size_t i = 0; i < sizeof(regions) / sizeof(regions[0]); i++) {
        uintptr_t first = (uintptr_t)regions[i]->addr, at = (uintptr_t)memory;
        if (at >= first && at - first <= regions[i]->length && bytes <= regions[i]->length - (at - first)) {
            *key = regions[i]->lkey;
            return BKV_OK;
        }
    }
    return bkv_fail(err, BKV_INTERNAL, "memory that no RDMA device knows");
}

static bkv_status_t begin_fetch(session_t *session, const fetch_t *wanted, bkv_error_t *err) {
    fetch_t *fetch = malloc(sizeof(*fetch));
    if (fetch == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a transfer");
    }
    *fetch = *wanted;
    bkv_status_t status = bkv_verbs_begin(&session->path, &fetch->transfer, err);
    if (status != BKV_OK) {
        free(fetch);
    }
    return status;
}

static bkv_status_t verbs_fetch(void *self, void *state, const bkv_place_t *place, bkv_ingest_t *ingest, bkv_ingest_done_t done,
                                void *user, bkv_error_t *err) {
    const transport_t *transport = self;
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
    bkv_status_t status = local_key(transport, memory, fetch.transfer.bytes, &fetch.transfer.local_key, err);
    return status == BKV_OK ? begin_fetch(state, &fetch, err) : status;
}

// ---- deliver ----

typedef struct deliver {
    bkv_job_t job; // first: the pool knows only this
    bkv_verbs_transfer_t transfer;
    session_t *session;
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
    const bkv_transports_config_t *config = bkv_transports_config_of(deliver->session->transport->transports);
    bkv_status_t status = bkv_delivery_verify(config->pipeline, deliver->delivery, err);
    return status == BKV_OK ? bkv_verbs_begin(&deliver->session->path, &deliver->transfer, err) : status;
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
    const transport_t *transport = deliver->session->transport;
    bkv_status_t status = local_key(transport, delivery->data, delivery->length, &deliver->transfer.local_key, err);
    if (status != BKV_OK) {
        return status;
    }
    return delivery->length <= SMALL_RECORD
               ? verify_and_begin(deliver, err)
               : bkv_pipeline_submit(bkv_transports_config_of(transport->transports)->pipeline, &deliver->job, err);
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
