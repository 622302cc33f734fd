// session.h - what transport.c, session.c, transfer.c and fd_socket.c share: the open transports and the table of sessions.
// Transports themselves (shm.c, cuda_ipc.c, verbs.c) know internal.h alone.
#ifndef BKV_TRANSPORT_SESSION_H
#define BKV_TRANSPORT_SESSION_H

#include "daemon/transport/fd_socket.h"
#include "daemon/transport/internal.h"

#define BKV_TRANSPORT_REASON 120

// One kind of memory, as this machine has it.
typedef struct bkv_transport {
    const bkv_transport_ops_t *ops;
    void *self;
    bool open;
    char reason[BKV_TRANSPORT_REASON]; // why not, when it is not open
} bkv_transport_t;

// One atomic per metric; the gauge of sessions stays 0 here and is read where it lives.
typedef struct bkv_transport_counters {
#define X(name, is_counter, help) _Atomic uint64_t name;
    BKV_TRANSPORT_METRICS(X)
#undef X
} bkv_transport_counters_t;

struct bkv_transports {
    bkv_transports_config_t config;
    bkv_transport_t kinds[BKV_TRANSPORT_KINDS];
    bkv_fd_socket_t *fd_socket; // NULL: no transport here needs one
    bkv_transport_counters_t counters;

    pthread_mutex_t lock; // what follows, and of each session: next, held
    pthread_cond_t none;  // count fell to 0
    uint32_t count;       // sessions that have not been taken down yet, ended ones included
    uint32_t mask;        // buckets are a power of two
    bkv_session_t **buckets;
};

struct bkv_session {
    bkv_transports_t *transports;
    const bkv_transport_ops_t *ops;
    void *self, *state;
    bkv_session_id_t id;
    uint64_t bytes;
    _Atomic uint32_t references; // of the table until the end, of callers, of transfers
    _Atomic uint64_t used_ms;
    _Atomic bool ended;
    bool held;               // by a connection to the fd socket
    bkv_session_gone_t gone; // whom to tell; set by who ended it, before its reference goes
    void *gone_user;
    bkv_session_t *next;
};

static inline void bkv_transport_count(_Atomic uint64_t *counter, uint64_t by) {
    atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

// The table; init allocates, so that attach cannot fail for it.
bkv_status_t bkv_sessions_init(bkv_transports_t *transports, bkv_error_t *err);
void bkv_sessions_deinit(bkv_transports_t *transports); // none is left

// Ends every session and waits until the last transfer is over.
void bkv_sessions_end_all(bkv_transports_t *transports);

// A connection takes the session for its own: from now on it does not idle out. FAILED_PRECONDITION: no such session, or it is
// held already.
bkv_status_t bkv_session_hold(bkv_transports_t *transports, const bkv_session_id_t *id, bkv_error_t *err);

// That connection is gone: the session ends, unless it has already.
void bkv_session_lose(bkv_transports_t *transports, const bkv_session_id_t *id);

// Whether there is still such a session. Not a use.
bool bkv_session_alive(bkv_transports_t *transports, const bkv_session_id_t *id);

#endif
