// world.c - the made-up world's members: their stores, movers and views, and what must be true of all of them together.
#include "world.h"

#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"
#include "kernels/seal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// ---- in the place of cluster.c and membership.c ----

void bkv_cluster_hold(bkv_cluster_t *cluster) {
    atomic_fetch_add(&cluster->busy, 1);
}

void bkv_cluster_release(bkv_cluster_t *cluster) {
    atomic_fetch_sub(&cluster->busy, 1);
}

const bkv_view_t *bkv_membership_view(bkv_membership_t *membership) {
    return bkv_view_take(&membership->views);
}

void bkv_membership_get_status(bkv_membership_t *membership, bkv_membership_status_t *status) {
    *status = (bkv_membership_status_t){.state = atomic_load(&membership->state)};
}

// ---- small things ----

uint32_t world_dice(world_t *world, uint32_t sides) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&lock);
    uint64_t x = world->state += 0x9e3779b97f4a7c15u;
    pthread_mutex_unlock(&lock);
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)((x ^ x >> 31) % sides);
}

void nap_ms(uint32_t ms) {
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000}, NULL);
}

bkv_name_t name_of(uint32_t key) {
    bkv_name_t name = {.spec_id = {{0x5e}}};
    uint64_t state = key;
    for (size_t i = 0; i < sizeof(name.key.bytes); i += 8) {
        uint64_t word = (state += 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
        word ^= word >> 29;
        memcpy(name.key.bytes + i, &word, 8);
    }
    return name;
}

// ---- nodes ----

static bkv_store_t *store_new(void) {
    const bkv_store_config_t config = {.arena_bytes = 32u << 20, .slab_bytes = 1u << 20, .max_entries = 16384, .arena_fd = -1};
    bkv_store_t *store = NULL;
    cr_assert_eq(bkv_store_create(&config, bkv_now_ms(), &store, NULL, NULL), BKV_OK);
    return store;
}

// The views of a node that has just been started know nobody.
static void membership_new(bkv_membership_t *membership) {
    cr_assert_eq(bkv_views_init(&membership->views, NULL), BKV_OK);
    atomic_store(&membership->state, BKV_MEMBERSHIP_MEMBER);
}

void node_start(world_t *world, uint32_t number) {
    node_t *node = &world->nodes[number];
    cr_assert(!node->up);
    membership_new(&node->membership);
    bkv_store_t *store = node->store != NULL ? node->store : store_new();
    const bkv_mover_config_t config = {.store = store,
                                       .peers = &node->peers,
                                       .membership = &node->membership,
                                       .delay_ms = world->delay_ms,
                                       .rate = world->rate,
                                       .pause_ms = 5};
    bkv_mover_t *mover = NULL;
    cr_assert_eq(bkv_mover_create(&config, &mover, NULL), BKV_OK);
    pthread_mutex_lock(&node->lock);
    node->up = true;
    node->store = store;
    node->mover = mover;
    node->cluster.store = store;
    node->cluster.mover = mover;
    pthread_mutex_unlock(&node->lock);
}

// A process that comes back has forgotten which of its records are copies, and so does this one.
static void forget_copies(bkv_store_t *store) {
    bkv_store_item_t items[64];
    uint64_t cursor = 0;
    for (bool more = true; more;) {
        size_t count = bkv_store_list_copies(store, &cursor, items, 64, bkv_now_ms(), &more);
        for (size_t i = 0; i < count; i++) {
            bkv_store_set_copy(store, &items[i].name, false, bkv_now_ms());
        }
    }
}

void node_crash(world_t *world, uint32_t number, bool memory) {
    node_t *node = &world->nodes[number];
    bkv_mover_stop(node->mover);
    pthread_mutex_lock(&node->lock);
    bkv_mover_t *mover = node->mover;
    node->up = false;
    node->mover = NULL;
    if (!memory) {
        bkv_store_destroy(node->store);
        node->store = NULL;
    }
    pthread_mutex_unlock(&node->lock);
    bkv_mover_destroy(mover);
    if (memory) {
        forget_copies(node->store);
    }
    bkv_views_deinit(&node->membership.views);
}

world_t *world_new(uint64_t seed, uint32_t replicas) {
    world_t *world = calloc(1, sizeof(*world));
    world->state = seed;
    world->replicas = replicas;
    world->delay_ms = 20;
    pthread_mutex_init(&world->lock, NULL);
    pthread_cond_init(&world->changed, NULL);
    for (uint32_t i = 0; i < NODES; i++) {
        node_t *node = &world->nodes[i];
        snprintf(node->id, sizeof(node->id), "node-%u", i);
        pthread_mutex_init(&node->lock, NULL);
        node->peers = (bkv_peers_t){.world = world, .from = i};
        node->cluster.membership = &node->membership;
        node->cluster.peers = &node->peers;
        node->cluster.peer_timeout_ms = 200;
        bkv_giving_init(&node->cluster.giving, 200);
    }
    cr_assert_eq(bkv_log_set_level("error", NULL), BKV_OK);
    wires_start(world);
    return world;
}

void world_free(world_t *world) {
    for (uint32_t i = 0; i < NODES; i++) {
        if (world->nodes[i].up) {
            bkv_mover_stop(world->nodes[i].mover);
        }
    }
    wires_stop(world);
    for (uint32_t i = 0; i < NODES; i++) {
        cr_assert_eq(atomic_load(&world->nodes[i].cluster.busy), 0);
        if (world->nodes[i].up) {
            node_crash(world, i, false);
        } else if (world->nodes[i].store != NULL) {
            bkv_store_destroy(world->nodes[i].store);
        }
        bkv_giving_deinit(&world->nodes[i].cluster.giving);
        pthread_mutex_destroy(&world->nodes[i].lock);
    }
    pthread_cond_destroy(&world->changed);
    pthread_mutex_destroy(&world->lock);
    free(world);
}

// ---- what etcd says ----

void world_list(world_t *world, uint32_t number, uint32_t weight) {
    bkv_member_t *member = &world->members[number];
    pthread_mutex_lock(&world->nodes[number].lock);
    *member = (bkv_member_t){.address_count = 1};
    memcpy(member->place.id, world->nodes[number].id, sizeof(member->place.id));
    member->place.epoch = ++world->epochs;
    member->place.weight = weight;
    world->listed[number] = true;
    pthread_mutex_unlock(&world->nodes[number].lock);
}

void world_unlist(world_t *world, uint32_t number) {
    world->listed[number] = false;
}

void world_drain(world_t *world, uint32_t number, bool draining) {
    world->members[number].place.draining = draining;
}

static bkv_placement_t *placement_new(const world_t *world, bkv_member_t *members, uint32_t *count) {
    bkv_placement_member_t places[NODES];
    *count = 0;
    for (uint32_t i = 0; i < NODES; i++) { // in order of ids, as they have one digit
        if (world->listed[i]) {
            places[*count] = world->members[i].place;
            members[(*count)++] = world->members[i];
        }
    }
    const bkv_placement_config_t config = {.members = places, .count = *count, .replicas = world->replicas, .seed = 7};
    bkv_placement_t *placement = NULL;
    cr_assert_eq(bkv_placement_create(&config, NULL, &placement, NULL), BKV_OK);
    return placement;
}

// bkv_views_publish without a table, which would take longest of all.
static void publish(world_t *world, bkv_views_t *views, const char *id) {
    bkv_view_t *was = atomic_load(&views->current), *view = views->pool;
    while (atomic_load(&view->used)) {
        cr_assert(++view < views->pool + BKV_VIEWS_MAX, "all views are in use");
    }
    bkv_member_t *members = calloc(NODES, sizeof(*members));
    view->placement = placement_new(world, members, &view->count);
    view->members = members;
    view->version = was->version + 1;
    view->seed = 7;
    view->self = bkv_placement_find(view->placement, id);
    atomic_store(&view->used, true);
    atomic_store(&view->refs, 1);
    atomic_store(&views->current, view);
    bkv_view_give(was);
}

void world_tell(world_t *world, uint32_t number) {
    node_t *node = &world->nodes[number];
    publish(world, &node->membership.views, node->id);
    bkv_mover_view_changed(node->mover);
}

void world_tell_all(world_t *world) {
    uint32_t first = world_dice(world, NODES);
    for (uint32_t i = 0; i < NODES; i++) {
        if (world->nodes[(first + i) % NODES].up) {
            world_tell(world, (first + i) % NODES);
        }
    }
}

void world_begin(world_t *world, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        node_start(world, i);
        world_list(world, i, 2 + i % 3);
    }
    world_tell_all(world);
    world_settle(world);
}

// ---- records ----

static void fill(uint8_t *data, uint32_t key) {
    bkv_name_t name = name_of(key);
    bkv_record_header_t header = {.magic = BKV_RECORD_MAGIC,
                                  .version = BKV_RECORD_VERSION,
                                  .codec = BKV_CODEC_RAW,
                                  .length = RECORD_BYTES,
                                  .tenant = 7,
                                  .tokens = 1,
                                  .layers = 1,
                                  .heads = 1,
                                  .key_dim = 8,
                                  .value_dim = 8,
                                  .dtype = BKV_BF16};
    memcpy(header.key, name.key.bytes, sizeof(header.key));
    memcpy(header.spec_id, name.spec_id.bytes, sizeof(header.spec_id));
    memset(data, (int)(key & 0xff), RECORD_BYTES);
    memcpy(data, &header, sizeof(header));
    bkv_record_seal(data);
}

void world_put_at(world_t *world, uint32_t number, uint32_t key) {
    bkv_store_t *store = world->nodes[number].store;
    bkv_slot_t slot;
    cr_assert_eq(bkv_store_reserve(store, 7, RECORD_BYTES, bkv_now_ms(), &slot, NULL), BKV_OK);
    fill(slot.data, key);
    bkv_status_t status = bkv_store_publish(store, &slot, 0, 0, bkv_now_ms(), NULL);
    cr_assert(status == BKV_OK || status == BKV_ALREADY_EXISTS);
    world->keys = key >= world->keys ? key + 1 : world->keys;
}

// The owners' numbers, as bits.
static uint32_t owners_of(const bkv_placement_t *placement, uint32_t key) {
    uint16_t owners[BKV_REPLICAS_MAX];
    bkv_name_t name = name_of(key);
    uint32_t bits = 0, count = bkv_placement_owners(placement, &name.key, owners);
    for (uint32_t i = 0; i < count; i++) {
        bits |= 1u << atoi(bkv_placement_member(placement, owners[i])->id + strlen("node-"));
    }
    return bits;
}

static uint32_t owners_by_list(world_t *world, uint32_t key) {
    bkv_member_t members[NODES];
    uint32_t count;
    bkv_placement_t *placement = placement_new(world, members, &count);
    uint32_t bits = owners_of(placement, key);
    bkv_placement_destroy(placement);
    return bits;
}

// By the view of some node that is up.
void world_put(world_t *world, uint32_t count) {
    uint32_t putter = world_dice(world, NODES);
    while (!world->nodes[putter].up) {
        putter = (putter + 1) % NODES;
    }
    const bkv_view_t *view = bkv_view_take(&world->nodes[putter].membership.views);
    for (uint32_t key = world->keys, end = key + count; key < end; key++) {
        uint32_t owners = owners_of(view->placement, key);
        for (uint32_t i = 0; i < NODES; i++) {
            if ((owners >> i & 1) != 0 && world->nodes[i].up) {
                world_put_at(world, i, key);
            }
        }
    }
    bkv_view_give(view);
}

bool node_has(world_t *world, uint32_t number, uint32_t key) {
    bkv_name_t name = name_of(key);
    bkv_store_t *store = world->nodes[number].store;
    return store != NULL && bkv_store_contains(store, &name.spec_id, &name.key, bkv_now_ms());
}

bool world_owns(world_t *world, uint32_t number, uint32_t key) {
    return (owners_by_list(world, key) >> number & 1) != 0;
}

uint32_t world_share(world_t *world, uint32_t number) {
    uint32_t share = 0;
    for (uint32_t key = 0; key < world->keys; key++) {
        share += world_owns(world, number, key);
    }
    return share;
}

// ---- what must be true ----

bkv_mover_progress_t node_progress(world_t *world, uint32_t number) {
    bkv_mover_progress_t progress;
    bkv_mover_get_progress(world->nodes[number].mover, &progress);
    return progress;
}

bkv_mover_metrics_t node_metrics(world_t *world, uint32_t number) {
    bkv_mover_metrics_t metrics;
    bkv_mover_get_metrics(world->nodes[number].mover, &metrics);
    return metrics;
}

bkv_store_metrics_t node_store(world_t *world, uint32_t number) {
    bkv_store_metrics_t metrics;
    bkv_store_metrics(world->nodes[number].store, &metrics);
    return metrics;
}

bool world_idle(world_t *world) {
    bool idle = true;
    for (uint32_t i = 0; i < NODES; i++) {
        idle = idle && (!world->nodes[i].up || node_progress(world, i).state == BKV_MOVER_IDLE);
    }
    return idle;
}

void world_settle(world_t *world) {
    EVENTUALLY(world_idle(world));
}

void world_check(world_t *world, bool all) {
    bkv_member_t members[NODES];
    uint32_t count;
    bkv_placement_t *placement = placement_new(world, members, &count);
    for (uint32_t key = 0; key < world->keys; key++) {
        uint32_t owners = owners_of(placement, key), holders = 0;
        for (uint32_t i = 0; i < NODES; i++) {
            holders |= world->nodes[i].up && node_has(world, i, key) ? 1u << i : 0;
        }
        cr_assert(!all || holders != 0, "record %u is lost", key);
        cr_assert(holders == 0 || (holders & owners) == owners, "record %u: owners %x, holders %x", key, owners, holders);
    }
    bkv_placement_destroy(placement);
}
