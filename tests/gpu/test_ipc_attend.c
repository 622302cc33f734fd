// test_ipc_attend.c - a daemon with a cache of records in GPU memory computes Attend there: the same as the CPU over the same
// records, and much faster once they are there. Puts go through messages or shared memory, as it comes.
#include "ipc_rig.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define BLOCKS      48
#define TOKENS      256
#define LAYERS      4
#define HEADS       4
#define DIM         128
#define QUERY_HEADS 16
#define QUERIES     2
#define ROWS        (LAYERS * QUERY_HEADS * QUERIES)

typedef struct world {
    bkv_client_t *client;
    bkv_spec_id_t spec;
    bkv_key_t keys[BLOCKS];
} world_t;

static void open_spec(world_t *world, bkv_codec_t codec, uint32_t rate) {
    const bkv_spec_t spec = {.model = "gpu-attend",
                             .layers = LAYERS,
                             .kv_heads = HEADS,
                             .key_dim = DIM,
                             .dtype = BKV_BF16,
                             .block_tokens = TOKENS,
                             .codec = codec,
                             .rate = rate};
    bkv_error_t err = {0};
    REQUIRE(bkv_open(world->client, &spec, 0, &world->spec, NULL, &err) == BKV_OK, "open: %s", err.message);
}

static void put_blocks(world_t *world) {
    const bkv_shape_t shape = {
        .layers = LAYERS, .heads = HEADS, .tokens = TOKENS, .key_dim = DIM, .value_dim = DIM, .dtype = BKV_BF16};
    blocks_t blocks;
    bkv_error_t err = {0};
    blocks_make(&shape, BLOCKS, LAYOUT_PAYLOAD, 11, &blocks);
    const size_t bytes = blocks.bytes / BLOCKS;
    for (uint32_t i = 0; i < BLOCKS; i++) {
        bkv_key_next(&world->spec, i > 0 ? &world->keys[i - 1] : NULL, &i, 1, &world->keys[i]);
        const bkv_put_t put = {.key = world->keys[i],
                               .position = i * TOKENS,
                               .tokens = TOKENS,
                               .payload = blocks.host + i * bytes,
                               .payload_bytes = bytes};
        REQUIRE(bkv_put(world->client, &world->spec, &put, 1, 0, NULL, &err) == BKV_OK, "put: %s", err.message);
    }
    blocks_free(&blocks);
}

typedef struct answer {
    float q[ROWS * DIM], out[ROWS * DIM], lse[ROWS];
} answer_t;

static answer_t *answer_new(void) {
    answer_t *answer = calloc(1, sizeof(*answer));
    draw_t draw = {.state = 3};
    for (size_t i = 0; i < ROWS * DIM; i++) {
        answer->q[i] = (float)draw_gauss(&draw);
    }
    return answer;
}

static bkv_attend_args_t args_of(answer_t *answer) {
    return (bkv_attend_args_t){.layers = LAYERS,
                               .query_heads = QUERY_HEADS,
                               .queries = QUERIES,
                               .q = answer->q,
                               .out = answer->out,
                               .lse = answer->lse};
}

static double attend(const world_t *world, uint32_t first, uint32_t count, answer_t *answer) {
    const bkv_attend_args_t args = args_of(answer);
    struct timespec from, to;
    bkv_error_t err = {0};
    clock_gettime(CLOCK_MONOTONIC, &from);
    REQUIRE(bkv_attend_remote(world->client, &world->spec, world->keys + first, count, &args, HEADS, DIM, DIM, 0, &err) ==
                BKV_OK,
            "attend: %s", err.message);
    clock_gettime(CLOCK_MONOTONIC, &to);
    return (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
}

// By the best CPU backend, over the records as they come back.
static void attend_here(const world_t *world, uint32_t first, uint32_t count, answer_t *answer) {
    bkv_record_t records[BLOCKS];
    const void *datas[BLOCKS];
    const bkv_attend_args_t args = args_of(answer);
    const bkv_backend_t *backend = bkv_backend_get(NULL);
    bkv_error_t err = {0};
    REQUIRE(bkv_get(world->client, &world->spec, world->keys + first, count, NULL, 0, records, &err) == BKV_OK, "get: %s",
            err.message);
    for (uint32_t i = 0; i < count; i++) {
        datas[i] = records[i].data;
    }
    void *workspace = aligned_alloc(64, (bkv_attend_workspace(backend, datas, count, &args) + 63) / 64 * 64);
    REQUIRE(bkv_attend(backend, datas, count, &args, workspace, &err) == BKV_OK, "attend here: %s", err.message);
    for (uint32_t i = 0; i < count; i++) {
        bkv_record_free(&records[i]);
    }
    free(workspace);
}

static void compare(const world_t *world, uint32_t first, uint32_t count) {
    answer_t *there = answer_new(), *here = answer_new();
    attend(world, first, count, there);
    attend_here(world, first, count, here);
    double difference = 0, norm = 0, lse = 0;
    for (size_t i = 0; i < ROWS * DIM; i++) {
        difference += pow((double)there->out[i] - (double)here->out[i], 2);
        norm += pow((double)here->out[i], 2);
    }
    for (size_t i = 0; i < ROWS; i++) {
        lse = fmax(lse, fabs((double)there->lse[i] - (double)here->lse[i]));
    }
    check_that(sqrt(difference / norm) < 0.01, "%u records from %u: relative error %.2e", count, first,
               sqrt(difference / norm));
    check_that(lse < 0.02, "%u records from %u: log-sum-exp off by %.2e", count, first, lse);
    free(there);
    free(here);
}

static void test_codec(world_t *world, const char *name, bkv_codec_t codec, uint32_t rate) {
    char title[96];
    snprintf(title, sizeof(title), "attend in the daemon's GPU cache: %s", name);
    check_begin(title);
    open_spec(world, codec, rate);
    put_blocks(world);
    size_t warm = 0;
    bkv_error_t err = {0};
    REQUIRE(bkv_warm(world->client, &world->spec, world->keys, BLOCKS / 2, 0, &warm, &err) == BKV_OK, "warm: %s", err.message);
    check_that(warm == BLOCKS / 2, "%zu records are warm", warm);
    const double before = ipc_metric(world->client, "balancekv_attends_gpu_total");
    compare(world, 0, BLOCKS);
    compare(world, 5, 1);
    compare(world, 17, 30);
    check_that(ipc_metric(world->client, "balancekv_attends_gpu_total") == before + 3, "not all of it ran on the GPU");
}

// What is there already need not be brought; the figures are for the reader, no bar.
static void show_times(const world_t *world) {
    answer_t *answer = answer_new();
    double fastest = 1e9;
    for (int i = 0; i < 20; i++) {
        fastest = fmin(fastest, attend(world, 0, BLOCKS, answer));
    }
    printf("  Attend over %d records in the GPU cache, end to end: %.0f us\n", BLOCKS, fastest * 1e6);
    free(answer);
}

int main(int argc, char **argv) {
    if (bkv_cuda_count() == 0) {
        printf("SKIPPED the test of Attend on a GPU: there is none\n");
        return 0;
    }
    ipc_daemon_t daemon;
    ipc_daemon_start_cache(&daemon, argc > 1 ? argv[1] : ipc_daemon_program(), "1G", "256M");
    world_t world = {.client = ipc_client(&daemon, 30000)};
    test_codec(&world, "raw", BKV_CODEC_RAW, 0);
    test_codec(&world, "dense8", BKV_CODEC_DENSE8, 0);
    test_codec(&world, "dense4", BKV_CODEC_DENSE4, 0);
    test_codec(&world, "balance 8x", BKV_CODEC_BALANCE, 8);
    test_codec(&world, "balance 16x", BKV_CODEC_BALANCE, 16);
    const double loads = ipc_metric(world.client, "balancekv_gpu_loads_total");
    show_times(&world);
    check_begin("attend in the daemon's GPU cache: records are brought once");
    check_that(ipc_metric(world.client, "balancekv_gpu_loads_total") == loads, "some were brought again");
    check_that(ipc_metric(world.client, "balancekv_gpu_bytes") <= 256 << 20, "more than its memory");
    bkv_client_destroy(world.client);
    ipc_daemon_stop(&daemon);
    return check_end();
}
