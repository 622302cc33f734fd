// verbs.c - see verbs.h. A pull is what one fetch reads: the peer says where the records lie and keeps them there (Locate), their
// sink says where they are to go, and the device fetches them one by one. What does not come so goes by stream.
//
// Two round trips instead of one, and the second is the device's own: worth it where there is much to come. How much that is,
// nobody knows before Locate; the records that came so far tell.
//
// Threads. A pull's callbacks come one after the other: all that begin on the thread that brings Locate's answer, before the first
// READ; all that end well on the device's; and those that did not on whichever of the two is last. A fetch that is given up before
// Locate is answered goes back at once, and the answer finds nobody (`fetch` NULL).
#include "daemon/cluster/peer/verbs.h"

#include "daemon/cluster/peer/link.h"
#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"
#include "peer.pb-c.h"

#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>

// Expected bytes of a fetch from which it is worth it: a question more takes as long as a stream takes for about so many, some 70 us
// at 3 to 4 GB/s; and what is READ costs neither end a thread's time.
#define READ_FROM (256u << 10)

typedef struct bkv_peers_verbs verbs_t;
typedef struct bkv_pull pull_t;

typedef struct part {
    bkv_verbs_transfer_t transfer; // first: it is all that comes back
    pull_t *pull;
    uint32_t index; // in the fetch
    bool reading;   // [verbs->lock] begun and not over
    bool came;
} part_t;

struct bkv_pull {
    pull_t *next, **prev; // [verbs->lock] among all
    bkv_peer_fetch_t *fetch;
    bkv_peer_t *peer; // counted
    bkv_way_t *way;   // likewise
    uint64_t asked_ms, deadline_ms;
    bool located;         // [verbs->lock] Locate was answered
    bool reading;         // [verbs->lock] and all parts are there
    uint64_t hold;        // 0: none
    uint32_t outstanding; // [verbs->lock] parts that are being read, and one until all have been begun
    uint32_t part_count;
    part_t parts[];
};

// ---- the list of all, [lock] ----

static void enlist(verbs_t *verbs, pull_t *pull) {
    pull->next = verbs->pulls;
    pull->prev = &verbs->pulls;
    if (pull->next != NULL) {
        pull->next->prev = &pull->next;
    }
    verbs->pulls = pull;
}

static void delist(pull_t *pull) {
    *pull->prev = pull->next;
    if (pull->next != NULL) {
        pull->next->prev = pull->prev;
    }
}

// ---- the end of a pull ----

static void pull_free(pull_t *pull) {
    bkv_way_put(pull->way, pull->hold);
    bkv_peer_release(pull->peer);
    free(pull);
}

// All that could be read has been: the rest goes by stream.
static void finish(verbs_t *verbs, pull_t *pull) {
    bkv_peer_fetch_t *fetch = pull->fetch;
    bool all = true;
    for (uint32_t i = 0; i < pull->part_count; i++) {
        const part_t *part = &pull->parts[i];
        if (!part->came) {
            all = false;
            bkv_peer_fetch_keep(fetch, part->index, part->transfer.local);
        }
    }
    if (all && pull->part_count > 0) {
        bkv_link_worked(pull->peer);
    }
    pthread_mutex_lock(&verbs->lock);
    delist(pull);
    pthread_mutex_unlock(&verbs->lock);
    pull_free(pull);
    bkv_peer_fetch_rest(fetch);
}

static void part_done(verbs_t *verbs, pull_t *pull) {
    pthread_mutex_lock(&verbs->lock);
    bool last = --pull->outstanding == 0;
    pthread_mutex_unlock(&verbs->lock);
    if (last) {
        finish(verbs, pull);
    }
}

// ---- reading ----

static void on_over(bkv_verbs_transfer_t *transfer, const bkv_error_t *error) {
    part_t *part = (part_t *)transfer;
    pull_t *pull = part->pull;
    verbs_t *verbs = pull->way->verbs;
    pthread_mutex_lock(&verbs->lock);
    part->reading = false;
    pthread_mutex_unlock(&verbs->lock);
    if (error->status == BKV_OK) {
        part->came = true;
        atomic_fetch_add(&verbs->peers->counters.peer_read_total, 1);
        bkv_peer_fetch_end(pull->fetch, part->index, error);
    } else if (error->status == BKV_FAILED_PRECONDITION) {
        bkv_link_failed(pull->peer, pull->way, false, bkv_now_ms());
    }
    part_done(verbs, pull);
}

// The sink's memory must be the arena's, as nothing else is registered.
static bool in_arena(const struct ibv_mr *arena, const uint8_t *memory, uint64_t bytes) {
    uintptr_t first = (uintptr_t)arena->addr, at = (uintptr_t)memory;
    return at >= first && at - first <= arena->length && bytes <= arena->length - (at - first);
}

// Has all parts read. One that cannot be has not come.
static void read_all(verbs_t *verbs, pull_t *pull) {
    struct ibv_mr *arena;
    bool able = bkv_peer_device_arena(&verbs->device, &arena, NULL) == BKV_OK, broken = false;
    pthread_mutex_lock(&verbs->lock);
    pull->reading = true;
    for (uint32_t i = 0; i < pull->part_count; i++) {
        part_t *part = &pull->parts[i];
        bkv_verbs_transfer_t *transfer = &part->transfer;
        if (!able || !in_arena(arena, transfer->local, transfer->bytes) || atomic_load(&pull->fetch->call.cancelled)) {
            continue;
        }
        transfer->local_key = arena->lkey;
        transfer->deadline_ms = pull->deadline_ms;
        part->reading = bkv_verbs_begin(&pull->way->path, transfer, NULL) == BKV_OK;
        pull->outstanding += part->reading;
        broken = broken || !part->reading;
    }
    pthread_mutex_unlock(&verbs->lock);
    if (broken) {
        bkv_link_failed(pull->peer, pull->way, false, bkv_now_ms());
    }
}

// ---- where they lie ----

static bkv_status_t check_location(const pull_t *pull, const Balancekv__Cluster__V1__Location *location, bkv_error_t *err) {
    if (location->bytes == 0) {
        return BKV_OK;
    }
    uint64_t most = pull->peer->peers->record_max;
    if (location->bytes < sizeof(bkv_record_header_t) || location->bytes > most) {
        return bkv_fail(err, BKV_INTERNAL, "Locate: a record of %llu bytes", (unsigned long long)location->bytes);
    }
    if (location->offset > pull->way->bytes || location->bytes > pull->way->bytes - location->offset) {
        return bkv_fail(err, BKV_INTERNAL, "Locate: a record at %llu, past the end of the arena",
                        (unsigned long long)location->offset);
    }
    return BKV_OK;
}

static bkv_status_t check_locations(const pull_t *pull, const Balancekv__Cluster__V1__LocateResponse *response,
                                    bkv_error_t *err) {
    if (response->n_locations != pull->fetch->count) {
        return bkv_fail(err, BKV_INTERNAL, "Locate: %zu locations of %u records", response->n_locations, pull->fetch->count);
    }
    bkv_status_t status = BKV_OK;
    for (uint32_t i = 0; i < pull->fetch->count && status == BKV_OK; i++) {
        status = check_location(pull, response->locations[i], err);
    }
    return status;
}

// Asks the sink where each is to go that is there.
static void begin_all(pull_t *pull, const Balancekv__Cluster__V1__LocateResponse *response) {
    bkv_peer_fetch_t *fetch = pull->fetch;
    for (uint32_t i = 0; i < fetch->count; i++) {
        const Balancekv__Cluster__V1__Location *location = response->locations[i];
        if (location->bytes == 0) {
            bkv_error_t error;
            bkv_fail(&error, BKV_NOT_FOUND, "%s: has it not", pull->peer->id);
            bkv_peer_fetch_end(fetch, i, &error);
            continue;
        }
        uint8_t *memory = bkv_peer_fetch_begin(fetch, i, location->tenant, location->bytes, location->ttl_ms);
        if (memory == NULL) {
            continue;
        }
        pull->parts[pull->part_count++] = (part_t){
            .transfer = {.read = true, .local = memory, .offset = location->offset, .bytes = location->bytes, .over = on_over},
            .pull = pull,
            .index = i,
        };
    }
}

// What is held in place is so from when the peer answered, so at least from when it was asked.
static void set_deadline(pull_t *pull, uint64_t hold_ms) {
    uint64_t held_ms = hold_ms < BKV_LINK_ASK_MS ? pull->asked_ms + hold_ms : pull->asked_ms + BKV_LINK_ASK_MS;
    pull->deadline_ms = pull->fetch->call.deadline_ms < held_ms ? pull->fetch->call.deadline_ms : held_ms;
}

// The peer did not say where its records are. Whatever is wrong, what it knows nothing of it can be asked for anew at once.
static void not_located(const pull_t *pull, const bkv_error_t *error) {
    bool forgotten = error->status == BKV_FAILED_PRECONDITION;
    if (forgotten || error->status == BKV_UNIMPLEMENTED || error->status == BKV_INTERNAL) {
        bkv_link_failed(pull->peer, pull->way, forgotten, bkv_now_ms());
    }
}

// Of an answer that finds nobody only the hold is of interest.
static void on_located(void *user, const bkv_error_t *error, const ProtobufCMessage *message) {
    pull_t *pull = user;
    verbs_t *verbs = pull->way->verbs;
    const Balancekv__Cluster__V1__LocateResponse *response = (const Balancekv__Cluster__V1__LocateResponse *)message;
    pthread_mutex_lock(&verbs->lock);
    bool wanted = pull->fetch != NULL;
    pull->located = true;
    pull->outstanding = 1;
    pthread_mutex_unlock(&verbs->lock);
    bkv_error_t failure = *error;
    pull->hold = error->status == BKV_OK ? response->hold : 0;
    if (!wanted) {
        pull_free(pull);
        return;
    }
    if (failure.status == BKV_OK && check_locations(pull, response, &failure) == BKV_OK) {
        set_deadline(pull, response->hold_ms);
        begin_all(pull, response);
        read_all(verbs, pull);
    } else {
        not_located(pull, &failure);
    }
    part_done(verbs, pull);
}

// ---- the start ----

// Whether what is fetched is likely to be so much that reading it is worth a round trip more. With nothing known it is tried.
static bool worth_it(const bkv_peers_t *peers, uint32_t count) {
    uint64_t records = atomic_load_explicit(&peers->counters.peer_fetched_total, memory_order_relaxed);
    uint64_t bytes = atomic_load_explicit(&peers->counters.peer_fetched_bytes_total, memory_order_relaxed);
    return records == 0 || count * (bytes / records) >= READ_FROM;
}

// Under the lock the pull is not answered before it is one of all.
static bkv_status_t locate(verbs_t *verbs, pull_t *pull) {
    uint64_t releases[BKV_HOLDS_MAX / 2];
    Balancekv__Cluster__V1__LocateRequest request = BALANCEKV__CLUSTER__V1__LOCATE_REQUEST__INIT;
    const bkv_peer_fetch_t *fetch = pull->fetch;
    request.link = (ProtobufCBinaryData){sizeof(pull->way->id.bytes), pull->way->id.bytes};
    request.names = (ProtobufCBinaryData){fetch->count * sizeof(fetch->names[0]), (uint8_t *)(uintptr_t)fetch->names};
    request.n_release = bkv_way_releases(pull->way, releases);
    request.release = releases;
    pthread_mutex_lock(&verbs->lock);
    bkv_status_t status =
        bkv_peer_ask(pull->peer, BKV_PEER_SERVICE "Locate", &request.base, &balancekv__cluster__v1__locate_response__descriptor,
                     fetch->call.deadline_ms, on_located, pull, NULL);
    bool first = verbs->pulls == NULL;
    if (status == BKV_OK) {
        enlist(verbs, pull);
    }
    pthread_mutex_unlock(&verbs->lock);
    if (status == BKV_OK && first) { // there is something to look at now
        bkv_verbs_wake(verbs->verbs);
    }
    return status;
}

bool bkv_peer_verbs_fetch(bkv_peer_t *peer, bkv_peer_fetch_t *fetch) {
    verbs_t *verbs = peer->peers->verbs;
    if (verbs == NULL || !peer->offers_verbs || fetch->count > peer->peers->max_batch || !worth_it(peer->peers, fetch->count)) {
        return false;
    }
    uint64_t now_ms = bkv_now_ms();
    bkv_way_t *way = bkv_link_get(peer, now_ms);
    pull_t *pull = way != NULL ? calloc(1, sizeof(*pull) + fetch->count * sizeof(pull->parts[0])) : NULL;
    if (pull == NULL) {
        if (way != NULL) {
            bkv_way_put(way, 0);
        }
        return false;
    }
    pull->fetch = fetch;
    pull->peer = bkv_peer_hold(peer);
    pull->way = way;
    pull->asked_ms = now_ms;
    if (locate(verbs, pull) != BKV_OK) {
        pull_free(pull);
        return false;
    }
    return true;
}

// ---- what is not wanted any more ----

// [lock] A pull that waits for Locate in vain; NULL: there is none. Those that are being read are told to stop.
static bkv_peer_fetch_t *next_unwanted(verbs_t *verbs, uint64_t now_ms) {
    for (pull_t *pull = verbs->pulls; pull != NULL; pull = pull->next) {
        if (!atomic_load(&pull->fetch->call.cancelled) && now_ms < pull->fetch->call.deadline_ms) {
            continue;
        }
        if (!pull->located) {
            bkv_peer_fetch_t *fetch = pull->fetch;
            delist(pull);
            pull->fetch = NULL;
            return fetch;
        }
        for (uint32_t i = 0; pull->reading && i < pull->part_count; i++) {
            if (pull->parts[i].reading) {
                bkv_verbs_cancel(&pull->parts[i].transfer);
            }
        }
    }
    return NULL;
}

// On the device's thread.
static uint64_t tick(void *user, uint64_t now_ms) {
    verbs_t *verbs = user;
    for (;;) {
        pthread_mutex_lock(&verbs->lock);
        bkv_peer_fetch_t *fetch = next_unwanted(verbs, now_ms);
        uint64_t next_ms = verbs->pulls != NULL ? now_ms + BKV_LINK_WATCH_MS : UINT64_MAX;
        pthread_mutex_unlock(&verbs->lock);
        if (fetch == NULL) {
            return next_ms;
        }
        bkv_peer_fetch_rest(fetch);
    }
}

// ---- open, close ----

static bkv_status_t start_device(verbs_t *verbs, bkv_error_t *err) {
    const bkv_verbs_config_t config = {
        .device = verbs->device.device,
        .max_paths = BKV_LINK_PATHS,
        .words = {.subject = "cluster: a member's ",
                  .remedy = "",
                  .limit = "one for each member",
                  .otherwise = "other members' records come by gRPC"},
        .thread_name = "bkv-peer-verbs",
        .now_ms = bkv_now_ms,
        .tick = tick,
        .user = verbs,
    };
    bkv_status_t status = bkv_serve_create(&verbs->device, &verbs->serve, err);
    if (status == BKV_OK) {
        status = bkv_links_start(verbs, err);
    }
    return status == BKV_OK ? bkv_verbs_create(&config, &verbs->verbs, err) : status;
}

bkv_status_t bkv_peer_verbs_open(bkv_peers_t *peers, const bkv_peers_config_t *config, bkv_error_t *err) {
    const char *name = config->verbs_device;
    if (name == NULL || name[0] == '\0' || strcmp(name, "off") == 0) {
        return BKV_OK;
    }
    verbs_t *verbs = calloc(1, sizeof(*verbs));
    if (verbs == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: out of memory");
    }
    verbs->peers = peers;
    strncpy(verbs->self, config->self, sizeof(verbs->self) - 1);
    bkv_error_t cause;
    bkv_status_t status =
        bkv_peer_device_open(&verbs->device, config->store, name, config->verbs_port, config->verbs_gid, &cause);
    if (status != BKV_OK) {
        free(verbs);
        return strcmp(name, "auto") == 0 ? BKV_OK : bkv_fail(err, status, "transport.verbs: %.200s", cause.message);
    }
    pthread_mutex_init(&verbs->lock, NULL);
    bkv_links_init(verbs);
    peers->verbs = verbs;
    return start_device(verbs, err);
}

// The ways are gone before the device's thread, which takes the lock to the last.
void bkv_peer_verbs_close(bkv_peers_t *peers) {
    verbs_t *verbs = peers->verbs;
    if (verbs == NULL) {
        return;
    }
    bkv_links_stop(verbs);
    bkv_verbs_destroy(verbs->verbs);
    bkv_serve_destroy(verbs->serve);
    bkv_peer_device_close(&verbs->device);
    pthread_cond_destroy(&verbs->changed);
    pthread_mutex_destroy(&verbs->lock);
    free(verbs);
    peers->verbs = NULL;
}

bkv_serve_t *bkv_peers_serve(const bkv_peers_t *peers) {
    return peers->verbs != NULL ? peers->verbs->serve : NULL;
}
