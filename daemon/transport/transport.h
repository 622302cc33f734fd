// transport.h - how payloads and records move without going through messages: sessions, by which clients share memory, and one
// small table of operations for each kind of memory.
//
//   shm       windows of ours that local clients map (shm.c); descriptors pass through the fd socket (fd_socket.c)
//   cuda-ipc  GPU memory of local workers, compressed where it lies (cuda_ipc.c)
//   verbs     windows of clients on other hosts, by RDMA (verbs.c)
//
// A place is a range of a session's memory. Fetch takes a payload from a place into an ingest, deliver takes a record to one;
// rpc/ knows no more of it than that. Nothing in a place is trusted: offsets and lengths are checked here against the session,
// and what lies in a client's memory is copied before it is looked at, as the client may change it at any time.
//
// Sessions are named by 16 random bytes. They end by detach, with the connection that holds them (fd_socket.c), when unnamed for
// idle_ms, or at destroy; what is under way finishes first, as each transfer holds a reference.
//
// Thread-safe. Callbacks run exactly once for each accepted start, on any thread or before the start returns, and must not
// block.
#ifndef BKV_TRANSPORT_H
#define BKV_TRANSPORT_H

#include "daemon/pipeline/pipeline.h"
#include "proto/verbs_link.h"

#define BKV_SESSION_BYTES      16
#define BKV_PLACE_ALIGN        64
#define BKV_CUDA_HANDLE_BYTES  64 // of cudaIpcMemHandle_t and of cudaIpcEventHandle_t
#define BKV_CUDA_UUID_BYTES    16
#define BKV_DEVICE_ALLOCATIONS 16384 // most in one session: 320 GiB in chunks of 20 MiB, as PyTorch takes them

typedef struct bkv_transports bkv_transports_t;
typedef struct bkv_session bkv_session_t;

typedef struct bkv_session_id {
    uint8_t bytes[BKV_SESSION_BYTES];
} bkv_session_id_t;

typedef enum bkv_transport_kind {
    BKV_TRANSPORT_SHM,
    BKV_TRANSPORT_CUDA_IPC,
    BKV_TRANSPORT_VERBS,
    BKV_TRANSPORT_KINDS
} bkv_transport_kind_t;

typedef struct bkv_transports_config {
    bkv_pipeline_t *pipeline; // outlive the transports
    bkv_store_t *store;
    const char *socket_path; // of the gRPC socket; the fd socket is beside it. NULL or "": no local transports
    unsigned socket_mode;
    uint32_t max_sessions;
    uint64_t idle_ms;
    uint64_t shm_bytes;       // most memory shared with local clients, all together; 0: no shm
    uint64_t shm_window;      // most that one session gets
    bool cuda_ipc;            // where there is a GPU
    const char *verbs_device; // "auto": the first with an active port; "off"; or a name
    uint32_t verbs_port;      // 0: the first active one
    int verbs_gid;            // index; -1: the best for the port
    uint32_t verbs_sessions;  // most queue pairs
    uint64_t (*now_ms)(void);
} bkv_transports_config_t;

// X(name, is_counter, help)
#define BKV_TRANSPORT_METRICS(X)                                                                                               \
    X(sessions, false, "sessions of clients that share memory")                                                                \
    X(shm_window_bytes, false, "memory shared with local clients")                                                             \
    X(sessions_total, true, "sessions begun")                                                                                  \
    X(sessions_idle_total, true, "sessions ended because nobody used them")                                                    \
    X(sessions_lost_total, true, "sessions ended because their client went away")                                              \
    X(fetches_total, true, "payloads taken from places")                                                                       \
    X(fetched_bytes_total, true, "their bytes")                                                                                \
    X(deliveries_total, true, "records taken to places")                                                                       \
    X(delivered_bytes_total, true, "their bytes")                                                                              \
    X(transfers_failed_total, true, "transfers that failed, by fault of a client or of a link")

typedef struct bkv_transport_metrics {
#define X(name, is_counter, help) uint64_t name;
    BKV_TRANSPORT_METRICS(X)
#undef X
} bkv_transport_metrics_t;

// Opens what this machine has. A transport that is not to be had is left out, with a line in the log where it was asked for by
// name; that alone (a named verbs device that does not exist, the fd socket's path in use) is an error: INVALID_ARGUMENT or
// FAILED_PRECONDITION.
bkv_status_t bkv_transports_create(const bkv_transports_config_t *config, bkv_transports_t **transports, bkv_error_t *err);

// Ends all sessions, waits until nothing is under way, closes the fd socket, frees. Before the pipeline's destroy. NULL is allowed.
void bkv_transports_destroy(bkv_transports_t *transports);

// Ends sessions that have been idle for too long; call about once a second.
void bkv_transports_tick(bkv_transports_t *transports, uint64_t now_ms);

void bkv_transports_metrics(bkv_transports_t *transports, bkv_transport_metrics_t *metrics);

// Names of what a peer can use, best first, "inline" last; local: it came by the unix socket. names has room for
// BKV_TRANSPORT_KINDS + 1; returns how many. The strings are static.
size_t bkv_transports_offer(const bkv_transports_t *transports, bool local, const char **names);

// ---- sessions ----

typedef struct bkv_device_allocation {
    const uint8_t *handle; // BKV_CUDA_HANDLE_BYTES; NULL: a descriptor comes through the fd socket
    uint64_t bytes;
} bkv_device_allocation_t;

typedef struct bkv_attach_args {
    bkv_transport_kind_t kind;
    bool local;          // the peer came by the unix socket
    uint64_t bytes;      // shm: wanted
    const uint8_t *uuid; // cuda-ipc, BKV_CUDA_UUID_BYTES
    const bkv_device_allocation_t *allocations;
    uint32_t allocation_count;
    bkv_verbs_end_t verbs; // the client's end
} bkv_attach_args_t;

typedef struct bkv_attach_result {
    bkv_session_id_t id;
    uint64_t bytes; // of the session's memory
    uint64_t idle_ms;
    bkv_verbs_end_t verbs; // the daemon's end
} bkv_attach_result_t;

// UNIMPLEMENTED: no such transport here, or none for this peer; RESOURCE_EXHAUSTED: max_sessions, shm_bytes; INVALID_ARGUMENT
// names the field ("shm.bytes: ...").
bkv_status_t bkv_session_attach(bkv_transports_t *transports, const bkv_attach_args_t *args, bkv_attach_result_t *result,
                                bkv_error_t *err);

// Ends a session at once: nothing new begins in it. gone (may be NULL) is called when nothing is under way in it any more, and its
// memory is the client's alone. FAILED_PRECONDITION: there is no such session.
typedef void (*bkv_session_gone_t)(void *user);
bkv_status_t bkv_session_detach(bkv_transports_t *transports, const bkv_session_id_t *id, bkv_session_gone_t gone, void *user,
                                bkv_error_t *err);

// A reference, to be released; counts as a use. FAILED_PRECONDITION ("place.session: ..."): none such, or it has ended.
bkv_status_t bkv_session_find(bkv_transports_t *transports, const bkv_session_id_t *id, bkv_session_t **session,
                              bkv_error_t *err);
void bkv_session_release(bkv_session_t *session);

// Whether payloads of this session lie in GPU memory: their ingests begin with args.on_device.
bool bkv_session_on_device(const bkv_session_t *session);

// ---- transfers ----

// As DeviceLayout. The arrays are the caller's and are read during the start of a transfer.
typedef struct bkv_device_layout {
    const uint64_t *keys, *values; // [layers]
    uint32_t layers;
    const uint64_t *pages; // [page_count]
    uint32_t page_count, page_tokens;
    uint64_t page_stride, token_stride, head_stride, value_token_stride, value_head_stride; // the last two are filled in
} bkv_device_layout_t;

typedef struct bkv_place {
    uint64_t offset, bytes;
    const bkv_device_layout_t *layout; // cuda-ipc payloads, else NULL
    const uint8_t *event;              // BKV_CUDA_HANDLE_BYTES, or NULL
} bkv_place_t;

// Takes the ingest's payload from the place and commits it; `done` as of bkv_ingest_commit. On failure the ingest is still the
// caller's and `done` is not called. INVALID_ARGUMENT ("place.offset: ..."), BUSY as there.
bkv_status_t bkv_session_fetch(bkv_session_t *session, const bkv_place_t *place, bkv_ingest_t *ingest, bkv_ingest_done_t done,
                               void *user, bkv_error_t *err);

// error.status == BKV_OK: the whole record lies there, verified. error is never NULL and lives for the call only.
typedef void (*bkv_delivered_t)(void *user, const bkv_error_t *error);

// Takes a record to the place, which has room for it (place->bytes, the record's length): bkv_session_room. The delivery stays
// the caller's, who keeps it until `done`. The delivery is unverified; the transport verifies it: by bkv_delivery_copy as it
// copies, or by bkv_delivery_verify before a device or a NIC takes it (on a compute thread: see bkv_pipeline_submit).
// DATA_LOSS, of the start or of `done`: the record was damaged and has been dropped. On failure `done` is not called.
bkv_status_t bkv_session_deliver(bkv_session_t *session, const bkv_place_t *place, const bkv_delivery_t *delivery,
                                 bkv_delivered_t done, void *user, bkv_error_t *err);

// Checks a place for records: aligned, within the session. INVALID_ARGUMENT names the field.
bkv_status_t bkv_session_room(const bkv_session_t *session, const bkv_place_t *place, bkv_error_t *err);

#endif
