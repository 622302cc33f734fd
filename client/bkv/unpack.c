// unpack.c - see unpack.h. Dequantising is bkv_section_read's; this file lays the pieces out.
#include "unpack.h"

#include "memory.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TENSORS_PER_LAYER 4
#define HALF_MAX          65504.0f

// One layer on its way out; reused from layer to layer.
typedef struct layer {
    uint32_t rows; // m: of the fullest head
    uint16_t *k, *v;
    float *logw;
    int32_t *index;
} layer_t;

// Scratch for one section, as float32.
typedef struct scratch {
    float *k, *v, *logw;
    uint32_t *index;
} scratch_t;

static uint32_t head_rows(const bkv_unpack_t *unpack, uint32_t layer, uint32_t head) {
    uint32_t rows = unpack->window;
    for (size_t i = 0; i < unpack->count; i++) {
        bkv_section_view_t view;
        bkv_record_section(unpack->records[i], layer, head, &view);
        rows += view.tokens;
    }
    return rows;
}

static uint32_t layer_rows(const bkv_unpack_t *unpack, const bkv_shape_t *shape, uint32_t layer) {
    uint32_t most = 0;
    for (uint32_t head = 0; head < shape->heads; head++) {
        uint32_t rows = head_rows(unpack, layer, head);
        most = rows > most ? rows : most;
    }
    return most;
}

static void to_half(bkv_unpack_t *unpack, const float *from, size_t count, uint16_t *to) {
    for (size_t i = 0; i < count; i++) {
        unpack->saturated += fabsf(from[i]) > HALF_MAX;
        to[i] = bkv_float_to_half(from[i]);
    }
}

// The sections of one head, record after record, from row 0 of that head on; returns the rows filled.
static uint32_t fill_summaries(bkv_unpack_t *unpack, const bkv_shape_t *shape, uint32_t layer, uint32_t head,
                               scratch_t *scratch, layer_t *out) {
    uint32_t rows = 0;
    for (size_t i = 0; i < unpack->count; i++) {
        const bkv_record_header_t *header = unpack->records[i];
        bkv_section_view_t view;
        bkv_record_section(header, layer, head, &view);
        bkv_section_read(&view, scratch->k, scratch->v, scratch->logw, scratch->index);
        size_t at = (size_t)head * out->rows + rows;
        to_half(unpack, scratch->k, (size_t)view.tokens * shape->key_dim, out->k + at * shape->key_dim);
        to_half(unpack, scratch->v, (size_t)view.tokens * shape->value_dim, out->v + at * shape->value_dim);
        memcpy(out->logw + at, scratch->logw, view.tokens * sizeof *out->logw);
        for (uint32_t t = 0; t < view.tokens; t++) {
            out->index[at + t] = (int32_t)(header->position + scratch->index[t]);
        }
        rows += view.tokens;
    }
    return rows;
}

static void fill_window(bkv_unpack_t *unpack, const bkv_shape_t *shape, uint32_t layer, uint32_t head, uint32_t rows,
                        scratch_t *scratch, layer_t *out) {
    const bkv_trace_t *trace = unpack->trace;
    uint64_t first = trace->shape.tokens - unpack->window;
    for (uint32_t t = 0; t < unpack->window; t++) {
        uint64_t row = (uint64_t)head * trace->shape.tokens + first + t;
        size_t at = (size_t)head * out->rows + rows + t;
        bkv_tensor_to_float(trace->keys[layer], row * shape->key_dim, shape->key_dim, scratch->k);
        bkv_tensor_to_float(trace->values[layer], row * shape->value_dim, shape->value_dim, scratch->v);
        to_half(unpack, scratch->k, shape->key_dim, out->k + at * shape->key_dim);
        to_half(unpack, scratch->v, shape->value_dim, out->v + at * shape->value_dim);
        out->logw[at] = 0;
        out->index[at] = (int32_t)(first + t);
    }
}

static void fill_layer(bkv_unpack_t *unpack, const bkv_shape_t *shape, uint32_t layer, scratch_t *scratch, layer_t *out) {
    size_t rows = (size_t)shape->heads * out->rows;
    memset(out->k, 0, rows * shape->key_dim * sizeof *out->k);
    memset(out->v, 0, rows * shape->value_dim * sizeof *out->v);
    for (uint32_t head = 0; head < shape->heads; head++) {
        uint32_t filled = fill_summaries(unpack, shape, layer, head, scratch, out);
        if (unpack->window > 0) {
            fill_window(unpack, shape, layer, head, filled, scratch, out);
            filled += unpack->window;
        }
        for (uint32_t t = filled; t < out->rows; t++) {
            out->logw[(size_t)head * out->rows + t] = -INFINITY;
            out->index[(size_t)head * out->rows + t] = -1;
        }
    }
}

static bkv_status_t write_layer(bkv_safetensors_writer_t *writer, const bkv_shape_t *shape, const layer_t *layer,
                                bkv_error_t *err) {
    size_t rows = (size_t)shape->heads * layer->rows;
    bkv_status_t status;
    if ((status = bkv_safetensors_write(writer, layer->k, rows * shape->key_dim * sizeof *layer->k, err)) != BKV_OK ||
        (status = bkv_safetensors_write(writer, layer->v, rows * shape->value_dim * sizeof *layer->v, err)) != BKV_OK ||
        (status = bkv_safetensors_write(writer, layer->logw, rows * sizeof *layer->logw, err)) != BKV_OK) {
        return status;
    }
    return bkv_safetensors_write(writer, layer->index, rows * sizeof *layer->index, err);
}

static bkv_status_t check_records(const bkv_unpack_t *unpack, bkv_shape_t *shape, bkv_error_t *err) {
    bkv_record_shape(unpack->records[0], shape);
    for (size_t i = 0; i < unpack->count; i++) {
        const bkv_record_header_t *header = unpack->records[i];
        bkv_shape_t other;
        bkv_record_shape(header, &other);
        if (other.layers != shape->layers || other.heads != shape->heads || other.key_dim != shape->key_dim ||
            other.value_dim != shape->value_dim) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "records: not alike in layers, heads and dims");
        }
        if (header->position > INT32_MAX - BKV_MAX_TOKENS) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "record.position: %llu does not fit index.N (int32)",
                            (unsigned long long)header->position);
        }
    }
    return BKV_OK;
}

// Declares the tensors of all layers; returns the rows of the fullest. The caller frees *tensors and *names.
static uint32_t declare(const bkv_unpack_t *unpack, const bkv_shape_t *shape, bkv_tensor_t **tensors, char (**names)[16]) {
    static const struct {
        const char *prefix;
        bkv_tensor_type_t type;
    } parts[TENSORS_PER_LAYER] = {
        {"k", BKV_TENSOR_F16}, {"v", BKV_TENSOR_F16}, {"logw", BKV_TENSOR_F32}, {"index", BKV_TENSOR_I32}};
    uint32_t most = 0;
    *tensors = bkv_xcalloc((size_t)shape->layers * TENSORS_PER_LAYER, sizeof **tensors);
    *names = bkv_xcalloc((size_t)shape->layers * TENSORS_PER_LAYER, sizeof **names);
    for (uint32_t layer = 0; layer < shape->layers; layer++) {
        uint32_t rows = layer_rows(unpack, shape, layer);
        most = rows > most ? rows : most;
        for (size_t part = 0; part < TENSORS_PER_LAYER; part++) {
            size_t i = layer * TENSORS_PER_LAYER + part;
            snprintf((*names)[i], sizeof **names, "%s.%u", parts[part].prefix, unpack->layer_numbers[layer]);
            (*tensors)[i] = (bkv_tensor_t){
                .name = (*names)[i],
                .type = parts[part].type,
                .rank = part < 2 ? 3 : 2,
                .shape = {shape->heads, rows, part == 0 ? shape->key_dim : shape->value_dim},
            };
        }
    }
    return most;
}

static bkv_status_t write_layers(bkv_unpack_t *unpack, const bkv_shape_t *shape, const bkv_tensor_t *tensors, uint32_t most,
                                 bkv_safetensors_writer_t *writer, bkv_error_t *err) {
    size_t rows = (size_t)shape->heads * most;
    layer_t layer = {.k = bkv_xcalloc(rows * shape->key_dim, sizeof *layer.k),
                     .v = bkv_xcalloc(rows * shape->value_dim, sizeof *layer.v),
                     .logw = bkv_xcalloc(rows, sizeof *layer.logw),
                     .index = bkv_xcalloc(rows, sizeof *layer.index)};
    // A window goes through the scratch one token at a time, so there is room for that one even beside empty sections.
    scratch_t scratch = {.k = bkv_xcalloc((size_t)most * shape->key_dim, sizeof *scratch.k),
                         .v = bkv_xcalloc((size_t)most * shape->value_dim, sizeof *scratch.v),
                         .logw = bkv_xcalloc(most, sizeof *scratch.logw),
                         .index = bkv_xcalloc(most, sizeof *scratch.index)};
    bkv_status_t status = BKV_OK;
    for (uint32_t i = 0; i < shape->layers && status == BKV_OK; i++) {
        layer.rows = (uint32_t)tensors[i * TENSORS_PER_LAYER].shape[1];
        fill_layer(unpack, shape, i, &scratch, &layer);
        status = write_layer(writer, shape, &layer, err);
    }
    free(layer.k);
    free(layer.v);
    free(layer.logw);
    free(layer.index);
    free(scratch.k);
    free(scratch.v);
    free(scratch.logw);
    free(scratch.index);
    return status;
}

bkv_status_t bkv_unpack_write(bkv_unpack_t *unpack, const char *path, bkv_error_t *err) {
    bkv_shape_t shape;
    bkv_tensor_t *tensors;
    char(*names)[16];
    bkv_safetensors_writer_t *writer = NULL;
    if (unpack->count == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "records: none to write");
    }
    bkv_status_t status = check_records(unpack, &shape, err);
    if (status != BKV_OK) {
        return status;
    }
    unpack->saturated = 0;
    uint32_t most = declare(unpack, &shape, &tensors, &names);
    status = bkv_safetensors_create(path, tensors, (size_t)shape.layers * TENSORS_PER_LAYER, unpack->metadata,
                                    unpack->metadata_count, &writer, err);
    if (status == BKV_OK) {
        status = write_layers(unpack, &shape, tensors, most, writer, err);
        if (status == BKV_OK) {
            status = bkv_safetensors_finish(writer, err);
        } else {
            bkv_safetensors_abandon(writer);
        }
    }
    free(tensors);
    free(names);
    return status;
}

uint64_t bkv_unpack_raw_bytes(const void *const *records, size_t count) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < count; i++) {
        bkv_shape_t shape;
        bkv_record_shape(records[i], &shape);
        bytes += 2 * (uint64_t)shape.layers * shape.heads * shape.tokens * (shape.key_dim + shape.value_dim);
    }
    return bytes;
}

uint64_t bkv_unpack_stored_bytes(const void *const *records, size_t count) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < count; i++) {
        bytes += ((const bkv_record_header_t *)records[i])->length;
    }
    return bytes;
}

bkv_status_t bkv_unpack_write_records(const void *const *records, size_t count, const char *path, bkv_error_t *err) {
    FILE *out = fopen(path, "wbe");
    bool ok = out != NULL;
    for (size_t i = 0; i < count && ok; i++) {
        ok = fwrite(records[i], ((const bkv_record_header_t *)records[i])->length, 1, out) == 1;
    }
    int why = errno;
    if (out != NULL && fclose(out) != 0 && ok) {
        ok = false;
        why = errno;
    }
    return ok ? BKV_OK : bkv_fail(err, BKV_FAILED_PRECONDITION, "%s: %s", path, strerror(why));
}
