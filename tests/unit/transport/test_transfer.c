// test_transfer.c - places: what is refused, to the byte and near 2^64; and how transfers keep and count their session.
#include "fixture.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define WINDOW UINT64_C(131072)
#define TOKENS 64 // 48 KiB

static const bkv_device_layout_t layout = {0};
static const uint8_t event[BKV_CUDA_HANDLE_BYTES] = {0};

static const struct {
    bkv_place_t place;
    const char *field; // NULL: fine
} rooms[] = {
    {{.offset = 0, .bytes = WINDOW}, NULL},
    {{.offset = 64, .bytes = WINDOW - 64}, NULL},
    {{.offset = WINDOW, .bytes = 0}, NULL},
    {{.offset = 0, .bytes = WINDOW + 1}, "place.bytes"},
    {{.offset = 64, .bytes = WINDOW}, "place.bytes"},
    {{.offset = WINDOW, .bytes = 1}, "place.bytes"},
    {{.offset = WINDOW + 64, .bytes = 0}, "place.offset"},
    {{.offset = 1, .bytes = 64}, "place.offset"},
    {{.offset = 63, .bytes = 64}, "place.offset"},
    {{.offset = UINT64_MAX - 63, .bytes = 64}, "place.offset"},
    {{.offset = UINT64_MAX - 63, .bytes = UINT64_MAX}, "place.offset"},
    {{.offset = UINT64_C(1) << 63, .bytes = UINT64_C(1) << 63}, "place.offset"},
    {{.offset = 64, .bytes = UINT64_MAX - 63}, "place.bytes"},
    {{.offset = 64, .bytes = UINT64_MAX}, "place.bytes"},
    {{.offset = 0, .bytes = 64, .layout = &layout}, "place.layout"},
    {{.offset = 0, .bytes = 64, .event = event}, "place.event"},
};

Test(transfer, rooms_are_checked_against_the_session) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    bkv_session_t *session = fixture_find(&fixture, &id);
    for (size_t i = 0; i < sizeof(rooms) / sizeof(rooms[0]); i++) {
        bkv_error_t err = {.message = ""};
        bkv_status_t status = bkv_session_room(session, &rooms[i].place, &err);
        cr_assert_eq(status, rooms[i].field == NULL ? BKV_OK : BKV_INVALID_ARGUMENT, "%zu: %s", i, err.message);
        cr_assert(rooms[i].field == NULL || strstr(err.message, rooms[i].field) == err.message, "%zu: %s", i, err.message);
    }
    bkv_session_release(session);
    fixture_close(&fixture);
}

Test(transfer, payloads_are_checked_against_the_session) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    bkv_session_t *session = fixture_find(&fixture, &id);
    bkv_ingest_t *ingest = fixture_begin(&fixture, 1, TOKENS, BKV_CODEC_RAW);
    uint64_t bytes = bkv_ingest_bytes(ingest), last = (WINDOW - bytes) / 64 * 64;
    const struct {
        bkv_place_t place;
        const char *field;
    } refused[] = {
        {{.offset = 0, .bytes = bytes - 1}, "place.bytes"},
        {{.offset = 0, .bytes = bytes + 1}, "place.bytes"},
        {{.offset = 8, .bytes = bytes}, "place.offset"},
        {{.offset = last + 64, .bytes = bytes}, "place.bytes"},
        {{.offset = last + 64, .bytes = 0}, "place.bytes"}, // 0 stands for the payload's own
        {{.offset = WINDOW + 64, .bytes = 0}, "place.offset"},
        {{.offset = UINT64_MAX - 63, .bytes = bytes}, "place.offset"},
        {{.offset = UINT64_C(0) - 49152, .bytes = 0}, "place.offset"}, // wraps around to 0
        {{.offset = 0, .layout = &layout}, "place.layout"},
        {{.offset = 0, .event = event}, "place.event"},
    };
    outcome_t outcome;
    outcome_init(&outcome);
    for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++) {
        bkv_error_t err = {.message = ""};
        bkv_status_t status = bkv_session_fetch(session, &refused[i].place, ingest, outcome_put_done, &outcome, &err);
        cr_assert_eq(status, BKV_INVALID_ARGUMENT, "%zu", i);
        cr_assert_eq(strstr(err.message, refused[i].field), err.message, "%zu: %s", i, err.message);
    }
    const bkv_place_t place = {.offset = last};
    cr_assert_eq(bkv_session_fetch(session, &place, ingest, outcome_put_done, &outcome, NULL), BKV_OK, "still the caller's");
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK);
    cr_assert_eq(fixture_metrics(&fixture).fetches_total, 1);
    cr_assert_eq(fixture_metrics(&fixture).fetched_bytes_total, bytes);
    cr_assert_eq(fixture_metrics(&fixture).transfers_failed_total, 0);
    bkv_session_release(session);
    fixture_close(&fixture);
}

Test(transfer, a_record_needs_its_room) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    fixture_put(&fixture, 1, TOKENS);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    bkv_session_t *session = fixture_find(&fixture, &id);
    bkv_delivery_t delivery = fixture_deliver(&fixture, 1);
    outcome_t outcome;
    outcome_init(&outcome);
    bkv_place_t place = {.offset = 64, .bytes = delivery.length - 1};
    bkv_error_t err;
    cr_assert_eq(bkv_session_deliver(session, &place, &delivery, outcome_delivered, &outcome, &err), BKV_INVALID_ARGUMENT);
    place.bytes = delivery.length;
    cr_assert_eq(bkv_session_deliver(session, &place, &delivery, outcome_delivered, &outcome, &err), BKV_OK);
    outcome_wait(&outcome);
    cr_assert_eq(fixture_metrics(&fixture).deliveries_total, 1);
    cr_assert_eq(fixture_metrics(&fixture).delivered_bytes_total, delivery.length);
    bkv_delivery_release(fixture.pipeline, &delivery);
    bkv_session_release(session);
    fixture_close(&fixture);
}

Test(transfer, an_ended_session_begins_none_and_finishes_those_under_way) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    uint8_t *window;
    int peer = peer_take(&fixture, &id, WINDOW, &window);
    fixture_fill(&fixture, TOKENS, 5, window);
    bkv_session_t *session = fixture_find(&fixture, &id);
    blocker_t blockers[2];
    blocker_start(&blockers[0], &fixture);
    blocker_start(&blockers[1], &fixture);
    outcome_t under_way;
    outcome_init(&under_way);
    const bkv_place_t place = {.offset = 0};
    bkv_ingest_t *ingest = fixture_begin(&fixture, 1, TOKENS, BKV_CODEC_DENSE8);
    cr_assert_eq(bkv_session_fetch(session, &place, ingest, outcome_put_done, &under_way, NULL), BKV_OK);

    close(peer); // with it the session ends, but for the transfer that waits for a compute thread
    WAIT_UNTIL(!bkv_session_alive(fixture.transports, &id));
    bkv_ingest_t *late = fixture_begin(&fixture, 2, TOKENS, BKV_CODEC_RAW);
    bkv_error_t err;
    outcome_t never;
    outcome_init(&never);
    cr_assert_eq(bkv_session_fetch(session, &place, late, outcome_put_done, &never, &err), BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(err.message, "place.session"));
    bkv_ingest_abort(late);
    bkv_session_release(session);
    cr_assert_eq(fixture_metrics(&fixture).sessions, 1);

    sem_post(&blockers[0].release);
    sem_post(&blockers[1].release);
    outcome_wait(&under_way);
    cr_assert_eq(under_way.error.status, BKV_OK);
    cr_assert_eq(fixture_metrics(&fixture).sessions, 0, "gone before its owner hears of it");
    cr_assert_eq(fixture_metrics(&fixture).shm_window_bytes, 0);
    munmap(window, WINDOW);
    fixture_close(&fixture);
}

static void on_gone(void *user) {
    sem_post(user);
}

// Who ends a session may count on its memory once he is told.
Test(transfer, detach_tells_when_nothing_is_under_way) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    bkv_session_t *session = fixture_find(&fixture, &id);
    blocker_t blockers[2];
    blocker_start(&blockers[0], &fixture);
    blocker_start(&blockers[1], &fixture);
    outcome_t under_way;
    outcome_init(&under_way);
    const bkv_place_t place = {.offset = 0};
    bkv_ingest_t *ingest = fixture_begin(&fixture, 1, TOKENS, BKV_CODEC_DENSE8);
    cr_assert_eq(bkv_session_fetch(session, &place, ingest, outcome_put_done, &under_way, NULL), BKV_OK);
    bkv_session_release(session);
    sem_t gone;
    sem_init(&gone, 0, 0);
    cr_assert_eq(bkv_session_detach(fixture.transports, &id, on_gone, &gone, NULL), BKV_OK);
    cr_assert_neq(sem_trywait(&gone), 0, "a payload is still to be read");
    sem_post(&blockers[0].release);
    sem_post(&blockers[1].release);
    outcome_wait(&under_way);
    sem_wait(&gone);
    cr_assert_eq(fixture_metrics(&fixture).shm_window_bytes, 0);

    id = fixture_attach(&fixture, WINDOW); // with nothing under way at once
    cr_assert_eq(bkv_session_detach(fixture.transports, &id, on_gone, &gone, NULL), BKV_OK);
    cr_assert_eq(sem_trywait(&gone), 0);
    fixture_close(&fixture);
}

// Destroy waits for what is under way.
Test(transfer, destroy_waits) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    bkv_session_t *session = fixture_find(&fixture, &id);
    outcome_t outcomes[8];
    const bkv_place_t place = {.offset = 0};
    for (uint32_t i = 0; i < 8; i++) {
        outcome_init(&outcomes[i]);
        bkv_ingest_t *ingest = fixture_begin(&fixture, i, TOKENS, i % 2 == 0 ? BKV_CODEC_RAW : BKV_CODEC_DENSE8);
        cr_assert_eq(bkv_session_fetch(session, &place, ingest, outcome_put_done, &outcomes[i], NULL), BKV_OK);
    }
    bkv_session_release(session);
    bkv_transports_destroy(fixture.transports);
    fixture.transports = NULL;
    for (size_t i = 0; i < 8; i++) {
        outcome_wait(&outcomes[i]);
        cr_assert_eq(outcomes[i].error.status, BKV_OK, "%s", outcomes[i].error.message);
    }
    fixture_close(&fixture);
}
