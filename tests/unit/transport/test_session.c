// test_session.c - sessions: names, bounds, references, every way to end, and threads that do it all at once.
#include "fixture.h"

#include <criterion/criterion.h>
#include <string.h>
#include <unistd.h>

#define WINDOW UINT64_C(65536)

static bkv_status_t try_attach(fixture_t *fixture, bool local, uint64_t bytes, bkv_attach_result_t *result, bkv_error_t *err) {
    const bkv_attach_args_t args = {.kind = BKV_TRANSPORT_SHM, .local = local, .bytes = bytes};
    return bkv_session_attach(fixture->transports, &args, result, err);
}

static void assert_gone(fixture_t *fixture, const bkv_session_id_t *id) {
    bkv_session_t *session;
    bkv_error_t err;
    cr_assert_eq(bkv_session_find(fixture->transports, id, &session, &err), BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(err.message, "place.session"), "%s", err.message);
}

Test(session, is_found_until_it_is_detached) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t first = fixture_attach(&fixture, WINDOW), second = fixture_attach(&fixture, WINDOW);
    cr_assert_neq(memcmp(&first, &second, sizeof(first)), 0);
    cr_assert_eq(fixture_metrics(&fixture).sessions, 2);
    cr_assert_eq(fixture_metrics(&fixture).shm_window_bytes, 2 * WINDOW);

    bkv_session_t *session = fixture_find(&fixture, &first);
    cr_assert_not(bkv_session_on_device(session));
    bkv_error_t err;
    cr_assert_eq(bkv_session_detach(fixture.transports, &first, NULL, NULL, &err), BKV_OK);
    assert_gone(&fixture, &first);
    cr_assert_eq(fixture_metrics(&fixture).sessions, 2, "the reference keeps its memory");
    bkv_session_release(session);
    cr_assert_eq(fixture_metrics(&fixture).sessions, 1);
    cr_assert_eq(fixture_metrics(&fixture).shm_window_bytes, WINDOW);
    cr_assert_eq(bkv_session_detach(fixture.transports, &first, NULL, NULL, &err), BKV_FAILED_PRECONDITION);

    bkv_session_release(fixture_find(&fixture, &second));
    cr_assert_eq(fixture_metrics(&fixture).sessions_total, 2);
    fixture_close(&fixture); // ends the second
}

Test(session, names_that_were_never_given_are_none) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    for (size_t bit = 0; bit < sizeof(id) * 8; bit++) {
        bkv_session_id_t other = id;
        other.bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
        assert_gone(&fixture, &other);
    }
    fixture_close(&fixture);
}

Test(session, bounds) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_attach_result_t result;
    bkv_error_t err;
    bkv_session_id_t first = fixture_attach(&fixture, WINDOW);
    for (uint32_t i = 1; i < fixture.config.max_sessions; i++) {
        fixture_attach(&fixture, WINDOW);
    }
    cr_assert_eq(try_attach(&fixture, true, WINDOW, &result, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert_not_null(strstr(err.message, "max_sessions"));
    bkv_session_t *held = fixture_find(&fixture, &first);
    cr_assert_eq(bkv_session_detach(fixture.transports, &first, NULL, NULL, NULL), BKV_OK);
    cr_assert_eq(try_attach(&fixture, true, WINDOW, &result, &err), BKV_RESOURCE_EXHAUSTED, "it still takes memory");
    bkv_session_release(held);
    cr_assert_eq(try_attach(&fixture, true, WINDOW, &result, &err), BKV_OK);
    cr_assert_eq(result.idle_ms, 1000);
    fixture_close(&fixture);
}

Test(session, a_refused_one_takes_no_place) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_attach_result_t result;
    bkv_error_t err;
    for (int i = 0; i < 100; i++) {
        cr_assert_eq(try_attach(&fixture, true, 100, &result, &err), BKV_INVALID_ARGUMENT);
        cr_assert_not_null(strstr(err.message, "shm.bytes"));
        cr_assert_eq(try_attach(&fixture, false, WINDOW, &result, &err), BKV_UNIMPLEMENTED);
    }
    cr_assert_eq(fixture_metrics(&fixture).sessions, 0);
    cr_assert_eq(fixture_metrics(&fixture).shm_window_bytes, 0);
    fixture_close(&fixture);
}

Test(session, idle_ones_end_and_used_ones_do_not) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t idle = fixture_attach(&fixture, WINDOW), used = fixture_attach(&fixture, WINDOW),
                     held = fixture_attach(&fixture, WINDOW), busy = fixture_attach(&fixture, WINDOW);
    cr_assert_eq(bkv_session_hold(fixture.transports, &held, NULL), BKV_OK);
    bkv_session_t *reference = fixture_find(&fixture, &busy);
    fixture_advance(999);
    bkv_transports_tick(fixture.transports, fixture_now());
    cr_assert_eq(fixture_metrics(&fixture).sessions, 4);
    bkv_session_release(fixture_find(&fixture, &used));
    fixture_advance(1);
    bkv_transports_tick(fixture.transports, fixture_now());
    assert_gone(&fixture, &idle);
    cr_assert_eq(fixture_metrics(&fixture).sessions_idle_total, 1);
    bkv_session_release(reference);
    bkv_session_release(fixture_find(&fixture, &busy));
    fixture_advance(5000);
    bkv_transports_tick(fixture.transports, fixture_now());
    cr_assert_eq(fixture_metrics(&fixture).sessions, 1, "the held one alone");
    bkv_session_release(fixture_find(&fixture, &held));
    bkv_transports_tick(fixture.transports, 0); // a clock that was read before the session's last use
    cr_assert_eq(fixture_metrics(&fixture).sessions, 1);
    fixture_close(&fixture);
}

Test(session, is_held_once_and_lost_with_its_holder) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    bkv_error_t err;
    cr_assert(bkv_session_alive(fixture.transports, &id));
    cr_assert_eq(bkv_session_hold(fixture.transports, &id, &err), BKV_OK);
    cr_assert_eq(bkv_session_hold(fixture.transports, &id, &err), BKV_FAILED_PRECONDITION);
    bkv_session_lose(fixture.transports, &id);
    cr_assert_not(bkv_session_alive(fixture.transports, &id));
    bkv_session_lose(fixture.transports, &id); // nothing is there to lose any more
    cr_assert_eq(fixture_metrics(&fixture).sessions_lost_total, 1);
    cr_assert_eq(bkv_session_hold(fixture.transports, &id, &err), BKV_FAILED_PRECONDITION);
    fixture_close(&fixture);
}

Test(session, offers_by_peer) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    const char *names[BKV_TRANSPORT_KINDS + 1];
    cr_assert_eq(bkv_transports_offer(fixture.transports, true, names), 2);
    cr_assert_str_eq(names[0], "shm");
    cr_assert_str_eq(names[1], "inline");
    cr_assert_eq(bkv_transports_offer(fixture.transports, false, names), 1);
    cr_assert_str_eq(names[0], "inline");
    fixture_close(&fixture);
}

// Without a unix socket, or with nothing to share, local transports are not to be had, and say why.
Test(session, a_daemon_without_shm) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_transports_config_t configs[] = {fixture.config, fixture.config, fixture.config};
    configs[0].shm_bytes = 0;
    configs[1].socket_path = "";
    configs[2].socket_path = NULL;
    bkv_transports_destroy(fixture.transports);
    for (size_t i = 0; i < 3; i++) {
        bkv_error_t err;
        cr_assert_eq(bkv_transports_create(&configs[i], &fixture.transports, &err), BKV_OK);
        cr_assert_neq(access(fixture.fd_socket, F_OK), 0, "no socket for nobody");
        bkv_attach_result_t result;
        cr_assert_eq(try_attach(&fixture, true, WINDOW, &result, &err), BKV_UNIMPLEMENTED);
        cr_assert_not_null(strstr(err.message, i == 0 ? "transport.shm" : "listen.socket"), "%s", err.message);
        if (i < 2) {
            bkv_transports_destroy(fixture.transports);
        }
    }
    fixture_close(&fixture);
}

// ---- many threads ----

#define THREADS 4
#define ROUNDS  400

static void *attach_and_end(void *argument) {
    fixture_t *fixture = argument;
    for (int i = 0; i < ROUNDS; i++) {
        bkv_attach_result_t result;
        bkv_session_t *session;
        if (try_attach(fixture, true, WINDOW, &result, NULL) != BKV_OK) {
            continue;
        }
        if (bkv_session_find(fixture->transports, &result.id, &session, NULL) == BKV_OK) {
            fixture_advance(i % 7 == 0 ? 1001 : 0);
            bkv_session_release(session);
        }
        if (i % 3 == 0) {
            bkv_session_lose(fixture->transports, &result.id);
        } else if (i % 3 == 1) {
            bkv_session_detach(fixture->transports, &result.id, NULL, NULL, NULL); // unless the ticker was faster
        }
        bkv_transports_tick(fixture->transports, fixture_now());
    }
    return NULL;
}

Test(session, threads_that_begin_and_end_them) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    pthread_t threads[THREADS];
    for (size_t i = 0; i < THREADS; i++) {
        cr_assert_eq(pthread_create(&threads[i], NULL, attach_and_end, &fixture), 0);
    }
    for (size_t i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    fixture_advance(1001);
    bkv_transports_tick(fixture.transports, fixture_now());
    bkv_transport_metrics_t metrics = fixture_metrics(&fixture);
    cr_assert_eq(metrics.sessions, 0);
    cr_assert_eq(metrics.shm_window_bytes, 0);
    cr_assert_gt(metrics.sessions_total, ROUNDS);
    fixture_close(&fixture);
}

// One session that many look for while it ends: each finds it whole or not at all, and it is taken down once.
typedef struct hunt {
    fixture_t *fixture;
    bkv_session_id_t id;
    _Atomic uint64_t found;
} hunt_t;

static void *find_until_gone(void *argument) {
    hunt_t *hunt = argument;
    bkv_session_t *session;
    while (bkv_session_find(hunt->fixture->transports, &hunt->id, &session, NULL) == BKV_OK) {
        const bkv_place_t place = {.bytes = WINDOW};
        cr_assert_eq(bkv_session_room(session, &place, NULL), BKV_OK);
        atomic_fetch_add(&hunt->found, 1);
        bkv_session_release(session);
    }
    return NULL;
}

Test(session, ends_while_others_use_it) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    for (int round = 0; round < 20; round++) {
        hunt_t hunt = {.fixture = &fixture, .id = fixture_attach(&fixture, WINDOW)};
        pthread_t threads[THREADS];
        for (size_t i = 0; i < THREADS; i++) {
            cr_assert_eq(pthread_create(&threads[i], NULL, find_until_gone, &hunt), 0);
        }
        WAIT_UNTIL(atomic_load(&hunt.found) > 100);
        cr_assert_eq(bkv_session_detach(fixture.transports, &hunt.id, NULL, NULL, NULL), BKV_OK);
        for (size_t i = 0; i < THREADS; i++) {
            pthread_join(threads[i], NULL);
        }
        cr_assert_eq(fixture_metrics(&fixture).sessions, 0);
    }
    fixture_close(&fixture);
}
