// What becomes of the cuda-ipc transport when something fails: the GPU, a client in the middle of it, too many at once.
#include "cuda_rig.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// ---- the GPU ----

static bool is_alive(const bkv_session_t *session) {
    return session->ops->alive(session->self, session->state);
}

// Puts `count` blocks that the fake's streams hold up.
static void put_held(cuda_rig_t *rig, bkv_session_t *session, cuda_layout_t *layout, outcome_t *outcomes, uint32_t count) {
    bkv_error_t err;
    cuda_layout_payload(rig, 0, layout);
    fixture_fill(&rig->fixture, CUDA_TOKENS, 1, rig->memory);
    fake_gpu_hold(true);
    for (uint32_t i = 0; i < count; i++) {
        bkv_ingest_args_t args = cuda_put_args(rig, i, BKV_CODEC_DENSE4, 0);
        const bkv_place_t place = {.layout = &layout->layout};
        cr_assert_eq(cuda_put(rig, session, &args, &place, &outcomes[i], &err), BKV_OK, "%s", err.message);
    }
}

Test(cuda_ipc_faults, a_fault_of_the_gpu_ends_its_sessions_and_the_device_comes_back) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    cuda_layout_t layout;
    outcome_t outcomes[20];
    bkv_error_t err;
    put_held(&rig, session, &layout, outcomes, 20);
    usleep(2000);
    fake_gpu_break(false);
    fake_gpu_hold(false);
    for (uint32_t i = 0; i < 20; i++) {
        outcome_wait(&outcomes[i]);
        cr_assert_eq(outcomes[i].error.status, BKV_FAILED_PRECONDITION, "%s", outcomes[i].error.message);
    }
    WAIT_UNTIL(!is_alive(session) && session->ops->alive(session->self, NULL));
    bkv_ingest_args_t args = cuda_put_args(&rig, 99, BKV_CODEC_DENSE4, 0);
    const bkv_place_t place = {.layout = &layout.layout};
    outcome_t outcome;
    cr_assert_eq(cuda_put(&rig, session, &args, &place, &outcome, &err), BKV_FAILED_PRECONDITION);
    cr_assert_eq(strncmp(err.message, "place.session: ", 15), 0, "%s", err.message);
    bkv_session_t *again = cuda_attach_memory(&rig); // the same handle, opened anew
    cuda_put_well(&rig, again, &args, &layout.layout);
    cuda_assert_stored(&rig, 99, &args, rig.memory);
    cuda_detach(&rig, again);
    cuda_detach(&rig, session); // what it had mapped is not to be closed again
    cuda_rig_close(&rig);
}

Test(cuda_ipc_faults, a_gpu_that_does_not_come_back_is_no_transport_and_the_daemon_goes_on) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    cuda_layout_t layout;
    outcome_t outcomes[3];
    bkv_error_t err;
    bkv_session_id_t id;
    put_held(&rig, session, &layout, outcomes, 3);
    fake_gpu_break(true);
    fake_gpu_hold(false);
    for (uint32_t i = 0; i < 3; i++) {
        outcome_wait(&outcomes[i]);
        cr_assert_eq(outcomes[i].error.status, BKV_FAILED_PRECONDITION);
    }
    WAIT_UNTIL(!session->ops->alive(session->self, NULL));
    uint8_t handle[BKV_GPU_HANDLE_BYTES] = {0};
    const bkv_device_allocation_t allocation = {.handle = handle, .bytes = CUDA_MEMORY};
    bkv_status_t status;
    WAIT_UNTIL((status = cuda_try_attach(&rig, &allocation, 1, &id, &err)) == BKV_UNIMPLEMENTED);
    cr_assert_eq(status, BKV_UNIMPLEMENTED);
    cr_assert_not_null(strstr(err.message, "restart"), "%s", err.message);
    fixture_put(&rig.fixture, 500, CUDA_TOKENS); // what needs no GPU works
    cuda_detach(&rig, session);
    fixture_close(&rig.fixture); // what the dead device had cannot be given back
}

Test(cuda_ipc_faults, a_fault_while_clients_wait_for_events) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    cuda_layout_t layout;
    outcome_t outcome;
    bkv_error_t err;
    uint8_t handle[BKV_GPU_HANDLE_BYTES];
    fake_gpu_event(handle);
    cuda_layout_payload(&rig, 0, &layout);
    bkv_ingest_args_t args = cuda_put_args(&rig, 1, BKV_CODEC_DENSE4, 0);
    const bkv_place_t place = {.layout = &layout.layout, .event = handle};
    cr_assert_eq(cuda_put(&rig, session, &args, &place, &outcome, &err), BKV_OK);
    usleep(3000);
    fake_gpu_break(false);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_FAILED_PRECONDITION, "%s", outcome.error.message);
    WAIT_UNTIL(session->ops->alive(session->self, NULL));
    cuda_detach(&rig, session);
    cuda_rig_close(&rig);
}

// ---- clients ----

Test(cuda_ipc_faults, a_session_that_ends_in_the_middle_lets_what_has_begun_finish) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    cuda_layout_t layout;
    outcome_t outcomes[40];
    put_held(&rig, session, &layout, outcomes, 40);
    WAIT_UNTIL(fake_gpu_counts().compressions > 0);
    cuda_detach(&rig, session);
    cr_assert_eq(fake_gpu_counts().imports, 1, "transfers are under way");
    fake_gpu_hold(false);
    uint32_t good = 0, ended = 0;
    for (uint32_t i = 0; i < 40; i++) {
        outcome_wait(&outcomes[i]);
        good += outcomes[i].error.status == BKV_OK;
        ended += outcomes[i].error.status == BKV_FAILED_PRECONDITION;
    }
    cr_assert_eq(good + ended, 40);
    cr_assert_gt(good, 0);
    WAIT_UNTIL(fake_gpu_counts().imports == 0);
    cuda_rig_close(&rig);
}

Test(cuda_ipc_faults, nothing_is_kept_of_the_gpu_while_nobody_uses_it) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    cuda_layout_t layout;
    cuda_layout_payload(&rig, 0, &layout);
    fixture_fill(&rig.fixture, CUDA_TOKENS, 1, rig.memory);
    for (uint32_t i = 0; i < 3; i++) {
        bkv_session_t *session = cuda_attach_memory(&rig);
        bkv_ingest_args_t args = cuda_put_args(&rig, i, BKV_CODEC_DENSE4, 0);
        cuda_put_well(&rig, session, &args, &layout.layout);
        cr_assert_gt(fake_gpu_counts().memory_bytes, 0);
        cuda_detach(&rig, session);
        WAIT_UNTIL(fake_gpu_counts().memory_bytes == 0);
        cr_assert_eq(fake_gpu_counts().imports, 0);
    }
    cuda_rig_close(&rig);
}

#define WORKERS 4
#define ROUNDS  30

typedef struct worker {
    cuda_rig_t *rig;
    uint32_t number, good, ended;
} worker_t;

// Attaches, puts and gets with events, and now and then leaves in the middle.
static void *work(void *argument) {
    worker_t *worker = argument;
    cuda_rig_t *rig = worker->rig;
    uint8_t *memory = fake_gpu_alloc(CUDA_MEMORY, false), handle[BKV_GPU_HANDLE_BYTES];
    const bkv_device_allocation_t allocation = cuda_by_handle(memory, CUDA_MEMORY, handle);
    cuda_layout_t layout;
    cuda_layout_payload(rig, 0, &layout);
    fixture_fill(&rig->fixture, CUDA_TOKENS, worker->number, memory);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        bkv_session_t *session = cuda_attach(rig, &allocation, 1);
        outcome_t outcomes[8];
        bool begun[8];
        uint8_t event[BKV_GPU_HANDLE_BYTES];
        void *comes = fake_gpu_event(event);
        bkv_error_t err;
        for (uint32_t i = 0; i < 8; i++) {
            bkv_ingest_args_t args = cuda_put_args(rig, worker->number * 10000 + round * 10 + i, BKV_CODEC_DENSE4, 0);
            const bkv_place_t place = {.layout = &layout.layout, .event = i % 2 ? event : NULL};
            begun[i] = cuda_put(rig, session, &args, &place, &outcomes[i], &err) == BKV_OK;
        }
        if (round % 3 != 0) {
            fake_gpu_event_come(comes);
        }
        if (round % 3 == 0) {
            cuda_detach(rig, session); // whose event never comes
        }
        for (uint32_t i = 0; i < 8; i++) {
            cr_assert(begun[i]);
            outcome_wait(&outcomes[i]);
            worker->good += outcomes[i].error.status == BKV_OK;
            worker->ended += outcomes[i].error.status == BKV_FAILED_PRECONDITION;
        }
        if (round % 3 != 0) {
            cuda_detach(rig, session);
        }
    }
    return NULL;
}

Test(cuda_ipc_faults, many_clients_come_and_go_and_nothing_stays, .timeout = 120) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    worker_t workers[WORKERS];
    pthread_t threads[WORKERS];
    for (uint32_t i = 0; i < WORKERS; i++) {
        workers[i] = (worker_t){.rig = &rig, .number = i};
        cr_assert_eq(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
    }
    for (uint32_t i = 0; i < WORKERS; i++) {
        pthread_join(threads[i], NULL);
        cr_assert_eq(workers[i].good + workers[i].ended, ROUNDS * 8);
        cr_assert_geq(workers[i].good, ROUNDS * 8 * 2 / 3);
        cr_assert_geq(workers[i].ended, ROUNDS / 3 * 4, "half of a third have an event that never comes");
    }
    WAIT_UNTIL(fake_gpu_counts().imports == 0);
    cuda_rig_close(&rig);
}
