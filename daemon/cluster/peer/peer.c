// peer.c - one other member: the channel to it, how long it lives, and what is said when it falls silent or answers again.
#include "daemon/cluster/peer/internal.h"

#include "daemon/cluster/peer/verbs.h"
#include "daemon/observe/log.h"
#include "proto/address.h"
#include "proto/grpc_arg.h"

#include <stdlib.h>
#include <string.h>

// Records come in chunks of about 1 MiB; the longest other answer is a Have's.
#define RECEIVE_MAX (16 << 20)

// A daemon that was started again is found within a second. CONNECT bounds one try, handshakes included.
#define RECONNECT_FIRST_MS   100
#define RECONNECT_LONGEST_MS 1000
#define CONNECT_MS           2000

// Keepalive sets TCP_USER_TIMEOUT to its timeout: a connection that eats what is written ends after that, and gRPC lets go of
// what it was to send.
#define PING_MS         5000
#define PING_TIMEOUT_MS 5000

// ---- address ----

static const char *address_of(const bkv_member_t *member) {
    for (uint32_t i = 0; i < member->address_count; i++) {
        if (bkv_address_has_host(member->addresses[i]) && bkv_address_has_port(member->addresses[i])) {
            return member->addresses[i];
        }
    }
    return NULL;
}

// ---- channel ----

static grpc_channel *make_channel(const bkv_peers_t *peers, const char *address) {
    grpc_arg args[] = {
        bkv_int_arg(GRPC_ARG_ENABLE_HTTP_PROXY, 0),
        bkv_int_arg(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
        bkv_int_arg(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL,
                    1),                          // a member that starts again is another peer, with a connection of its own
        bkv_int_arg(GRPC_ARG_ENABLE_RETRIES, 0), // who asks decides; gRPC's own would hold on to payloads
        bkv_int_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, RECEIVE_MAX),
        bkv_int_arg(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1),
        bkv_int_arg(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0), // nobody compresses here but to make us run out of memory
        bkv_int_arg(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, RECONNECT_FIRST_MS),
        bkv_int_arg(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, RECONNECT_LONGEST_MS),
        bkv_int_arg(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, CONNECT_MS), // despite its name
        bkv_int_arg(GRPC_ARG_KEEPALIVE_TIME_MS, PING_MS),
        bkv_int_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, PING_TIMEOUT_MS),
        bkv_int_arg(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        bkv_string_arg(GRPC_ARG_PRIMARY_USER_AGENT_STRING, "balancekvd/" BKV_VERSION),
        bkv_string_arg(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, peers->tls_name),
    };
    const grpc_channel_args channel_args = {.num_args = sizeof(args) / sizeof(args[0]) - (peers->tls_name != NULL ? 0 : 1),
                                            .args = args};
    return grpc_channel_create(address, peers->credentials, &channel_args);
}

// ---- life ----

bkv_peer_t *bkv_peer_new(bkv_peers_t *peers, const bkv_member_t *member) {
    const char *address = address_of(member);
    bkv_peer_t *peer = address != NULL ? calloc(1, sizeof(*peer)) : NULL;
    if (peer == NULL) {
        return NULL;
    }
    peer->peers = peers;
    memcpy(peer->id, member->place.id, sizeof(peer->id));
    peer->epoch = member->place.epoch;
    for (uint32_t i = 0; i < member->transport_count; i++) {
        peer->offers_verbs = peer->offers_verbs || strcmp(member->transports[i], "verbs") == 0;
    }
    peer->channel = make_channel(peers, address);
    atomic_init(&peer->refs, 1);
    bkv_pulse_init(&peer->pulse, peers->timeout_ms);
    return peer;
}

bkv_peer_t *bkv_peer_hold(bkv_peer_t *peer) {
    atomic_fetch_add(&peer->refs, 1);
    return peer;
}

void bkv_peer_release(bkv_peer_t *peer) {
    if (peer == NULL || atomic_fetch_sub(&peer->refs, 1) != 1) {
        return;
    }
    if (bkv_pulse_suspected(&peer->pulse)) {
        atomic_fetch_sub(&peer->peers->counters.peers_suspected, 1);
    }
    bkv_peer_verbs_forget(peer);
    grpc_channel_destroy(peer->channel);
    bkv_pulse_deinit(&peer->pulse);
    free(peer);
}

// ---- how it answers ----

void bkv_peer_get_health(const bkv_peer_t *peer, bkv_peer_health_t *health) {
    bkv_peer_t *asked = (bkv_peer_t *)(uintptr_t)peer; // for its locks and counters
    *health = (bkv_peer_health_t){
        .fetched_bytes = atomic_load(&asked->fetched_bytes),
        .stored_bytes = atomic_load(&asked->stored_bytes),
        .failures = atomic_load(&asked->failures),
    };
    bkv_pulse_read(&asked->pulse, &health->suspected, &health->latency_us, &health->patience_us);
}

void bkv_peer_heard(bkv_peer_t *peer, uint64_t now_ms) {
    if (bkv_pulse_heard(&peer->pulse, now_ms)) {
        atomic_fetch_sub(&peer->peers->counters.peers_suspected, 1);
        bkv_log(BKV_LOG_INFO, 0, "member %s answers again", peer->id);
    }
}

static void suspected(bkv_peer_t *peer, const char *why) {
    atomic_fetch_add(&peer->peers->counters.peers_suspected, 1);
    bkv_log(BKV_LOG_WARN, 0, "member %s is passed over until it answers: %.200s", peer->id, why);
}

void bkv_peer_unheard(bkv_peer_t *peer, uint64_t since_ms, uint64_t now_ms) {
    if (bkv_pulse_silent(&peer->pulse, since_ms, now_ms)) {
        suspected(peer, "it has been asked and says nothing");
    }
}

void bkv_peer_unreachable(bkv_peer_t *peer, uint64_t now_ms, const char *why) {
    if (bkv_pulse_unreachable(&peer->pulse, now_ms)) {
        suspected(peer, why);
    }
}
