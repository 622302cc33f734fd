// test_shm.c - windows: their seals, their bounds, bytes in and out, and a client that writes to its window all the time.
#include "fixture.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/seal.h"

static bkv_status_t attach(fixture_t *fixture, uint64_t wanted, bkv_attach_result_t *result) {
    const bkv_attach_args_t args = {.kind = BKV_TRANSPORT_SHM, .local = true, .bytes = wanted};
    return bkv_session_attach(fixture->transports, &args, result, NULL);
}

Test(shm, a_window_cannot_change_its_size) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, FIXTURE_WINDOW);
    int peer = peer_connect(&fixture), fd;
    const bkv_fd_message_t request = peer_message(BKV_FD_TAKE, &id);
    bkv_fd_message_t answer;
    peer_send(peer, &request, sizeof(request), NULL, 0);
    cr_assert(peer_receive(peer, &answer, &fd));
    struct stat status;
    cr_assert_eq(fstat(fd, &status), 0);
    cr_assert_eq(status.st_size, (off_t)FIXTURE_WINDOW);
    cr_assert_eq(fcntl(fd, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    cr_assert(ftruncate(fd, 4096) != 0 && errno == EPERM);
    cr_assert(ftruncate(fd, (off_t)FIXTURE_WINDOW * 2) != 0 && errno == EPERM);
    cr_assert(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) != 0 && errno == EPERM, "nor be made read-only under the daemon");
    cr_assert(fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE) != 0 && errno == EPERM);
    cr_assert_eq(pwrite(fd, "x", 1, (off_t)FIXTURE_WINDOW), -1);
    cr_assert_neq(fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
    close(fd);
    close(peer);
    fixture_close(&fixture);
}

Test(shm, windows_are_as_large_as_there_is_room) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_attach_result_t results[6];
    cr_assert_eq(attach(&fixture, 65535, &results[0]), BKV_INVALID_ARGUMENT);
    cr_assert_eq(attach(&fixture, 65537, &results[0]), BKV_OK);
    cr_assert_eq(results[0].bytes, 2 * 65536);
    cr_assert_eq(bkv_session_detach(fixture.transports, &results[0].id, NULL, NULL, NULL), BKV_OK);
    const uint64_t wanted[] = {UINT64_MAX, UINT64_MAX - 65535, FIXTURE_WINDOW + 1, FIXTURE_WINDOW - 65536};
    const uint64_t got[] = {FIXTURE_WINDOW, FIXTURE_WINDOW, FIXTURE_WINDOW, FIXTURE_WINDOW - 65536};
    for (size_t i = 0; i < 4; i++) {
        cr_assert_eq(attach(&fixture, wanted[i], &results[i]), BKV_OK);
        cr_assert_eq(results[i].bytes, got[i]);
    }
    cr_assert_eq(attach(&fixture, FIXTURE_WINDOW, &results[4]), BKV_OK);
    cr_assert_eq(results[4].bytes, 65536, "what is left");
    cr_assert_eq(attach(&fixture, 65536, &results[5]), BKV_RESOURCE_EXHAUSTED);
    cr_assert_eq(fixture_metrics(&fixture).shm_window_bytes, FIXTURE_SHM);
    cr_assert_eq(bkv_session_detach(fixture.transports, &results[0].id, NULL, NULL, NULL), BKV_OK);
    cr_assert_eq(attach(&fixture, FIXTURE_WINDOW, &results[5]), BKV_OK);
    cr_assert_eq(results[5].bytes, FIXTURE_WINDOW);
    fixture_close(&fixture);
}

// Small enough for the calling thread, and large enough for a compute thread; 768 KiB as raw.
static const uint32_t sizes[] = {1, 64, 300, FIXTURE_TOKENS};

Test(shm, payloads_and_records_move_byte_for_byte) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, FIXTURE_WINDOW);
    uint8_t *window, *payload = malloc(FIXTURE_WINDOW);
    int peer = peer_take(&fixture, &id, FIXTURE_WINDOW, &window);
    bkv_session_t *session = fixture_find(&fixture, &id);
    for (uint32_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        const bkv_place_t from = {.offset = 4096 + 64 * i};
        uint64_t bytes = fixture_fill(&fixture, sizes[i], i + 1, payload);
        memcpy(window + from.offset, payload, bytes);
        outcome_t outcome;
        outcome_init(&outcome);
        bkv_ingest_t *ingest = fixture_begin(&fixture, i, sizes[i], BKV_CODEC_RAW);
        cr_assert_eq(bkv_session_fetch(session, &from, ingest, outcome_put_done, &outcome, NULL), BKV_OK);
        outcome_wait(&outcome);
        cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);

        memset(window, 0xee, FIXTURE_WINDOW);
        bkv_delivery_t delivery = fixture_deliver(&fixture, i);
        const bkv_place_t to = {.offset = 64 * (i + 1), .bytes = delivery.length};
        outcome_init(&outcome);
        cr_assert_eq(bkv_session_deliver(session, &to, &delivery, outcome_delivered, &outcome, NULL), BKV_OK);
        outcome_wait(&outcome);
        cr_assert_eq(outcome.error.status, BKV_OK);
        const uint8_t *record = window + to.offset;
        cr_assert_eq(bkv_record_verify(record, delivery.length, NULL), BKV_OK);
        cr_assert_eq(memcmp(record + delivery.length - bytes, payload, bytes), 0, "a raw record ends with its payload");
        cr_assert(record[-1] == 0xee && record[delivery.length] == 0xee, "and nothing else was written");
        bkv_delivery_release(fixture.pipeline, &delivery);
    }
    bkv_session_release(session);
    munmap(window, FIXTURE_WINDOW);
    close(peer);
    free(payload);
    fixture_close(&fixture);
}

Test(shm, a_damaged_record_is_data_loss_and_goes) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, FIXTURE_WINDOW);
    bkv_session_t *session = fixture_find(&fixture, &id);
    for (uint32_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        fixture_put(&fixture, i, sizes[i]);
        bkv_delivery_t delivery = fixture_deliver(&fixture, i);
        ((uint8_t *)(uintptr_t)delivery.data)[delivery.length - 1] ^= 1; // the arena, as a stray writer would
        outcome_t outcome;
        outcome_init(&outcome);
        const bkv_place_t place = {.offset = 0, .bytes = FIXTURE_WINDOW};
        cr_assert_eq(bkv_session_deliver(session, &place, &delivery, outcome_delivered, &outcome, NULL), BKV_OK);
        outcome_wait(&outcome);
        cr_assert_eq(outcome.error.status, BKV_DATA_LOSS);
        bkv_delivery_release(fixture.pipeline, &delivery);
    }
    bkv_store_metrics_t store;
    bkv_store_metrics(fixture.store, &store);
    cr_assert_eq(store.entries, 0);
    cr_assert_eq(store.corrupt_total, 4);
    cr_assert_eq(fixture_metrics(&fixture).transfers_failed_total, 4);
    bkv_session_release(session);
    fixture_close(&fixture);
}

Test(shm, busy_compute_threads_refuse_at_the_door) {
    fixture_t fixture;
    fixture_open(&fixture, 1);
    fixture_put(&fixture, 1, FIXTURE_TOKENS);
    bkv_session_id_t id = fixture_attach(&fixture, FIXTURE_WINDOW);
    bkv_session_t *session = fixture_find(&fixture, &id);
    blocker_t blockers[2];
    blocker_start(&blockers[0], &fixture);
    blocker_start(&blockers[1], &fixture);
    outcome_t first, second;
    outcome_init(&first);
    outcome_init(&second);
    const bkv_place_t place = {.offset = 0, .bytes = FIXTURE_WINDOW};
    bkv_delivery_t delivery = fixture_deliver(&fixture, 1), other = fixture_deliver(&fixture, 1);
    cr_assert_eq(bkv_session_deliver(session, &place, &delivery, outcome_delivered, &first, NULL), BKV_OK);
    cr_assert_eq(bkv_session_deliver(session, &place, &other, outcome_delivered, &second, NULL), BKV_BUSY);
    const uint32_t tokens[] = {64, FIXTURE_TOKENS}; // copied on this thread, and on a compute thread: both need one to compress
    for (size_t i = 0; i < 2; i++) {
        bkv_ingest_t *ingest = fixture_begin(&fixture, 2, tokens[i], BKV_CODEC_DENSE8);
        const bkv_place_t from = {.offset = 0};
        cr_assert_eq(bkv_session_fetch(session, &from, ingest, outcome_put_done, &second, NULL), BKV_BUSY);
        cr_assert_eq(bkv_session_fetch(session, &from, ingest, outcome_put_done, &second, NULL), BKV_BUSY,
                     "nor when asked again");
        bkv_ingest_abort(ingest);
    }
    sem_post(&blockers[0].release);
    sem_post(&blockers[1].release);
    outcome_wait(&first);
    cr_assert_eq(first.error.status, BKV_OK);
    int value;
    sem_getvalue(&second.called, &value);
    cr_assert_eq(value, 0, "who was refused is not called");
    bkv_delivery_release(fixture.pipeline, &delivery);
    bkv_delivery_release(fixture.pipeline, &other);
    bkv_session_release(session);
    fixture_close(&fixture);
}

// ---- a client that writes to its window while it is read ----

typedef struct scribbler {
    uint8_t *window;
    _Atomic bool stop;
} scribbler_t;

// Under ThreadSanitizer the race is the point: what must not race is what the daemon keeps.
__attribute__((no_sanitize("thread"))) static void *scribble(void *argument) {
    scribbler_t *scribbler = argument;
    for (uint32_t round = 1; !atomic_load(&scribbler->stop); round++) {
        for (uint64_t at = 0; at < FIXTURE_WINDOW; at += 64) {
            *(volatile float *)(void *)(scribbler->window + at) = (float)(round % 1000);
        }
    }
    return NULL;
}

Test(shm, a_record_is_sound_whatever_the_client_does_meanwhile) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, FIXTURE_WINDOW);
    scribbler_t scribbler = {.stop = false};
    int peer = peer_take(&fixture, &id, FIXTURE_WINDOW, &scribbler.window);
    bkv_session_t *session = fixture_find(&fixture, &id);
    pthread_t thread;
    cr_assert_eq(pthread_create(&thread, NULL, scribble, &scribbler), 0);
    void *copy = malloc(FIXTURE_WINDOW);
    for (uint32_t i = 0; i < 40; i++) {
        outcome_t outcome;
        outcome_init(&outcome);
        const bkv_place_t place = {.offset = 0, .bytes = 0};
        bkv_ingest_t *ingest = fixture_begin(&fixture, i, FIXTURE_TOKENS, i % 4 == 3 ? BKV_CODEC_DENSE8 : BKV_CODEC_RAW);
        cr_assert_eq(bkv_session_fetch(session, &place, ingest, outcome_put_done, &outcome, NULL), BKV_OK);
        outcome_wait(&outcome);
        cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
        bkv_delivery_t delivery = fixture_deliver(&fixture, i);
        memcpy(copy, delivery.data, delivery.length);
        cr_assert_eq(bkv_record_verify(copy, delivery.length, NULL), BKV_OK);
        const bkv_place_t to = {.offset = 1 << 20, .bytes = 1 << 20}; // where the client writes as well
        outcome_init(&outcome);
        cr_assert_eq(bkv_session_deliver(session, &to, &delivery, outcome_delivered, &outcome, NULL), BKV_OK);
        outcome_wait(&outcome);
        cr_assert_eq(outcome.error.status, BKV_OK, "the sum is the arena's, not the window's");
        cr_assert_eq(memcmp(copy, delivery.data, delivery.length), 0);
        bkv_delivery_release(fixture.pipeline, &delivery);
    }
    atomic_store(&scribbler.stop, true);
    pthread_join(thread, NULL);
    free(copy);
    munmap(scribbler.window, FIXTURE_WINDOW);
    bkv_session_release(session);
    close(peer);
    fixture_close(&fixture);
}
