// cmd_bench.c - `bkv bench`: puts, looks up and gets blocks with N calls in flight, and says how fast that went.
//
// Blocks come from a trace or are made up from --seed; either way under keys of their own, so that a bench neither finds
// nor leaves anything another worker uses. What it put it drops at the end. Payloads lie where a worker that cares would have
// them, in memory shared with the daemon if there is any (bkv_buffer_get).
#include "cli.h"

#include "memory.h"
#include "session.h"
#include "shares.h"
#include "table.h"
#include "text.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_PARALLEL 4
#define MAX_PARALLEL     1024
#define DEFAULT_BLOCKS   32
#define MAX_BLOCKS       (1u << 20)
#define PAYLOADS         4 // different payloads, taken in turn: more would measure this program's memory

typedef enum op { OP_PUT, OP_LOOKUP, OP_GET, OP_COUNT } op_t;

static const char *const op_names[OP_COUNT] = {"put", "lookup", "get"};

typedef struct bench {
    bkv_cli_t *cli;
    bkv_session_t session;
    bkv_shape_t shape; // of one block
    void *payloads[PAYLOADS];
    size_t payload_bytes;
    uint32_t blocks, parallel;
    bkv_key_t *keys; // [blocks]
    bkv_put_t *puts; // [parallel], as the next four
    bkv_put_result_t *results;
    bkv_record_t *records;
    bool *resident;
    uint8_t *shares; // NULL: equal
    uint64_t *started_ns;
    bool *busy;
    uint64_t *latency_ns; // [blocks], in order of completion
} bench_t;

// One phase's outcome.
typedef struct outcome {
    uint64_t calls, bytes, elapsed_ns, p50_ns, p99_ns;
} outcome_t;

// SplitMix64 (Steele, Lea, Flood 2014): enough for made-up data, and the same everywhere.
static uint64_t next_random(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// Roughly normal with variance 1: the sum of four uniforms.
static float random_value(uint64_t *state) {
    uint64_t bits = next_random(state);
    int32_t sum = 0;
    for (int i = 0; i < 4; i++) {
        sum += (int32_t)(bits >> (16 * i) & 0xffff) - 0x8000;
    }
    return (float)sum * (1.7320508f / 65536.0f);
}

static void make_payload(const bkv_shape_t *shape, uint64_t seed, void *payload) {
    size_t element = bkv_dtype_bytes(shape->dtype), count = bkv_shape_bytes(shape) / element;
    uint64_t state = seed;
    for (size_t i = 0; i < count; i++) {
        float value = random_value(&state);
        uint16_t half = shape->dtype == BKV_FP16 ? bkv_float_to_half(value) : bkv_float_to_bf16(value);
        memcpy((uint8_t *)payload + i * element, shape->dtype == BKV_FP32 ? (void *)&value : (void *)&half, element);
    }
}

static bkv_status_t prepare_payloads(bench_t *bench, const bkv_trace_t *trace, uint64_t seed, bkv_error_t *err) {
    bench->payload_bytes = bkv_shape_bytes(&bench->shape);
    uint32_t whole = trace != NULL ? trace->shape.tokens / bench->shape.tokens : 0;
    for (uint32_t i = 0; i < PAYLOADS; i++) {
        bench->payloads[i] = bkv_buffer_get(bench->session.client, bench->payload_bytes);
        if (bench->payloads[i] == NULL) {
            return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for payloads of %zu bytes", bench->payload_bytes);
        }
        if (trace != NULL) {
            bkv_span_t span = {.position = (uint64_t)(i % whole) * bench->shape.tokens, .tokens = bench->shape.tokens};
            bkv_trace_gather(trace, &span, bench->payloads[i]);
        } else {
            make_payload(&bench->shape, seed + i, bench->payloads[i]);
        }
    }
    return BKV_OK;
}

// Keys nobody else has: their own model name is not enough where a bench runs twice at once, so time goes in, too.
static void prepare_keys(bench_t *bench) {
    uint64_t now_ns = bkv_now_monotonic_ns();
    bench->keys = bkv_xcalloc(bench->blocks, sizeof *bench->keys);
    for (uint32_t i = 0; i < bench->blocks; i++) {
        uint32_t words[3] = {(uint32_t)now_ns, (uint32_t)(now_ns >> 32), i};
        bkv_key_next(&bench->session.id, NULL, words, 3, &bench->keys[i]);
    }
}

static bkv_status_t bench_init(bench_t *bench, const bkv_trace_t *trace, uint64_t seed, bkv_error_t *err) {
    uint32_t slots = bench->parallel;
    prepare_keys(bench);
    bench->puts = bkv_xcalloc(slots, sizeof *bench->puts);
    bench->results = bkv_xcalloc(slots, sizeof *bench->results);
    bench->records = bkv_xcalloc(slots, sizeof *bench->records);
    bench->resident = bkv_xcalloc(slots, sizeof *bench->resident);
    bench->started_ns = bkv_xcalloc(slots, sizeof *bench->started_ns);
    bench->busy = bkv_xcalloc(slots, sizeof *bench->busy);
    bench->latency_ns = bkv_xcalloc(bench->blocks, sizeof *bench->latency_ns);
    return prepare_payloads(bench, trace, seed, err);
}

// Before the session's end: payloads are the client's memory.
static void bench_deinit(bench_t *bench) {
    for (uint32_t i = 0; i < PAYLOADS && bench->payloads[i] != NULL; i++) {
        bkv_buffer_put(bench->session.client, bench->payloads[i]);
    }
    free(bench->keys);
    free(bench->puts);
    free(bench->results);
    free(bench->records);
    free(bench->resident);
    free(bench->shares);
    free(bench->started_ns);
    free(bench->busy);
    free(bench->latency_ns);
}

static bkv_status_t submit(bench_t *bench, bkv_queue_t *queue, op_t op, uint32_t slot, uint32_t block) {
    const bkv_spec_id_t *id = &bench->session.id;
    const bkv_key_t *key = &bench->keys[block];
    bench->started_ns[slot] = bkv_now_monotonic_ns();
    switch (op) {
    case OP_PUT:
        bench->puts[slot] = (bkv_put_t){
            .key = *key,
            .position = (uint64_t)block * bench->shape.tokens,
            .tokens = bench->shape.tokens,
            .payload = bench->payloads[block % PAYLOADS],
            .payload_bytes = bench->payload_bytes,
        };
        return bkv_put_submit(queue, slot, id, &bench->puts[slot], 1, 0, &bench->results[slot]);
    case OP_LOOKUP:
        return bkv_lookup_submit(queue, slot, id, key, 1, 0, &bench->resident[slot], NULL);
    default:
        return bkv_get_submit(queue, slot, id, key, 1, NULL, 0, &bench->records[slot]);
    }
}

// Bytes that a finished call moved; frees what it brought.
static uint64_t finish(bench_t *bench, op_t op, uint32_t slot) {
    if (op != OP_GET) {
        return op == OP_PUT ? bench->payload_bytes : 0;
    }
    uint64_t bytes = bench->records[slot].length;
    bkv_record_free(&bench->records[slot]);
    bench->records[slot] = (bkv_record_t){.data = NULL};
    return bytes;
}

static int by_value(const void *a, const void *b) {
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return (left > right) - (left < right);
}

static void summarize_latency(bench_t *bench, outcome_t *outcome) {
    size_t count = outcome->calls;
    qsort(bench->latency_ns, count, sizeof *bench->latency_ns, by_value);
    outcome->p50_ns = bench->latency_ns[(count - 1) / 2];
    outcome->p99_ns = bench->latency_ns[(size_t)((double)(count - 1) * 0.99)];
}

static void note_failure(bkv_error_t *first, op_t op, const bkv_error_t *error) {
    if (error->status != BKV_OK && first->status == BKV_OK) {
        // What was put a moment ago and is gone was evicted.
        const char *hint = op == OP_GET && error->status == BKV_NOT_FOUND ? " (evicted? fewer --blocks fit the arena)" : "";
        bkv_fail(first, error->status, "%s: %s%s", op_names[op], error->message, hint);
    }
}

// One phase: every block once, `parallel` calls in flight. The first failure ends it once the calls in flight are back.
static bkv_status_t run_phase(bench_t *bench, bkv_queue_t *queue, op_t op, outcome_t *outcome, bkv_error_t *err) {
    bkv_error_t failure = {.status = BKV_OK};
    bkv_progress_t progress;
    uint32_t next = 0, in_flight = 0;
    *outcome = (outcome_t){.calls = 0};
    bkv_progress_begin(&progress, op_names[op], bench->blocks, bench->cli->json);
    uint64_t start_ns = bkv_now_monotonic_ns();
    while (in_flight > 0 || (next < bench->blocks && failure.status == BKV_OK)) {
        for (uint32_t s = 0; s < bench->parallel && next < bench->blocks && failure.status == BKV_OK; s++) {
            if (bench->busy[s]) {
                continue;
            }
            bkv_status_t status = submit(bench, queue, op, s, next);
            if (status != BKV_OK) {
                bkv_fail(&failure, status, "%s: could not be submitted", op_names[op]);
                break;
            }
            bench->busy[s] = true;
            in_flight++;
            next++;
        }
        bkv_completion_t done[64];
        size_t count = in_flight > 0 ? bkv_queue_poll(queue, done, 64, 1000) : 0;
        uint64_t now_ns = bkv_now_monotonic_ns();
        for (size_t c = 0; c < count; c++) {
            uint32_t slot = (uint32_t)done[c].tag;
            uint64_t bytes = finish(bench, op, slot);
            bench->busy[slot] = false;
            in_flight--;
            outcome->bytes += bytes;
            bench->latency_ns[outcome->calls++] = now_ns - bench->started_ns[slot];
            note_failure(&failure, op, &done[c].error);
            bkv_progress_step(&progress, 1, bytes);
        }
    }
    outcome->elapsed_ns = bkv_now_monotonic_ns() - start_ns;
    bkv_progress_end(&progress);
    if (failure.status != BKV_OK) {
        return bkv_fail(err, failure.status, "%s", failure.message);
    }
    summarize_latency(bench, outcome);
    return BKV_OK;
}

// "put,get" -> which phases; false where a name is none.
static bool parse_ops(const char *text, bool *wanted) {
    while (text != NULL && *text != '\0') {
        size_t length = strcspn(text, ","), op = 0;
        while (op < OP_COUNT && (strlen(op_names[op]) != length || strncmp(text, op_names[op], length) != 0)) {
            op++;
        }
        if (op == OP_COUNT) {
            return false;
        }
        wanted[op] = true;
        text += length + (text[length] == ',');
    }
    return true;
}

// Which way the blocks have gone; "?" where the daemon is gone by now.
static const char *transport_used(const bench_t *bench) {
    bkv_transport_info_t info[BKV_TRANSPORTS];
    size_t count = 0;
    bkv_transports(bench->session.client, 0, info, &count, NULL);
    for (size_t i = 0; i < count; i++) {
        if (info[i].chosen) {
            return info[i].name;
        }
    }
    return "?";
}

static void show(const bench_t *bench, const bool *wanted, const outcome_t *outcomes, bkv_codec_t codec) {
    json_t *list = json_array();
    bkv_table_t *table = bkv_table_create("call|>calls|>in flight|>bytes each|>calls/s|>GB/s|>p50|>p99");
    for (size_t op = 0; op < OP_COUNT; op++) {
        const outcome_t *o = &outcomes[op];
        char bytes[BKV_TEXT_MAX], rate[BKV_TEXT_MAX], p50[BKV_TEXT_MAX], p99[BKV_TEXT_MAX];
        if (!wanted[op]) {
            continue;
        }
        double seconds = (double)o->elapsed_ns / 1e9, gigabytes = (double)o->bytes / 1e9 / seconds;
        json_array_append_new(list, json_pack("{s:s, s:I, s:I, s:I, s:f, s:f, s:f, s:I, s:I}", "call", op_names[op], "calls",
                                              (json_int_t)o->calls, "parallel", (json_int_t)bench->parallel, "bytes",
                                              (json_int_t)o->bytes, "seconds", seconds, "calls_per_second",
                                              (double)o->calls / seconds, "gb_per_second", gigabytes, "p50_ns",
                                              (json_int_t)o->p50_ns, "p99_ns", (json_int_t)o->p99_ns));
        bkv_table_cell(table, "%s", op_names[op]);
        bkv_table_cell(table, "%" PRIu64, o->calls);
        bkv_table_cell(table, "%u", bench->parallel);
        bkv_table_cell(table, "%s", bkv_text_of_bytes((double)o->bytes / (double)o->calls, bytes));
        bkv_table_cell(table, "%s", bkv_text_of_count(round((double)o->calls / seconds), rate));
        bkv_table_cell(table, "%.3f", gigabytes);
        bkv_table_cell(table, "%s", bkv_text_of_ns((double)o->p50_ns, p50));
        bkv_table_cell(table, "%s", bkv_text_of_ns((double)o->p99_ns, p99));
    }
    if (bench->cli->json) {
        bkv_cli_print_json(json_pack("{s:s, s:s, s:s, s:I, s:O}", "codec", bkv_codec_name(codec), "backend",
                                     bench->session.limits.backend, "transport", transport_used(bench), "payload_bytes",
                                     (json_int_t)bench->payload_bytes, "results", list),
                           false);
    } else {
        char payload[BKV_TEXT_MAX];
        printf("%u blocks of %s, codec %s, kernels %s, transport %s\n", bench->blocks,
               bkv_text_of_bytes((double)bench->payload_bytes, payload), bkv_codec_name(codec), bench->session.limits.backend,
               transport_used(bench));
        bkv_table_print(table, stdout, bkv_table_color(stdout));
    }
    json_decref(list);
    bkv_table_destroy(table);
}

static bkv_status_t run_phases(bench_t *bench, const bool *wanted, outcome_t *outcomes, bkv_error_t *err) {
    bkv_queue_t *queue = NULL;
    bkv_status_t status = bkv_queue_create(bench->session.client, bench->parallel, &queue, err);
    if (status != BKV_OK) {
        return status;
    }
    for (size_t op = 0; op < OP_COUNT && status == BKV_OK; op++) {
        if (wanted[op]) {
            status = run_phase(bench, queue, (op_t)op, &outcomes[op], err);
        }
    }
    bkv_queue_destroy(queue);
    for (size_t done = 0; !bench->cli->keep && done < bench->blocks;) {
        size_t batch = bkv_session_batch(&bench->session, bench->blocks - done), dropped;
        // Whatever comes of it: the blocks can also simply age out.
        bkv_drop(bench->session.client, &bench->session.id, bench->keys + done, batch, 0, &dropped, NULL);
        done += batch;
    }
    return status;
}

// A get or lookup alone would find nothing: blocks must have been put.
static bkv_status_t read_ops(bkv_cli_t *cli, bool *wanted, bkv_error_t *err) {
    if (!parse_ops(cli->ops != NULL ? cli->ops : "put,lookup,get", wanted)) {
        return bkv_cli_usage(cli, err, "--ops: \"%.64s\" is not a list of put, lookup, get", cli->ops);
    }
    if (wanted[OP_GET] && !wanted[OP_PUT]) {
        return bkv_cli_usage(cli, err, "--ops: get needs put");
    }
    return BKV_OK;
}

static void fill_defaults(bkv_cli_t *cli) {
    cli->model = cli->model != NULL ? cli->model : "bkv-bench";
    cli->layers = cli->layers > 0 ? cli->layers : 8;
    cli->kv_heads = cli->kv_heads > 0 ? cli->kv_heads : 4;
    cli->key_dim = cli->key_dim > 0 ? cli->key_dim : 128;
    if (!bkv_cli_given(cli, BKV_OPT_codec)) {
        cli->codec = BKV_CODEC_RAW;
        cli->given |= (uint64_t)1 << BKV_OPT_codec;
    }
}

static bkv_status_t bench_run(bench_t *bench, const bkv_trace_t *trace, const bool *wanted, bkv_error_t *err) {
    bkv_spec_t spec;
    bkv_status_t status = bkv_keyset_spec(bench->cli, trace, &spec, err);
    if (status != BKV_OK) {
        return status;
    }
    bench->shape = (bkv_shape_t){.layers = spec.layers,
                                 .heads = spec.kv_heads,
                                 .tokens = spec.block_tokens,
                                 .key_dim = spec.key_dim,
                                 .value_dim = spec.value_dim,
                                 .dtype = spec.dtype};
    if (trace != NULL && trace->shape.tokens < spec.block_tokens) {
        spec.block_tokens = bench->shape.tokens = trace->shape.tokens;
    }
    if ((status = bkv_shape_check(&bench->shape, err)) != BKV_OK ||
        (status = bkv_shares_load_spec(bench->cli, &spec, &bench->shares, err)) != BKV_OK) {
        return status;
    }
    outcome_t outcomes[OP_COUNT] = {{.calls = 0}};
    status = bkv_session_open(&bench->session, bench->cli, &spec, err);
    if (status == BKV_OK) {
        status = bench_init(bench, trace, bench->cli->seed, err);
    }
    if (status == BKV_OK) {
        status = run_phases(bench, wanted, outcomes, err);
    }
    if (status == BKV_OK) {
        show(bench, wanted, outcomes, spec.codec);
    }
    bench_deinit(bench);
    bkv_session_end(&bench->session);
    return status;
}

bkv_status_t bkv_cmd_bench(bkv_cli_t *cli, bkv_error_t *err) {
    bench_t bench = {.cli = cli};
    bool wanted[OP_COUNT] = {false};
    bkv_trace_t trace = {.file = NULL};
    bkv_status_t status = read_ops(cli, wanted, err);
    fill_defaults(cli);
    bench.blocks = cli->blocks > 0 ? cli->blocks : DEFAULT_BLOCKS;
    bench.parallel = cli->parallel > 0 ? cli->parallel : DEFAULT_PARALLEL;
    if (status == BKV_OK && (bench.blocks > MAX_BLOCKS || bench.parallel > MAX_PARALLEL)) {
        status = bkv_cli_usage(cli, err, "--blocks or --parallel: beyond %u and %d", MAX_BLOCKS, MAX_PARALLEL);
    }
    if (status == BKV_OK && cli->arg_count > 0) {
        status = bkv_trace_init(&trace, cli->args[0], err);
    }
    if (status == BKV_OK) {
        status = bench_run(&bench, cli->arg_count > 0 ? &trace : NULL, wanted, err);
    }
    bkv_trace_deinit(&trace);
    return status;
}
