// internal.h - what the files of this room share; nobody else includes it.
//
// One lock guards everything that moves. Under it work is posted and a broken link stopped, but nobody is called back: transfers
// that are over are collected in a list, and the thread tells of them once the lock is free.
#ifndef BKV_VERBS_INTERNAL_H
#define BKV_VERBS_INTERNAL_H

#include "daemon/verbs/verbs.h"

#include <pthread.h>
#include <stdatomic.h>

struct ibv_comp_channel;
struct ibv_cq;
struct ibv_wc;

#define BKV_VERBS_PIECE     (1u << 20) // most bytes in one work request
#define BKV_VERBS_LINK_WORK 8          // most work requests on one link
#define BKV_VERBS_WORK      1024       // and on all together: the memory that can be under way

// A work request in flight. Its id is its index and generation, so that one which comes back too late means nobody.
typedef struct bkv_verbs_work {
    bkv_verbs_transfer_t *transfer; // NULL: free
    uint32_t generation, next;
} bkv_verbs_work_t;

struct bkv_verbs {
    bkv_verbs_config_t config;
    struct ibv_comp_channel *channel;
    struct ibv_cq *completions;
    uint32_t max_paths, link_work, piece;
    pthread_t thread;
    bool watched;       // there is a thread
    int wake;           // eventfd; written when the thread is to look; -1: none yet
    uint64_t looked_ms; // at the port; the thread's own
    _Atomic bool stopping, gone, port_down;

    pthread_mutex_t lock; // all of the below, and the paths' own
    bkv_verbs_path_t *paths;
    uint32_t path_count; // also those that are not connected yet
    bkv_verbs_path_t *turn_head, **turn_tail;
    uint32_t free_work; // index of the first free one; work_count: none
    uint32_t work_count;
    bkv_verbs_work_t *work;
    bkv_verbs_list_t over; // to be told
    uint64_t next_look_ms; // when the thread wakes by itself
};

static inline void bkv_verbs_list_init(bkv_verbs_list_t *list) {
    *list = (bkv_verbs_list_t){.tail = &list->head};
}

// ---- work.c ----

bkv_status_t bkv_verbs_work_init(bkv_verbs_t *verbs, uint32_t count, bkv_error_t *err);
void bkv_verbs_work_deinit(bkv_verbs_t *verbs);

// What follows needs the lock. Transfers that are thereby over are to be told of.

// Gives the path up: nothing more is posted, what has been comes back in failure. Of several reasons the first counts.
void bkv_verbs_break(bkv_verbs_path_t *path, const char *cause);

// The same for what has not come back in time: the queue pair is destroyed, after which it no longer can. On the thread.
void bkv_verbs_abandon(bkv_verbs_path_t *path);

// Posts no more of a transfer that is not all posted yet.
void bkv_verbs_cut(bkv_verbs_transfer_t *transfer, bkv_status_t why);

// A work request has come back.
void bkv_verbs_returned(bkv_verbs_t *verbs, const struct ibv_wc *completion);

// Posts what there is room for, a piece from each path in turn.
void bkv_verbs_post(bkv_verbs_t *verbs);

// Without the lock, on the thread: tells of all that is over.
void bkv_verbs_tell(bkv_verbs_t *verbs);

// ---- watch.c ----

bkv_status_t bkv_verbs_watch_start(bkv_verbs_t *verbs, bkv_error_t *err);
void bkv_verbs_watch_stop(bkv_verbs_t *verbs); // once no path is left

#endif
