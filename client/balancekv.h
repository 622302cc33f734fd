// balancekv.h - the C client of balancekvd: link with -lbalancekv (pkg-config balancekv).
//
// A client is a connection that mends itself, to one daemon or to several of which it uses the first that works. What it does about
// failures:
//   - No connection, a connection lost, the daemon busy or draining: the call is tried again after a pause (10 ms, doubling
//     to 500 ms, half of it random) until it works or its deadline comes. Every operation may be repeated: Put is idempotent,
//     a Pin whose answer was lost leaves a lease that ends by itself, a Drop then counts what its last attempt dropped. A
//     call that never got through ends with BKV_BUSY and the last reason. Only bkv_ping is not tried again.
//   - The daemon was restarted: specs are opened again by themselves, unseen but for the time it takes.
//   - The daemon is there but does not answer (or is stopped): BKV_DEADLINE_EXCEEDED, in time, whatever was under way.
//   - There are several endpoints: one that cannot be reached, loses the connection, is draining, stays busy for some 0.1 s or does
//     not answer is left for the next, within the call's deadline. A daemon that is at work on a call is not silent: where nothing
//     is heard for an eighth of the call's timeout (0.05 to 0.2 s), it is asked for its health, and has a quarter of the timeout
//     (at most 1 s) to say so. Later calls go to the first endpoint, in the order given, that works; those that do not are asked
//     every second. Specs are opened at each by themselves. Pins and folds are the daemon's own that made them; bkv_unpin finds it.
// Every other status is the daemon's answer and is returned at once. Every call takes a deadline in milliseconds (0: the
// client's default).
//
// Every function is thread-safe. There is no global state of ours; gRPC's own threads start with the first client and stay
// until the process ends (do not fork between creating a client and exec). A client has one thread, with all signals blocked,
// and for a moment another while it attaches memory; callers that wait do that thread's work meanwhile.
//
// Payloads and records move through memory shared with the daemon where both ends have it: shm on the same host, RDMA ("verbs")
// from another. It is attached when first wanted, kept, and attached anew after a restart of the daemon; what it cannot hold goes
// inline, in messages, and so does everything small. A payload is copied into it once, or never where it is made there
// (bkv_buffer_get); a record that is got lies in it until it is freed. After a call that ended without the daemon's answer
// (deadline, cancelled, connection lost), what it used of that memory is not used again, since the daemon may still be at it.
//
// In a cluster every daemon answers for all. With `route` in the options the client asks the owners of the blocks itself: Lookups and
// Gets go, in parts, to the daemons that own the keys, whose addresses it learns from the one it was given, and come back as one. A
// Put goes to an owner only from a client that has no daemon on its own host, to which it would rather leave the compression. An
// owner that does not answer is left for the next one, and in the end for the endpoints of the list. This saves the way through the
// local daemon for records that it does not have; where most of them are there, go without it.
//
// Synchronous calls are the asynchronous ones waited for. Asynchronous: bkv_queue_t is a completion queue with a file
// descriptor (eventfd) for any event loop; bkv_*_submit starts a call with a tag, bkv_queue_poll hands back completions.
//
// Compression without a daemon (codec.h), reading records (summary.h) and attention over them (codec.h) are in the same
// library. client/examples/put_get.c shows it all.
#ifndef BALANCEKV_H
#define BALANCEKV_H

#include "codec.h"
#include "cool.h"
#include "seal.h"
#include "status.h"
#include "summary.h"

#ifdef __cplusplus
extern "C" {
#endif

#define BKV_DEFAULT_ENDPOINT "unix:/run/balancekv/balancekvd.sock"

typedef struct bkv_client bkv_client_t;
typedef struct bkv_queue bkv_queue_t;

typedef struct bkv_client_options {
    // "unix:/path" or "host:port", or several of them (16 at most), separated by commas, the preferred one first; NULL: $BKV_ENDPOINT,
    // else BKV_DEFAULT_ENDPOINT.
    const char *endpoint;
    uint32_t timeout_ms; // deadline of calls that give 0; 0: 10,000
    const char
        *tls_ca; // PEM file of the CA that signs the daemon; NULL: no TLS. With several endpoints, for those of host:port
    const char *tls_cert; // PEM file of this client's certificate (mTLS); NULL: none
    const char *tls_key;
    const char *tls_name; // name to expect in the daemon's certificate; NULL: the endpoint's host

    // How payloads move: "inline", "shm" (with endpoints that are unix sockets, if there are any) or "verbs"; NULL: $BKV_TRANSPORT, else "auto", the best that both ends have. What "auto"
    // cannot have goes inline, and bkv_transports says why; one asked for by name that cannot be had is UNIMPLEMENTED.
    const char *transport;
    uint64_t
        window_bytes; // of memory shared with each daemon for it, taken with the first use; 0: 256 MiB. An eighth where only
                      // routing knows the daemon
    const char *verbs_device; // RDMA device as "NAME[:PORT[:GID INDEX]]"; NULL: the first with an active port

    bool route; // in a cluster: ask the daemons that own the blocks themselves, see above
} bkv_client_options_t;

// A model's cache, as in proto/balancekv.proto's Spec; zero fields take the same defaults.
typedef struct bkv_spec {
    const char *model;
    uint32_t layers, kv_heads, key_dim, value_dim;
    bkv_dtype_t dtype;
    uint32_t block_tokens;
    const char *tenant; // NULL: the default tenant
    uint32_t tp_rank, tp_size;
    bkv_codec_t codec; // 0: balance
    uint32_t rate, sink_tokens;
    bool no_sink;
    uint64_t seed;
    const uint8_t *shares; // share_count bytes, read during bkv_open: layers * kv_heads, each 1..255, or none
    size_t share_count;
} bkv_spec_t;

typedef struct bkv_limits {
    uint64_t boot_epoch, max_message_bytes, max_block_bytes;
    uint32_t max_batch;
    char backend[16];
} bkv_limits_t;

// One block to put. payload: [layer][K,V][head][token][dim] in the spec's dtype, read during the call (asynchronous: until
// its completion), never written. Over plain TCP its checksum goes with it.
typedef struct bkv_put {
    bkv_key_t key;
    uint64_t position;
    uint32_t tokens;
    bkv_codec_t codec; // 0: the spec's
    uint32_t rate;     // 0: the spec's
    uint64_t ttl_ms;   // 0: the daemon's default
    const void *payload;
    size_t payload_bytes;
} bkv_put_t;

typedef struct bkv_put_result {
    uint64_t stored_bytes;
    bool duplicate;
    uint32_t replicas; // members of the cluster that hold it now, of those that own it; 0: this daemon alone has it
} bkv_put_result_t;

// Layers and heads to fetch; a zero count means "all from first on".
typedef struct bkv_range {
    uint32_t first_layer, layers, first_head, heads;
} bkv_range_t;

// A record received, validated (bkv_record_check) and verified (checksum). data is 64-byte aligned and owned by the holder
// of the bkv_record_t, perhaps in memory shared with the daemon, of which there is little: free it soon, with bkv_record_free,
// also when the client is gone already. status != BKV_OK: there is no data, and the call's message says why for the
// first such record.
typedef struct bkv_record {
    bkv_key_t key;
    bkv_status_t status;
    void *data;
    size_t length;
    void *owner; // of data; the library's own
} bkv_record_t;

// What a fold is to be. Exactly one of budget_bytes and rate, or neither with a profile, whose rates then hold as they are.
typedef struct bkv_fold_request {
    uint64_t budget_bytes; // most bytes of all records of the answer together
    uint32_t rate;         // in place of budget_bytes: what the tokens take as bf16, divided by this
    bkv_profile_t profile; // how dense by age (cool.h); count 0: one record, everything alike
    uint64_t ttl_ms;       // 0: the daemon's default
} bkv_fold_request_t;

typedef struct bkv_metric {
    const char *name, *help;
    bool counter;
    double value;
} bkv_metric_t;

typedef struct bkv_stats {
    const char *version, *backend;
    uint64_t boot_epoch, uptime_ms;
    bool draining;
    size_t count;
    bkv_metric_t *metrics;
} bkv_stats_t;

// One way for payloads to move, as seen from this client.
typedef struct bkv_transport_info {
    const char *name; // "shm", "cuda-ipc", "verbs", "inline"; static
    bool offered;     // by the daemon to this peer
    bool usable;      // tried out, and works; cuda-ipc is not tried, as it needs a device of the caller's
    bool chosen;      // Put and Get use it
    char reason[120]; // when not usable: why
} bkv_transport_info_t;

#define BKV_TRANSPORTS 4

// Library version, "1.0.0".
BKV_API const char *bkv_version(void);

// Never blocks on the network: the connection is made by the first call. options may be NULL. Bad files or addresses:
// INVALID_ARGUMENT. On success *client is the caller's.
BKV_API bkv_status_t bkv_client_create(const bkv_client_options_t *options, bkv_client_t **client, bkv_error_t *err);

// Cancels what is in flight (synchronous calls of other threads return BKV_CANCELLED) and frees. NULL is allowed. Queues of
// this client must have been destroyed. Takes at most about 0.2 s, also when a socket blocks for ever; the client's thread
// then stays behind until the daemon is gone or goes on.
BKV_API void bkv_client_destroy(bkv_client_t *client);

// Declares a spec; *id names it from then on. limits may be NULL. Opened again by itself after a restart of the daemon.
BKV_API bkv_status_t bkv_open(bkv_client_t *client, const bkv_spec_t *spec, uint32_t timeout_ms, bkv_spec_id_t *id,
                              bkv_limits_t *limits, bkv_error_t *err);

// The key of a block: SHA-256(id || parent or zeros || token ids, uint32 little-endian). parent NULL: the first block.
BKV_API void bkv_key_next(const bkv_spec_id_t *id, const bkv_key_t *parent, const uint32_t *token_ids, size_t count,
                          bkv_key_t *key);

// Lower-case hex, NUL-terminated: out has room for 2 * n + 1 characters. The parse returns false unless text is exactly
// 2 * n hex digits.
BKV_API void bkv_hex(const uint8_t *bytes, size_t n, char *out);
BKV_API bool bkv_hex_parse(const char *text, uint8_t *bytes, size_t n);

// Which of `count` keys are resident (resident, may be NULL) and how many of the first without a gap (prefix, may be NULL).
// count 0 is INVALID_ARGUMENT, here and below.
BKV_API bkv_status_t bkv_lookup(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                                uint32_t timeout_ms, bool *resident, size_t *prefix, bkv_error_t *err);

// Puts `count` blocks in one call; results (count, may be NULL) are set on BKV_OK.
BKV_API bkv_status_t bkv_put(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_put_t *blocks, size_t count,
                             uint32_t timeout_ms, bkv_put_result_t *results, bkv_error_t *err);

// Gets `count` records (range may be NULL). records[i] belongs to keys[i]; all are set, also on failure, and the caller
// frees them. The status is the first record's that is not BKV_OK, or the call's.
BKV_API bkv_status_t bkv_get(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                             const bkv_range_t *range, uint32_t timeout_ms, bkv_record_t *records, bkv_error_t *err);

// A summary of consecutive blocks, oldest first: one record, or with a profile one or more for each of its bands, oldest first,
// which are to be used together. records has room for one, with a profile for BKV_FOLD_RECORDS; *record_count says how many
// there are. On failure there are none, and each has the call's status. Their keys are the fold's, under which they can be got
// again. A profile that is none: INVALID_ARGUMENT, and records are left alone.
BKV_API bkv_status_t bkv_fold_remote(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                                     const bkv_fold_request_t *params, uint32_t timeout_ms, bkv_record_t *records,
                                     size_t *record_count, bkv_error_t *err);

// Attention next to the data. args as in codec.h with first_layer, layers (at least 1) of the model; args->out and args->lse
// receive the result. heads, key_dim and value_dim are the spec's.
BKV_API bkv_status_t bkv_attend_remote(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                                       const bkv_attend_args_t *args, uint32_t heads, uint32_t key_dim, uint32_t value_dim,
                                       uint32_t timeout_ms, bkv_error_t *err);

// Leaves copies of records in the daemon's GPU memory, where attention finds them. warm (may be NULL): how many have one now; what
// is not resident has none. UNIMPLEMENTED: the daemon has no GPU cache.
BKV_API bkv_status_t bkv_warm(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                              uint32_t timeout_ms, size_t *warm, bkv_error_t *err);

// Keeps resident blocks from eviction and expiry for ttl_ms (1..3,600,000) or until bkv_unpin; all or nothing.
BKV_API bkv_status_t bkv_pin(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                             uint64_t ttl_ms, uint32_t timeout_ms, uint64_t *lease, bkv_error_t *err);
BKV_API bkv_status_t bkv_unpin(bkv_client_t *client, uint64_t lease, uint32_t timeout_ms, bkv_error_t *err);

// Forgets blocks. dropped (may be NULL): how many were there.
BKV_API bkv_status_t bkv_drop(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                              uint32_t timeout_ms, size_t *dropped, bkv_error_t *err);

// *stats is the caller's; free it with bkv_stats_free.
BKV_API bkv_status_t bkv_stats_get(bkv_client_t *client, uint32_t timeout_ms, bkv_stats_t **stats, bkv_error_t *err);
BKV_API void bkv_stats_free(bkv_stats_t *stats);

// The health service's answer: BKV_OK when serving, BKV_BUSY when draining or not to be reached; not tried again, but with several
// endpoints they are asked in turn until one serves. After a
// restart it may take a second until the client looks again. round_trip_ns may be NULL.
BKV_API bkv_status_t bkv_ping(bkv_client_t *client, uint32_t timeout_ms, uint64_t *round_trip_ns, bkv_error_t *err);

// ---- the cluster, as the daemon that is asked sees it; FAILED_PRECONDITION: that one runs alone ----

typedef struct bkv_cluster_node {
    const char *id, *domain, *version; // domain: failure domain; "": one of its own
    uint64_t epoch;                    // of its present start
    size_t address_count, transport_count;
    const char *const *addresses;  // host:port, the best first
    const char *const *transports; // "shm", "cuda-ipc", "verbs", "inline"
    uint64_t capacity_bytes;
    uint32_t weight;
    bool draining;
    bool suspected;      // did not answer the asked daemon in time lately
    uint64_t latency_us; // from the asked daemon; 0 for itself, and where it has not been measured
} bkv_cluster_node_t;

typedef struct bkv_cluster_info {
    const char *name;
    const char *self;    // id of the daemon that was asked
    const char *state;   // of its membership: "member", "joining", "cut off", "blocked" or "left"
    const char *trouble; // why it is not a member; ""
    uint64_t view;       // counts changes of the members, in that process
    int64_t revision;    // etcd's, of the view
    uint64_t seed;       // of the placement
    uint32_t replicas;
    const char *repair;                           // "idle", "waiting" (for the view to stay as it is) or "moving"
    uint64_t repair_left_keys, repair_left_bytes; // estimates
    uint64_t repaired_bytes;                      // sent by that daemon since its start
    uint64_t boot_epoch;
    size_t count;
    const bkv_cluster_node_t *nodes; // ascending by id
} bkv_cluster_info_t;

// *info is the caller's; free it with bkv_cluster_free.
BKV_API bkv_status_t bkv_cluster_get(bkv_client_t *client, uint32_t timeout_ms, bkv_cluster_info_t **info, bkv_error_t *err);
BKV_API void bkv_cluster_free(bkv_cluster_info_t *info); // NULL is allowed

// Where one block is.
typedef struct bkv_where_key {
    size_t owner_count, holder_count;
    const char *const *owners;  // ids of the members that are to have it, the first one first
    const char *const *holders; // of these and the asked daemon, those that have it now
    uint64_t record_bytes;      // 0: nobody has it
} bkv_where_key_t;

typedef struct bkv_where {
    size_t count;
    const bkv_where_key_t *keys;
} bkv_where_t;

// Who owns `count` blocks of a spec and who of these has them now. id NULL: owners alone, for which nobody else is asked. *where is
// the caller's; free it with bkv_where_free.
BKV_API bkv_status_t bkv_where(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                               uint32_t timeout_ms, bkv_where_t **where, bkv_error_t *err);
BKV_API void bkv_where_free(bkv_where_t *where); // NULL is allowed

typedef enum bkv_drain_step {
    BKV_DRAIN_LOOK,  // change nothing
    BKV_DRAIN_SET,   // the member is to hand all that it holds to others
    BKV_DRAIN_CLEAR, // it is not, after all
} bkv_drain_step_t;

typedef struct bkv_drain_state {
    bool draining;
    bool done;                        // all that it held is with others: it may be stopped
    uint64_t left_keys, left_bytes;   // estimates of what it still must send
    uint64_t moved_keys, moved_bytes; // since the drain began
} bkv_drain_state_t;

// Has a member (by id; NULL: the daemon that is asked) hand its blocks over before it goes, and says how far it is: set it once,
// then look until it is done. For operators: through a daemon's unix socket, PERMISSION_DENIED elsewhere. state may be NULL.
BKV_API bkv_status_t bkv_drain(bkv_client_t *client, const char *member, bkv_drain_step_t step, uint32_t timeout_ms,
                               bkv_drain_state_t *state, bkv_error_t *err);

BKV_API void bkv_record_free(bkv_record_t *record); // frees data, not the struct; NULL data is allowed

// Which transports there are and which is in use, with the endpoint that calls go to now: asks the daemon, and tries those that are not in use yet. info has room for
// BKV_TRANSPORTS; *count says how many there are.
BKV_API bkv_status_t bkv_transports(bkv_client_t *client, uint32_t timeout_ms, bkv_transport_info_t *info, size_t *count,
                                    bkv_error_t *err);

// Memory that is shared with the daemon (shm, verbs), 64-byte aligned, contents undefined: a payload that lies within, at a multiple
// of 64 bytes, is not copied by this library when it is put. Without such memory (no transport but inline, window full) it is
// ordinary memory, to the same effect but for the copy; so is a buffer from before the daemon was restarted or the memory attached
// anew for other reasons. The first one waits for the memory to be attached, at most 2 s. NULL: out of memory. Give it back once no
// call uses it, while the client is alive.
//
// Do not fill it again after a Put from it that ended with DEADLINE_EXCEEDED, CANCELLED or BUSY, but give it back: the daemon may
// still be reading, and would take the new bytes for the old block's.
BKV_API void *bkv_buffer_get(bkv_client_t *client, size_t bytes);
BKV_API void bkv_buffer_put(bkv_client_t *client, void *buffer);

// ---- asynchronous ----

typedef struct bkv_completion {
    uint64_t tag;
    bkv_error_t error; // error.status is the call's status
} bkv_completion_t;

// A queue for at most `depth` (1..65536) calls that are in flight or not yet polled.
BKV_API bkv_status_t bkv_queue_create(bkv_client_t *client, uint32_t depth, bkv_queue_t **queue, bkv_error_t *err);

// Cancels what is in flight and waits until nothing uses the callers' buffers any more (which does not take the network).
// Records that have come are still handed over in their bkv_record_t and are the caller's. NULL is allowed.
BKV_API void bkv_queue_destroy(bkv_queue_t *queue);

// Readable while completions wait. Owned by the queue; do not read from it.
BKV_API int bkv_queue_fd(const bkv_queue_t *queue);

// Takes up to `max` completions, waiting at most wait_ms (0: not at all) for the first. Returns how many. Records are
// verified here, by the thread that polls.
BKV_API size_t bkv_queue_poll(bkv_queue_t *queue, bkv_completion_t *completions, size_t max, uint32_t wait_ms);

// The asynchronous forms. All buffers (inputs, results, records) must live until the completion with `tag` is polled.
// BKV_BUSY: the queue is full, nothing was started.
BKV_API bkv_status_t bkv_put_submit(bkv_queue_t *queue, uint64_t tag, const bkv_spec_id_t *id, const bkv_put_t *blocks,
                                    size_t count, uint32_t timeout_ms, bkv_put_result_t *results);
BKV_API bkv_status_t bkv_get_submit(bkv_queue_t *queue, uint64_t tag, const bkv_spec_id_t *id, const bkv_key_t *keys,
                                    size_t count, const bkv_range_t *range, uint32_t timeout_ms, bkv_record_t *records);
BKV_API bkv_status_t bkv_lookup_submit(bkv_queue_t *queue, uint64_t tag, const bkv_spec_id_t *id, const bkv_key_t *keys,
                                       size_t count, uint32_t timeout_ms, bool *resident, size_t *prefix);
BKV_API bkv_status_t bkv_fold_submit(bkv_queue_t *queue, uint64_t tag, const bkv_spec_id_t *id, const bkv_key_t *keys,
                                     size_t count, const bkv_fold_request_t *params, uint32_t timeout_ms, bkv_record_t *records,
                                     size_t *record_count);

#ifdef __cplusplus
}
#endif
#endif
