// The client library's bkv_device.h against a daemon's server and transports, all in this process, over a fake GPU: what a
// worker says of its memory is what the daemon reads. Between processes, and on a GPU: tests/gpu/test_ipc.c.
#include "client/bkv_device.h"
#include "cuda_rig.h"
#include "daemon/rpc/server.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LAYERS 2
#define HEADS  2
#define BLOCK  64
#define DIM    32
#define ROW    (DIM * 4)

typedef struct world {
    cuda_rig_t rig;
    bkv_server_t *server;
    bkv_client_t *client;
    bkv_spec_id_t spec;
    char endpoint[100];
} world_t;

static void serve(world_t *world, uint64_t epoch) {
    bkv_error_t err;
    const bkv_server_config_t config = {
        .pipeline = world->rig.fixture.pipeline,
        .store = world->rig.fixture.store,
        .transports = world->rig.fixture.transports,
        .version = "0",
        .backend = "ref",
        .boot_epoch = epoch,
        .socket_path = world->rig.fixture.socket,
        .socket_mode = 0600,
        .threads = 1,
        .max_calls = 64,
        .max_batch = 16,
        .peer_batch = 16,
        .max_message = 8 << 20,
        .max_block = 8 << 20,
        .op_timeout_ms = 20000,
    };
    cr_assert_eq(bkv_server_start(&config, &world->server, &err), BKV_OK, "%s", err.message);
}

static void world_open(world_t *world) {
    bkv_error_t err;
    cuda_rig_open(&world->rig);
    serve(world, 1);
    snprintf(world->endpoint, sizeof(world->endpoint), "unix:%s", world->rig.fixture.socket);
    const bkv_client_options_t options = {.endpoint = world->endpoint, .timeout_ms = 20000, .transport = "inline"};
    cr_assert_eq(bkv_client_create(&options, &world->client, &err), BKV_OK, "%s", err.message);
    const bkv_spec_t spec = {.model = "m",
                             .layers = LAYERS,
                             .kv_heads = HEADS,
                             .key_dim = DIM,
                             .dtype = BKV_FP32,
                             .block_tokens = BLOCK,
                             .codec = BKV_CODEC_RAW};
    cr_assert_eq(bkv_open(world->client, &spec, 0, &world->spec, NULL, &err), BKV_OK, "%s", err.message);
}

static void world_close(world_t *world) {
    bkv_client_destroy(world->client);
    bkv_server_stop(world->server);
    char lock[100];
    snprintf(lock, sizeof(lock), "%s.lock", world->rig.fixture.socket);
    unlink(lock);
    cuda_rig_close(&world->rig);
}

static bkv_device_t *share(world_t *world, const void *memory, size_t bytes) {
    bkv_error_t err;
    bkv_device_t *shared = NULL;
    const bkv_device_range_t range = {memory, bytes};
    cr_assert_eq(bkv_device_share(world->client, 0, &range, 1, 0, &shared, &err), BKV_OK, "%s", err.message);
    return shared;
}

// A cache as paged engines have it, [layer][K,V][page][16 tokens][head][dim], at `memory`; the block is in these pages.
static const uint64_t pages[] = {5, 1, 4, 2};
typedef struct cache {
    const void *keys[LAYERS], *values[LAYERS];
    bkv_device_put_t put;
} cache_t;
#define PAGE         (16 * HEADS * ROW)
#define CACHE_PAGES  8
#define CACHE_TENSOR (CACHE_PAGES * PAGE)
#define CACHE_BYTES  (2 * LAYERS * CACHE_TENSOR)

static void cache_fill(cache_t *cache, uint8_t *memory, uint32_t key) {
    for (size_t i = 0; i < CACHE_BYTES / 4; i++) {
        ((float *)(void *)memory)[i] = (float)(i * 7919 % 1000 + key);
    }
    *cache = (cache_t){.put = {.tokens = BLOCK}};
    for (size_t layer = 0; layer < LAYERS; layer++) {
        cache->keys[layer] = memory + 2 * layer * CACHE_TENSOR;
        cache->values[layer] = memory + (2 * layer + 1) * CACHE_TENSOR;
    }
    memcpy(cache->put.key.bytes, &key, sizeof(key));
    cache->put.layout = (bkv_kv_layout_t){.keys = cache->keys,
                                          .values = cache->values,
                                          .pages = pages,
                                          .page_count = 4,
                                          .page_tokens = 16,
                                          .page_stride = PAGE,
                                          .token_stride = HEADS * ROW,
                                          .head_stride = ROW};
}

// Of a raw record, whose payload is [layer][K,V][head][token][dim].
static void assert_payload(const cache_t *cache, const uint8_t *record, size_t length) {
    const uint8_t *row = record + length - (size_t)2 * LAYERS * HEADS * BLOCK * ROW;
    for (uint32_t i = 0; i < 2 * LAYERS * HEADS * BLOCK; i++, row += ROW) {
        uint32_t token = i % BLOCK, head = i / BLOCK % HEADS, tensor = i / BLOCK / HEADS;
        const uint8_t *from = (tensor % 2 ? cache->values : cache->keys)[tensor / 2];
        cr_assert_eq(memcmp(row, from + pages[token / 16] * PAGE + token % 16 * HEADS * ROW + head * ROW, ROW), 0);
    }
}

static void assert_stored(world_t *world, const cache_t *cache) {
    bkv_error_t err;
    bkv_record_t record;
    cr_assert_eq(bkv_get(world->client, &world->spec, &cache->put.key, 1, NULL, 0, &record, &err), BKV_OK, "%s", err.message);
    assert_payload(cache, record.data, record.length);
    bkv_record_free(&record);
}

Test(cuda_ipc_client, a_block_goes_from_pages_to_a_record_and_back_into_the_workers_memory) {
    world_t world;
    world_open(&world);
    bkv_device_t *shared = share(&world, world.rig.memory, CUDA_MEMORY);
    cache_t cache;
    bkv_error_t err;
    bkv_put_result_t result;
    cache_fill(&cache, world.rig.memory, 1);
    cr_assert_eq(bkv_device_put(shared, &world.spec, &cache.put, 1, NULL, 0, &result, &err), BKV_OK, "%s", err.message);
    cr_assert(!result.duplicate && result.stored_bytes > BLOCK * ROW);
    assert_stored(&world, &cache);
    uint8_t *room = world.rig.memory + CUDA_MEMORY / 2;
    bkv_device_record_t records[2];
    bkv_key_t keys[] = {cache.put.key, {.bytes = {77}}};
    bkv_status_t status = bkv_device_get(shared, &world.spec, keys, 2, NULL, room, CUDA_MEMORY / 2, NULL, 0, records, &err);
    cr_assert_eq(status, BKV_NOT_FOUND);
    cr_assert_eq(records[0].status, BKV_OK);
    cr_assert_eq(records[1].status, BKV_NOT_FOUND);
    cr_assert(records[0].offset == 0 && records[0].length == result.stored_bytes && records[1].length == 0);
    assert_payload(&cache, room, records[0].length);
    bkv_device_unshare(shared);
    world_close(&world);
}

Test(cuda_ipc_client, what_does_not_fit_in_the_room_is_said) {
    world_t world;
    world_open(&world);
    bkv_device_t *shared = share(&world, world.rig.memory, CUDA_MEMORY);
    cache_t cache;
    bkv_error_t err;
    bkv_key_t keys[3];
    bkv_put_result_t result;
    for (uint32_t i = 0; i < 3; i++) {
        cache_fill(&cache, world.rig.memory, i);
        keys[i] = cache.put.key;
        cr_assert_eq(bkv_device_put(shared, &world.spec, &cache.put, 1, NULL, 0, &result, &err), BKV_OK, "%s", err.message);
    }
    bkv_device_record_t records[3];
    size_t bytes = 2 * ((result.stored_bytes + 63) / 64 * 64);
    cr_assert_eq(bkv_device_get(shared, &world.spec, keys, 3, NULL, world.rig.memory, bytes, NULL, 0, records, &err),
                 BKV_RESOURCE_EXHAUSTED);
    cr_assert(records[0].status == BKV_OK && records[1].status == BKV_OK && records[2].status == BKV_RESOURCE_EXHAUSTED);
    cr_assert_not_null(strstr(err.message, "keys[2]"), "%s", err.message);
    bkv_device_unshare(shared);
    world_close(&world);
}

Test(cuda_ipc_client, chunks_go_by_descriptor_and_blocks_may_lie_across_them) {
    world_t world;
    world_open(&world);
    size_t bytes = (CACHE_BYTES + 2 * FAKE_GRANULARITY - 1) / FAKE_GRANULARITY * FAKE_GRANULARITY;
    uint8_t *chunks = fake_gpu_alloc(bytes, true);
    bkv_device_t *shared = share(&world, chunks + 100, bytes - 100);
    cache_t cache;
    bkv_error_t err;
    cache_fill(&cache, chunks + bytes - CACHE_BYTES, 3);
    cr_assert_eq(bkv_device_put(shared, &world.spec, &cache.put, 1, NULL, 0, NULL, &err), BKV_OK, "%s", err.message);
    assert_stored(&world, &cache);
    cr_assert_eq(fake_gpu_counts().chunks, bytes / FAKE_GRANULARITY);
    bkv_device_unshare(shared);
    WAIT_UNTIL(fake_gpu_counts().chunks == 0);
    world_close(&world);
}

Test(cuda_ipc_client, memory_that_is_not_shared_is_refused_before_anybody_is_asked) {
    world_t world;
    world_open(&world);
    bkv_device_t *shared = share(&world, world.rig.memory, 1);
    uint8_t *other = fake_gpu_alloc(CUDA_MEMORY, false);
    cache_t cache;
    bkv_error_t err;
    bkv_device_record_t record;
    cache_fill(&cache, other, 1);
    cr_assert_eq(bkv_device_put(shared, &world.spec, &cache.put, 1, NULL, 0, NULL, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "layout.keys[0]"), "%s", err.message);
    cache_fill(&cache, world.rig.memory + CUDA_MEMORY - CACHE_BYTES, 1);
    cache.values[1] = (const uint8_t *)cache.values[1] + 3 * PAGE; // page 5 is past the end
    cr_assert_eq(bkv_device_put(shared, &world.spec, &cache.put, 1, NULL, 0, NULL, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "layout.values[1]"), "%s", err.message);
    cr_assert_eq(bkv_device_get(shared, &world.spec, &cache.put.key, 1, NULL, other, 64, NULL, 0, &record, &err),
                 BKV_INVALID_ARGUMENT);
    cr_assert_eq(record.status, BKV_INVALID_ARGUMENT);
    bkv_device_unshare(shared);
    const bkv_device_range_t host = {&world, sizeof(world)};
    cr_assert_eq(bkv_device_share(world.client, 0, &host, 1, 0, &shared, &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(bkv_device_share(world.client, 7, &host, 1, 0, &shared, &err), BKV_UNIMPLEMENTED);
    world_close(&world);
}

// Transports that forget all sessions, as a restart does.
Test(cuda_ipc_client, memory_is_shared_anew_when_the_daemon_does_not_know_it_any_more) {
    world_t world;
    world_open(&world);
    bkv_device_t *shared = share(&world, world.rig.memory, CUDA_MEMORY);
    cache_t cache;
    bkv_error_t err;
    for (uint32_t i = 0; i < 3; i++) {
        bkv_server_stop(world.server);
        bkv_transports_destroy(world.rig.fixture.transports);
        cr_assert_eq(bkv_transports_create(&world.rig.fixture.config, &world.rig.fixture.transports, &err), BKV_OK);
        serve(&world, 2 + i);
        cache_fill(&cache, world.rig.memory, i);
        cr_assert_eq(bkv_device_put(shared, &world.spec, &cache.put, 1, NULL, 0, NULL, &err), BKV_OK, "%s", err.message);
        assert_stored(&world, &cache);
        bkv_device_record_t record;
        cr_assert_eq(
            bkv_device_get(shared, &world.spec, &cache.put.key, 1, NULL, world.rig.memory, CUDA_MEMORY, NULL, 0, &record, &err),
            BKV_OK, "%s", err.message);
    }
    bkv_device_unshare(shared);
    world_close(&world);
}

Test(cuda_ipc_client, many_calls_at_once_by_a_queue) {
    world_t world;
    world_open(&world);
    bkv_device_t *shared = share(&world, world.rig.memory, CUDA_MEMORY);
    bkv_queue_t *queue;
    bkv_error_t err;
    cache_t cache;
    enum { CALLS = 40 };
    bkv_device_put_t puts[CALLS];
    bkv_device_record_t records[CALLS];
    bkv_completion_t completion;
    cr_assert_eq(bkv_queue_create(world.client, CALLS, &queue, &err), BKV_OK);
    cache_fill(&cache, world.rig.memory, 0);
    for (uint32_t i = 0; i < CALLS; i++) {
        puts[i] = cache.put;
        memcpy(puts[i].key.bytes, &i, sizeof(i));
        cr_assert_eq(bkv_device_put_submit(queue, i, shared, &world.spec, &puts[i], 1, NULL, 0, NULL), BKV_OK);
    }
    for (uint32_t i = 0; i < CALLS; i++) {
        cr_assert_eq(bkv_queue_poll(queue, &completion, 1, 20000), 1);
        cr_assert_eq(completion.error.status, BKV_OK, "%s", completion.error.message);
    }
    for (uint32_t i = 0; i < CALLS; i++) {
        void *room = world.rig.memory + CUDA_MEMORY / 2;
        cr_assert_eq(bkv_device_get_submit(queue, i, shared, &world.spec, &puts[i].key, 1, NULL, room, CUDA_MEMORY / 2, NULL, 0,
                                           &records[i]),
                     BKV_OK);
    }
    for (uint32_t i = 0; i < CALLS; i++) {
        cr_assert_eq(bkv_queue_poll(queue, &completion, 1, 20000), 1);
        cr_assert_eq(completion.error.status, BKV_OK, "%s", completion.error.message);
        cr_assert_gt(records[completion.tag].length, 0);
    }
    bkv_queue_destroy(queue);
    bkv_device_unshare(shared);
    world_close(&world);
}
