// work.c - transfers cut into work requests. A link gets few of them at a time and all links together not more than the
// completion queue has room for; what does not fit waits, a session's transfers in order and the sessions in turn.
//
// Requests on one link come back in the order in which they were posted. So do transfers, and the oldest is always the first to
// be over; on a broken link it is as soon as the device has returned what it had of it.
#include "daemon/transport/verbs/verbs.h"

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

static bool can_post(const bkv_verbs_session_t *session) {
    const bkv_verbs_transfer_t *transfer = session->posting;
    return transfer != NULL && session->pending < session->link.work &&
           (!transfer->read || session->reads < session->link.reads);
}

static void take_turn(bkv_verbs_session_t *session) {
    bkv_verbs_t *verbs = session->verbs;
    if (!session->has_turn && can_post(session)) {
        session->has_turn = true;
        session->turn_next = NULL;
        *verbs->turn_tail = session;
        verbs->turn_tail = &session->turn_next;
    }
}

static bkv_verbs_session_t *next_turn(bkv_verbs_t *verbs) {
    bkv_verbs_session_t *session = verbs->turn_head;
    if (session != NULL) {
        verbs->turn_head = session->turn_next;
        if (verbs->turn_head == NULL) {
            verbs->turn_tail = &verbs->turn_head;
        }
        session->has_turn = false;
    }
    return session;
}

static void lose_turn(bkv_verbs_session_t *session) {
    bkv_verbs_t *verbs = session->verbs;
    bkv_verbs_session_t **slot = &verbs->turn_head, *last = NULL;
    while (*slot != NULL) {
        if (*slot == session) {
            *slot = session->turn_next;
        } else {
            last = *slot;
            slot = &last->turn_next;
        }
    }
    verbs->turn_tail = last != NULL ? &last->turn_next : &verbs->turn_head;
    session->has_turn = false;
}

// ---- posting ----

static int post_piece(bkv_verbs_session_t *session, bkv_verbs_transfer_t *transfer) {
    bkv_verbs_t *verbs = session->verbs;
    uint64_t rest = transfer->bytes - transfer->posted;
    uint32_t piece = rest < verbs->piece ? (uint32_t)rest : verbs->piece;
    struct ibv_sge part = {.addr = (uintptr_t)transfer->local + transfer->posted, .length = piece, .lkey = transfer->local_key};
    struct ibv_send_wr request = {
        .wr_id = take_work(verbs, transfer),
        .sg_list = &part,
        .num_sge = 1,
        .opcode = transfer->read ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE,
        .send_flags = IBV_SEND_SIGNALED,
        .wr.rdma = {.remote_addr = session->window.address + transfer->offset + transfer->posted, .rkey = session->window.key},
    };
    struct ibv_send_wr *refused;
    int cause = ibv_post_send(session->link.pair, &request, &refused);
    if (cause != 0) {
        return_work(verbs, request.wr_id);
        return cause;
    }
    if (session->pending == 0) {
        session->progress_ms = bkv_transports_config_of(verbs->transports)->now_ms();
    }
    transfer->posted += piece;
    transfer->pending++;
    session->pending++;
    session->reads += transfer->read ? 1 : 0;
    if (transfer->posted == transfer->bytes) {
        session->posting = transfer->next;
    }
    return 0;
}

void bkv_verbs_post(bkv_verbs_t *verbs, bkv_verbs_list_t *over) {
    while (verbs->free_work < verbs->work_count) {
        bkv_verbs_session_t *session = next_turn(verbs);
        if (session == NULL) {
            return;
        }
        int cause = post_piece(session, session->posting);
        if (cause != 0) {
            bkv_verbs_break(session, strerror(cause), over);
        }
        take_turn(session);
    }
}

bkv_status_t bkv_verbs_begin(bkv_verbs_session_t *session, bkv_verbs_transfer_t *transfer, bkv_error_t *err) {
    bkv_verbs_t *verbs = session->verbs;
    bkv_verbs_list_t over;
    bkv_verbs_list_init(&over);
    assert(transfer->bytes > 0);
    pthread_mutex_lock(&verbs->lock);
    bool ended = session->until_ms != 0;
    if (ended || session->broken.status != BKV_OK) {
        bkv_status_t status = bkv_fail(err, BKV_FAILED_PRECONDITION, "%s",
                                       ended ? "place.session: has ended; Attach again" : session->broken.message);
        pthread_mutex_unlock(&verbs->lock);
        return status;
    }
    transfer->next = NULL;
    transfer->session = session;
    *session->transfers.tail = transfer;
    session->transfers.tail = &transfer->next;
    if (session->posting == NULL) {
        session->posting = transfer;
    }
    take_turn(session);
    bkv_verbs_post(verbs, &over);
    pthread_mutex_unlock(&verbs->lock);
    bkv_verbs_tell(&over);
    return BKV_OK;
}

// ---- ends of transfers ----

// Moves from the session to `over` what is over.
static void collect(bkv_verbs_session_t *session, bkv_verbs_list_t *over) {
    bool broken = session->broken.status != BKV_OK;
    while (session->transfers.head != NULL) {
        bkv_verbs_transfer_t *transfer = session->transfers.head;
        if (transfer->pending > 0 || (!broken && transfer->posted < transfer->bytes)) {
            return;
        }
        session->transfers.head = transfer->next;
        transfer->next = NULL;
        transfer->failed = transfer->failed || transfer->posted < transfer->bytes;
        *over->tail = transfer;
        over->tail = &transfer->next;
    }
    session->transfers.tail = &session->transfers.head;
}

void bkv_verbs_tell(bkv_verbs_list_t *over) {
    const bkv_error_t fine = {.status = BKV_OK};
    while (over->head != NULL) {
        bkv_verbs_transfer_t *transfer = over->head;
        over->head = transfer->next;
        // `broken` no longer changes. What had been moved when the link broke is fine.
        const bkv_error_t error = transfer->failed ? transfer->session->broken : fine;
        transfer->over(transfer, &error);
    }
    over->tail = &over->head;
}

// ---- broken links ----

void bkv_verbs_break(bkv_verbs_session_t *session, const char *cause, bkv_verbs_list_t *over) {
    if (session->broken.status != BKV_OK) {
        return;
    }
    bkv_fail(&session->broken, BKV_FAILED_PRECONDITION, "place.session: its RDMA link has failed (%s); Attach again", cause);
    session->broken_ms = bkv_transports_config_of(session->verbs->transports)->now_ms();
    session->posting = NULL;
    lose_turn(session);
    bkv_log_failure(0, "verbs", &session->broken);
    bkv_verbs_link_stop(&session->link);
    collect(session, over);
    bkv_verbs_wake(session->verbs);
}

void bkv_verbs_abandon(bkv_verbs_session_t *session, bkv_verbs_list_t *over) {
    bkv_verbs_t *verbs = session->verbs;
    assert(session->broken.status != BKV_OK);
    bkv_verbs_link_deinit(&session->link);
    for (uint32_t i = 0; i < verbs->work_count && session->pending > 0; i++) {
        bkv_verbs_transfer_t *transfer = verbs->work[i].transfer;
        if (transfer != NULL && transfer->session == session) {
            transfer->failed = true;
            transfer->pending--;
            session->pending--;
            free_work(verbs, i);
        }
    }
    assert(session->pending == 0);
    collect(session, over);
}

void bkv_verbs_returned(bkv_verbs_t *verbs, const struct ibv_wc *completion, bkv_verbs_list_t *over) {
    bkv_verbs_transfer_t *transfer = return_work(verbs, completion->wr_id);
    if (transfer == NULL) {
        return;
    }
    bkv_verbs_session_t *session = transfer->session;
    transfer->pending--;
    session->pending--;
    session->reads -= transfer->read ? 1 : 0;
    session->progress_ms = bkv_transports_config_of(verbs->transports)->now_ms();
    if (completion->status != IBV_WC_SUCCESS) {
        transfer->failed = true;
        bkv_verbs_break(session, ibv_wc_status_str(completion->status), over);
    }
    collect(session, over);
    take_turn(session);
}
