// sharing.c - see sharing.h.
#include "sharing.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SESSIONS 16
#define TASKS    64

typedef struct task {
    bkv_session_t *session;
    bkv_ingest_t *ingest; // of a fetch
    const bkv_delivery_t *delivery;
    uint64_t offset;
    bkv_ingest_done_t fetched;
    bkv_delivered_t delivered;
    void *user;
} task_t;

struct bkv_session {
    bkv_transports_t *transports;
    bkv_session_id_t id;
    uint8_t *memory; // NULL: the slot is free
    uint64_t bytes;
    uint32_t references;
    bool ended;
};

struct bkv_transports {
    bkv_pipeline_t *pipeline;
    pthread_mutex_t lock; // protects the following
    pthread_cond_t changed;
    struct bkv_session sessions[SESSIONS];
    task_t tasks[TASKS]; // waiting; seen.waiting of them
    sharing_orders_t orders;
    sharing_seen_t seen;
};

bkv_transports_t *sharing_create(bkv_pipeline_t *pipeline) {
    bkv_transports_t *sharing = calloc(1, sizeof(*sharing));
    sharing->pipeline = pipeline;
    pthread_mutex_init(&sharing->lock, NULL);
    pthread_cond_init(&sharing->changed, NULL);
    return sharing;
}

void sharing_destroy(bkv_transports_t *sharing) {
    cr_assert_eq(sharing->seen.waiting, 0);
    for (int i = 0; i < SESSIONS; i++) {
        struct bkv_session *session = &sharing->sessions[i];
        cr_assert_eq(session->references, session->memory != NULL && !session->ended, "session %d", i);
        free(session->memory);
    }
    pthread_cond_destroy(&sharing->changed);
    pthread_mutex_destroy(&sharing->lock);
    free(sharing);
}

void sharing_order(bkv_transports_t *sharing, sharing_orders_t orders) {
    pthread_mutex_lock(&sharing->lock);
    sharing->orders = orders;
    pthread_mutex_unlock(&sharing->lock);
}

sharing_seen_t sharing_look(bkv_transports_t *sharing) {
    pthread_mutex_lock(&sharing->lock);
    sharing_seen_t seen = sharing->seen;
    seen.busy = sharing->orders.busy;
    pthread_mutex_unlock(&sharing->lock);
    return seen;
}

static struct timespec in_five_seconds(void) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 5;
    return until;
}

bool sharing_waits_for(bkv_transports_t *sharing, uint32_t count) {
    struct timespec until = in_five_seconds();
    pthread_mutex_lock(&sharing->lock);
    while (sharing->seen.waiting < count && pthread_cond_timedwait(&sharing->changed, &sharing->lock, &until) == 0) {
    }
    bool reached = sharing->seen.waiting == count;
    pthread_mutex_unlock(&sharing->lock);
    return reached;
}

uint8_t *sharing_memory(bkv_transports_t *sharing, const uint8_t id[BKV_SESSION_BYTES]) {
    bkv_session_t *session;
    bkv_session_id_t name;
    memcpy(name.bytes, id, sizeof(name.bytes));
    cr_assert_eq(bkv_session_find(sharing, &name, &session, NULL), BKV_OK);
    uint8_t *memory = session->memory;
    bkv_session_release(session);
    return memory;
}

uint32_t sharing_sessions(bkv_transports_t *sharing) {
    uint32_t count = 0;
    pthread_mutex_lock(&sharing->lock);
    for (int i = 0; i < SESSIONS; i++) {
        count += sharing->sessions[i].memory != NULL && !sharing->sessions[i].ended;
    }
    pthread_mutex_unlock(&sharing->lock);
    return count;
}

// ---- sessions, as transport.h has them ----

size_t bkv_transports_offer(const bkv_transports_t *transports, bool local, const char **names) {
    (void)transports;
    size_t count = 0;
    if (local) {
        names[count++] = "shm";
    }
    names[count++] = "inline";
    return count;
}

bkv_status_t bkv_session_attach(bkv_transports_t *transports, const bkv_attach_args_t *args, bkv_attach_result_t *result,
                                bkv_error_t *err) {
    *result = (bkv_attach_result_t){.bytes = args->bytes, .idle_ms = 1234, .verbs = {.queue_pair = 7, .reads = 3}};
    if (args->kind == BKV_TRANSPORT_SHM && args->bytes == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "shm.bytes: 0");
    }
    pthread_mutex_lock(&transports->lock);
    transports->seen.attached++;
    transports->seen.args = *args;
    if (args->allocation_count > 0 && args->allocations[0].handle != NULL) {
        memcpy(transports->seen.handle, args->allocations[0].handle, sizeof(transports->seen.handle));
    }
    while (transports->orders.late) {
        pthread_cond_wait(&transports->changed, &transports->lock);
    }
    struct bkv_session *session = transports->sessions;
    while (session->memory != NULL) {
        session++;
    }
    *session = (struct bkv_session){
        .transports = transports, .memory = calloc(1, args->bytes + 1), .bytes = args->bytes, .references = 1};
    memset(session->id.bytes, (int)transports->seen.attached, sizeof(session->id.bytes));
    result->id = session->id;
    pthread_mutex_unlock(&transports->lock);
    return BKV_OK;
}

static struct bkv_session *find(bkv_transports_t *transports, const bkv_session_id_t *id) {
    for (int i = 0; i < SESSIONS; i++) {
        struct bkv_session *session = &transports->sessions[i];
        if (session->memory != NULL && !session->ended && memcmp(&session->id, id, sizeof(*id)) == 0) {
            return session;
        }
    }
    return NULL;
}

bkv_status_t bkv_session_find(bkv_transports_t *transports, const bkv_session_id_t *id, bkv_session_t **session,
                              bkv_error_t *err) {
    pthread_mutex_lock(&transports->lock);
    *session = find(transports, id);
    if (*session != NULL) {
        (*session)->references++;
    }
    pthread_mutex_unlock(&transports->lock);
    return *session != NULL ? BKV_OK : bkv_fail(err, BKV_FAILED_PRECONDITION, "place.session: there is none of this name");
}

void bkv_session_release(bkv_session_t *session) {
    bkv_transports_t *transports = session->transports;
    pthread_mutex_lock(&transports->lock);
    cr_assert_gt(session->references, 0);
    session->references--;
    pthread_mutex_unlock(&transports->lock);
}

bkv_status_t bkv_session_detach(bkv_transports_t *transports, const bkv_session_id_t *id, bkv_session_gone_t gone, void *user,
                                bkv_error_t *err) {
    pthread_mutex_lock(&transports->lock);
    struct bkv_session *session = find(transports, id);
    if (session != NULL) {
        session->ended = true;
        session->references--;
    }
    pthread_mutex_unlock(&transports->lock);
    if (session != NULL && gone != NULL) {
        gone(user);
    }
    return session != NULL ? BKV_OK : bkv_fail(err, BKV_FAILED_PRECONDITION, "session: there is none of this name");
}

bool bkv_session_on_device(const bkv_session_t *session) {
    bkv_transports_t *transports = session->transports;
    pthread_mutex_lock(&transports->lock);
    bool on_device = transports->orders.on_device;
    pthread_mutex_unlock(&transports->lock);
    return on_device;
}

bkv_status_t bkv_session_room(const bkv_session_t *session, const bkv_place_t *place, bkv_error_t *err) {
    return place->offset <= session->bytes && place->bytes <= session->bytes - place->offset
               ? BKV_OK
               : bkv_fail(err, BKV_INVALID_ARGUMENT, "place.bytes: past the session's end");
}

// ---- transfers ----

static bkv_status_t read_memory(void *source, bkv_ingest_t *ingest, bkv_error_t *err) {
    return bkv_ingest_write(ingest, source, bkv_ingest_bytes(ingest), err);
}

static bkv_status_t run(const task_t *task, bkv_status_t end, bkv_error_t *err) {
    bkv_error_t error = {.status = BKV_OK};
    uint8_t *memory = task->session->memory + task->offset;
    if (task->ingest != NULL && end == BKV_OK) {
        return bkv_ingest_commit_from(task->ingest, read_memory, memory, task->fetched, task->user, err);
    }
    if (end != BKV_OK) {
        bkv_fail(&error, end, "the link broke");
    } else {
        bkv_delivery_copy(task->session->transports->pipeline, task->delivery, memory, &error);
    }
    if (task->ingest != NULL) {
        bkv_ingest_abort(task->ingest);
        task->fetched(task->user, &error, &(bkv_ingest_result_t){0});
    } else {
        task->delivered(task->user, &error);
    }
    return BKV_OK;
}

static bkv_status_t start(task_t *task, const bkv_place_t *place, bkv_error_t *err) {
    bkv_transports_t *transports = task->session->transports;
    pthread_mutex_lock(&transports->lock);
    bkv_status_t status = transports->orders.busy > 0 ? BKV_BUSY : transports->orders.start, end = transports->orders.end;
    transports->orders.busy -= transports->orders.busy > 0;
    transports->seen.event = place->event != NULL;
    if (place->layout != NULL) {
        transports->seen.layout = *place->layout;
        transports->seen.first_key = place->layout->keys[0];
        transports->seen.first_page = place->layout->page_count > 0 ? place->layout->pages[0] : 0;
    }
    bool late = transports->orders.late && status == BKV_OK;
    if (late) {
        task->session->references++;
        transports->tasks[transports->seen.waiting++] = *task;
        pthread_cond_broadcast(&transports->changed);
    }
    pthread_mutex_unlock(&transports->lock);
    if (status != BKV_OK) {
        return bkv_fail(err, status, "place.offset: refused at command");
    }
    return late ? BKV_OK : run(task, end, err);
}

bkv_status_t bkv_session_fetch(bkv_session_t *session, const bkv_place_t *place, bkv_ingest_t *ingest, bkv_ingest_done_t done,
                               void *user, bkv_error_t *err) {
    task_t task = {.session = session, .ingest = ingest, .offset = place->offset, .fetched = done, .user = user};
    return start(&task, place, err);
}

bkv_status_t bkv_session_deliver(bkv_session_t *session, const bkv_place_t *place, const bkv_delivery_t *delivery,
                                 bkv_delivered_t done, void *user, bkv_error_t *err) {
    cr_assert_eq(place->bytes, delivery->length);
    task_t task = {.session = session, .delivery = delivery, .offset = place->offset, .delivered = done, .user = user};
    return start(&task, place, err);
}

void sharing_let_go(bkv_transports_t *sharing) {
    task_t tasks[TASKS];
    pthread_mutex_lock(&sharing->lock);
    uint32_t count = sharing->seen.waiting;
    memcpy(tasks, sharing->tasks, sizeof(tasks));
    sharing->seen.waiting = 0;
    sharing->orders.late = false;
    bkv_status_t end = sharing->orders.end;
    pthread_cond_broadcast(&sharing->changed);
    pthread_mutex_unlock(&sharing->lock);
    while (count-- > 0) {
        bkv_session_t *session = tasks[count].session;
        cr_assert_eq(run(&tasks[count], end, NULL), BKV_OK);
        bkv_session_release(session);
    }
}
