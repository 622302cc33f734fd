// cmd_calibrate.c - `bkv calibrate TRACE...`: measures which heads of a model need the bytes, for --shares; the measuring is in
// calibrate.c.
//
// A head's share is what it alone adds to the squared error of its layer's attention output, against the square of that output,
// mean over the traces. On the real model of the quality bench, measured on two books and judged on four contexts of 4096 tokens of
// others (blocks of 256, newest 64 exact), NLL above exact at 8x, 16x and 32x is 0.026, 0.062 and 0.098 with equal shares, 0.005,
// 0.024 and 0.063 with these; shares in proportion to the root of the error gain much less. With the model at hand its own loss
// tells more than attention does: tests/bench/quality/calibrate.py makes the same file of it (figures: kernels/plan.c).
#include "cli.h"

#include "calibrate.h"
#include "memory.h"
#include "shares.h"
#include "table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_RATE         24
#define DEFAULT_BLOCK_TOKENS 256
#define DEFAULT_LAST         256

typedef struct calibration {
    bkv_cli_t *cli;
    bkv_summarize_t options;
    uint32_t layers, heads;
    uint32_t *layer_numbers; // [layers]
    double *errors;          // [layers][heads], sum over the traces
    uint8_t *shares;
} calibration_t;

static bkv_status_t read_options(bkv_cli_t *cli, bkv_summarize_t *options, bkv_error_t *err) {
    const char *name = bkv_cli_given(cli, BKV_OPT_backend) ? cli->backend : "auto";
    *options = (bkv_summarize_t){
        .params = bkv_cli_codec(cli),
        .block_tokens = bkv_cli_given(cli, BKV_OPT_block_tokens) ? cli->block_tokens : DEFAULT_BLOCK_TOKENS,
        .window = bkv_cli_given(cli, BKV_OPT_last) ? cli->last : DEFAULT_LAST,
        .threads = cli->threads,
        .backend = bkv_backend_get(name),
        .quiet = cli->json,
    };
    options->params.rate = bkv_cli_given(cli, BKV_OPT_rate) ? cli->rate : DEFAULT_RATE;
    if (options->block_tokens == 0 || options->block_tokens > BKV_MAX_TOKENS) {
        return bkv_cli_usage(cli, err, "--block-tokens: %u is not in 1..%u", options->block_tokens, BKV_MAX_TOKENS);
    }
    if (options->window == 0) {
        return bkv_cli_usage(cli, err, "--last: somebody has to ask");
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

// The first trace says what the model is; the others must be of the same.
static bkv_status_t match_trace(calibration_t *calibration, const bkv_trace_t *trace, bkv_error_t *err) {
    const bkv_shape_t *shape = &trace->shape;
    if (calibration->layers == 0) {
        calibration->layers = shape->layers;
        calibration->heads = shape->heads;
        calibration->errors = bkv_xcalloc((size_t)shape->layers * shape->heads, sizeof *calibration->errors);
        calibration->layer_numbers = bkv_xcalloc(shape->layers, sizeof *calibration->layer_numbers);
        memcpy(calibration->layer_numbers, trace->layer_numbers, shape->layers * sizeof *trace->layer_numbers);
    }
    if (shape->layers != calibration->layers || shape->heads != calibration->heads) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "k.N: %u layers of %u heads, unlike the first trace's %u of %u",
                        shape->layers, shape->heads, calibration->layers, calibration->heads);
    }
    return BKV_OK;
}

static bkv_status_t measure_file(calibration_t *calibration, const char *path, bkv_error_t *err) {
    bkv_trace_t trace;
    bkv_error_t cause = {.status = BKV_OK};
    bkv_status_t status = bkv_trace_init(&trace, path, err);
    if (status == BKV_OK) {
        status = match_trace(calibration, &trace, &cause);
        if (status == BKV_OK) {
            status = bkv_calibrate_trace(&trace, &calibration->options, calibration->cli->scale, calibration->errors, &cause);
        }
        if (status != BKV_OK) {
            status = bkv_fail(err, status, "%s: %s", path, cause.message);
        }
    }
    bkv_trace_deinit(&trace);
    return status;
}

// The shares file, which is also what --json shows.
static json_t *describe(const calibration_t *calibration) {
    json_t *shares = json_array(), *errors = json_array();
    for (size_t i = 0; i < (size_t)calibration->layers * calibration->heads; i++) {
        json_array_append_new(shares, json_integer(calibration->shares[i]));
        json_array_append_new(errors, json_real(calibration->errors[i]));
    }
    return json_pack("{s:I, s:I, s:o, s:o, s:I, s:I, s:I}", "layers", (json_int_t)calibration->layers, "heads",
                     (json_int_t)calibration->heads, "shares", shares, "errors", errors, "rate",
                     (json_int_t)calibration->options.params.rate, "queries", (json_int_t)calibration->options.window, "traces",
                     (json_int_t)calibration->cli->arg_count);
}

static void show_table(const calibration_t *calibration) {
    bkv_table_t *table = bkv_table_create(">layer|>head|>error|>share");
    for (uint32_t layer = 0; layer < calibration->layers; layer++) {
        for (uint32_t head = 0; head < calibration->heads; head++) {
            size_t i = (size_t)layer * calibration->heads + head;
            bkv_table_cell(table, "%u", calibration->layer_numbers[layer]);
            bkv_table_cell(table, "%u", head);
            bkv_table_cell(table, "%.5f", calibration->errors[i]);
            bkv_table_cell(table, "%u", calibration->shares[i]);
        }
    }
    bkv_table_print(table, stdout, bkv_table_color(stdout));
    bkv_table_destroy(table);
}

static bkv_status_t tell(const calibration_t *calibration, bkv_error_t *err) {
    const bkv_cli_t *cli = calibration->cli;
    json_t *json = describe(calibration);
    bkv_status_t status = BKV_OK;
    if (cli->out != NULL && json_dump_file(json, cli->out, JSON_INDENT(2)) != 0) {
        status = bkv_fail(err, BKV_FAILED_PRECONDITION, "%s: %s", cli->out, strerror(errno));
    }
    if (cli->json) {
        bkv_cli_print_json(json, false);
        return status;
    }
    json_decref(json);
    show_table(calibration);
    return status;
}

bkv_status_t bkv_cmd_calibrate(bkv_cli_t *cli, bkv_error_t *err) {
    calibration_t calibration = {.cli = cli};
    bkv_status_t status = read_options(cli, &calibration.options, err);
    for (int i = 0; i < cli->arg_count && status == BKV_OK; i++) {
        status = measure_file(&calibration, cli->args[i], err);
    }
    if (status == BKV_OK) {
        size_t count = (size_t)calibration.layers * calibration.heads;
        for (size_t i = 0; i < count; i++) {
            calibration.errors[i] /= cli->arg_count;
        }
        calibration.shares = bkv_xcalloc(count, 1);
        bkv_shares_scale(calibration.errors, count, calibration.shares);
        status = tell(&calibration, err);
    }
    free(calibration.layer_numbers);
    free(calibration.errors);
    free(calibration.shares);
    return status;
}
