// cluster.h - this daemon as part of a pool: what rpc/ asks of all members' stores together.
//
//   Lookup  bkv_cluster_lookup   which records are anywhere in the pool
//   Get...  bkv_cluster_fetch    brings records here, pinned, from whichever owner answers first
//   Put     bkv_cluster_place    gives a record that was just published here to its owners
//   Drop    bkv_cluster_forget   everywhere
//   Where, Cluster, Drain        for operators, and for clients that route by key
//
// Blocks are immutable and named by what they are of, so there is nothing to keep consistent: an old view, a lost message, a
// daemon that was cut off cost misses and copies too many, never a wrong byte. Each request takes the present view (a snapshot)
// once. What comes from another daemon is validated and its checksum verified before anything here sees it.
//
// Files: cluster.c (create, join, leave, what is known), lookup.c and where.c over poll.h, fetch.c over reading.h, place.c,
// forget.c, owners.h (whom to ask), alarm.h (when it takes too long), hot.h (which copies stay), and the rooms etcd/ (its API),
// members/ (who is there), peer/ (asking one of them), move/ (repair and drain).
//
// Threads. Everything is thread-safe. `done` runs exactly once for each call, on a thread of the peers' or, when nothing had to
// be asked, on the caller's before the call returns; it must not block. Deadlines are bkv_now_ms times, UINT64_MAX: none of the
// caller's; done comes soon after them at the latest.
#ifndef BKV_CLUSTER_H
#define BKV_CLUSTER_H

#include "daemon/cluster/etcd/etcd.h"
#include "daemon/cluster/members/membership.h"
#include "daemon/cluster/move/mover.h"
#include "daemon/cluster/peer/peers.h"
#include "daemon/observe/metrics.h"

typedef struct bkv_cluster bkv_cluster_t;

typedef struct bkv_cluster_options {
    bkv_etcd_options_t etcd;
    const char *name;  // of the cluster
    bkv_member_t self; // without addresses: see bkv_cluster_join
    uint32_t replicas, lease_s;
    bkv_peers_config_t peers;
    uint64_t repair_delay_ms, repair_rate;
    uint32_t hot_copies; // reads after which a copy stays; 0: never
} bkv_cluster_options_t;

// X(name, is_counter, help)
#define BKV_CLUSTER_METRICS(X)                                                                                                 \
    X(remote_hits_total, true, "records that were not here and came from another member")                                      \
    X(remote_misses_total, true, "records that were not here and that no owner had")                                           \
    X(remote_failed_total, true, "records that could not be had in time, or came damaged")                                     \
    X(remote_hedged_total, true, "records that were asked of a second owner because the first was slow")                       \
    X(placed_total, true, "records given to all their owners when they were put")                                              \
    X(placed_short_total, true, "records put while an owner could not be reached: repair is to give it to them")               \
    X(hot_copies_total, true, "records of other owners that were read often and stayed here")

typedef struct bkv_cluster_metrics {
#define X(name, is_counter, help) uint64_t name;
    BKV_CLUSTER_METRICS(X)
#undef X
} bkv_cluster_metrics_t;

// Begins to watch, and to speak to members; is none itself yet. INVALID_ARGUMENT names the option ("cluster.etcd: ...").
bkv_status_t bkv_cluster_create(const bkv_cluster_options_t *options, bkv_cluster_t **cluster, bkv_error_t *err);

// Waits until the members are known, for at most timeout_ms; whether they are. Who asks before that is told of what is here alone.
bool bkv_cluster_await(bkv_cluster_t *cluster, uint32_t timeout_ms);

// Registers this daemon, reached at `address` (host:port), with these transports, and goes on trying for as long as etcd cannot be
// reached. Once. INVALID_ARGUMENT: the address is too long.
bkv_status_t bkv_cluster_join(bkv_cluster_t *cluster, const char *address, const char *const *transports, size_t count,
                              bkv_error_t *err);

// Takes the registration back, so that others go round this daemon from now on, and waits for at most timeout_ms; it goes on
// answering.
void bkv_cluster_leave(bkv_cluster_t *cluster, uint32_t timeout_ms);

// Ends what is under way (BUSY, absent) and frees. Before the store. NULL: nothing.
void bkv_cluster_destroy(bkv_cluster_t *cluster);

void bkv_cluster_set_limits(bkv_cluster_t *cluster, uint64_t repair_delay_ms, uint64_t repair_rate, uint32_t hot_copies);

// A metrics source: BKV_CLUSTER_METRICS, those of membership, mover and peers, and a few of each peer.
void bkv_cluster_collect(void *cluster, bkv_metric_emit_t emit, void *sink);

// Whether this daemon is a member in good standing: what health says of "balancekv.cluster".
bool bkv_cluster_connected(bkv_cluster_t *cluster);

// ---- records of the pool ----

typedef void (*bkv_cluster_done_t)(void *user);

// Which of names are anywhere: have[i] is set where an owner says so. The caller has filled in what is here, which is not asked
// for again. Never fails: what nobody says to have in time is absent.
void bkv_cluster_lookup(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms, bool *have,
                        bkv_cluster_done_t done, void *user);

// found.status OK: pinned, and the caller's to unpin. NOT_FOUND: no owner has it. DATA_LOSS: it came damaged from all that have
// it. RESOURCE_EXHAUSTED: no room here for it, as all is pinned. DEADLINE_EXCEEDED, BUSY: an owner that may have it did not
// answer.
typedef struct bkv_found {
    bkv_status_t status;
    bkv_pin_t pin;
} bkv_found_t;

// Brings records here. Those with found[i].status OK on entry (and whatever pin) are left alone; all others, say NOT_FOUND, are
// looked for here first and then at their owners. names and found must live until done. What has come is verified.
void bkv_cluster_fetch(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                       bkv_found_t *found, bkv_cluster_done_t done, void *user);

// Whoever had a record brought here has used it, and holds no pin on it any more: unless it is read often it leaves again. Only a
// copy does, and one that nobody else holds; see hot.h.
void bkv_cluster_used(bkv_cluster_t *cluster, const bkv_name_t *name);

// Gives a resident record to its owners. replicas: how many of these have it now, this daemon counted if it is one; fewer than
// there should be when one could not be reached within the peer timeout or the deadline, and then repair has been told. 0: there
// is no other member, or no owner has it. Where this daemon is no owner and all owners have it, it is a copy from now on.
// bytes: of the record. known: it was here before this Put, so that its owners have it, too, as a rule: they are asked first.
typedef void (*bkv_placed_t)(void *user, uint32_t replicas);
void bkv_cluster_place(bkv_cluster_t *cluster, const bkv_name_t *name, uint64_t bytes, bool known, uint64_t deadline_ms,
                       bkv_placed_t done, void *user);

// Forgets records here and at all members, as copies may be anywhere; had[i]: it was somewhere.
void bkv_cluster_forget(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms, bool *had,
                        bkv_cluster_done_t done, void *user);

// The answering end of one-sided reads, for the Peer service; NULL: this daemon has no RDMA.
bkv_serve_t *bkv_cluster_serve(const bkv_cluster_t *cluster);

// ---- for operators and clients that route ----

// A copy of what is known, to be freed with bkv_cluster_report_free. RESOURCE_EXHAUSTED: no memory.
typedef struct bkv_cluster_report {
    const char *name; // the cluster's own
    char self[BKV_MEMBER_NAME_MAX];
    bkv_membership_status_t membership;
    bkv_mover_progress_t mover;
    uint64_t repaired_bytes;
    uint64_t view;
    int64_t revision;
    uint64_t seed;
    uint32_t replicas, count;
    bkv_member_t *members;     // [count]
    bkv_peer_health_t *health; // [count]; of this daemon itself zero
} bkv_cluster_report_t;

bkv_status_t bkv_cluster_get_report(bkv_cluster_t *cluster, bkv_cluster_report_t *report, bkv_error_t *err);
void bkv_cluster_report_free(bkv_cluster_report_t *report);

// Of one key: its owners, the first one first, and which of them, and of this daemon, have it.
typedef struct bkv_whereabouts {
    uint32_t owner_count, holder_count;
    char owners[BKV_REPLICAS_MAX][BKV_MEMBER_NAME_MAX];
    char holders[BKV_REPLICAS_MAX + 1][BKV_MEMBER_NAME_MAX];
    uint64_t bytes;
} bkv_whereabouts_t;

// ask: whether holders are wanted; without it done runs at once.
void bkv_cluster_where(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, bool ask, uint64_t deadline_ms,
                       bkv_whereabouts_t *where, bkv_cluster_done_t done, void *user);

// Of this daemon alone (member "" or its id), or passed on to that member. NOT_FOUND: no such member.
void bkv_cluster_drain(bkv_cluster_t *cluster, const char *member, bkv_drain_order_t order, uint64_t deadline_ms,
                       bkv_peer_drain_t done, void *user);

// The same of this daemon itself, at once: what its Peer service answers.
void bkv_cluster_drain_self(bkv_cluster_t *cluster, bkv_drain_order_t order, bkv_drain_progress_t *progress);

#endif
