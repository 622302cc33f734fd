// peers.h - the other daemons of the cluster: a channel to each, what can be asked of it, and how it has answered so far.
//
// What it is: the asking end of proto/peer.proto, over gRPC, and where both ends have RDMA by one-sided reads (verbs.c); and for
// each member how long it takes to answer, and whether it does. What it is not: it knows no placement. Whom to ask, and what to
// do about an answer, is the caller's.
//
// A peer is one start of a member, its id and epoch. Peers are made when first asked for and closed when no view has them any
// more (bkv_peers_keep); who has a reference may go on using one, its calls then fail.
//
// Silence. A call of which nothing comes for timeout_ms is given up. A member that has answered nothing for as long while it was
// asked is suspected: calls to it are refused with BUSY at once, so that one dead member costs a request or two and not every
// one, until it has answered a probe; those are sent now and then. A call that fails because nobody listens makes it suspected
// too. Suspicion is this daemon's own affair; who is a member is for etcd to say.
//
// Threads. Everything here is thread-safe. Callbacks run on threads of the peers', those of one call one after the other; they
// may start further calls, and must not block. Each accepted start leads to exactly one `done`, soon after its deadline at the
// latest; after a start that was refused there is none. Deadlines are bkv_now_ms times.
//
// Nothing that a member sends is trusted: lengths, counts and indices are checked here, records by who takes them.
#ifndef BKV_PEERS_H
#define BKV_PEERS_H

#include "daemon/cluster/members/view.h"
#include "daemon/cluster/peer/serve.h"
#include "daemon/store/store.h"

typedef struct bkv_peers bkv_peers_t;
typedef struct bkv_peer bkv_peer_t;
typedef struct bkv_peer_call bkv_peer_call_t;

// Names in one message, and records in one Store, among daemons: the same for all, whatever limits.max_batch each of them has.
#define BKV_PEER_BATCH 1024u

typedef struct bkv_peers_config {
    bkv_store_t *store;             // outlives the peers: Store reads from it, one-sided reads need it registered
    const char *self;               // this daemon's id
    const char *tls_ca;             // PEM file of the CAs of members' certificates; NULL or "": no TLS
    const char *tls_cert, *tls_key; // this daemon's own
    const char *tls_name;           // the DNS name that every member's certificate carries
    uint32_t timeout_ms;            // see above
    uint32_t max_batch;             // names in one message: BKV_PEER_BATCH; larger questions are split
    const char *verbs_device;       // "auto", "off" or a name, as of [transport]; with its port and GID
    uint32_t verbs_port;
    int verbs_gid;
} bkv_peers_config_t;

// X(name, is_counter, help)
#define BKV_PEERS_METRICS(X)                                                                                                   \
    X(peers, false, "other members that this daemon has spoken to")                                                            \
    X(peers_suspected, false, "of these, those that did not answer lately")                                                    \
    X(peer_calls_total, true, "questions to other members")                                                                    \
    X(peer_calls_failed_total, true, "of these, those that failed or were not answered in time")                               \
    X(peer_fetched_total, true, "records read from other members")                                                             \
    X(peer_fetched_bytes_total, true, "their bytes")                                                                           \
    X(peer_read_total, true, "of them, those that came by RDMA READ")                                                          \
    X(peer_stored_total, true, "records sent to other members, and taken")                                                     \
    X(peer_stored_bytes_total, true, "their bytes")

typedef struct bkv_peers_metrics {
#define X(name, is_counter, help) uint64_t name;
    BKV_PEERS_METRICS(X)
#undef X
} bkv_peers_metrics_t;

// INVALID_ARGUMENT names the option ("cluster.peer_ca: ...").
bkv_status_t bkv_peers_create(const bkv_peers_config_t *config, bkv_peers_t **peers, bkv_error_t *err);

// Cancels what is under way and waits until no callback runs any more and nothing of the store is referred to: where a peer has
// stopped to read half-way through a record, until the connection is given up, some 5 s. All references must have been given
// back. NULL: nothing.
void bkv_peers_destroy(bkv_peers_t *peers);

// Closes peers that are in neither view (each may be NULL). Call it when the present view, or the one that repair starts from,
// has changed.
void bkv_peers_keep(bkv_peers_t *peers, const bkv_view_t *view, const bkv_view_t *other);

// A reference to the peer that a member of a view is; NULL: without memory, or a member without a usable address.
bkv_peer_t *bkv_peers_get(bkv_peers_t *peers, const bkv_member_t *member);
bkv_peer_t *bkv_peer_hold(bkv_peer_t *peer);
void bkv_peer_release(bkv_peer_t *peer); // NULL: nothing

void bkv_peers_metrics(bkv_peers_t *peers, bkv_peers_metrics_t *metrics);

// The answering end of one-sided reads, which shares its device with the asking one; NULL: this daemon has no RDMA.
bkv_serve_t *bkv_peers_serve(const bkv_peers_t *peers);

// ---- how it answers ----

typedef struct bkv_peer_health {
    bool suspected;
    uint64_t latency_us;  // of a small question, smoothed; 0: none has been answered yet
    uint64_t patience_us; // an answer that takes longer than this is slow for this peer (about its 95th percentile, 1 ms at
                          // least, timeout_ms at most): time to ask another one too
    uint64_t fetched_bytes, stored_bytes, failures; // so far
} bkv_peer_health_t;

void bkv_peer_get_health(const bkv_peer_t *peer, bkv_peer_health_t *health);

// ---- questions ----
// Statuses of error: DEADLINE_EXCEEDED, BUSY (cannot be reached, or not now), PERMISSION_DENIED and UNAUTHENTICATED (the cluster's
// certificates are not in order), INTERNAL (it answered nonsense), CANCELLED. A start is refused with BUSY (suspected),
// RESOURCE_EXHAUSTED (no memory) or CANCELLED (the peers are being destroyed).

// bytes: [count], of the records; 0: not there. NULL when error->status is not BKV_OK.
typedef void (*bkv_peer_have_t)(void *user, const bkv_error_t *error, const uint64_t *bytes);
bkv_status_t bkv_peer_have(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                           bkv_peer_have_t done, void *user, bkv_error_t *err);

// What a fetch is told, per index into its names. Every index is ended exactly once before done, in any order.
typedef struct bkv_fetch_sink {
    // The peer has it. Returns where it is to go: 64-byte aligned, room for `bytes` rounded up to 64, and of the arena of
    // config.store, as RDMA may go there. It must stay until the index has ended. NULL: it is not wanted (any more).
    void *(*begin)(void *user, uint32_t index, uint64_t tenant, uint64_t bytes, uint64_t ttl_ms);
    // OK: all of it lies there, and nobody has looked at it. NOT_FOUND: the peer has it not. Else it broke off; nothing is
    // written there any more.
    void (*end)(void *user, uint32_t index, const bkv_error_t *error);
    void (*done)(void *user, const bkv_error_t *error);
} bkv_fetch_sink_t;

// *call (may be NULL) is good until done has returned. sink must live until then; names are copied.
bkv_status_t bkv_peer_fetch(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                            const bkv_fetch_sink_t *sink, void *user, bkv_peer_call_t **call, bkv_error_t *err);

// Gives a fetch up: what has not ended ends with CANCELLED soon. It may end otherwise just now.
void bkv_peer_cancel(bkv_peer_call_t *call);

// results: [count]: OK (taken), ALREADY_EXISTS (it had it), NOT_FOUND (it is not in this store any more, and was not sent), or
// why it was refused. NULL when error->status is not BKV_OK. Records are pinned here for as long as gRPC refers to them.
typedef void (*bkv_peer_store_t)(void *user, const bkv_error_t *error, const bkv_status_t *results);
bkv_status_t bkv_peer_store(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                            bkv_peer_store_t done, void *user, bkv_error_t *err);

// had: [count]; NULL when error->status is not BKV_OK.
typedef void (*bkv_peer_forget_t)(void *user, const bkv_error_t *error, const bool *had);
bkv_status_t bkv_peer_forget(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                             bkv_peer_forget_t done, void *user, bkv_error_t *err);

// As in proto/peer.proto.
typedef struct bkv_drain_progress {
    bool draining, done;
    uint64_t left_keys, left_bytes, moved_keys, moved_bytes;
    uint64_t settled;
} bkv_drain_progress_t;

typedef enum bkv_drain_order { BKV_DRAIN_ASK, BKV_DRAIN_BEGIN, BKV_DRAIN_UNDO } bkv_drain_order_t;

typedef void (*bkv_peer_drain_t)(void *user, const bkv_error_t *error, const bkv_drain_progress_t *progress);
bkv_status_t bkv_peer_drain(bkv_peer_t *peer, bkv_drain_order_t order, uint64_t deadline_ms, bkv_peer_drain_t done, void *user,
                            bkv_error_t *err);

#endif
