// session.c - sessions: their names, their table, who refers to them, and how they end.
//
// The table holds one reference from attach to the end; a call that names the session holds one, and so does each transfer
// (transfer.c). Whoever gives up the last one takes the session down. A session ends once: whoever takes it out of the table,
// under the lock, ends it.
#include "daemon/transport/session.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

// ---- the table ----

bkv_status_t bkv_sessions_init(bkv_transports_t *transports, bkv_error_t *err) {
    uint32_t buckets = 64;
    while (buckets < transports->config.max_sessions && buckets < 1u << 20) {
        buckets *= 2;
    }
    transports->buckets = calloc(buckets, sizeof(transports->buckets[0]));
    if (transports->buckets == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "transport.max_sessions: no memory for %u sessions",
                        transports->config.max_sessions);
    }
    transports->mask = buckets - 1;
    pthread_mutex_init(&transports->lock, NULL);
    pthread_cond_init(&transports->none, NULL);
    return BKV_OK;
}

void bkv_sessions_deinit(bkv_transports_t *transports) {
    assert(transports->count == 0);
    pthread_cond_destroy(&transports->none);
    pthread_mutex_destroy(&transports->lock);
    free(transports->buckets);
}

// Where the table points to the session, or to NULL. Under the lock. Ids are random, so their first bytes are hash enough.
static bkv_session_t **slot_of(bkv_transports_t *transports, const bkv_session_id_t *id) {
    uint32_t hash;
    memcpy(&hash, id->bytes, sizeof(hash));
    bkv_session_t **slot = &transports->buckets[hash & transports->mask];
    while (*slot != NULL && memcmp(&(*slot)->id, id, sizeof(*id)) != 0) {
        slot = &(*slot)->next;
    }
    return slot;
}

// Under the lock. The table's reference goes to the caller, who owes end_session.
static bkv_session_t *take_out(bkv_session_t **slot) {
    bkv_session_t *session = *slot;
    if (session != NULL) {
        *slot = session->next;
        session->next = NULL;
        atomic_store(&session->ended, true);
    }
    return session;
}

// Without the lock: transports may wait in there.
static void end_session(bkv_session_t *session) {
    if (session->ops->end != NULL) {
        session->ops->end(session->self, session->state);
    }
    bkv_session_release(session);
}

static void end_list(bkv_session_t *list, _Atomic uint64_t *counter) {
    while (list != NULL) {
        bkv_session_t *session = list;
        list = session->next;
        if (counter != NULL) {
            bkv_transport_count(counter, 1);
        }
        end_session(session);
    }
}

// ---- attach ----

static bkv_status_t check_peer(const bkv_transport_t *transport, const bkv_attach_args_t *args, bkv_error_t *err) {
    if (!transport->open) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "%s: %s", transport->ops != NULL ? transport->ops->name : "transport",
                        transport->reason);
    }
    if (transport->ops->local && !args->local) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "%s: is for peers that come by the unix socket", transport->ops->name);
    }
    return BKV_OK;
}

static bkv_status_t admit(bkv_transports_t *transports, bkv_error_t *err) {
    pthread_mutex_lock(&transports->lock);
    bool full = transports->count >= transports->config.max_sessions;
    transports->count += full ? 0 : 1;
    pthread_mutex_unlock(&transports->lock);
    return full ? bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%u clients share memory already (transport.max_sessions)",
                           transports->config.max_sessions)
                : BKV_OK;
}

static void leave(bkv_transports_t *transports) {
    pthread_mutex_lock(&transports->lock);
    if (--transports->count == 0) {
        pthread_cond_broadcast(&transports->none);
    }
    pthread_mutex_unlock(&transports->lock);
}

static bkv_status_t session_create(bkv_transports_t *transports, const bkv_transport_t *transport,
                                   const bkv_attach_args_t *args, bkv_attach_result_t *result, bkv_session_t **session_out,
                                   bkv_error_t *err) {
    bkv_session_t *session = calloc(1, sizeof(*session));
    if (session == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a session");
    }
    *session = (bkv_session_t){.transports = transports, .ops = transport->ops, .self = transport->self};
    bkv_status_t status = BKV_OK;
    if (getrandom(&session->id, sizeof(session->id), 0) != (ssize_t)sizeof(session->id)) {
        status = bkv_fail(err, BKV_INTERNAL, "getrandom: %s", strerror(errno));
    }
    if (status == BKV_OK) {
        status = session->ops->attach(session->self, args, result, &session->state, err);
    }
    if (status != BKV_OK) {
        free(session);
        return status;
    }
    result->id = session->id;
    result->idle_ms = transports->config.idle_ms;
    session->bytes = result->bytes;
    atomic_store(&session->references, 1);
    atomic_store(&session->used_ms, transports->config.now_ms());
    *session_out = session;
    return BKV_OK;
}

bkv_status_t bkv_session_attach(bkv_transports_t *transports, const bkv_attach_args_t *args, bkv_attach_result_t *result,
                                bkv_error_t *err) {
    assert(args->kind < BKV_TRANSPORT_KINDS);
    const bkv_transport_t *transport = &transports->kinds[args->kind];
    bkv_session_t *session = NULL;
    *result = (bkv_attach_result_t){0};
    bkv_status_t status = check_peer(transport, args, err);
    if (status == BKV_OK) {
        status = admit(transports, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    status = session_create(transports, transport, args, result, &session, err);
    if (status != BKV_OK) {
        leave(transports);
        return status;
    }
    pthread_mutex_lock(&transports->lock);
    bkv_session_t **slot = slot_of(transports, &session->id);
    assert(*slot == NULL); // 128 random bits
    *slot = session;
    pthread_mutex_unlock(&transports->lock);
    bkv_transport_count(&transports->counters.sessions_total, 1);
    return BKV_OK;
}

// ---- references ----

// Whether its transport can do nothing more with it. Under the lock.
static bool is_lost(const bkv_session_t *session, uint64_t now_ms) {
    (void)now_ms;
    return session->ops->alive != NULL && !session->ops->alive(session->self, session->state);
}

bkv_status_t bkv_session_find(bkv_transports_t *transports, const bkv_session_id_t *id, bkv_session_t **session_out,
                              bkv_error_t *err) {
    pthread_mutex_lock(&transports->lock);
    bkv_session_t **slot = slot_of(transports, id), *session = *slot, *lost = NULL;
    if (session != NULL && is_lost(session, 0)) {
        lost = take_out(slot);
        session = NULL;
    }
    if (session != NULL) {
        atomic_fetch_add(&session->references, 1);
        atomic_store(&session->used_ms, transports->config.now_ms());
    }
    pthread_mutex_unlock(&transports->lock);
    end_list(lost, &transports->counters.sessions_lost_total);
    if (session == NULL) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "place.session: there is none of this name (any more); Attach again");
    }
    *session_out = session;
    return BKV_OK;
}

void bkv_session_release(bkv_session_t *session) {
    if (atomic_fetch_sub(&session->references, 1) > 1) {
        return;
    }
    bkv_transports_t *transports = session->transports;
    bkv_session_gone_t gone = session->gone;
    void *gone_user = session->gone_user;
    session->ops->detach(session->self, session->state);
    free(session);
    if (gone != NULL) {
        gone(gone_user);
    }
    leave(transports); // who waits for this frees the transports
}

bool bkv_session_on_device(const bkv_session_t *session) {
    return session->ops->on_device;
}

// ---- the end ----

bkv_status_t bkv_session_detach(bkv_transports_t *transports, const bkv_session_id_t *id, bkv_session_gone_t gone, void *user,
                                bkv_error_t *err) {
    pthread_mutex_lock(&transports->lock);
    bkv_session_t *session = take_out(slot_of(transports, id));
    pthread_mutex_unlock(&transports->lock);
    if (session == NULL) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "session: there is none of this name (any more)");
    }
    session->gone = gone;
    session->gone_user = user;
    end_session(session);
    return BKV_OK;
}

// Takes every session out for which `over` says so, and chains them. Under the lock.
static bkv_session_t *take_out_if(bkv_transports_t *transports, bool (*over)(const bkv_session_t *session, uint64_t now_ms),
                                  uint64_t now_ms) {
    bkv_session_t *list = NULL;
    for (uint32_t bucket = 0; bucket <= transports->mask; bucket++) {
        bkv_session_t **slot = &transports->buckets[bucket];
        while (*slot != NULL) {
            if (over != NULL && !over(*slot, now_ms)) {
                slot = &(*slot)->next;
                continue;
            }
            bkv_session_t *session = take_out(slot);
            session->next = list;
            list = session;
        }
    }
    return list;
}

// A reference besides the table's is a use that goes on. Its time may lie ahead of now_ms, which was read before the lock.
static bool is_idle(const bkv_session_t *session, uint64_t now_ms) {
    uint64_t used_ms = atomic_load(&session->used_ms);
    return !session->held && atomic_load(&session->references) == 1 && now_ms > used_ms &&
           now_ms - used_ms >= session->transports->config.idle_ms;
}

void bkv_transports_tick(bkv_transports_t *transports, uint64_t now_ms) {
    pthread_mutex_lock(&transports->lock);
    bkv_session_t *lost = take_out_if(transports, is_lost, now_ms);
    bkv_session_t *idle = take_out_if(transports, is_idle, now_ms);
    pthread_mutex_unlock(&transports->lock);
    end_list(lost, &transports->counters.sessions_lost_total);
    end_list(idle, &transports->counters.sessions_idle_total);
}

void bkv_sessions_end_all(bkv_transports_t *transports) {
    pthread_mutex_lock(&transports->lock);
    bkv_session_t *list = take_out_if(transports, NULL, 0);
    pthread_mutex_unlock(&transports->lock);
    end_list(list, NULL);
    pthread_mutex_lock(&transports->lock);
    while (transports->count > 0) {
        pthread_cond_wait(&transports->none, &transports->lock);
    }
    pthread_mutex_unlock(&transports->lock);
}

// ---- connections ----

bkv_status_t bkv_session_hold(bkv_transports_t *transports, const bkv_session_id_t *id, bkv_error_t *err) {
    pthread_mutex_lock(&transports->lock);
    bkv_session_t *session = *slot_of(transports, id);
    bool held = session != NULL && session->held;
    if (session != NULL && session->ops->local) {
        session->held = true;
    }
    bool remote = session != NULL && !session->ops->local;
    pthread_mutex_unlock(&transports->lock);
    if (session == NULL || remote) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "session: there is no local one of this name (any more)");
    }
    return held ? bkv_fail(err, BKV_FAILED_PRECONDITION, "session: another connection holds it") : BKV_OK;
}

void bkv_session_lose(bkv_transports_t *transports, const bkv_session_id_t *id) {
    pthread_mutex_lock(&transports->lock);
    bkv_session_t *session = take_out(slot_of(transports, id));
    pthread_mutex_unlock(&transports->lock);
    end_list(session, &transports->counters.sessions_lost_total);
}

bool bkv_session_alive(bkv_transports_t *transports, const bkv_session_id_t *id) {
    pthread_mutex_lock(&transports->lock);
    bool alive = *slot_of(transports, id) != NULL;
    pthread_mutex_unlock(&transports->lock);
    return alive;
}
