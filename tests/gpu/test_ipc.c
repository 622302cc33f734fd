// test_ipc.c - CUDA IPC between this process, a worker, and a real daemon: records made from the worker's GPU memory are byte
// for byte those that bkv_cuda_compress makes of the same blocks directly, whatever the layout and however the memory was
// allocated. What goes wrong is test_ipc_faults.c's.
#include "ipc_rig.h"

#include "kernels/seal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCKS 6
#define TOKENS 256

typedef struct world {
    bkv_cuda_t *cuda;
    bkv_client_t *client;
    uint32_t next_key;
    uint8_t *room; // shared with every device
    size_t room_bytes;
} world_t;

// ---- what is to come out ----

typedef struct codec {
    const char *name;
    bkv_codec_params_t params;
} codec_t;

static const codec_t codecs[] = {
    {"raw", {.codec = BKV_CODEC_RAW}},
    {"dense4", {.codec = BKV_CODEC_DENSE4}},
    {"balance 16x", {.codec = BKV_CODEC_BALANCE, .rate = 16}},
};

static bkv_spec_id_t open_spec(const world_t *world, const bkv_shape_t *shape, const codec_t *codec) {
    const bkv_spec_t spec = {.model = "gpu-ipc",
                             .layers = shape->layers,
                             .kv_heads = shape->heads,
                             .key_dim = shape->key_dim,
                             .value_dim = shape->value_dim,
                             .dtype = shape->dtype,
                             .block_tokens = shape->tokens,
                             .codec = codec->params.codec,
                             .rate = codec->params.rate,
                             .sink_tokens = BKV_DEFAULT_SINK,
                             .seed = 5};
    bkv_spec_id_t id;
    bkv_error_t err = {0};
    REQUIRE(bkv_open(world->client, &spec, 0, &id, NULL, &err) == BKV_OK, "open: %s", err.message);
    return id;
}

static bkv_key_t new_key(world_t *world, const bkv_spec_id_t *spec) {
    bkv_key_t key;
    bkv_key_next(spec, NULL, &world->next_key, 1, &key);
    world->next_key++;
    return key;
}

// The blocks' records made here, sealed. The tenant's tag is the daemon's to know: taken from a record of its.
static uint8_t *direct_records(const world_t *world, blocks_t *blocks, const codec_t *codec, const bkv_key_t *keys,
                               const bkv_spec_id_t *spec, uint64_t tenant, size_t *stride, size_t *length) {
    bkv_codec_params_t params = codec->params;
    params.sink = BKV_DEFAULT_SINK;
    params.seed = 5;
    uint64_t status[BLOCKS];
    for (uint32_t i = 0; i < blocks->count; i++) {
        blocks->ids[i] = (bkv_record_id_t){
            .key = keys[i], .spec_id = *spec, .tenant = tenant, .position = (uint64_t)i * blocks->at_host[0].shape.tokens};
    }
    uint8_t *records = compress_device(world->cuda, blocks, &params, stride, length, status);
    for (uint32_t i = 0; i < blocks->count; i++) {
        bkv_record_seal(records + i * *stride);
    }
    return records;
}

// Gets the records by messages and into GPU memory; both are to be what is made here.
static void compare(world_t *world, bkv_device_t *shared, blocks_t *blocks, const codec_t *codec, const bkv_key_t *keys,
                    const bkv_spec_id_t *spec, const char *what) {
    bkv_error_t err = {0};
    bkv_record_t records[BLOCKS];
    bkv_device_record_t placed[BLOCKS];
    bkv_status_t got = bkv_get(world->client, spec, keys, blocks->count, NULL, 0, records, &err);
    check_that(got == BKV_OK, "%s: get: %s", what, err.message);
    bkv_status_t taken =
        bkv_device_get(shared, spec, keys, blocks->count, NULL, world->room, world->room_bytes, NULL, 0, placed, &err);
    check_that(taken == BKV_OK, "%s: get to the device: %s", what, err.message);
    if (got == BKV_OK && taken == BKV_OK) {
        size_t stride, length;
        uint64_t tenant = ((const bkv_record_header_t *)records[0].data)->tenant;
        uint8_t *direct = direct_records(world, blocks, codec, keys, spec, tenant, &stride, &length);
        uint8_t *back = malloc(length);
        for (uint32_t i = 0; i < blocks->count; i++) {
            const uint8_t *expected = direct + i * stride;
            bool same = records[i].length == length && memcmp(records[i].data, expected, length) == 0;
            check_that(same, "%s: record %u of %zu bytes is not what is made here (%zu)", what, i, records[i].length, length);
            check_that(placed[i].length == length, "%s: record %u on the device has %llu bytes", what, i,
                       (unsigned long long)placed[i].length);
            if (placed[i].length == length) {
                device_get(back, world->room + placed[i].offset, length);
                check_that(memcmp(back, expected, length) == 0, "%s: record %u on the device differs", what, i);
            }
        }
        free(back);
        free(direct);
    }
    for (uint32_t i = 0; i < blocks->count; i++) {
        bkv_record_free(&records[i]);
    }
}

static bkv_device_t *share(const world_t *world, const bkv_device_range_t *ranges, size_t count) {
    bkv_device_t *shared = NULL;
    bkv_error_t err = {0};
    REQUIRE(bkv_device_share(world->client, 0, ranges, count, 0, &shared, &err) == BKV_OK, "share: %s", err.message);
    return shared;
}

// ---- layouts ----

// One block's layout as bkv_device.h has it, from strides over memory at `base`, a copy of blocks->device.
typedef struct place {
    const void *keys[64], *values[64];
    bkv_kv_layout_t layout;
} place_t;

static void place_strided(const blocks_t *blocks, uint32_t i, const uint8_t *base, place_t *place) {
    const bkv_block_t *block = &blocks->at_device[i];
    for (uint32_t layer = 0; layer < block->shape.layers; layer++) {
        place->keys[layer] = base + ((const uint8_t *)block->keys - blocks->device) + layer * block->key_stride.layer;
        place->values[layer] = base + ((const uint8_t *)block->values - blocks->device) + layer * block->value_stride.layer;
    }
    place->layout = (bkv_kv_layout_t){.keys = place->keys,
                                      .values = place->values,
                                      .token_stride = (uint64_t)block->key_stride.token,
                                      .head_stride = (uint64_t)block->key_stride.head,
                                      .value_token_stride = (uint64_t)block->value_stride.token,
                                      .value_head_stride = (uint64_t)block->value_stride.head};
}

// Puts all blocks in one call.
static void put_all(world_t *world, bkv_device_t *shared, const blocks_t *blocks, const place_t *places,
                    const bkv_spec_id_t *spec, bkv_key_t *keys, void *stream, const char *what) {
    bkv_device_put_t puts[BLOCKS];
    bkv_put_result_t results[BLOCKS];
    bkv_error_t err = {0};
    for (uint32_t i = 0; i < blocks->count; i++) {
        keys[i] = new_key(world, spec);
        puts[i] = (bkv_device_put_t){.key = keys[i],
                                     .position = (uint64_t)i * blocks->at_host[0].shape.tokens,
                                     .tokens = blocks->at_host[0].shape.tokens,
                                     .layout = places[i].layout};
    }
    bkv_status_t status = bkv_device_put(shared, spec, puts, blocks->count, stream, 0, results, &err);
    check_that(status == BKV_OK, "%s: put: %s", what, err.message);
}

static void test_layouts(world_t *world) {
    static const struct {
        const char *name;
        layout_t layout;
        bkv_shape_t shape;
    } cases[] = {
        {"payload", LAYOUT_PAYLOAD, {4, 8, TOKENS, 128, 128, BKV_BF16}},
        {"heads last", LAYOUT_HEADS_LAST, {4, 8, TOKENS, 128, 128, BKV_BF16}},
        {"K, then V", LAYOUT_TOKENS, {3, 2, 100, 192, 128, BKV_FP16}},
        {"latent", LAYOUT_LATENT, {3, 1, TOKENS, 576, 512, BKV_BF16}},
        {"fp32", LAYOUT_PAYLOAD, {2, 3, 200, 64, 64, BKV_FP32}},
    };
    check_begin("ipc: every layout and codec, byte for byte");
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        blocks_t blocks;
        blocks_make(&cases[i].shape, BLOCKS, cases[i].layout, 3 + i, &blocks);
        uint8_t *memory = ipc_memory(blocks.bytes);
        device_put(memory, blocks.host, blocks.bytes);
        bkv_device_t *shared =
            share(world, (bkv_device_range_t[]){{memory, blocks.bytes}, {world->room, world->room_bytes}}, 2);
        for (size_t c = 0; c < sizeof(codecs) / sizeof(codecs[0]); c++) {
            char what[64];
            bkv_key_t keys[BLOCKS];
            place_t places[BLOCKS];
            snprintf(what, sizeof(what), "%s, %s", cases[i].name, codecs[c].name);
            bkv_spec_id_t spec = open_spec(world, &cases[i].shape, &codecs[c]);
            for (uint32_t b = 0; b < BLOCKS; b++) {
                place_strided(&blocks, b, memory, &places[b]);
            }
            put_all(world, shared, &blocks, places, &spec, keys, NULL, what);
            compare(world, shared, &blocks, &codecs[c], keys, &spec, what);
        }
        bkv_device_unshare(shared);
        bkv_gpu_give(memory);
        blocks_free(&blocks);
    }
}

// ---- pages ----

#define PAGE_TOKENS 16
#define PAGES       (TOKENS / PAGE_TOKENS)

static const bkv_shape_t paged_shape = {4, 8, TOKENS, 128, 128, BKV_BF16};

// Copies a block's rows to pages of a layer's tensor on the host: [page][token][head][dim].
static void scatter(const blocks_t *blocks, uint32_t i, bool value, uint32_t layer, const uint64_t *pages, uint8_t *tensor) {
    const bkv_block_t *block = &blocks->at_host[i];
    const bkv_stride_t *stride = value ? &block->value_stride : &block->key_stride;
    size_t row = 2u * block->shape.key_dim;
    for (uint32_t token = 0; token < block->shape.tokens; token++) {
        for (uint32_t head = 0; head < block->shape.heads; head++) {
            const uint8_t *from = (const uint8_t *)(value ? block->values : block->keys) + stride->layer * layer +
                                  stride->head * head + stride->token * token;
            size_t slot = (size_t)pages[token / PAGE_TOKENS] * PAGE_TOKENS + token % PAGE_TOKENS;
            memcpy(tensor + (slot * block->shape.heads + head) * row, from, row);
        }
    }
}

// Every tensor of every layer in an allocation of its own, pages of all blocks in a random order.
static void test_pages(world_t *world) {
    check_begin("ipc: pages of 16 tokens, each layer an allocation of its own");
    size_t page_bytes = (size_t)PAGE_TOKENS * paged_shape.heads * paged_shape.key_dim * 2, count = BLOCKS * PAGES;
    size_t tensor_bytes = page_bytes * (count + 3);
    blocks_t blocks;
    blocks_make(&paged_shape, BLOCKS, LAYOUT_PAYLOAD, 11, &blocks);
    uint64_t order[BLOCKS * PAGES];
    draw_t draw = {17};
    for (size_t i = 0; i < count; i++) {
        size_t j = (size_t)(draw_unit(&draw) * (double)(i + 1));
        order[i] = order[j];
        order[j] = i + 2;
    }
    uint8_t *tensors[8], *host = calloc(1, tensor_bytes);
    bkv_device_range_t ranges[9] = {{world->room, world->room_bytes}};
    for (uint32_t t = 0; t < 8; t++) {
        for (uint32_t i = 0; i < BLOCKS; i++) {
            scatter(&blocks, i, t % 2, t / 2, order + i * PAGES, host);
        }
        tensors[t] = ipc_memory(tensor_bytes);
        device_put(tensors[t], host, tensor_bytes);
        ranges[t + 1] = (bkv_device_range_t){tensors[t], tensor_bytes};
    }
    bkv_device_t *shared = share(world, ranges, 9);
    for (size_t c = 0; c < sizeof(codecs) / sizeof(codecs[0]); c++) {
        bkv_key_t keys[BLOCKS];
        place_t places[BLOCKS];
        bkv_spec_id_t spec = open_spec(world, &paged_shape, &codecs[c]);
        for (uint32_t i = 0; i < BLOCKS; i++) {
            for (uint32_t layer = 0; layer < 4; layer++) {
                places[i].keys[layer] = tensors[2 * layer];
                places[i].values[layer] = tensors[2 * layer + 1];
            }
            places[i].layout = (bkv_kv_layout_t){.keys = places[i].keys,
                                                 .values = places[i].values,
                                                 .pages = order + i * PAGES,
                                                 .page_count = PAGES,
                                                 .page_tokens = PAGE_TOKENS,
                                                 .page_stride = page_bytes,
                                                 .token_stride = 2u * paged_shape.heads * paged_shape.key_dim,
                                                 .head_stride = 2u * paged_shape.key_dim};
        }
        put_all(world, shared, &blocks, places, &spec, keys, NULL, codecs[c].name);
        compare(world, shared, &blocks, &codecs[c], keys, &spec, codecs[c].name);
    }
    bkv_device_unshare(shared);
    for (uint32_t t = 0; t < 8; t++) {
        bkv_gpu_give(tensors[t]);
    }
    free(host);
    blocks_free(&blocks);
}

// ---- chunks ----

static void test_chunks(world_t *world) {
    check_begin("ipc: chunks shared by descriptor, blocks across them");
    size_t unit = 0;
    REQUIRE(bkv_gpu_granularity(0, &unit) == 0, "granularity");
    blocks_t blocks;
    blocks_make(&paged_shape, BLOCKS, LAYOUT_HEADS_LAST, 23, &blocks);
    uint32_t count = (uint32_t)(blocks.bytes / unit + 2);
    uint8_t *chunks = ipc_chunks(unit, count), *memory = chunks + unit - 4096; // from the end of the first chunk on
    device_put(memory, blocks.host, blocks.bytes);
    bkv_device_t *shared = share(world, (bkv_device_range_t[]){{memory, blocks.bytes}, {world->room, world->room_bytes}}, 2);
    for (size_t c = 0; c < sizeof(codecs) / sizeof(codecs[0]); c++) {
        bkv_key_t keys[BLOCKS];
        place_t places[BLOCKS];
        bkv_spec_id_t spec = open_spec(world, &paged_shape, &codecs[c]);
        for (uint32_t i = 0; i < BLOCKS; i++) {
            place_strided(&blocks, i, memory, &places[i]);
        }
        put_all(world, shared, &blocks, places, &spec, keys, NULL, codecs[c].name);
        compare(world, shared, &blocks, &codecs[c], keys, &spec, codecs[c].name);
    }
    bkv_device_unshare(shared);
    for (uint32_t i = 0; i < count; i++) {
        bkv_gpu_span_unmap(chunks + i * unit, unit);
    }
    bkv_gpu_span_free(chunks, unit * count);
    blocks_free(&blocks);
}

// ---- order ----

// What is written late on a side stream is what is stored: until the event has come there is something else.
static void test_order(world_t *world) {
    check_begin("ipc: a stream that writes late");
    void *stream = NULL;
    REQUIRE(bkv_gpu_stream_create(&stream) == 0, "stream");
    ipc_keep_busy(NULL, 0.001); // takes its memory, and measures
    blocks_t blocks;
    blocks_make(&paged_shape, BLOCKS, LAYOUT_PAYLOAD, 31, &blocks);
    uint8_t *memory = ipc_memory(blocks.bytes), *zeros = calloc(1, blocks.bytes);
    bkv_device_t *shared = share(world, (bkv_device_range_t[]){{memory, blocks.bytes}, {world->room, world->room_bytes}}, 2);
    bkv_spec_id_t spec = open_spec(world, &paged_shape, &codecs[1]);
    for (int round = 0; round < 5; round++) {
        bkv_key_t keys[BLOCKS];
        place_t places[BLOCKS];
        for (uint32_t i = 0; i < BLOCKS; i++) {
            place_strided(&blocks, i, memory, &places[i]);
        }
        device_put(memory, zeros, blocks.bytes);
        ipc_keep_busy(stream, 0.15);
        REQUIRE(bkv_gpu_copy(memory, blocks.device, blocks.bytes, stream) == 0, "copy");
        put_all(world, shared, &blocks, places, &spec, keys, stream, "late");
        compare(world, shared, &blocks, &codecs[1], keys, &spec, "late");
    }
    bkv_device_unshare(shared);
    bkv_gpu_stream_destroy(stream);
    bkv_gpu_give(memory);
    free(zeros);
    blocks_free(&blocks);
}

// ---- main ----

int main(int argc, char **argv) {
    const char *program = argc > 1 ? argv[1] : ipc_daemon_program();
    ipc_daemon_t daemon;
    ipc_daemon_start(&daemon, program, "1G"); // forks, so before CUDA is touched
    world_t world = {.client = ipc_client(&daemon, 30000)};
    bkv_error_t err = {0};
    if (bkv_cuda_open(0, &world.cuda, &err) != BKV_OK) {
        printf("SKIPPED the tests of CUDA IPC: %s\n", err.message);
        bkv_client_destroy(world.client);
        ipc_daemon_stop(&daemon);
        return 0;
    }
    world.room_bytes = (size_t)64 << 20;
    world.room = ipc_memory(world.room_bytes);
    test_layouts(&world);
    test_pages(&world);
    test_chunks(&world);
    test_order(&world);
    check_begin("ipc: nothing is left in the daemon");
    bkv_client_destroy(world.client); // with it goes its window for host memory
    world.client = ipc_client(&daemon, 30000);
    check_that(ipc_metric_becomes(world.client, "balancekv_sessions", 0), "sessions are left");
    bkv_client_destroy(world.client);
    ipc_daemon_stop(&daemon);
    bkv_cuda_close(world.cuda);
    return check_end();
}
