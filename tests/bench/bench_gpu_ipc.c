// bench_gpu_ipc.c - CUDA IPC end to end on one GPU: blocks of a worker, another process than the daemon, from its GPU memory to
// published, checksummed records in host memory, and back into its GPU memory. Compared with what moving the raw cache over
// PCIe takes in the same run, to and from pinned memory, which is what offloading without compression comes down to.
//
//   bench_gpu_ipc [--out FILE.json] [--daemon BALANCEKVD] [--quick]
//
// The cache is that of a 32 k-token context: 128 blocks of 256 tokens, 32 layers, 8 KV heads of 128, bf16; 4 GiB.
#include "gpu_common.h"
#include "tests/gpu/ipc_rig.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS      32
#define HEADS       8
#define DIM         128
#define BLOCK       256
#define BLOCKS      128
#define PAGE_TOKENS 16
#define PAGES       (BLOCK / PAGE_TOKENS)
#define PER_CALL    8 // blocks
#define TURNS       7

typedef struct bench {
    bkv_client_t *client;
    bkv_queue_t *queue;
    bkv_device_t *shared;
    uint8_t *cache, *room, *pinned; // the last is host memory
    size_t cache_bytes, room_bytes, token_bytes;
    uint32_t next_key;
    int turns;
    bkv_key_t keys[BLOCKS];
    bkv_device_put_t puts[BLOCKS];
    const void *tensors[BLOCKS][2][LAYERS];
    uint64_t pages[BLOCKS][PAGES];
    bkv_report_t report;
} bench_t;

// ---- the cache ----

// Keys with a common mean, and values: 64 MiB made on the host, laid down again and again.
static void cache_fill(bench_t *bench) {
    size_t piece = (size_t)64 << 20;
    uint16_t *host = gpu_host_memory(piece);
    draw_t draw = {7};
    for (size_t i = 0; i < piece / 2; i++) {
        double mean = sin((double)(i % DIM) * 1.7) * (i / DIM % 20 ? 1 : -1);
        host[i] = i < (1 << 20) ? bkv_float_to_bf16((float)(mean + draw_gauss(&draw))) : host[i - (1 << 20)];
    }
    for (size_t at = 0; at < bench->cache_bytes; at += piece) {
        size_t left = bench->cache_bytes - at;
        device_put(bench->cache + at, host, left < piece ? left : piece);
    }
    free(host);
}

// [layer][K,V][token][head][dim], tokens of all blocks in a row; in pages of 16 tokens where `paged`, in a random order.
static void blocks_lay(bench_t *bench, bool paged) {
    size_t row = DIM * 2, token = HEADS * row, tensor = (size_t)BLOCKS * BLOCK * token;
    draw_t draw = {9};
    uint64_t order[BLOCKS * PAGES];
    for (size_t i = 0; i < BLOCKS * PAGES; i++) {
        size_t j = (size_t)(draw_unit(&draw) * (double)(i + 1));
        order[i] = order[j];
        order[j] = i;
    }
    for (uint32_t i = 0; i < BLOCKS; i++) {
        for (uint32_t layer = 0; layer < LAYERS; layer++) {
            size_t at = paged ? 0 : i * BLOCK * token;
            bench->tensors[i][0][layer] = bench->cache + 2 * layer * tensor + at;
            bench->tensors[i][1][layer] = bench->cache + (2 * layer + 1) * tensor + at;
        }
        memcpy(bench->pages[i], order + i * PAGES, sizeof(bench->pages[i]));
        bench->puts[i] = (bkv_device_put_t){.position = (uint64_t)i * BLOCK,
                                            .tokens = BLOCK,
                                            .layout = {.keys = bench->tensors[i][0],
                                                       .values = bench->tensors[i][1],
                                                       .pages = bench->pages[i],
                                                       .page_count = paged ? PAGES : 0,
                                                       .page_tokens = paged ? PAGE_TOKENS : 0,
                                                       .page_stride = paged ? PAGE_TOKENS * token : 0,
                                                       .token_stride = token,
                                                       .head_stride = row}};
    }
}

static bkv_spec_id_t open_spec(bench_t *bench, bkv_codec_t codec, uint32_t rate) {
    const bkv_spec_t spec = {.model = "bench-gpu-ipc",
                             .layers = LAYERS,
                             .kv_heads = HEADS,
                             .key_dim = DIM,
                             .dtype = BKV_BF16,
                             .block_tokens = BLOCK,
                             .codec = codec,
                             .rate = rate};
    bkv_spec_id_t id;
    bkv_error_t err = {0};
    REQUIRE(bkv_open(bench->client, &spec, 0, &id, NULL, &err) == BKV_OK, "open: %s", err.message);
    return id;
}

// ---- raw bytes over the bus ----

static double copy_seconds(bench_t *bench, bool to_host) {
    double seconds[TURNS];
    void *stream = bkv_gpu_own_stream();
    for (int turn = -1; turn < bench->turns; turn++) {
        double start = gpu_now();
        size_t half = bench->cache_bytes / 2; // the pinned memory is half of it
        for (size_t at = 0; at < bench->cache_bytes; at += half) {
            gpu_must(bkv_gpu_copy(to_host ? bench->pinned : bench->cache + at, to_host ? bench->cache + at : bench->pinned,
                                  half, stream),
                     "copy");
        }
        gpu_must(bkv_gpu_wait(stream), "copy");
        if (turn >= 0) {
            seconds[turn] = gpu_now() - start;
        }
    }
    return bkv_quantile(seconds, (size_t)bench->turns, 0.5);
}

// ---- put and get ----

static void poll_all(bench_t *bench, size_t calls) {
    bkv_completion_t completion;
    for (size_t i = 0; i < calls; i++) {
        REQUIRE(bkv_queue_poll(bench->queue, &completion, 1, 60000) == 1, "a call never ended");
        REQUIRE(completion.error.status == BKV_OK, "call %llu: %s", (unsigned long long)completion.tag,
                completion.error.message);
    }
}

// All blocks under new keys, PER_CALL in each call, all calls at once: what an engine does that offloads a context.
static double put_once(bench_t *bench, const bkv_spec_id_t *spec) {
    for (uint32_t i = 0; i < BLOCKS; i++) {
        bkv_key_next(spec, NULL, &bench->next_key, 1, &bench->keys[i]);
        bench->next_key++;
        bench->puts[i].key = bench->keys[i];
    }
    double start = gpu_now();
    for (uint32_t i = 0; i < BLOCKS; i += PER_CALL) {
        bkv_status_t status =
            bkv_device_put_submit(bench->queue, i, bench->shared, spec, &bench->puts[i], PER_CALL, NULL, 0, NULL);
        REQUIRE(status == BKV_OK, "submit: %s", bkv_status_name(status));
    }
    poll_all(bench, BLOCKS / PER_CALL);
    return gpu_now() - start;
}

static void drop_all(bench_t *bench, const bkv_spec_id_t *spec) {
    bkv_error_t err = {0};
    REQUIRE(bkv_drop(bench->client, spec, bench->keys, BLOCKS, 0, NULL, &err) == BKV_OK, "drop: %s", err.message);
}

static double put_seconds(bench_t *bench, const bkv_spec_id_t *spec) {
    double seconds[TURNS];
    for (int turn = -2; turn < bench->turns; turn++) {
        double once = put_once(bench, spec);
        if (turn >= 0) {
            seconds[turn] = once;
        }
        if (turn + 1 < bench->turns) {
            drop_all(bench, spec); // the last ones stay, to be got
        }
    }
    return bkv_quantile(seconds, (size_t)bench->turns, 0.5);
}

// All records of the context into GPU memory, `per_call` in each call.
static double get_once(bench_t *bench, const bkv_spec_id_t *spec, uint32_t per_call) {
    static bkv_device_record_t records[BLOCKS];
    size_t each = bench->room_bytes / BLOCKS * per_call / 64 * 64;
    double start = gpu_now();
    for (uint32_t i = 0, call = 0; i < BLOCKS; i += per_call, call++) {
        bkv_status_t status = bkv_device_get_submit(bench->queue, i, bench->shared, spec, &bench->keys[i], per_call, NULL,
                                                    bench->room + call * each, each, NULL, 0, &records[i]);
        REQUIRE(status == BKV_OK, "submit: %s", bkv_status_name(status));
    }
    poll_all(bench, BLOCKS / per_call);
    return gpu_now() - start;
}

static double get_seconds(bench_t *bench, const bkv_spec_id_t *spec, uint32_t per_call) {
    double seconds[TURNS];
    for (int turn = -2; turn < bench->turns; turn++) {
        double once = get_once(bench, spec, per_call);
        if (turn >= 0) {
            seconds[turn] = once;
        }
    }
    return bkv_quantile(seconds, (size_t)bench->turns, 0.5);
}

// One block alone, from the call to its answer.
static void bench_latency(bench_t *bench, const bkv_spec_id_t *spec) {
    double seconds[101];
    bkv_error_t err = {0};
    bkv_device_put_t put = bench->puts[0];
    for (int i = -10; i < 101; i++) {
        bkv_key_next(spec, NULL, &bench->next_key, 1, &put.key);
        bench->next_key++;
        double start = gpu_now();
        REQUIRE(bkv_device_put(bench->shared, spec, &put, 1, NULL, 0, NULL, &err) == BKV_OK, "put: %s", err.message);
        if (i >= 0) {
            seconds[i] = gpu_now() - start;
        }
        REQUIRE(bkv_drop(bench->client, spec, &put.key, 1, 0, NULL, &err) == BKV_OK, "drop: %s", err.message);
    }
    bkv_report_add(&bench->report, "put of one block, p50", 1e6 * bkv_quantile(seconds, 101, 0.5), "us", NULL, 0, BKV_BAR_NONE,
                   0);
}

static void bench_all(bench_t *bench) {
    static const struct {
        const char *name;
        bkv_codec_t codec;
        uint32_t rate;
        bool paged;
        double put_bar, get_bar;
    } runs[] = {
        {"balance 16x", BKV_CODEC_BALANCE, 16, false, 5, 8},
        {"balance 16x, pages of 16 tokens", BKV_CODEC_BALANCE, 16, true, 0, 0},
        {"balance 8x", BKV_CODEC_BALANCE, 8, false, 0, 0},
        {"dense4", BKV_CODEC_DENSE4, 0, false, 0, 0},
    };
    double gigabytes = 1e-9 * (double)bench->cache_bytes;
    for (size_t i = 0; i < sizeof(runs) / sizeof(runs[0]); i++) {
        char name[64];
        bkv_spec_id_t spec = open_spec(bench, runs[i].codec, runs[i].rate);
        blocks_lay(bench, runs[i].paged);
        double to_host = gigabytes / copy_seconds(bench, true), from_host = gigabytes / copy_seconds(bench, false);
        cache_fill(bench); // which that has overwritten
        double put = gigabytes / put_seconds(bench, &spec);
        snprintf(name, sizeof(name), "put %s", runs[i].name);
        bkv_report_add(&bench->report, name, put, "GB/s", "raw to pinned memory", to_host,
                       runs[i].put_bar > 0 ? BKV_BAR_AT_LEAST : BKV_BAR_NONE, runs[i].put_bar);
        double get = gigabytes / get_seconds(bench, &spec, 16);
        snprintf(name, sizeof(name), "get %s", runs[i].name);
        bkv_report_add(&bench->report, name, get, "GB/s", "raw from pinned memory", from_host,
                       runs[i].get_bar > 0 ? BKV_BAR_AT_LEAST : BKV_BAR_NONE, runs[i].get_bar);
        if (i == 0) {
            double one_call = gigabytes / get_seconds(bench, &spec, BLOCKS);
            bkv_report_add(&bench->report, "get balance 16x, in one call", one_call, "GB/s", "raw from pinned memory",
                           from_host, BKV_BAR_NONE, 0);
            bench_latency(bench, &spec);
        }
        drop_all(bench, &spec);
    }
}

// ---- main ----

static void memory_take(bench_t *bench) {
    void *pinned = NULL;
    bench->token_bytes = (size_t)2 * LAYERS * HEADS * DIM * 2;
    bench->cache_bytes = bench->token_bytes * BLOCKS * BLOCK;
    bench->room_bytes = bench->cache_bytes / 3; // enough for dense4
    bench->cache = ipc_memory(bench->cache_bytes);
    bench->room = ipc_memory(bench->room_bytes);
    gpu_must(bkv_gpu_host_take(&pinned, bench->cache_bytes / 2), "pinned memory");
    bench->pinned = pinned;
    memset(pinned, 1, bench->cache_bytes / 2);
    bkv_error_t err = {0};
    const bkv_device_range_t ranges[] = {{bench->cache, bench->cache_bytes}, {bench->room, bench->room_bytes}};
    REQUIRE(bkv_device_share(bench->client, 0, ranges, 2, 0, &bench->shared, &err) == BKV_OK, "share: %s", err.message);
    REQUIRE(bkv_queue_create(bench->client, 256, &bench->queue, &err) == BKV_OK, "queue: %s", err.message);
}

int main(int argc, char **argv) {
    const gpu_options_t options = gpu_options(argc, argv);
    static bench_t bench;
    bench.turns = options.quick ? 1 : TURNS;
    ipc_daemon_t daemon;
    ipc_daemon_start(&daemon, options.daemon ? options.daemon : ipc_daemon_program(), "4G"); // forks, so before CUDA is touched
    bench.client = ipc_client(&daemon, 60000);
    if (bkv_gpu_count() == 0) {
        printf("SKIPPED the bench of CUDA IPC: there is no CUDA device here\n");
        bkv_client_destroy(bench.client);
        ipc_daemon_stop(&daemon);
        return 0;
    }
    memory_take(&bench);
    bench_all(&bench);
    bkv_queue_destroy(bench.queue);
    bkv_device_unshare(bench.shared);
    bkv_client_destroy(bench.client);
    ipc_daemon_stop(&daemon);
    return gpu_report(&options, &bench.report);
}
