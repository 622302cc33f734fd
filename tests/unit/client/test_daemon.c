// Every operation of the client against the real server, pipeline and store, in a process that can be killed.
#include "process.h"

#include "daemon/observe/clock.h"
#include "daemon/rpc/server.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 3, HEADS = 2, KEY_DIM = 32, VALUE_DIM = 16, TOKENS = 128, BLOCKS = 4 };

#define PAYLOAD_FLOATS ((size_t)LAYERS * HEADS * TOKENS * (KEY_DIM + VALUE_DIM))

static void start_daemon(const fake_place_t *place, uint64_t epoch) {
    bkv_store_t *store = NULL;
    bkv_pipeline_t *pipeline = NULL;
    bkv_server_t *server = NULL;
    const bkv_store_config_t store_config = {.arena_bytes = 64 << 20, .slab_bytes = 8 << 20, .arena_fd = -1};
    bool good = bkv_store_create(&store_config, bkv_now_ms(), &store, NULL, NULL) == BKV_OK;
    const bkv_pipeline_config_t pipeline_config = {
        .store = store,
        .backend = bkv_backend_get("ref"),
        .compute_threads = 1,
        .max_jobs = 64,
        .staging_bytes = 16 << 20,
        .max_block_bytes = 4 << 20,
        .max_specs = 4,
        .max_batch = 64,
        .now_ms = bkv_now_ms,
    };
    good = good && bkv_pipeline_create(&pipeline_config, &pipeline, NULL) == BKV_OK;
    const bkv_server_config_t server_config = {
        .pipeline = pipeline,
        .store = store,
        .version = "test",
        .backend = "ref",
        .boot_epoch = epoch,
        .socket_path = place->path,
        .socket_mode = 0600,
        .threads = 1,
        .max_calls = 256,
        .max_batch = 64,
        .peer_batch = 64,
        .max_message = 80 << 20,
        .max_block = 4 << 20,
        .op_timeout_ms = 30000,
    };
    if (!good || bkv_server_start(&server_config, &server, NULL) != BKV_OK) {
        abort();
    }
}

// ---- a scene: client, spec, blocks ----

typedef struct scene {
    fake_place_t place;
    process_t first, second;
    bkv_client_t *client;
    bkv_spec_id_t id;
    bkv_key_t keys[BLOCKS];
    float *payload[BLOCKS];
    bkv_put_t puts[BLOCKS];
    bkv_error_t err;
} scene_t;

// Deterministic, about normal, slowly wandering.
static float *make_payload(uint32_t seed) {
    float *payload = malloc(PAYLOAD_FLOATS * sizeof *payload);
    uint32_t state = seed * 2654435761u + 1;
    float level = 0;
    for (size_t i = 0; i < PAYLOAD_FLOATS; i++) {
        state = state * 1664525u + 1013904223u;
        level = 0.5f * level + (float)(state >> 8) / (float)(1 << 24) - 0.5f;
        payload[i] = level;
    }
    return payload;
}

static void scene_open(scene_t *scene, bkv_codec_t codec) {
    memset(scene, 0, sizeof *scene);
    fake_place_make(&scene->place);
    process_fork(&scene->first, &scene->place, 11, start_daemon);
    process_fork(&scene->second, &scene->place, 22, start_daemon);
    process_start(&scene->first);
    scene->client = fake_client(&scene->place, 20000);
    const bkv_spec_t spec = {
        .model = "test",
        .layers = LAYERS,
        .kv_heads = HEADS,
        .key_dim = KEY_DIM,
        .value_dim = VALUE_DIM,
        .dtype = BKV_FP32,
        .block_tokens = TOKENS,
        .codec = codec,
        .rate = codec == BKV_CODEC_BALANCE ? 8 : 0,
    };
    bkv_limits_t limits;
    cr_assert(bkv_open(scene->client, &spec, 0, &scene->id, &limits, &scene->err) == BKV_OK, "%s", scene->err.message);
    cr_assert(limits.boot_epoch == 11 && limits.max_block_bytes == 4 << 20 && strcmp(limits.backend, "ref") == 0);
    for (uint32_t i = 0; i < BLOCKS; i++) {
        bkv_key_next(&scene->id, i > 0 ? &scene->keys[i - 1] : NULL, &i, 1, &scene->keys[i]);
        scene->payload[i] = make_payload(i);
        scene->puts[i] = (bkv_put_t){
            .key = scene->keys[i],
            .position = (uint64_t)i * TOKENS,
            .tokens = TOKENS,
            .payload = scene->payload[i],
            .payload_bytes = PAYLOAD_FLOATS * sizeof(float),
        };
    }
}

static void scene_put(scene_t *scene, size_t count) {
    bkv_put_result_t results[BLOCKS];
    cr_assert(bkv_put(scene->client, &scene->id, scene->puts, count, 0, results, &scene->err) == BKV_OK, "%s",
              scene->err.message);
    for (size_t i = 0; i < count; i++) {
        cr_assert(results[i].stored_bytes > 0 && !results[i].duplicate);
    }
}

static void scene_close(scene_t *scene) {
    bkv_client_destroy(scene->client);
    process_kill(&scene->first);
    process_kill(&scene->second);
    for (size_t i = 0; i < BLOCKS; i++) {
        free(scene->payload[i]);
    }
    char lock[80];
    snprintf(lock, sizeof lock, "%s.lock", scene->place.path);
    remove(lock);
    fake_place_remove(&scene->place);
}

static void records_free(bkv_record_t *records, size_t count) {
    for (size_t i = 0; i < count; i++) {
        bkv_record_free(&records[i]);
    }
}

// ---- tests ----

Test(daemon, raw_comes_back_to_the_bit) {
    scene_t scene;
    scene_open(&scene, BKV_CODEC_RAW);
    bool resident[BLOCKS];
    size_t prefix;
    scene_put(&scene, 3);
    cr_assert(bkv_lookup(scene.client, &scene.id, scene.keys, BLOCKS, 0, resident, &prefix, &scene.err) == BKV_OK);
    cr_assert(prefix == 3 && resident[0] && resident[2] && !resident[3]);

    bkv_record_t records[BLOCKS];
    cr_assert(bkv_get(scene.client, &scene.id, scene.keys, BLOCKS, NULL, 0, records, &scene.err) == BKV_NOT_FOUND);
    cr_assert(strstr(scene.err.message, "keys[3]") != NULL, "%s", scene.err.message);
    const bkv_shape_t shape = {LAYERS, HEADS, TOKENS, KEY_DIM, VALUE_DIM, BKV_FP32};
    for (size_t i = 0; i < 3; i++) {
        cr_assert(records[i].status == BKV_OK);
        cr_assert(memcmp((const char *)records[i].data + bkv_raw_payload(&shape), scene.payload[i],
                         PAYLOAD_FLOATS * sizeof(float)) == 0);
    }
    cr_assert(records[3].status == BKV_NOT_FOUND && records[3].data == NULL);
    records_free(records, BLOCKS);

    bkv_put_result_t result;
    cr_assert(bkv_put(scene.client, &scene.id, scene.puts, 1, 0, &result, &scene.err) == BKV_OK && result.duplicate);
    scene_close(&scene);
}

Test(daemon, ranges_are_slices) {
    scene_t scene;
    scene_open(&scene, BKV_CODEC_DENSE8);
    scene_put(&scene, 1);
    bkv_record_t whole, part;
    const bkv_range_t range = {.first_layer = 1, .layers = 2, .first_head = 1, .heads = 1};
    cr_assert(bkv_get(scene.client, &scene.id, scene.keys, 1, NULL, 0, &whole, &scene.err) == BKV_OK, "%s", scene.err.message);
    cr_assert(bkv_get(scene.client, &scene.id, scene.keys, 1, &range, 0, &part, &scene.err) == BKV_OK, "%s", scene.err.message);
    bkv_section_view_t of_whole, of_part;
    bkv_record_section(whole.data, 2, 1, &of_whole);
    bkv_record_section(part.data, 1, 0, &of_part);
    float a[TOKENS * KEY_DIM], b[TOKENS * KEY_DIM];
    cr_assert(of_whole.tokens == TOKENS && of_part.tokens == TOKENS);
    bkv_section_read(&of_whole, a, NULL, NULL, NULL);
    bkv_section_read(&of_part, b, NULL, NULL, NULL);
    cr_assert(memcmp(a, b, sizeof a) == 0);
    const bkv_range_t beyond = {.first_layer = LAYERS};
    bkv_record_t none;
    cr_assert(bkv_get(scene.client, &scene.id, scene.keys, 1, &beyond, 0, &none, &scene.err) == BKV_INVALID_ARGUMENT);
    cr_assert(none.status == BKV_INVALID_ARGUMENT && none.data == NULL);
    records_free(&whole, 1);
    records_free(&part, 1);
    scene_close(&scene);
}

Test(daemon, attend_there_is_attend_here) {
    enum { QUERY_HEADS = 4, ROWS = LAYERS * QUERY_HEADS * 2 };
    static float q[ROWS * KEY_DIM], there[ROWS * VALUE_DIM], here[ROWS * VALUE_DIM], there_lse[ROWS], here_lse[ROWS];
    scene_t scene;
    scene_open(&scene, BKV_CODEC_DENSE4);
    scene_put(&scene, BLOCKS);
    for (size_t i = 0; i < ROWS * KEY_DIM; i++) {
        q[i] = (float)(i % 17) / 8 - 1;
    }
    bkv_attend_args_t args = {
        .layers = LAYERS, .query_heads = QUERY_HEADS, .queries = 2, .q = q, .out = there, .lse = there_lse};
    cr_assert(bkv_attend_remote(scene.client, &scene.id, scene.keys, BLOCKS, &args, HEADS, KEY_DIM, VALUE_DIM, 0, &scene.err) ==
                  BKV_OK,
              "%s", scene.err.message);
    bkv_record_t records[BLOCKS];
    cr_assert(bkv_get(scene.client, &scene.id, scene.keys, BLOCKS, NULL, 0, records, &scene.err) == BKV_OK);
    const void *data[BLOCKS];
    for (size_t i = 0; i < BLOCKS; i++) {
        data[i] = records[i].data;
    }
    args.out = here;
    args.lse = here_lse;
    const bkv_backend_t *backend = bkv_backend_get("ref");
    void *workspace = aligned_alloc(64, (bkv_attend_workspace(backend, data, BLOCKS, &args) + 63) / 64 * 64);
    cr_assert(bkv_attend(backend, data, BLOCKS, &args, workspace, &scene.err) == BKV_OK, "%s", scene.err.message);
    cr_assert(memcmp(here, there, sizeof here) == 0 && memcmp(here_lse, there_lse, sizeof here_lse) == 0);
    free(workspace);
    records_free(records, BLOCKS);
    bkv_key_t missing = fake_key(9, 9);
    cr_assert(bkv_attend_remote(scene.client, &scene.id, &missing, 1, &args, HEADS, KEY_DIM, VALUE_DIM, 0, &scene.err) ==
              BKV_NOT_FOUND);
    scene_close(&scene);
}

Test(daemon, fold_within_its_budget) {
    scene_t scene;
    scene_open(&scene, BKV_CODEC_BALANCE);
    scene_put(&scene, BLOCKS);
    const bkv_fold_request_t params = {.budget_bytes = 40000};
    bkv_record_t fold;
    size_t count;
    cr_assert(bkv_fold_remote(scene.client, &scene.id, scene.keys, BLOCKS, &params, 0, &fold, &count, &scene.err) == BKV_OK,
              "%s", scene.err.message);
    bkv_shape_t shape;
    bkv_record_shape(fold.data, &shape);
    cr_assert(count == 1 && fold.length <= 40000 && shape.tokens == BLOCKS * TOKENS);
    bkv_record_t again;
    cr_assert(bkv_get(scene.client, &scene.id, &fold.key, 1, NULL, 0, &again, &scene.err) == BKV_OK, "%s", scene.err.message);
    cr_assert(again.length == fold.length && memcmp(again.data, fold.data, fold.length) == 0, "it is stored under its key");
    records_free(&fold, 1);
    records_free(&again, 1);
    scene_close(&scene);
}

Test(daemon, fold_that_cools) {
    scene_t scene;
    scene_open(&scene, BKV_CODEC_DENSE8);
    scene_put(&scene, BLOCKS);
    bkv_fold_request_t params = {.rate = 8};
    cr_assert(bkv_profile_parse("64:3,:12", &params.profile, &scene.err) == BKV_OK, "%s", scene.err.message);
    bkv_record_t records[BKV_FOLD_RECORDS];
    size_t count;
    cr_assert(bkv_fold_remote(scene.client, &scene.id, scene.keys, BLOCKS, &params, 0, records, &count, &scene.err) == BKV_OK,
              "%s", scene.err.message);
    cr_assert(count == 2);
    uint64_t whole = (uint64_t)BLOCKS * TOKENS * LAYERS * HEADS * (KEY_DIM + VALUE_DIM) * 2;
    cr_assert(records[0].length + records[1].length <= whole / 8);
    double bytes_per_token[2];
    for (size_t i = 0; i < 2; i++) {
        bkv_shape_t shape;
        bkv_record_shape(records[i].data, &shape);
        bytes_per_token[i] = (double)records[i].length / shape.tokens;
    }
    cr_assert(bytes_per_token[1] > 2 * bytes_per_token[0], "the newer band is denser");
    records_free(records, 2);
    scene_close(&scene);
}

Test(daemon, pins_drops_and_numbers) {
    scene_t scene;
    scene_open(&scene, BKV_CODEC_RAW);
    scene_put(&scene, 2);
    uint64_t lease = 0, round_trip = 0;
    size_t dropped = 0;
    cr_assert(bkv_pin(scene.client, &scene.id, scene.keys, 2, 60000, 0, &lease, &scene.err) == BKV_OK, "%s", scene.err.message);
    cr_assert(bkv_pin(scene.client, &scene.id, scene.keys, 3, 60000, 0, &round_trip, &scene.err) == BKV_NOT_FOUND);
    cr_assert(bkv_unpin(scene.client, lease, 0, &scene.err) == BKV_OK, "%s", scene.err.message);
    cr_assert(bkv_unpin(scene.client, lease, 0, &scene.err) == BKV_NOT_FOUND);
    cr_assert(bkv_drop(scene.client, &scene.id, scene.keys, BLOCKS, 0, &dropped, &scene.err) == BKV_OK && dropped == 2);
    cr_assert(bkv_ping(scene.client, 0, &round_trip, &scene.err) == BKV_OK && round_trip > 0, "%s", scene.err.message);
    bkv_stats_t *stats = NULL;
    cr_assert(bkv_stats_get(scene.client, 0, &stats, &scene.err) == BKV_OK, "%s", scene.err.message);
    cr_assert(stats->boot_epoch == 11 && strcmp(stats->version, "test") == 0 && stats->count > 0);
    bkv_stats_free(stats);
    scene_close(&scene);
}

Test(daemon, refusals_name_the_field) {
    scene_t scene;
    scene_open(&scene, BKV_CODEC_RAW);
    bkv_put_t put = scene.puts[0];
    put.tokens = TOKENS + 1;
    cr_assert(bkv_put(scene.client, &scene.id, &put, 1, 0, NULL, &scene.err) == BKV_INVALID_ARGUMENT);
    cr_assert(strstr(scene.err.message, "tokens") != NULL, "%s", scene.err.message);
    put = scene.puts[0];
    put.payload_bytes -= 4;
    cr_assert(bkv_put(scene.client, &scene.id, &put, 1, 0, NULL, &scene.err) == BKV_INVALID_ARGUMENT);
    cr_assert(strstr(scene.err.message, "payload_bytes") != NULL, "%s", scene.err.message);
    scene.payload[0][77] = NAN;
    cr_assert(bkv_put(scene.client, &scene.id, scene.puts, 1, 0, NULL, &scene.err) == BKV_INVALID_ARGUMENT, "%s",
              scene.err.message);
    const bkv_spec_t odd = {.model = "odd", .layers = 1, .kv_heads = 1, .key_dim = 13, .dtype = BKV_FP32};
    bkv_spec_id_t id;
    cr_assert(bkv_open(scene.client, &odd, 0, &id, NULL, &scene.err) == BKV_INVALID_ARGUMENT);
    cr_assert(strstr(scene.err.message, "key_dim") != NULL, "%s", scene.err.message);
    scene_close(&scene);
}

Test(daemon, killed_and_started_again) {
    scene_t scene;
    size_t prefix = 9;
    scene_open(&scene, BKV_CODEC_RAW);
    scene_put(&scene, BLOCKS);
    process_kill(&scene.first);
    process_start(&scene.second);
    cr_assert(bkv_lookup(scene.client, &scene.id, scene.keys, BLOCKS, 0, NULL, &prefix, &scene.err) == BKV_OK, "%s",
              scene.err.message);
    cr_assert(prefix == 0, "a miss, never wrong bytes");
    scene_put(&scene, BLOCKS);
    bkv_record_t records[BLOCKS];
    cr_assert(bkv_get(scene.client, &scene.id, scene.keys, BLOCKS, NULL, 0, records, &scene.err) == BKV_OK, "%s",
              scene.err.message);
    records_free(records, BLOCKS);
    scene_close(&scene);
}
