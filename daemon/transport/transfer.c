// transfer.c - fetch and deliver: checks places against the session, keeps the session while bytes move, and counts. Moving them
// is the transports' own.
#include "daemon/transport/session.h"

#include <stdlib.h>

// Keeps what a transport's callback needs to know beyond the caller's own.
typedef struct transfer {
    bkv_session_t *session; // a reference
    uint64_t bytes;
    bkv_ingest_done_t fetched;
    bkv_delivered_t delivered;
    void *user;
} transfer_t;

// ---- places ----

// Overflow-safe: nothing is added before it is known to fit.
static bkv_status_t check_range(const bkv_session_t *session, uint64_t offset, uint64_t bytes, bkv_error_t *err) {
    if (offset % BKV_PLACE_ALIGN != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.offset: %llu is not a multiple of %d", (unsigned long long)offset,
                        BKV_PLACE_ALIGN);
    }
    if (offset > session->bytes) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.offset: %llu is past the session's %llu bytes",
                        (unsigned long long)offset, (unsigned long long)session->bytes);
    }
    if (bytes > session->bytes - offset) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.bytes: %llu from %llu on are past the session's %llu bytes",
                        (unsigned long long)bytes, (unsigned long long)offset, (unsigned long long)session->bytes);
    }
    return BKV_OK;
}

static bkv_status_t check_event(const bkv_session_t *session, const bkv_place_t *place, bkv_error_t *err) {
    return place->event != NULL && !session->ops->on_device
               ? bkv_fail(err, BKV_INVALID_ARGUMENT, "place.event: is for memory of a GPU, and this session has none")
               : BKV_OK;
}

bkv_status_t bkv_session_room(const bkv_session_t *session, const bkv_place_t *place, bkv_error_t *err) {
    if (place->layout != NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.layout: is for payloads; records lie in one piece");
    }
    bkv_status_t status = check_event(session, place, err);
    return status == BKV_OK ? check_range(session, place->offset, place->bytes, err) : status;
}

static bkv_status_t check_payload(const bkv_session_t *session, const bkv_place_t *place, uint64_t bytes, bkv_error_t *err) {
    if (place->bytes != 0 && place->bytes != bytes) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.bytes: %llu, but the payload has %llu",
                        (unsigned long long)place->bytes, (unsigned long long)bytes);
    }
    bkv_status_t status = check_event(session, place, err);
    if (status != BKV_OK || place->layout == NULL) {
        return status == BKV_OK ? check_range(session, place->offset, bytes, err) : status;
    }
    if (!session->ops->on_device) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.layout: is for memory of a GPU, and this session has none");
    }
    return place->offset == 0 ? BKV_OK
                              : bkv_fail(err, BKV_INVALID_ARGUMENT, "place.offset: %llu, but with a layout it is 0",
                                         (unsigned long long)place->offset);
}

static bkv_status_t check_alive(const bkv_session_t *session, bkv_error_t *err) {
    return atomic_load(&session->ended) ? bkv_fail(err, BKV_FAILED_PRECONDITION, "place.session: has ended; Attach again")
                                        : BKV_OK;
}

// ---- transfers ----

static transfer_t *transfer_create(bkv_session_t *session, uint64_t bytes, void *user, bkv_error_t *err) {
    transfer_t *transfer = malloc(sizeof(*transfer));
    if (transfer == NULL) {
        bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a transfer");
        return NULL;
    }
    atomic_fetch_add(&session->references, 1);
    *transfer = (transfer_t){.session = session, .bytes = bytes, .user = user};
    return transfer;
}

static void transfer_destroy(transfer_t *transfer) {
    bkv_session_release(transfer->session);
    free(transfer);
}

// The transfer is over before its owner hears of it: after a call's answer nothing of it is left.
static void on_fetched(void *user, const bkv_error_t *error, const bkv_ingest_result_t *result) {
    const transfer_t transfer = *(transfer_t *)user;
    bkv_transport_counters_t *counters = &transfer.session->transports->counters;
    if (error->status == BKV_OK) {
        bkv_transport_count(&counters->fetches_total, 1);
        bkv_transport_count(&counters->fetched_bytes_total, transfer.bytes);
    } else {
        bkv_transport_count(&counters->transfers_failed_total, 1);
    }
    transfer_destroy(user);
    transfer.fetched(transfer.user, error, result);
}

bkv_status_t bkv_session_fetch(bkv_session_t *session, const bkv_place_t *place, bkv_ingest_t *ingest, bkv_ingest_done_t done,
                               void *user, bkv_error_t *err) {
    uint64_t bytes = bkv_ingest_bytes(ingest);
    bkv_status_t status = check_payload(session, place, bytes, err);
    if (status == BKV_OK) {
        status = check_alive(session, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    transfer_t *transfer = transfer_create(session, bytes, user, err);
    if (transfer == NULL) {
        return BKV_RESOURCE_EXHAUSTED;
    }
    transfer->fetched = done;
    status = session->ops->fetch(session->self, session->state, place, ingest, on_fetched, transfer, err);
    if (status != BKV_OK) {
        transfer_destroy(transfer);
    }
    return status;
}

static void on_delivered(void *user, const bkv_error_t *error) {
    const transfer_t transfer = *(transfer_t *)user;
    bkv_transport_counters_t *counters = &transfer.session->transports->counters;
    if (error->status == BKV_OK) {
        bkv_transport_count(&counters->deliveries_total, 1);
        bkv_transport_count(&counters->delivered_bytes_total, transfer.bytes);
    } else {
        bkv_transport_count(&counters->transfers_failed_total, 1);
    }
    transfer_destroy(user);
    transfer.delivered(transfer.user, error);
}

bkv_status_t bkv_session_deliver(bkv_session_t *session, const bkv_place_t *place, const bkv_delivery_t *delivery,
                                 bkv_delivered_t done, void *user, bkv_error_t *err) {
    bkv_status_t status = bkv_session_room(session, place, err);
    if (status == BKV_OK && delivery->length > place->bytes) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "place.bytes: %llu are no room for a record of %llu",
                          (unsigned long long)place->bytes, (unsigned long long)delivery->length);
    }
    if (status == BKV_OK) {
        status = check_alive(session, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    transfer_t *transfer = transfer_create(session, delivery->length, user, err);
    if (transfer == NULL) {
        return BKV_RESOURCE_EXHAUSTED;
    }
    transfer->delivered = done;
    status = session->ops->deliver(session->self, session->state, place, delivery, on_delivered, transfer, err);
    if (status != BKV_OK) {
        transfer_destroy(transfer);
    }
    return status;
}
