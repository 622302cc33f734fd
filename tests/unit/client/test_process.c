// A daemon that is stopped, killed and started again under a running client.
#include "process.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct state {
    uint64_t epoch;
    atomic_bool opened;
} state_t;

static void serve(fake_call_t *call, void *user) {
    state_t *state = user;
    if (fake_is(call, "Open")) {
        state->opened = true;
        fake_open(call, state->epoch);
    } else if (!state->opened) {
        fake_finish(call, GRPC_STATUS_NOT_FOUND, "spec_id: unknown");
    } else if (fake_is(call, "Put")) {
        fake_put(call, state->epoch);
    } else {
        fake_lookup(call, state->epoch);
    }
}

static void start_fake(const fake_place_t *place, uint64_t epoch) {
    state_t *state = calloc(1, sizeof *state);
    state->epoch = epoch;
    fake_server_start(place->endpoint, serve, state);
}

static bkv_spec_id_t open_spec(bkv_client_t *client) {
    bkv_spec_t spec = fake_spec();
    bkv_spec_id_t id;
    bkv_error_t err = {0};
    cr_assert(bkv_open(client, &spec, 10000, &id, NULL, &err) == BKV_OK, "%s", err.message);
    return id;
}

static bkv_status_t look_up(bkv_client_t *client, const bkv_spec_id_t *id, uint32_t timeout_ms, bkv_error_t *err) {
    bkv_key_t key = fake_key(2, 0);
    return bkv_lookup(client, id, &key, 1, timeout_ms, NULL, NULL, err);
}

// Far more than sockets and windows take, so that it cannot be sent while nobody reads.
#ifdef __SANITIZE_THREAD__
#define PAYLOAD (16u << 20)
#else
#define PAYLOAD (64u << 20)
#endif

static bkv_put_t map_block(void) {
    void *payload = mmap(NULL, PAYLOAD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert(payload != MAP_FAILED);
    memset(payload, 1, PAYLOAD);
    return (bkv_put_t){.key = fake_key(2, 0), .tokens = 1, .payload = payload, .payload_bytes = PAYLOAD};
}

static void unmap_block(bkv_put_t *block) {
    munmap((void *)block->payload, PAYLOAD);
}

static void assert_within(uint64_t start_ms, uint64_t limit_ms, const char *what) {
    uint64_t took_ms = fake_now_ms() - start_ms;
    cr_assert(took_ms < limit_ms, "%s took %llu ms", what, (unsigned long long)took_ms);
}

Test(process, stopped) {
    fake_place_t place;
    process_t process;
    bkv_error_t err = {0};
    fake_place_make(&place);
    process_fork(&process, &place, 1, start_fake);
    process_start(&process);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_spec_id_t id = open_spec(client);
    bkv_put_t block = map_block();
    process_stop(&process);

    uint64_t start = fake_now_ms();
    cr_assert(look_up(client, &id, 300, &err) == BKV_DEADLINE_EXCEEDED, "%s", err.message);
    assert_within(start, 5000, "Lookup");
    for (int i = 0; i < 3; i++) { // the second and third over the connections that replaced the first
        start = fake_now_ms();
        cr_assert(bkv_put(client, &id, &block, 1, 300, NULL, &err) == BKV_DEADLINE_EXCEEDED, "%s", err.message);
        assert_within(start, 5000, "Put");
    }
    bkv_key_t key = fake_key(2, 0);
    bkv_record_t record;
    start = fake_now_ms();
    cr_assert(bkv_get(client, &id, &key, 1, NULL, 300, &record, &err) == BKV_DEADLINE_EXCEEDED, "%s", err.message);
    assert_within(start, 5000, "Get");

    kill(process.pid, SIGCONT);
    cr_assert(look_up(client, &id, 30000, &err) == BKV_OK, "%s", err.message);
    bkv_put_result_t result = {0};
    cr_assert(bkv_put(client, &id, &block, 1, 30000, &result, &err) == BKV_OK && result.stored_bytes == PAYLOAD, "%s",
              err.message);
    bkv_client_destroy(client);
    unmap_block(&block);
    process_kill(&process);
    fake_place_remove(&place);
}

// One that blocks the connection and has long to go is not harmed by one that has to be freed from it.
Test(process, stopped_with_patient_calls) {
    fake_place_t place;
    process_t process;
    bkv_queue_t *queue = NULL;
    bkv_error_t err = {0};
    fake_place_make(&place);
    process_fork(&process, &place, 1, start_fake);
    process_start(&process);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_spec_id_t id = open_spec(client);
    bkv_put_t block = map_block();
    bkv_put_result_t results[3] = {0};
    bkv_key_t key = fake_key(2, 0);
    bool resident = false;
    cr_assert(bkv_queue_create(client, 4, &queue, NULL) == BKV_OK);
    process_stop(&process);
    for (uint64_t i = 0; i < 3; i++) {
        cr_assert(bkv_put_submit(queue, i, &id, &block, 1, 60000, &results[i]) == BKV_OK);
    }
    cr_assert(bkv_lookup_submit(queue, 3, &id, &key, 1, 60000, &resident, NULL) == BKV_OK);
    uint64_t start = fake_now_ms();
    cr_assert(bkv_put(client, &id, &block, 1, 300, NULL, &err) == BKV_DEADLINE_EXCEEDED);
    assert_within(start, 5000, "Put");
    kill(process.pid, SIGCONT);
    for (size_t count = 0; count < 4;) {
        bkv_completion_t completion;
        cr_assert(bkv_queue_poll(queue, &completion, 1, 60000) == 1);
        cr_assert(completion.error.status == BKV_OK, "%s", completion.error.message);
        count++;
    }
    cr_assert(resident && results[0].stored_bytes == PAYLOAD && results[2].stored_bytes == PAYLOAD);
    bkv_queue_destroy(queue);
    bkv_client_destroy(client);
    unmap_block(&block);
    process_kill(&process);
    fake_place_remove(&place);
}

Test(process, destroy_while_stopped) {
    fake_place_t place;
    process_t process;
    bkv_queue_t *queue = NULL;
    fake_place_make(&place);
    process_fork(&process, &place, 1, start_fake);
    process_start(&process);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_spec_id_t id = open_spec(client);
    bkv_put_t block = map_block();
    cr_assert(bkv_queue_create(client, 4, &queue, NULL) == BKV_OK);
    process_stop(&process);
    for (uint64_t i = 0; i < 4; i++) {
        cr_assert(bkv_put_submit(queue, i, &id, &block, 1, 60000, NULL) == BKV_OK);
    }
    usleep(100000); // let the socket fill up
    uint64_t start = fake_now_ms();
    bkv_queue_destroy(queue);
    unmap_block(&block);
    bkv_client_destroy(client);
    assert_within(start, 5000, "the end");
    process_kill(&process);
    fake_place_remove(&place);
}

Test(process, killed_and_started_again) {
    fake_place_t place;
    process_t first, second;
    bkv_error_t err = {0};
    fake_place_make(&place);
    process_fork(&first, &place, 1, start_fake);
    process_fork(&second, &place, 2, start_fake);
    process_start(&first);
    bkv_client_t *client = fake_client(&place, 40000);
    bkv_queue_t *queue = NULL;
    bkv_spec_id_t id = open_spec(client);
    bkv_put_t block = map_block();
    bkv_put_result_t result = {0};
    cr_assert(look_up(client, &id, 0, &err) == BKV_OK, "%s", err.message);
    cr_assert(bkv_queue_create(client, 64, &queue, NULL) == BKV_OK);
    cr_assert(bkv_put_submit(queue, 0, &id, &block, 1, 0, &result) == BKV_OK);
    usleep(2000); // it is killed in the middle of the Put
    process_kill(&first);
    bkv_key_t key = fake_key(2, 0);
    bool resident[32] = {0};
    for (uint64_t i = 0; i < 32; i++) { // while nobody is there
        cr_assert(bkv_lookup_submit(queue, 1 + i, &id, &key, 1, 0, &resident[i], NULL) == BKV_OK);
    }
    usleep(200000);
    uint64_t start = fake_now_ms();
    process_start(&second);
    for (size_t count = 0; count < 33; count++) {
        bkv_completion_t completion;
        cr_assert(bkv_queue_poll(queue, &completion, 1, 40000) == 1);
        cr_assert(completion.error.status == BKV_OK, "%s", completion.error.message);
    }
    assert_within(start, 20000, "finding the new daemon");
    cr_assert(result.stored_bytes == PAYLOAD && resident[0] && resident[31]);
    cr_assert(look_up(client, &id, 0, &err) == BKV_OK, "%s", err.message);
    bkv_queue_destroy(queue);
    bkv_client_destroy(client);
    unmap_block(&block);
    process_kill(&second);
    fake_place_remove(&place);
}
