// cmd_summarize.c - `bkv summarize IN OUT`: compress a trace off-line; the work is in summarize.c and unpack.c.
#include "cli.h"

#include "memory.h"
#include "shares.h"
#include "summarize.h"
#include "table.h"
#include "text.h"
#include "unpack.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_WINDOW       64
#define DEFAULT_BLOCK_TOKENS 256

// With a profile, --rate is the fold's. Its blocks are kept whole until they are folded, as int8 unless --codec says otherwise.
static bkv_status_t cool_options(bkv_cli_t *cli, bool rate, bkv_summarize_t *options, bkv_error_t *err) {
    if (!bkv_cli_given(cli, BKV_OPT_codec)) {
        options->params.codec = BKV_CODEC_DENSE8;
    }
    if (options->params.codec == BKV_CODEC_BALANCE) {
        return bkv_cli_usage(cli, err, "--codec: with --profile it is that of whole blocks: raw, dense8 or dense4");
    }
    if (rate && (cli->rate == 0 || cli->rate > BKV_MAX_BAND_RATE)) {
        return bkv_cli_usage(cli, err, "--rate: %u is not in 1..%d", cli->rate, BKV_MAX_BAND_RATE);
    }
    options->fold_rate = rate && options->budget == 0 ? cli->rate : 0;
    return BKV_OK;
}

static bkv_status_t read_options(bkv_cli_t *cli, bkv_summarize_t *options, bkv_error_t *err) {
    const char *name = bkv_cli_given(cli, BKV_OPT_backend) ? cli->backend : "auto";
    bool rate = bkv_cli_given(cli, BKV_OPT_rate);
    *options = (bkv_summarize_t){
        .params = bkv_cli_codec(cli),
        .block_tokens = bkv_cli_given(cli, BKV_OPT_block_tokens) ? cli->block_tokens : DEFAULT_BLOCK_TOKENS,
        .window = bkv_cli_given(cli, BKV_OPT_window) ? cli->window : DEFAULT_WINDOW,
        .budget = cli->budget,
        .threads = cli->threads,
        .backend = bkv_backend_get(name),
        .quiet = cli->json,
    };
    bkv_status_t status = bkv_cli_profile(cli, rate ? cli->rate : 0, &options->profile, err);
    if (status == BKV_OK && options->profile.count > 0) {
        status = cool_options(cli, rate, options, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    if (options->block_tokens == 0 || options->block_tokens > BKV_MAX_TOKENS) {
        return bkv_cli_usage(cli, err, "--block-tokens: %u is not in 1..%u", options->block_tokens, BKV_MAX_TOKENS);
    }
    if (options->backend == NULL) {
        return bkv_cli_usage(cli, err, "--backend: there is no %s here", name);
    }
    if (bkv_codec_check(&options->params, err) != BKV_OK) {
        cli->usage = true;
        return BKV_INVALID_ARGUMENT;
    }
    return BKV_OK;
}

// [[position, tokens, bytes] of each record], oldest first: which tokens of the output are whose.
static char *list_spans(const bkv_summaries_t *summaries) {
    json_t *list = json_array();
    for (size_t i = 0; i < summaries->count; i++) {
        const bkv_record_header_t *header = summaries->records[i];
        json_array_append_new(
            list, json_pack("[I, I, I]", (json_int_t)header->position, (json_int_t)header->tokens, (json_int_t)header->length));
    }
    char *text = json_dumps(list, JSON_COMPACT);
    json_decref(list);
    return text;
}

static bkv_status_t write_output(const bkv_cli_t *cli, const bkv_summarize_t *options, const bkv_trace_t *trace,
                                 const bkv_summaries_t *summaries, bkv_error_t *err) {
    char numbers[7][BKV_TEXT_MAX];
    const uint64_t values[7] = {summaries->stored_bytes, summaries->raw_bytes, options->params.rate, options->block_tokens,
                                options->params.sink,    options->window,      options->params.seed};
    for (size_t i = 0; i < 7; i++) {
        snprintf(numbers[i], sizeof numbers[i], "%" PRIu64, values[i]);
    }
    char profile[BKV_PROFILE_TEXT], *spans = list_spans(summaries);
    bkv_profile_format(&options->profile, profile);
    const char *const metadata[][2] = {
        {"stored_bytes", numbers[0]}, {"raw_bytes", numbers[1]},    {"codec", bkv_codec_name(options->params.codec)},
        {"rate", numbers[2]},         {"block_tokens", numbers[3]}, {"sink", numbers[4]},
        {"window", numbers[5]},       {"seed", numbers[6]},         {"backend", options->backend->name},
        {"version", bkv_version()},   {"profile", profile},         {"records", spans != NULL ? spans : "[]"},
    };
    bkv_unpack_t unpack = {
        .records = (const void *const *)summaries->records,
        .count = summaries->count,
        .layer_numbers = trace->layer_numbers,
        .trace = trace,
        .window = options->window,
        .metadata = metadata,
        .metadata_count = sizeof metadata / sizeof *metadata,
    };
    bkv_status_t status = bkv_unpack_write(&unpack, cli->args[1], err);
    if (status == BKV_OK && unpack.saturated > 0) {
        fprintf(stderr, "bkv: summarize: warning: %" PRIu64 " values beyond float16 were written as +-65504\n",
                unpack.saturated);
    }
    if (status == BKV_OK && bkv_cli_given(cli, BKV_OPT_record)) {
        status = bkv_unpack_write_records(unpack.records, unpack.count, cli->record, err);
    }
    free(spans);
    return status;
}

static void show(const bkv_cli_t *cli, const bkv_summarize_t *options, const bkv_trace_t *trace,
                 const bkv_summaries_t *summaries, uint64_t took_ns) {
    const bkv_shape_t *shape = &trace->shape;
    double rate = (double)summaries->raw_bytes / (double)summaries->stored_bytes;
    uint32_t tokens = shape->tokens - options->window;
    if (cli->json) {
        bkv_cli_print_json(json_pack("{s:s, s:i, s:i, s:i, s:I, s:I, s:I, s:f, s:f}", "codec",
                                     bkv_codec_name(options->params.codec), "layers", (int)shape->layers, "heads",
                                     (int)shape->heads, "tokens", (int)tokens, "records", (json_int_t)summaries->count,
                                     "raw_bytes", (json_int_t)summaries->raw_bytes, "stored_bytes",
                                     (json_int_t)summaries->stored_bytes, "rate", rate, "seconds", (double)took_ns / 1e9),
                           false);
        return;
    }
    char raw[BKV_TEXT_MAX], stored[BKV_TEXT_MAX], took[BKV_TEXT_MAX];
    printf("%s: %u tokens x %u layers x %u heads, %s as bf16 -> %s in %zu record%s (%.2fx, %s), newest %u tokens exact, %s\n",
           cli->args[1], tokens, shape->layers, shape->heads, bkv_text_of_bytes((double)summaries->raw_bytes, raw),
           bkv_text_of_bytes((double)summaries->stored_bytes, stored), summaries->count, summaries->count == 1 ? "" : "s", rate,
           bkv_codec_name(options->params.codec), options->window, bkv_text_of_ns((double)took_ns, took));
}

bkv_status_t bkv_cmd_summarize(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_summarize_t options;
    bkv_trace_t trace;
    bkv_summaries_t summaries = {.records = NULL};
    uint8_t *shares = NULL;
    bkv_status_t status = read_options(cli, &options, err);
    if (status != BKV_OK) {
        return status;
    }
    uint64_t start_ns = bkv_now_monotonic_ns();
    status = bkv_trace_init(&trace, cli->args[0], err);
    if (status == BKV_OK) {
        status = bkv_shares_load(cli, trace.shape.layers, trace.shape.heads, &shares, err);
        options.params.shares = shares;
    }
    if (status == BKV_OK) {
        status = bkv_summarize_trace(&trace, &options, &summaries, err);
    }
    if (status == BKV_OK) {
        status = write_output(cli, &options, &trace, &summaries, err);
    }
    if (status == BKV_OK) {
        show(cli, &options, &trace, &summaries, bkv_now_monotonic_ns() - start_ns);
    }
    bkv_summaries_deinit(&summaries);
    free(shares);
    bkv_trace_deinit(&trace);
    return status;
}
