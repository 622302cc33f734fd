// cmd_put.c - `bkv put FILE`: cut a trace into blocks, put them with several calls in flight, tell their keys.
#include "cli.h"

#include "memory.h"
#include "session.h"
#include "shares.h"
#include "table.h"
#include "text.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_PARALLEL 4
#define MAX_PARALLEL     1024

// All of one put. Slot s carries one block at a time: block slots[s].
typedef struct job {
    const bkv_cli_t *cli;
    const bkv_trace_t *trace;
    const bkv_session_t *session;
    bkv_span_t *spans;
    bkv_put_t *puts;           // [count]
    bkv_put_result_t *results; // [count]
    size_t count, next, in_flight;
    uint32_t parallel;
    void **payloads; // [parallel]
    size_t *slots;   // [parallel]
    bool *busy;      // [parallel]
} job_t;

static void job_init(job_t *job, size_t count, uint32_t parallel) {
    job->count = count;
    job->parallel = count < parallel ? (uint32_t)(count > 0 ? count : 1) : parallel;
    job->puts = bkv_xcalloc(count, sizeof *job->puts);
    job->results = bkv_xcalloc(count, sizeof *job->results);
    job->payloads = bkv_xcalloc(job->parallel, sizeof *job->payloads);
    job->slots = bkv_xcalloc(job->parallel, sizeof *job->slots);
    job->busy = bkv_xcalloc(job->parallel, sizeof *job->busy);
    size_t most = 0;
    for (size_t i = 0; i < count; i++) {
        bkv_shape_t shape = bkv_trace_block_shape(job->trace, &job->spans[i]);
        most = bkv_shape_bytes(&shape) > most ? bkv_shape_bytes(&shape) : most;
    }
    for (uint32_t s = 0; s < job->parallel; s++) {
        job->payloads[s] = bkv_xaligned(most);
    }
}

static void job_deinit(job_t *job) {
    for (uint32_t s = 0; s < job->parallel && job->payloads != NULL; s++) {
        free(job->payloads[s]);
    }
    free(job->payloads);
    free(job->slots);
    free(job->busy);
    free(job->puts);
    free(job->results);
    free(job->spans);
}

// Fills a free slot with the next block and starts its call.
static bkv_status_t start_next(job_t *job, bkv_queue_t *queue, uint32_t slot, bkv_error_t *err) {
    size_t i = job->next;
    const bkv_span_t *span = &job->spans[i];
    bkv_shape_t shape = bkv_trace_block_shape(job->trace, span);
    bkv_put_t *put = &job->puts[i];
    *put = (bkv_put_t){
        .position = span->position,
        .tokens = span->tokens,
        .ttl_ms = job->cli->ttl,
        .payload = job->payloads[slot],
        .payload_bytes = bkv_shape_bytes(&shape),
    };
    bkv_trace_gather(job->trace, span, job->payloads[slot]);
    bkv_status_t status =
        bkv_trace_key(job->trace, span, put->payload, &job->session->id, i == 0 ? NULL : &job->puts[i - 1].key, &put->key, err);
    if (status != BKV_OK) {
        return status;
    }
    status = bkv_put_submit(queue, slot, &job->session->id, put, 1, 0, &job->results[i]);
    if (status != BKV_OK) {
        return bkv_fail(err, status, "tokens %" PRIu64 "..: could not be submitted", span->position);
    }
    job->slots[slot] = i;
    job->busy[slot] = true;
    job->in_flight++;
    job->next++;
    return BKV_OK;
}

static void note_failure(bkv_error_t *first, const job_t *job, size_t i, const bkv_error_t *error) {
    if (error->status != BKV_OK && first->status == BKV_OK) {
        bkv_fail(first, error->status, "tokens %" PRIu64 "..%" PRIu64 ": %s", job->spans[i].position,
                 job->spans[i].position + job->spans[i].tokens - 1, error->message);
    }
}

// Keeps `parallel` calls in flight until all is done; after a failure it only waits for those still out.
static bkv_status_t put_all(job_t *job, bkv_queue_t *queue, bkv_error_t *err) {
    bkv_error_t failure = {.status = BKV_OK};
    bkv_progress_t progress;
    bkv_progress_begin(&progress, "put", job->count, job->cli->json);
    while (job->in_flight > 0 || (job->next < job->count && failure.status == BKV_OK)) {
        for (uint32_t s = 0; s < job->parallel && job->next < job->count && failure.status == BKV_OK; s++) {
            if (!job->busy[s]) {
                start_next(job, queue, s, &failure);
            }
        }
        bkv_completion_t done[16];
        size_t count = job->in_flight > 0 ? bkv_queue_poll(queue, done, 16, 1000) : 0;
        for (size_t c = 0; c < count; c++) {
            size_t slot = (size_t)done[c].tag, i = job->slots[slot];
            job->busy[slot] = false;
            job->in_flight--;
            note_failure(&failure, job, i, &done[c].error);
            bkv_progress_step(&progress, 1, job->puts[i].payload_bytes);
        }
    }
    bkv_progress_end(&progress);
    return failure.status == BKV_OK ? BKV_OK : bkv_fail(err, failure.status, "%s", failure.message);
}

static json_t *describe(const job_t *job, const bkv_spec_t *spec) {
    json_t *json = bkv_keyset_to_json(spec, job->trace->layer_numbers);
    json_t *blocks = json_array();
    for (size_t i = 0; i < job->count; i++) {
        json_array_append_new(blocks, json_pack("{s:o, s:I, s:I, s:I, s:b}", "key",
                                                bkv_cli_json_hex(job->puts[i].key.bytes, BKV_KEY_BYTES), "position",
                                                (json_int_t)job->spans[i].position, "tokens", (json_int_t)job->spans[i].tokens,
                                                "stored_bytes", (json_int_t)job->results[i].stored_bytes, "duplicate",
                                                job->results[i].duplicate));
    }
    json_object_set_new(json, "spec_id", bkv_cli_json_hex(job->session->id.bytes, BKV_SPEC_ID_BYTES));
    json_object_set_new(json, "blocks", blocks);
    return json;
}

// Bytes of a block had it come as bf16: what rates are measured against.
static double as_bf16(const job_t *job, size_t i) {
    return (double)job->puts[i].payload_bytes * 2 / (double)bkv_dtype_bytes(job->trace->shape.dtype);
}

static void show_table(const job_t *job, uint64_t took_ns) {
    bkv_table_t *table = bkv_table_create(">#|>position|>tokens|>stored|>rate|note|key");
    uint64_t payload = 0, stored = 0;
    char text[BKV_TEXT_MAX], stored_text[BKV_TEXT_MAX], rate_text[BKV_TEXT_MAX];
    for (size_t i = 0; i < job->count; i++) {
        char key[2 * BKV_KEY_BYTES + 1];
        bkv_hex(job->puts[i].key.bytes, BKV_KEY_BYTES, key);
        payload += job->puts[i].payload_bytes;
        stored += job->results[i].stored_bytes;
        bkv_table_cell(table, "%zu", i);
        bkv_table_cell(table, "%" PRIu64, job->spans[i].position);
        bkv_table_cell(table, "%u", job->spans[i].tokens);
        bkv_table_cell(table, "%s", bkv_text_of_bytes((double)job->results[i].stored_bytes, text));
        bkv_table_cell(table, "%.2fx", as_bf16(job, i) / (double)job->results[i].stored_bytes);
        bkv_table_cell(table, "%s", job->results[i].duplicate ? "duplicate" : "");
        bkv_table_cell(table, "%s", key);
    }
    bkv_table_print(table, stdout, bkv_table_color(stdout));
    bkv_table_destroy(table);
    printf("%s -> %s in %zu blocks, %s/s\n", bkv_text_of_bytes((double)payload, text),
           bkv_text_of_bytes((double)stored, stored_text), job->count,
           bkv_text_of_bytes((double)payload / ((double)took_ns / 1e9), rate_text));
}

static bkv_status_t tell(const job_t *job, const bkv_spec_t *spec, uint64_t took_ns, bkv_error_t *err) {
    const bkv_cli_t *cli = job->cli;
    json_t *json = describe(job, spec);
    bkv_status_t status = BKV_OK;
    if (cli->keys != NULL && json_dump_file(json, cli->keys, JSON_INDENT(2)) != 0) {
        status = bkv_fail(err, BKV_FAILED_PRECONDITION, "%s: %s", cli->keys, strerror(errno));
    }
    if (cli->json) {
        bkv_cli_print_json(json, false);
        return status;
    }
    json_decref(json);
    show_table(job, took_ns);
    return status;
}

static bkv_status_t put_trace(bkv_cli_t *cli, const bkv_trace_t *trace, const bkv_spec_t *spec, const bkv_session_t *session,
                              bkv_error_t *err) {
    job_t job = {.cli = cli, .trace = trace, .session = session};
    bkv_codec_params_t params = bkv_cli_codec(cli);
    bkv_queue_t *queue = NULL;
    uint32_t parallel = cli->parallel > 0 ? cli->parallel : DEFAULT_PARALLEL;
    size_t count = bkv_trace_plan(&trace->shape, trace->shape.tokens - cli->window, spec->block_tokens, &params, &job.spans);
    job_init(&job, count, parallel < MAX_PARALLEL ? parallel : MAX_PARALLEL);
    uint64_t start_ns = bkv_now_monotonic_ns();
    bkv_status_t status = bkv_queue_create(session->client, job.parallel, &queue, err);
    if (status == BKV_OK) {
        status = put_all(&job, queue, err);
        bkv_queue_destroy(queue);
    }
    if (status == BKV_OK) {
        status = tell(&job, spec, bkv_now_monotonic_ns() - start_ns, err);
    }
    job_deinit(&job);
    return status;
}

bkv_status_t bkv_cmd_put(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_trace_t trace;
    bkv_spec_t spec;
    bkv_session_t session = {.client = NULL};
    uint8_t *shares = NULL;
    bkv_codec_params_t params = bkv_cli_codec(cli);
    if (bkv_codec_check(&params, err) != BKV_OK) {
        cli->usage = true;
        return BKV_INVALID_ARGUMENT;
    }
    bkv_status_t status = bkv_trace_init(&trace, cli->args[0], err);
    if (status == BKV_OK && cli->window >= trace.shape.tokens) {
        status = bkv_cli_usage(cli, err, "--window: %u of %u tokens leaves nothing to put", cli->window, trace.shape.tokens);
    }
    if (status == BKV_OK) {
        status = bkv_keyset_spec(cli, &trace, &spec, err);
    }
    if (status == BKV_OK) {
        status = bkv_shares_load_spec(cli, &spec, &shares, err);
    }
    if (status == BKV_OK) {
        status = bkv_session_open(&session, cli, &spec, err);
    }
    if (status == BKV_OK) {
        status = put_trace(cli, &trace, &spec, &session, err);
    }
    bkv_session_end(&session);
    free(shares);
    bkv_trace_deinit(&trace);
    return status;
}
