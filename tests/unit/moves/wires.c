// wires.c - peers of the made-up world: two threads that carry questions and records from one store to the other.
#include "world.h"

#include "daemon/observe/clock.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

struct bkv_peer {
    _Atomic uint32_t refs;
    world_t *world;
    uint32_t from, to;
    uint64_t epoch;
};

typedef struct job {
    struct job *next;
    bkv_peer_t *peer;
    enum { HAVE, STORE, DRAIN } kind;
    bkv_name_t *names;
    uint32_t count;
    uint64_t due_us, deadline_ms;
    union {
        bkv_peer_have_t have;
        bkv_peer_store_t store;
        bkv_peer_drain_t drain;
    } done;
    void *user;
} job_t;

// One and the same for as long as a member is not started again.
bkv_peer_t *bkv_peers_get(bkv_peers_t *peers, const bkv_member_t *member) {
    uint32_t to = (uint32_t)atoi(member->place.id + strlen("node-"));
    pthread_mutex_lock(&peers->world->lock);
    bkv_peer_t *known = peers->known[to];
    if (known == NULL || known->epoch != member->place.epoch) {
        bkv_peer_release(known);
        known = calloc(1, sizeof(*known));
        known->refs = 1;
        known->world = peers->world;
        known->from = peers->from;
        known->to = to;
        known->epoch = member->place.epoch;
        peers->known[to] = known;
    }
    bkv_peer_hold(known);
    pthread_mutex_unlock(&peers->world->lock);
    return known;
}

bkv_peer_t *bkv_peer_hold(bkv_peer_t *peer) {
    atomic_fetch_add(&peer->refs, 1);
    return peer;
}

void bkv_peer_release(bkv_peer_t *peer) {
    if (peer != NULL && atomic_fetch_sub(&peer->refs, 1) == 1) {
        free(peer);
    }
}

// ---- what the far end does ----

static bkv_status_t copy_record(world_t *world, const bkv_peer_t *peer, const bkv_name_t *name) {
    bkv_store_t *from = world->nodes[peer->from].store, *to = world->nodes[peer->to].store;
    uint64_t now_ms = bkv_now_ms();
    bkv_pin_t pin;
    if (bkv_store_pin(from, &name->spec_id, &name->key, now_ms, &pin, NULL) != BKV_OK) {
        return BKV_NOT_FOUND;
    }
    bkv_slot_t slot;
    bkv_record_header_t header;
    memcpy(&header, pin.data, sizeof(header));
    bkv_status_t status = bkv_store_reserve(to, header.tenant, pin.length, now_ms, &slot, NULL);
    if (status == BKV_OK) {
        memcpy(slot.data, pin.data, pin.length);
        status = bkv_store_adopt(to, &slot, bkv_store_ttl(from, &pin, now_ms), false, now_ms, NULL, NULL);
    }
    bkv_store_unpin(from, &pin);
    atomic_fetch_add(status == BKV_OK ? &world->stored : &world->in_vain, 1);
    return status;
}

// What goes wrong with a call: OK, nothing. Both nodes' locks are held.
static bkv_status_t trouble(world_t *world, const job_t *job) {
    const node_t *to = &world->nodes[job->peer->to];
    uint32_t bit = 1u << job->peer->to;
    if (world->ending || !world->nodes[job->peer->from].up) {
        return BKV_CANCELLED;
    }
    if ((atomic_load(&world->silent) & bit) != 0) {
        return BKV_DEADLINE_EXCEEDED;
    }
    bool gone = !to->up || world->members[job->peer->to].place.epoch != job->peer->epoch;
    return gone || (atomic_load(&world->deaf) & bit) != 0 || world_dice(world, 100) < atomic_load(&world->failing) ? BKV_BUSY
                                                                                                                   : BKV_OK;
}

static void both_locks(world_t *world, const bkv_peer_t *peer, bool take) {
    uint32_t low = peer->from < peer->to ? peer->from : peer->to, high = peer->from + peer->to - low;
    if (take) {
        pthread_mutex_lock(&world->nodes[low].lock);
        pthread_mutex_lock(&world->nodes[high].lock);
    } else {
        pthread_mutex_unlock(&world->nodes[high].lock);
        pthread_mutex_unlock(&world->nodes[low].lock);
    }
}

static void run_have(world_t *world, job_t *job) {
    uint64_t *bytes = calloc(job->count, sizeof(bytes[0]));
    both_locks(world, job->peer, true);
    bkv_error_t error = {.status = trouble(world, job)};
    for (uint32_t i = 0; error.status == BKV_OK && i < job->count; i++) {
        bkv_record_header_t header;
        bkv_store_peek(world->nodes[job->peer->to].store, &job->names[i].spec_id, &job->names[i].key, bkv_now_ms(), &header,
                       &bytes[i]);
    }
    both_locks(world, job->peer, false);
    atomic_fetch_add(&world->haves, 1);
    job->done.have(job->user, &error, error.status == BKV_OK ? bytes : NULL);
    free(bytes);
}

static void run_store(world_t *world, job_t *job) {
    bkv_status_t *results = calloc(job->count, sizeof(results[0]));
    both_locks(world, job->peer, true);
    bkv_error_t error = {.status = trouble(world, job)};
    for (uint32_t i = 0; error.status == BKV_OK && i < job->count; i++) {
        bool refused = world_dice(world, 100) < atomic_load(&world->refusing);
        results[i] = refused ? BKV_RESOURCE_EXHAUSTED : copy_record(world, job->peer, &job->names[i]);
    }
    both_locks(world, job->peer, false);
    atomic_fetch_add(&world->stores, 1);
    job->done.store(job->user, &error, error.status == BKV_OK ? results : NULL);
    free(results);
}

static void run_drain(world_t *world, job_t *job) {
    bkv_mover_progress_t mover = {.settled = 0};
    both_locks(world, job->peer, true);
    bkv_error_t error = {.status = trouble(world, job)};
    if (error.status == BKV_OK) {
        bkv_mover_get_progress(world->nodes[job->peer->to].mover, &mover);
    }
    both_locks(world, job->peer, false);
    const bkv_drain_progress_t progress = {.settled = mover.settled};
    job->done.drain(job->user, &error, error.status == BKV_OK ? &progress : NULL);
}

// ---- the wires ----

// [lock] The first job whose time has come. Silent nodes' wait for their deadlines.
static job_t *next_job(world_t *world) {
    uint64_t now_us = bkv_now_us();
    for (job_t **at = &world->jobs; *at != NULL; at = &(*at)->next) {
        job_t *job = *at;
        bool silent = (atomic_load(&world->silent) >> job->peer->to & 1) != 0;
        uint64_t due_us = silent ? job->deadline_ms * 1000 : job->due_us;
        if (world->ending || due_us <= now_us) {
            *at = job->next;
            return job;
        }
    }
    return NULL;
}

static void run_job(world_t *world, job_t *job) {
    switch (job->kind) {
    case HAVE:
        run_have(world, job);
        break;
    case STORE:
        run_store(world, job);
        break;
    default:
        run_drain(world, job);
        break;
    }
    bkv_peer_release(job->peer);
    free(job->names);
    free(job);
}

static void *wire(void *user) {
    world_t *world = user;
    pthread_mutex_lock(&world->lock);
    while (!world->ending || world->jobs != NULL) {
        job_t *job = next_job(world);
        if (job == NULL) {
            struct timespec until;
            clock_gettime(CLOCK_REALTIME, &until);
            until.tv_nsec += world->jobs != NULL ? 500000 : 20000000;
            until.tv_sec += until.tv_nsec / 1000000000;
            until.tv_nsec %= 1000000000;
            pthread_cond_timedwait(&world->changed, &world->lock, &until);
            continue;
        }
        world->running++;
        pthread_mutex_unlock(&world->lock);
        run_job(world, job);
        pthread_mutex_lock(&world->lock);
        world->running--;
    }
    pthread_mutex_unlock(&world->lock);
    return NULL;
}

void wires_start(world_t *world) {
    for (uint32_t i = 0; i < 2; i++) {
        cr_assert_eq(pthread_create(&world->threads[i], NULL, wire, world), 0);
    }
}

void wires_stop(world_t *world) {
    pthread_mutex_lock(&world->lock);
    world->ending = true;
    pthread_cond_broadcast(&world->changed);
    pthread_mutex_unlock(&world->lock);
    for (uint32_t i = 0; i < 2; i++) {
        pthread_join(world->threads[i], NULL);
    }
    for (uint32_t i = 0; i < NODES * NODES; i++) {
        bkv_peer_release(world->nodes[i / NODES].peers.known[i % NODES]);
    }
}

static bkv_status_t begin(bkv_peer_t *peer, const job_t *what, const bkv_name_t *names, bkv_error_t *err) {
    world_t *world = peer->world;
    if ((atomic_load(&world->deaf) >> peer->to & 1) != 0 && world_dice(world, 2) == 0) {
        return bkv_fail(err, BKV_BUSY, "suspected");
    }
    job_t *job = malloc(sizeof(*job));
    uint32_t slow_us = atomic_load(&world->slow_us);
    *job = *what;
    job->peer = bkv_peer_hold(peer);
    job->due_us = bkv_now_us() + (slow_us > 0 ? world_dice(world, slow_us) : 0);
    job->names = malloc((job->count + 1u) * sizeof(names[0]));
    if (job->count > 0) {
        memcpy(job->names, names, job->count * sizeof(names[0]));
    }
    pthread_mutex_lock(&world->lock);
    cr_assert(!world->ending);
    job_t **at = &world->jobs;
    while (*at != NULL) {
        at = &(*at)->next;
    }
    job->next = NULL;
    *at = job;
    pthread_cond_signal(&world->changed);
    pthread_mutex_unlock(&world->lock);
    return BKV_OK;
}

bkv_status_t bkv_peer_have(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                           bkv_peer_have_t done, void *user, bkv_error_t *err) {
    return begin(peer, &(job_t){.kind = HAVE, .count = count, .deadline_ms = deadline_ms, .done.have = done, .user = user},
                 names, err);
}

bkv_status_t bkv_peer_store(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                            bkv_peer_store_t done, void *user, bkv_error_t *err) {
    return begin(peer, &(job_t){.kind = STORE, .count = count, .deadline_ms = deadline_ms, .done.store = done, .user = user},
                 names, err);
}

bkv_status_t bkv_peer_drain(bkv_peer_t *peer, bkv_drain_order_t order, uint64_t deadline_ms, bkv_peer_drain_t done, void *user,
                            bkv_error_t *err) {
    cr_assert_eq(order, BKV_DRAIN_ASK);
    return begin(peer, &(job_t){.kind = DRAIN, .deadline_ms = deadline_ms, .done.drain = done, .user = user}, NULL, err);
}
