// verbs.h - what the files of the verbs transport share. verbs.c: sessions, and what their payloads and records mean;
// work.c: transfers cut into work requests, posted in turn and taken back; watch.c: the thread that hears what the
// device has to say, and the clock.
//
// One lock guards everything that moves. Under it work is posted and a broken link stopped, but nobody is called back:
// transfers that are over are collected in a list, and told once the lock is free (bkv_verbs_tell).
#ifndef BKV_TRANSPORT_VERBS_H
#define BKV_TRANSPORT_VERBS_H

#include "daemon/transport/internal.h"

#include <pthread.h>

struct ibv_comp_channel;
struct ibv_wc;

#define BKV_VERBS_PIECE     (1u << 20) // most bytes in one work request
#define BKV_VERBS_LINK_WORK 8          // most work requests on one link
#define BKV_VERBS_WORK      1024       // and on all together: the memory that can be under way
#define BKV_VERBS_STUCK_MS  5000       // a link that completes nothing for so long is given up; its own retries take less
#define BKV_VERBS_FLUSH_MS  2000       // so long may a stopped link take to return its work
#define BKV_VERBS_END_MS    2000       // so long may an ended session's transfers take

typedef struct bkv_verbs bkv_verbs_t;
typedef struct bkv_verbs_session bkv_verbs_session_t;
typedef struct bkv_verbs_transfer bkv_verbs_transfer_t;

// One payload or record on its way. Whoever begins it fills in what comes first and frees it in `over`.
struct bkv_verbs_transfer {
    bool read;      // from the client's window; else to it
    uint8_t *local; // registered memory, its lkey
    uint32_t local_key;
    uint64_t offset, bytes; // in the window
    // Once, without the lock: the transfer is over, and no device touches its memory any more.
    void (*over)(bkv_verbs_transfer_t *transfer, const bkv_error_t *error);

    bkv_verbs_transfer_t *next;
    bkv_verbs_session_t *session;
    uint64_t posted;  // bytes
    uint32_t pending; // work requests posted and not come back
    bool failed;      // one of them, or it was not all posted
};

// A list, oldest first.
typedef struct bkv_verbs_list {
    bkv_verbs_transfer_t *head, **tail;
} bkv_verbs_list_t;

struct bkv_verbs_session {
    bkv_verbs_t *verbs;
    bkv_verbs_link_t link; // empty once it has been given up
    bkv_verbs_end_t window;

    bkv_verbs_session_t *next, **prev; // all sessions
    bkv_verbs_session_t *turn_next;    // those that could post more
    bool has_turn;
    bkv_verbs_list_t transfers;    // begun and not over
    bkv_verbs_transfer_t *posting; // the first of them that is not all posted
    uint32_t pending, reads;       // work requests posted; of these READs
    uint64_t progress_ms;          // when one last came back, or was posted on an idle link
    uint64_t until_ms;             // it has been ended, and must be over by then; 0: it has not
    bkv_error_t broken;            // why the link is of no use any more; else BKV_OK
    uint64_t broken_ms;
};

// A work request in flight. Its id is its index and generation, so that one which comes back too late means nobody.
typedef struct bkv_verbs_work {
    bkv_verbs_transfer_t *transfer; // NULL: free
    uint32_t generation, next;
} bkv_verbs_work_t;

struct bkv_verbs {
    bkv_transports_t *transports;
    bkv_verbs_device_t *device;
    struct ibv_mr *arena, *staging;
    struct ibv_comp_channel *channel;
    struct ibv_cq *completions;
    uint32_t max_sessions, link_work, piece;
    pthread_t thread;
    bool watched;       // there is a thread
    int wake;           // eventfd; written when the thread is to look; -1: none yet
    uint64_t looked_ms; // at the port; the thread's own
    _Atomic bool stopping, gone, port_down;

    pthread_mutex_t lock; // all of the below, and the sessions' own
    bkv_verbs_session_t *sessions;
    uint32_t session_count;
    bkv_verbs_session_t *turn_head, **turn_tail;
    uint32_t free_work; // index of the first free one; work_count: none
    uint32_t work_count;
    bkv_verbs_work_t *work;
};

static inline void bkv_verbs_list_init(bkv_verbs_list_t *list) {
    *list = (bkv_verbs_list_t){.tail = &list->head};
}

// ---- work.c ----

bkv_status_t bkv_verbs_work_init(bkv_verbs_t *verbs, uint32_t count, bkv_error_t *err);
void bkv_verbs_work_deinit(bkv_verbs_t *verbs);

// Begins a transfer, which is `over` later or before this returns. FAILED_PRECONDITION: the session's link has failed, or it
// has been ended; then it has not begun. Without the lock.
bkv_status_t bkv_verbs_begin(bkv_verbs_session_t *session, bkv_verbs_transfer_t *transfer, bkv_error_t *err);

// What follows needs the lock. Transfers that are thereby over are added to `over`.

// Gives the session's link up: nothing more is posted, what has been comes back in failure. Of several reasons the first
// counts.
void bkv_verbs_break(bkv_verbs_session_t *session, const char *cause, bkv_verbs_list_t *over);

// The same for what has not come back in time: the queue pair is destroyed, after which it no longer can. On the thread.
void bkv_verbs_abandon(bkv_verbs_session_t *session, bkv_verbs_list_t *over);

// A work request has come back.
void bkv_verbs_returned(bkv_verbs_t *verbs, const struct ibv_wc *completion, bkv_verbs_list_t *over);

// Posts what there is room for, a piece from each session in turn.
void bkv_verbs_post(bkv_verbs_t *verbs, bkv_verbs_list_t *over);

// Without the lock: tells all of the list.
void bkv_verbs_tell(bkv_verbs_list_t *over);

// ---- watch.c ----

bkv_status_t bkv_verbs_watch_start(bkv_verbs_t *verbs, bkv_error_t *err);
void bkv_verbs_watch_stop(bkv_verbs_t *verbs); // once no session is left
void bkv_verbs_wake(bkv_verbs_t *verbs);

#endif
