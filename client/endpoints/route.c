// route.c - see route.h: the map of the cluster, how it is learned, and which owners keys go to. How parts of a call become one
// again is fan.c's.
#include "client/client.h"
#include "proto/placement.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define NS_PER_MS 1000000ull

// When the members are asked for again: while all is well; when nobody could say; when an endpoint went down; where there is no
// cluster.
#define AGAIN_MS  10000
#define FAILED_MS 1000
#define STALE_MS  200
#define ALONE_MS  30000
#define ASK_MS    5000 // the deadline

_Static_assert(BKV_CALL_OWNERS >= BKV_REPLICAS_MAX, "a call can have all owners");

// ---- the map ----

typedef struct node {
    char *address;                   // where it is reached if `endpoint` is not known yet; NULL: nowhere
    bkv_client_endpoint_t *endpoint; // under the client's lock
} node_t;

struct bkv_client_map {
    uint32_t users; // under the client's lock
    bkv_placement_t *placement;
    uint64_t view, boot_epoch; // as told by
    const bkv_client_endpoint_t *by;
    uint32_t count;
    node_t nodes[];
};

static void map_free(bkv_client_map_t *map) {
    if (map != NULL) {
        for (uint32_t i = 0; i < map->count; i++) {
            free(map->nodes[i].address);
        }
        bkv_placement_destroy(map->placement);
        free(map);
    }
}

// One user less. The lock must be held; a map that is returned is to be freed without it.
static bkv_client_map_t *map_drop(bkv_client_map_t *map) {
    return map != NULL && --map->users == 0 ? map : NULL;
}

static bool copy_name(char *out, const char *name) {
    size_t length = strnlen(name, BKV_MEMBER_NAME_MAX);
    memcpy(out, name, length < BKV_MEMBER_NAME_MAX ? length + 1 : 0);
    return length < BKV_MEMBER_NAME_MAX;
}

// Nothing that a daemon says is trusted: placement.c checks the rest.
static bkv_placement_t *placement_of(const Balancekv__V1__ClusterResponse *response) {
    if (response->n_members == 0 || response->n_members > BKV_MEMBERS_MAX) {
        return NULL;
    }
    bkv_placement_member_t *members = calloc(response->n_members, sizeof *members);
    bkv_placement_t *placement = NULL;
    bool good = members != NULL;
    for (size_t i = 0; good && i < response->n_members; i++) {
        const Balancekv__V1__ClusterMember *member = response->members[i];
        good = copy_name(members[i].id, member->id) && copy_name(members[i].domain, member->domain);
        members[i].epoch = member->epoch;
        members[i].weight = member->weight;
        members[i].draining = member->draining;
    }
    bkv_placement_config_t config = {
        .members = members, .count = (uint32_t)response->n_members, .replicas = response->replicas, .seed = response->seed};
    if (good && bkv_placement_create(&config, NULL, &placement, NULL) != BKV_OK) {
        placement = NULL;
    }
    free(members);
    return placement;
}

static bkv_client_map_t *map_new(const Balancekv__V1__ClusterResponse *response, bkv_client_endpoint_t *by) {
    bkv_placement_t *placement = placement_of(response);
    bkv_client_map_t *map = placement != NULL ? calloc(1, sizeof *map + response->n_members * sizeof map->nodes[0]) : NULL;
    if (map == NULL) {
        bkv_placement_destroy(placement);
        return NULL;
    }
    map->users = 1;
    map->placement = placement;
    map->view = response->view;
    map->boot_epoch = response->boot_epoch;
    map->by = by;
    map->count = (uint32_t)response->n_members;
    for (uint32_t i = 0; i < map->count; i++) {
        const Balancekv__V1__ClusterMember *member = response->members[i];
        bool self = strcmp(member->id, response->self) == 0 && by->listed;
        map->nodes[i].endpoint = self ? by : bkv_client_endpoint_find(by->client, member->addresses, member->n_addresses);
        map->nodes[i].address = member->n_addresses > 0 ? strdup(member->addresses[0]) : NULL;
    }
    return map;
}

// Whom to ask after when it is down. The lock must be held.
static void mark_wanted(bkv_client_t *client, const bkv_client_map_t *map) {
    for (uint32_t i = 0; i < client->endpoint_count; i++) {
        client->endpoints[i]->wanted = false;
    }
    for (uint32_t i = 0; map != NULL && i < map->count; i++) {
        if (map->nodes[i].endpoint != NULL) {
            map->nodes[i].endpoint->wanted = true;
        }
    }
}

// ---- learning it ----

typedef struct ask_call {
    bkv_call_t call; // first
    Balancekv__V1__ClusterResponse *response;
} ask_call_t;

static void ask_clean(bkv_call_t *call) {
    ask_call_t *ask = (ask_call_t *)call;
    if (ask->response != NULL) {
        balancekv__v1__cluster_response__free_unpacked(ask->response, NULL);
        ask->response = NULL;
    }
}

static bkv_status_t ask_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    ask_clean(call); // of an earlier attempt
    ask_call_t *ask = (ask_call_t *)call;
    ask->response = (Balancekv__V1__ClusterResponse *)bkv_client_unpack(&balancekv__v1__cluster_response__descriptor, message);
    return ask->response != NULL ? BKV_OK : bkv_fail(err, BKV_INTERNAL, "Cluster: the response is not a ClusterResponse");
}

static const bkv_call_kind_t ask_kind = {
    .method = BKV_CLIENT_SERVICE "Cluster",
    .shape = BKV_UNARY,
    .take = ask_take,
    .clean = ask_clean,
};

static bool same(const bkv_client_map_t *map, const Balancekv__V1__ClusterResponse *response, const bkv_client_endpoint_t *by) {
    return map != NULL && map->by == by && map->view == response->view && map->boot_epoch == response->boot_epoch;
}

static void ask_over(bkv_call_t *call) {
    bkv_client_t *client = call->client;
    bkv_client_route_t *route = &client->route;
    const Balancekv__V1__ClusterResponse *response = ((ask_call_t *)call)->response;
    bkv_status_t status = call->error.status;
    bool alone = status == BKV_FAILED_PRECONDITION || status == BKV_UNIMPLEMENTED;
    pthread_mutex_lock(&client->lock);
    bool keep = status == BKV_OK ? same(route->map, response, call->endpoint) : !alone;
    pthread_mutex_unlock(&client->lock);
    bkv_client_map_t *fresh = !keep && status == BKV_OK ? map_new(response, call->endpoint) : NULL, *old = NULL;
    uint64_t ms = alone ? ALONE_MS : status == BKV_OK && (keep || fresh != NULL) ? AGAIN_MS : FAILED_MS;
    pthread_mutex_lock(&client->lock);
    if (!keep) {
        old = map_drop(route->map);
        route->map = fresh;
        mark_wanted(client, fresh);
    }
    route->asking = false;
    route->ask_ns = bkv_client_now_ns() + ms * NS_PER_MS;
    pthread_mutex_unlock(&client->lock);
    map_free(old);
    bkv_call_free(call);
}

static void ask(bkv_client_t *client) {
    bkv_call_t *call = bkv_call_new(sizeof(ask_call_t), &ask_kind, client, NULL, ASK_MS);
    if (call != NULL) {
        bkv_call_detach(call, ask_over);
        return;
    }
    pthread_mutex_lock(&client->lock);
    client->route.asking = false;
    pthread_mutex_unlock(&client->lock);
}

void bkv_client_route_stale(bkv_client_t *client) {
    uint64_t soon_ns = client->route.asked_ns + STALE_MS * NS_PER_MS;
    if (client->route.ask_ns > soon_ns) {
        client->route.ask_ns = soon_ns;
    }
}

void bkv_client_route_deinit(bkv_client_t *client) {
    map_free(client->route.map);
    client->route.map = NULL;
}

// The map there is, with one user more; and asks for another when it is time.
static bkv_client_map_t *map_use(bkv_client_t *client) {
    bkv_client_route_t *route = &client->route;
    uint64_t now_ns = bkv_client_now_ns();
    pthread_mutex_lock(&client->lock);
    bool due = !route->asking && now_ns >= route->ask_ns && !client->closing;
    if (due) {
        route->asking = true;
        route->asked_ns = now_ns;
        client->live_count++; // stays until that has been started
    }
    bkv_client_map_t *map = route->map;
    if (map != NULL) {
        map->users++;
    }
    pthread_mutex_unlock(&client->lock);
    if (due) {
        ask(client);
        bkv_client_leave(client);
    }
    return map;
}

static void map_leave(bkv_client_t *client, bkv_client_map_t *map) {
    pthread_mutex_lock(&client->lock);
    bkv_client_map_t *over = map_drop(map);
    pthread_mutex_unlock(&client->lock);
    map_free(over);
}

// ---- owners of keys ----

// A node's endpoint, made if need be; NULL: there is none, or it is down.
static bkv_client_endpoint_t *endpoint_of(bkv_client_t *client, node_t *node) {
    pthread_mutex_lock(&client->lock);
    bkv_client_endpoint_t *endpoint = node->endpoint;
    bool down = endpoint != NULL && endpoint->down;
    pthread_mutex_unlock(&client->lock);
    if (endpoint == NULL && node->address != NULL && (endpoint = bkv_client_endpoint_learn(client, node->address)) != NULL) {
        pthread_mutex_lock(&client->lock);
        node->endpoint = endpoint;
        endpoint->wanted = true;
        pthread_mutex_unlock(&client->lock);
    }
    return down ? NULL : endpoint;
}

static uint32_t owners_of(bkv_client_t *client, bkv_client_map_t *map, const bkv_key_t *key,
                          bkv_client_endpoint_t *owners[BKV_CALL_OWNERS]) {
    uint16_t members[BKV_REPLICAS_MAX];
    uint32_t count = bkv_placement_owners(map->placement, key, members), found = 0;
    for (uint32_t i = 0; i < count; i++) {
        bkv_client_endpoint_t *endpoint = endpoint_of(client, &map->nodes[members[i]]);
        if (endpoint != NULL) {
            owners[found++] = endpoint;
        }
    }
    return found;
}

#define NOBODY UINT32_MAX // as a first owner's number

// The parts of keys whose first owners are known: counted first, then filled. part_of has an entry for each endpoint, and one for
// nobody.
typedef struct splitter {
    bkv_client_t *client;
    bkv_client_map_t *map;
    const bkv_key_t *keys;
    size_t count;
    uint32_t *first;                         // [count], an endpoint's number, or NOBODY
    uint32_t part_of[BKV_ENDPOINTS_MAX + 1]; // plus one; 0: none yet
} splitter_t;

static uint32_t *part_at(splitter_t *splitter, uint32_t first) {
    return &splitter->part_of[first == NOBODY ? BKV_ENDPOINTS_MAX : first];
}

static size_t count_parts(splitter_t *splitter) {
    size_t parts = 0;
    for (size_t i = 0; i < splitter->count; i++) {
        bkv_client_endpoint_t *owners[BKV_CALL_OWNERS];
        uint32_t found = owners_of(splitter->client, splitter->map, &splitter->keys[i], owners);
        splitter->first[i] = found > 0 ? owners[0]->number : NOBODY;
        uint32_t *part = part_at(splitter, splitter->first[i]);
        if (*part == 0) {
            *part = (uint32_t)++parts;
        }
    }
    return parts;
}

// Everything in one piece of memory.
static bkv_client_split_t *split_new(splitter_t *splitter, size_t parts) {
    size_t head = sizeof(bkv_client_split_t) + parts * sizeof(bkv_client_part_t);
    bkv_client_split_t *split = calloc(1, head + splitter->count * (sizeof(size_t) + sizeof(bkv_key_t)));
    if (split == NULL) {
        return NULL;
    }
    split->count = parts;
    for (size_t i = 0; i < splitter->count; i++) {
        split->parts[*part_at(splitter, splitter->first[i]) - 1].count++;
    }
    size_t *numbers = (size_t *)(void *)((char *)split + head);
    bkv_key_t *keys = (bkv_key_t *)(void *)(numbers + splitter->count);
    for (size_t i = 0; i < parts; i++) {
        split->parts[i].numbers = numbers;
        split->parts[i].keys = keys;
        numbers += split->parts[i].count;
        keys += split->parts[i].count;
        split->parts[i].count = 0;
    }
    return split;
}

static void split_fill(splitter_t *splitter, bkv_client_split_t *split) {
    for (size_t i = 0; i < splitter->count; i++) {
        bkv_client_part_t *part = &split->parts[*part_at(splitter, splitter->first[i]) - 1];
        if (part->count == 0) {
            part->owner_count = owners_of(splitter->client, splitter->map, &splitter->keys[i], part->owners);
        }
        assert(part->numbers != NULL);
        part->numbers[part->count] = i;
        part->keys[part->count++] = splitter->keys[i];
    }
}

bkv_client_split_t *bkv_client_route_split(bkv_client_t *client, const bkv_key_t *keys, size_t count) {
    bkv_client_map_t *map = client->options.route ? map_use(client) : NULL;
    if (map == NULL) {
        return NULL;
    }
    splitter_t *splitter = calloc(1, sizeof *splitter);
    uint32_t *first = calloc(count, sizeof *first);
    bkv_client_split_t *split = NULL;
    if (splitter != NULL && first != NULL) {
        *splitter = (splitter_t){.client = client, .map = map, .keys = keys, .count = count, .first = first};
        split = split_new(splitter, count_parts(splitter));
    }
    if (split != NULL) {
        split_fill(splitter, split);
    }
    free(first);
    free(splitter);
    map_leave(client, map);
    return split;
}

void bkv_client_route_to(bkv_call_t *call, const bkv_client_part_t *part) {
    memcpy(call->owners, part->owners, sizeof call->owners);
    call->owner_count = part->owner_count;
}
