// Put: streams of blocks from the caller's memory, and that the memory is let go of before the call returns.
#include "fake.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct script {
    atomic_uint puts;
    unsigned break_first; // so many are answered UNAVAILABLE in the middle of the stream
    atomic_int mode;      // one of these:
} script_t;

enum { GOOD, REFUSE, FEWER, OTHER_KEY, NEVER_READ };

static void answer_with(fake_call_t *call, size_t count, const bkv_key_t *key) {
    Balancekv__V1__PutResult result = BALANCEKV__V1__PUT_RESULT__INIT, *list[1] = {&result};
    Balancekv__V1__PutResponse response = BALANCEKV__V1__PUT_RESPONSE__INIT;
    result.key = (ProtobufCBinaryData){.len = BKV_KEY_BYTES, .data = (uint8_t *)key->bytes};
    response.n_results = count;
    response.results = list;
    fake_write(call, &response.base);
    fake_finish(call, GRPC_STATUS_OK, "");
}

static void play(fake_call_t *call, void *user) {
    script_t *script = user;
    unsigned number = atomic_fetch_add(&script->puts, 1);
    bkv_key_t other = fake_key(99, 99);
    if (number < script->break_first) {
        Balancekv__V1__PutRequest *request = fake_read(call, &balancekv__v1__put_request__descriptor);
        balancekv__v1__put_request__free_unpacked(request, NULL);
        fake_finish(call, GRPC_STATUS_UNAVAILABLE, "staging: full");
    } else if (script->mode == GOOD) {
        fake_put(call, 1);
    } else if (script->mode == REFUSE) {
        fake_finish(call, GRPC_STATUS_INVALID_ARGUMENT, "tokens: 0");
    } else if (script->mode == FEWER) {
        answer_with(call, 0, &other);
    } else if (script->mode == OTHER_KEY) {
        answer_with(call, 1, &other);
    }
}

// A payload in a mapping of its own: once it is unmapped, nobody can have kept on reading it unnoticed.
static uint8_t *map_payload(size_t bytes) {
    uint8_t *payload = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert(payload != MAP_FAILED);
    for (size_t i = 0; i < bytes; i++) {
        payload[i] = (uint8_t)(i * 31 + i / 4093);
    }
    return payload;
}

static uint64_t sum(const uint8_t *bytes, size_t n) {
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++) {
        total += bytes[i];
    }
    return total;
}

static void put_sizes(unsigned break_first) {
    static const size_t sizes[] = {1, 100, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (5 << 20) + 12345};
    enum { COUNT = sizeof sizes / sizeof sizes[0] };
    fake_place_t place;
    script_t script = {.break_first = break_first};
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, play, &script);
    bkv_client_t *client = fake_client(&place, 20000);
    bkv_spec_id_t id = fake_spec_id();
    bkv_put_t blocks[COUNT];
    bkv_put_result_t results[COUNT];
    for (size_t i = 0; i < COUNT; i++) {
        blocks[i] = (bkv_put_t){
            .key = fake_key(1, (uint8_t)i), .tokens = 4, .payload = map_payload(sizes[i]), .payload_bytes = sizes[i]};
    }
    bkv_error_t err = {0};
    cr_assert(bkv_put(client, &id, blocks, COUNT, 0, results, &err) == BKV_OK, "%s", err.message);
    for (size_t i = 0; i < COUNT; i++) {
        cr_assert(results[i].stored_bytes == sum(blocks[i].payload, sizes[i]) && !results[i].duplicate, "block %zu", i);
        munmap((void *)blocks[i].payload, sizes[i]);
    }
    cr_assert(script.puts == break_first + 1);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

Test(put, all_sizes) {
    put_sizes(0);
}

Test(put, begins_again_from_the_start) {
    put_sizes(2);
}

Test(put, refusals) {
    static const struct {
        int mode;
        bkv_status_t status;
        const char *message;
    } cases[] = {
        {REFUSE, BKV_INVALID_ARGUMENT, "tokens: 0"},
        {FEWER, BKV_INTERNAL, "0 results for 1 blocks"},
        {OTHER_KEY, BKV_INTERNAL, "results[0]"},
    };
    fake_place_t place;
    script_t script = {0};
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, play, &script);
    bkv_client_t *client = fake_client(&place, 20000);
    bkv_spec_id_t id = fake_spec_id();
    size_t bytes = 32 << 20; // more than any buffer on the way takes: the answer comes in the middle
    bkv_put_t block = {.key = fake_key(1, 1), .tokens = 4, .payload = map_payload(bytes), .payload_bytes = bytes};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        bkv_error_t err = {0};
        script.mode = cases[i].mode;
        cr_assert(bkv_put(client, &id, &block, 1, 0, NULL, &err) == cases[i].status, "case %zu: %s", i, err.message);
        cr_assert(strstr(err.message, cases[i].message) != NULL, "case %zu: %s", i, err.message);
    }
    cr_assert(bkv_put(client, &id, NULL, 0, 0, NULL, NULL) == BKV_INVALID_ARGUMENT);
    munmap((void *)block.payload, bytes);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

Test(put, deadline_when_nobody_reads) {
    fake_place_t place;
    script_t script = {.mode = NEVER_READ};
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, play, &script);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_spec_id_t id = fake_spec_id();
    size_t bytes = 64 << 20;
    bkv_put_t block = {.key = fake_key(1, 1), .tokens = 4, .payload = map_payload(bytes), .payload_bytes = bytes};
    bkv_error_t err = {0};
    uint64_t start = fake_now_ms();
    cr_assert(bkv_put(client, &id, &block, 1, 300, NULL, &err) == BKV_DEADLINE_EXCEEDED, "%s", err.message);
    cr_assert(fake_now_ms() - start < 5000, "%d ms", (int)(fake_now_ms() - start));
    munmap((void *)block.payload, bytes);
    // The connection is still good, or a new one is.
    script.mode = GOOD;
    uint8_t byte = 7;
    bkv_put_result_t result;
    block.payload = &byte;
    block.payload_bytes = 1;
    cr_assert(bkv_put(client, &id, &block, 1, 20000, &result, &err) == BKV_OK && result.stored_bytes == 7, "%s", err.message);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

Test(put, queue_destroyed_half_way) {
    fake_place_t place;
    script_t script = {.mode = NEVER_READ};
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, play, &script);
    bkv_client_t *client = fake_client(&place, 60000);
    bkv_queue_t *queue = NULL;
    bkv_spec_id_t id = fake_spec_id();
    size_t bytes = 16 << 20;
    bkv_put_t block = {.key = fake_key(1, 1), .tokens = 4, .payload = map_payload(bytes), .payload_bytes = bytes};
    cr_assert(bkv_queue_create(client, 8, &queue, NULL) == BKV_OK);
    for (uint64_t i = 0; i < 8; i++) {
        cr_assert(bkv_put_submit(queue, i, &id, &block, 1, 0, NULL) == BKV_OK);
    }
    while (script.puts < 8) {
        usleep(1000);
    }
    uint64_t start = fake_now_ms();
    bkv_queue_destroy(queue);
    cr_assert(fake_now_ms() - start < 5000);
    munmap((void *)block.payload, bytes);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}
