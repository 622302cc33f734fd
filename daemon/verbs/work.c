// work.c - transfers cut into work requests. A link gets few of them at a time and all links together not more than the
// completion queue has room for; what does not fit waits, a path's transfers in order and the paths in turn.
//
// Requests on one link come back in the order in which they were posted. So do transfers, and the oldest is always the first to
// be over; on a broken link it is as soon as the device has returned what it had of it. Only one of which nothing has been posted
// yet can be cut out of the middle.
#include "daemon/verbs/internal.h"

#include "daemon/observe/log.h"

#include <assert.h>
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>

// ---- work requests ----

bkv_status_t bkv_verbs_work_init(bkv_verbs_t *verbs, uint32_t count, bkv_error_t *err) {
    verbs->work = calloc(count, sizeof(verbs->work[0]));
    if (verbs->work == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for %u work requests", count);
    }
    for (uint32_t i = 0; i < count; i++) {
        verbs->work[i].next = i + 1;
    }
    verbs->work_count = count;
    bkv_verbs_list_init(&verbs->over);
    verbs->turn_tail = &verbs->turn_head;
    return BKV_OK;
}

void bkv_verbs_work_deinit(bkv_verbs_t *verbs) {
    free(verbs->work);
}

static uint64_t take_work(bkv_verbs_t *verbs, bkv_verbs_transfer_t *transfer) {
    uint32_t index = verbs->free_work;
    bkv_verbs_work_t *work = &verbs->work[index];
    verbs->free_work = work->next;
    work->transfer = transfer;
    return (uint64_t)work->generation << 32 | index;
}

static void free_work(bkv_verbs_t *verbs, uint32_t index) {
    bkv_verbs_work_t *work = &verbs->work[index];
    work->transfer = NULL;
    work->generation++;
    work->next = verbs->free_work;
    verbs->free_work = index;
}

static bkv_verbs_transfer_t *return_work(bkv_verbs_t *verbs, uint64_t id) {
    uint32_t index = (uint32_t)id;
    if (index >= verbs->work_count || verbs->work[index].generation != id >> 32 || verbs->work[index].transfer == NULL) {
        return NULL; // of a queue pair that has been destroyed since
    }
    bkv_verbs_transfer_t *transfer = verbs->work[index].transfer;
    free_work(verbs, index);
    return transfer;
}

// ---- turns ----

static bool can_post(const bkv_verbs_path_t *path) {
    const bkv_verbs_transfer_t *transfer = path->posting;
    return transfer != NULL && path->pending < path->link.work && (!transfer->read || path->reads < path->link.reads);
}

static void take_turn(bkv_verbs_path_t *path) {
    bkv_verbs_t *verbs = path->verbs;
    if (!path->has_turn && can_post(path)) {
        path->has_turn = true;
        path->turn_next = NULL;
        *verbs->turn_tail = path;
        verbs->turn_tail = &path->turn_next;
    }
}

static bkv_verbs_path_t *next_turn(bkv_verbs_t *verbs) {
    bkv_verbs_path_t *path = verbs->turn_head;
    if (path != NULL) {
        verbs->turn_head = path->turn_next;
        if (verbs->turn_head == NULL) {
            verbs->turn_tail = &verbs->turn_head;
        }
        path->has_turn = false;
    }
    return path;
}

static void lose_turn(bkv_verbs_path_t *path) {
    bkv_verbs_t *verbs = path->verbs;
    bkv_verbs_path_t **slot = &verbs->turn_head, *last = NULL;
    while (*slot != NULL) {
        if (*slot == path) {
            *slot = path->turn_next;
        } else {
            last = *slot;
            slot = &last->turn_next;
        }
    }
    verbs->turn_tail = last != NULL ? &last->turn_next : &verbs->turn_head;
    path->has_turn = false;
}

// ---- posting ----

static int post_piece(bkv_verbs_path_t *path, bkv_verbs_transfer_t *transfer) {
    bkv_verbs_t *verbs = path->verbs;
    uint64_t rest = transfer->bytes - transfer->posted;
    uint32_t piece = rest < verbs->piece ? (uint32_t)rest : verbs->piece;
    struct ibv_sge part = {.addr = (uintptr_t)transfer->local + transfer->posted, .length = piece, .lkey = transfer->local_key};
    struct ibv_send_wr request = {
        .wr_id = take_work(verbs, transfer),
        .sg_list = &part,
        .num_sge = 1,
        .opcode = transfer->read ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE,
        .send_flags = IBV_SEND_SIGNALED,
        .wr.rdma = {.remote_addr = path->window.address + transfer->offset + transfer->posted, .rkey = path->window.key},
    };
    struct ibv_send_wr *refused;
    int cause = ibv_post_send(path->link.pair, &request, &refused);
    if (cause != 0) {
        return_work(verbs, request.wr_id);
        return cause;
    }
    if (path->pending == 0) {
        path->progress_ms = verbs->config.now_ms();
    }
    transfer->posted += piece;
    transfer->pending++;
    path->pending++;
    path->reads += transfer->read ? 1 : 0;
    if (transfer->posted == transfer->bytes) {
        path->posting = transfer->next;
    }
    return 0;
}

void bkv_verbs_post(bkv_verbs_t *verbs) {
    while (verbs->free_work < verbs->work_count) {
        bkv_verbs_path_t *path = next_turn(verbs);
        if (path == NULL) {
            return;
        }
        if (!can_post(path)) { // what it had to post has been cut since
            continue;
        }
        int cause = post_piece(path, path->posting);
        if (cause != 0) {
            bkv_verbs_break(path, strerror(cause));
        }
        take_turn(path);
    }
}

bkv_status_t bkv_verbs_begin(bkv_verbs_path_t *path, bkv_verbs_transfer_t *transfer, bkv_error_t *err) {
    bkv_verbs_t *verbs = path->verbs;
    const bkv_verbs_words_t *words = &verbs->config.words;
    assert(transfer->bytes > 0);
    pthread_mutex_lock(&verbs->lock);
    bool ended = path->until_ms != 0;
    if (ended || path->broken.status != BKV_OK) {
        bkv_status_t status =
            ended ? bkv_fail(err, BKV_FAILED_PRECONDITION, "%sRDMA link has ended%s", words->subject, words->remedy)
                  : bkv_fail(err, BKV_FAILED_PRECONDITION, "%s", path->broken.message);
        pthread_mutex_unlock(&verbs->lock);
        return status;
    }
    transfer->next = NULL;
    transfer->path = path;
    *path->transfers.tail = transfer;
    path->transfers.tail = &transfer->next;
    if (path->posting == NULL) {
        path->posting = transfer;
    }
    take_turn(path);
    bool early = transfer->deadline_ms != 0 && transfer->deadline_ms < verbs->next_look_ms;
    bkv_verbs_post(verbs);
    pthread_mutex_unlock(&verbs->lock);
    if (early) {
        bkv_verbs_wake(verbs);
    }
    return BKV_OK;
}

// ---- ends of transfers ----

// From the path's transfers to those that are to be told of. slot: what refers to it.
static void retire(bkv_verbs_path_t *path, bkv_verbs_transfer_t **slot) {
    bkv_verbs_t *verbs = path->verbs;
    bkv_verbs_transfer_t *transfer = *slot;
    *slot = transfer->next;
    if (transfer->next == NULL) {
        path->transfers.tail = slot;
    }
    transfer->next = NULL;
    transfer->retired = true;
    transfer->failed = transfer->failed || transfer->posted < transfer->bytes;
    *verbs->over.tail = transfer;
    verbs->over.tail = &transfer->next;
}

static void collect(bkv_verbs_path_t *path) {
    bool broken = path->broken.status != BKV_OK;
    while (path->transfers.head != NULL) {
        const bkv_verbs_transfer_t *transfer = path->transfers.head;
        bool more = transfer->posted < transfer->bytes && transfer->cut == BKV_OK && !broken;
        if (transfer->pending > 0 || more) {
            return;
        }
        retire(path, &path->transfers.head);
    }
}

void bkv_verbs_cut(bkv_verbs_transfer_t *transfer, bkv_status_t why) {
    bkv_verbs_path_t *path = transfer->path;
    if (transfer->retired || transfer->cut != BKV_OK || path->broken.status != BKV_OK) {
        return;
    }
    transfer->cut = why;
    if (path->posting == transfer) {
        path->posting = transfer->next;
        take_turn(path);
    }
    if (transfer->pending == 0) {
        bkv_verbs_transfer_t **slot = &path->transfers.head;
        while (*slot != transfer) {
            slot = &(*slot)->next;
        }
        retire(path, slot);
    }
}

void bkv_verbs_cancel(bkv_verbs_transfer_t *transfer) {
    bkv_verbs_t *verbs = transfer->path->verbs;
    pthread_mutex_lock(&verbs->lock);
    uint64_t now_ms = verbs->config.now_ms();
    if (transfer->deadline_ms == 0 || transfer->deadline_ms > now_ms) {
        transfer->deadline_ms = now_ms;
    }
    bkv_verbs_cut(transfer, BKV_CANCELLED);
    pthread_mutex_unlock(&verbs->lock);
    bkv_verbs_wake(verbs);
}

// `broken` no longer changes. What had been moved when the link broke, or the transfer was cut, is fine.
static void how_it_ended(const bkv_verbs_transfer_t *transfer, bkv_error_t *error) {
    if (!transfer->failed) {
        *error = (bkv_error_t){.status = BKV_OK};
    } else if (transfer->cut != BKV_OK) {
        bkv_fail(error, transfer->cut, "%llu of %llu bytes had been moved by RDMA", (unsigned long long)transfer->posted,
                 (unsigned long long)transfer->bytes);
    } else {
        *error = transfer->path->broken;
    }
}

void bkv_verbs_tell(bkv_verbs_t *verbs) {
    pthread_mutex_lock(&verbs->lock);
    bkv_verbs_transfer_t *transfer = verbs->over.head;
    bkv_verbs_list_init(&verbs->over);
    pthread_mutex_unlock(&verbs->lock);
    while (transfer != NULL) {
        bkv_verbs_transfer_t *next = transfer->next;
        bkv_error_t error;
        how_it_ended(transfer, &error);
        transfer->over(transfer, &error);
        transfer = next;
    }
}

// ---- broken links ----

void bkv_verbs_break(bkv_verbs_path_t *path, const char *cause) {
    bkv_verbs_t *verbs = path->verbs;
    if (path->broken.status != BKV_OK) {
        return;
    }
    bkv_fail(&path->broken, BKV_FAILED_PRECONDITION, "%sRDMA link has failed (%s)%s", verbs->config.words.subject, cause,
             verbs->config.words.remedy);
    path->broken_ms = verbs->config.now_ms();
    path->posting = NULL;
    lose_turn(path);
    bkv_log_failure(0, "verbs", &path->broken);
    bkv_verbs_link_stop(&path->link);
    collect(path);
    bkv_verbs_wake(verbs);
}

void bkv_verbs_abandon(bkv_verbs_path_t *path) {
    bkv_verbs_t *verbs = path->verbs;
    assert(path->broken.status != BKV_OK);
    bkv_verbs_link_deinit(&path->link);
    for (uint32_t i = 0; i < verbs->work_count && path->pending > 0; i++) {
        bkv_verbs_transfer_t *transfer = verbs->work[i].transfer;
        if (transfer != NULL && transfer->path == path) {
            transfer->failed = true;
            transfer->pending--;
            path->pending--;
            free_work(verbs, i);
        }
    }
    assert(path->pending == 0);
    collect(path);
}

void bkv_verbs_returned(bkv_verbs_t *verbs, const struct ibv_wc *completion) {
    bkv_verbs_transfer_t *transfer = return_work(verbs, completion->wr_id);
    if (transfer == NULL) {
        return;
    }
    bkv_verbs_path_t *path = transfer->path;
    transfer->pending--;
    path->pending--;
    path->reads -= transfer->read ? 1 : 0;
    path->progress_ms = verbs->config.now_ms();
    if (completion->status != IBV_WC_SUCCESS) {
        transfer->failed = true;
        bkv_verbs_break(path, ibv_wc_status_str(completion->status));
    }
    collect(path);
    take_turn(path);
}
