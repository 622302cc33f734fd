// cmd_attend.c - `bkv attend`: attention of a file's queries over resident blocks, computed in the daemon.
//
// Writes out.N F32 [query heads, queries, value dim] and lse.N F32 [query heads, queries]. Queries go in pieces that keep
// messages small; keys beyond one call's limit go in several calls whose partial results are merged here.
#include "cli.h"

#include "memory.h"
#include "session.h"
#include "table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_LAST  16
#define MESSAGE_BYTES (8u << 20)

// One layer's queries and results.
typedef struct layer {
    uint32_t number, index; // N of q.N, and the how-manieth layer that is
    const bkv_tensor_t *q;
    uint32_t heads, first, queries; // query heads; the first query used, and how many
    float *out, *lse;
} layer_t;

typedef struct job {
    const bkv_cli_t *cli;
    const bkv_session_t *session;
    layer_t *layers;
    size_t count;
} job_t;

static bkv_status_t find_layers(job_t *job, const bkv_safetensors_t *file, bkv_error_t *err) {
    const bkv_keyset_t *keyset = &job->session->keyset;
    uint32_t last = bkv_cli_given(job->cli, BKV_OPT_last) ? job->cli->last : DEFAULT_LAST;
    job->layers = bkv_xcalloc(keyset->spec.layers, sizeof *job->layers);
    for (uint32_t i = 0; i < keyset->spec.layers; i++) {
        char name[16];
        const bkv_tensor_t *q = bkv_safetensors_find(file, bkv_trace_tensor_name('q', keyset->layer_numbers[i], name));
        if (q == NULL) {
            continue;
        }
        bkv_status_t status = bkv_trace_check_queries(q, keyset->spec.kv_heads, keyset->spec.key_dim, err);
        if (status != BKV_OK) {
            return status;
        }
        uint32_t all = (uint32_t)q->shape[1], queries = last == 0 || last > all ? all : last;
        layer_t *layer = &job->layers[job->count++];
        *layer = (layer_t){.number = keyset->layer_numbers[i], .index = i, .q = q, .heads = (uint32_t)q->shape[0]};
        layer->first = all - queries;
        layer->queries = queries;
        layer->out = bkv_xcalloc((size_t)layer->heads * queries * keyset->spec.value_dim, sizeof *layer->out);
        layer->lse = bkv_xcalloc((size_t)layer->heads * queries, sizeof *layer->lse);
    }
    return job->count > 0 ? BKV_OK : bkv_fail(err, BKV_INVALID_ARGUMENT, "q.N: the file has none for these layers");
}

// Attention of args' queries over all keys. `part` has room for one more result like args->out followed by args->lse.
static bkv_status_t attend_keys(const job_t *job, bkv_attend_args_t *args, float *part, bkv_error_t *err) {
    const bkv_session_t *session = job->session;
    const bkv_keyset_t *keyset = &session->keyset;
    size_t rows = (size_t)args->query_heads * args->queries;
    float *out = args->out, *lse = args->lse;
    for (size_t done = 0; done < keyset->count;) {
        size_t batch = bkv_session_batch(session, keyset->count - done);
        args->out = done == 0 ? out : part;
        args->lse = done == 0 ? lse : part + rows * keyset->spec.value_dim;
        bkv_status_t status = bkv_attend_remote(session->client, &session->id, keyset->keys + done, batch, args,
                                                keyset->spec.kv_heads, keyset->spec.key_dim, keyset->spec.value_dim, 0, err);
        if (status != BKV_OK) {
            return status;
        }
        if (done > 0) {
            bkv_attend_merge(out, lse, args->out, args->lse, rows, keyset->spec.value_dim);
        }
        done += batch;
    }
    args->out = out;
    args->lse = lse;
    return BKV_OK;
}

// Queries [first, first + count) of a layer: gathered from q.N, answered, scattered into the layer's results.
static bkv_status_t attend_piece(const job_t *job, layer_t *layer, uint32_t first, uint32_t count, float *buffer,
                                 bkv_error_t *err) {
    const bkv_spec_t *spec = &job->session->keyset.spec;
    size_t rows = (size_t)layer->heads * count;
    float *q = buffer, *out = q + rows * spec->key_dim, *lse = out + rows * spec->value_dim, *part = lse + rows;
    for (uint32_t head = 0; head < layer->heads; head++) {
        uint64_t row = (uint64_t)head * layer->q->shape[1] + layer->first + first;
        bkv_tensor_to_float(layer->q, row * spec->key_dim, (uint64_t)count * spec->key_dim,
                            q + (size_t)head * count * spec->key_dim);
    }
    bkv_attend_args_t args = {
        .layers = 1,
        .first_layer = layer->index,
        .query_heads = layer->heads,
        .queries = count,
        .scale = job->cli->scale,
        .q = q,
        .out = out,
        .lse = lse,
    };
    bkv_status_t status = attend_keys(job, &args, part, err);
    for (uint32_t head = 0; head < layer->heads && status == BKV_OK; head++) {
        size_t from = (size_t)head * count, to = (size_t)head * layer->queries + first;
        memcpy(layer->out + to * spec->value_dim, out + from * spec->value_dim, count * spec->value_dim * sizeof *out);
        memcpy(layer->lse + to, lse + from, count * sizeof *lse);
    }
    return status;
}

static bkv_status_t attend_layer(const job_t *job, layer_t *layer, bkv_error_t *err) {
    const bkv_spec_t *spec = &job->session->keyset.spec;
    size_t row = (size_t)layer->heads * (spec->key_dim > spec->value_dim ? spec->key_dim : spec->value_dim) * sizeof(float);
    uint32_t piece = row >= MESSAGE_BYTES ? 1 : (uint32_t)(MESSAGE_BYTES / row);
    piece = piece < layer->queries ? piece : layer->queries;
    float *buffer = bkv_xcalloc((size_t)layer->heads * piece * (spec->key_dim + 2 * (spec->value_dim + 1)), sizeof *buffer);
    bkv_status_t status = BKV_OK;
    for (uint32_t done = 0; done < layer->queries && status == BKV_OK; done += piece) {
        uint32_t left = layer->queries - done;
        status = attend_piece(job, layer, done, left < piece ? left : piece, buffer, err);
    }
    free(buffer);
    return status;
}

static bkv_status_t write_results(const job_t *job, const char *path, bkv_error_t *err) {
    bkv_tensor_t *tensors = bkv_xcalloc(job->count * 2, sizeof *tensors);
    char(*names)[16] = bkv_xcalloc(job->count * 2, sizeof *names);
    uint32_t value_dim = job->session->keyset.spec.value_dim;
    for (size_t i = 0; i < job->count; i++) {
        const layer_t *layer = &job->layers[i];
        snprintf(names[2 * i], sizeof *names, "out.%u", layer->number);
        snprintf(names[2 * i + 1], sizeof *names, "lse.%u", layer->number);
        tensors[2 * i] = (bkv_tensor_t){
            .name = names[2 * i], .type = BKV_TENSOR_F32, .rank = 3, .shape = {layer->heads, layer->queries, value_dim}};
        tensors[2 * i + 1] = (bkv_tensor_t){
            .name = names[2 * i + 1], .type = BKV_TENSOR_F32, .rank = 2, .shape = {layer->heads, layer->queries}};
    }
    bkv_safetensors_writer_t *writer = NULL;
    bkv_status_t status = bkv_safetensors_create(path, tensors, job->count * 2, NULL, 0, &writer, err);
    for (size_t i = 0; i < job->count && status == BKV_OK; i++) {
        const layer_t *layer = &job->layers[i];
        size_t rows = (size_t)layer->heads * layer->queries;
        status = bkv_safetensors_write(writer, layer->out, rows * value_dim * sizeof *layer->out, err);
        if (status == BKV_OK) {
            status = bkv_safetensors_write(writer, layer->lse, rows * sizeof *layer->lse, err);
        }
    }
    if (status == BKV_OK) {
        status = bkv_safetensors_finish(writer, err);
    } else {
        bkv_safetensors_abandon(writer);
    }
    free(tensors);
    free(names);
    return status;
}

static void show(const job_t *job) {
    uint32_t value_dim = job->session->keyset.spec.value_dim;
    json_t *list = json_array();
    bkv_table_t *table = bkv_table_create(">layer|>heads|>queries|>mean lse|>rms out");
    for (size_t i = 0; i < job->count; i++) {
        const layer_t *layer = &job->layers[i];
        size_t rows = (size_t)layer->heads * layer->queries;
        double lse = 0, square = 0;
        for (size_t r = 0; r < rows; r++) {
            lse += layer->lse[r];
        }
        for (size_t e = 0; e < rows * value_dim; e++) {
            square += (double)layer->out[e] * layer->out[e];
        }
        lse /= (double)rows;
        square = sqrt(square / ((double)rows * value_dim));
        json_t *mean = isfinite(lse) ? json_real(lse) : json_null();
        json_array_append_new(list, json_pack("{s:I, s:I, s:I, s:o, s:f}", "layer", (json_int_t)layer->number, "query_heads",
                                              (json_int_t)layer->heads, "queries", (json_int_t)layer->queries, "mean_lse", mean,
                                              "rms_out", isfinite(square) ? square : 0.0));
        bkv_table_cell(table, "%u", layer->number);
        bkv_table_cell(table, "%u", layer->heads);
        bkv_table_cell(table, "%u", layer->queries);
        bkv_table_cell(table, "%.4f", lse);
        bkv_table_cell(table, "%.4f", square);
    }
    if (job->cli->json) {
        bkv_cli_print_json(json_pack("{s:O}", "layers", list), false);
    } else {
        bkv_table_print(table, stdout, bkv_table_color(stdout));
    }
    json_decref(list);
    bkv_table_destroy(table);
}

static bkv_status_t attend_all(job_t *job, bkv_error_t *err) {
    bkv_progress_t progress;
    bkv_status_t status = BKV_OK;
    bkv_progress_begin(&progress, "attend", job->count, job->cli->json);
    for (size_t i = 0; i < job->count && status == BKV_OK; i++) {
        status = attend_layer(job, &job->layers[i], err);
        bkv_progress_step(&progress, 1, 0);
    }
    bkv_progress_end(&progress);
    if (status == BKV_OK && job->cli->out != NULL) {
        status = write_results(job, job->cli->out, err);
    }
    return status;
}

bkv_status_t bkv_cmd_attend(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_session_t session;
    bkv_safetensors_t *file = NULL;
    if (cli->queries == NULL) {
        return bkv_cli_usage(cli, err, "--queries: missing");
    }
    bkv_status_t status = bkv_safetensors_open(cli->queries, &file, err);
    if (status != BKV_OK) {
        return status;
    }
    status = bkv_session_start(&session, cli, err);
    job_t job = {.cli = cli, .session = &session};
    if (status == BKV_OK) {
        status = find_layers(&job, file, err);
    }
    if (status == BKV_OK) {
        status = attend_all(&job, err);
    }
    if (status == BKV_OK) {
        show(&job);
    }
    for (size_t i = 0; i < job.count; i++) {
        free(job.layers[i].out);
        free(job.layers[i].lse);
    }
    free(job.layers);
    bkv_session_end(&session);
    bkv_safetensors_close(file);
    return status;
}
