// safetensors_write.c - the writer half of safetensors.h.
#include "safetensors.h"

#include "memory.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct bkv_safetensors_writer {
    FILE *out;
    char *path, *temporary;
    uint64_t expected, written; // bytes of tensor data
};

static uint64_t tensor_bytes(const bkv_tensor_t *tensor) {
    uint64_t bytes = bkv_tensor_type_bytes(tensor->type);
    for (uint32_t i = 0; i < tensor->rank; i++) {
        bytes *= tensor->shape[i];
    }
    return bytes;
}

static json_t *describe(const bkv_tensor_t *tensor, uint64_t begin, uint64_t end) {
    json_t *shape = json_array();
    for (uint32_t i = 0; i < tensor->rank; i++) {
        json_array_append_new(shape, json_integer((json_int_t)tensor->shape[i]));
    }
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", bkv_tensor_type_name(tensor->type), "shape", shape, "data_offsets",
                     (json_int_t)begin, (json_int_t)end);
}

// The header as text, padded with blanks so that the data starts at a multiple of 8. The caller frees it.
static char *make_header(const bkv_tensor_t *tensors, size_t count, const char *const (*metadata)[2], size_t metadata_count,
                         size_t *length, uint64_t *data_bytes) {
    json_t *header = json_object();
    if (metadata_count > 0) {
        json_t *strings = json_object();
        for (size_t i = 0; i < metadata_count; i++) {
            json_object_set_new(strings, metadata[i][0], json_string(metadata[i][1]));
        }
        json_object_set_new(header, "__metadata__", strings);
    }
    uint64_t at = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t end = at + tensor_bytes(&tensors[i]);
        json_object_set_new(header, tensors[i].name, describe(&tensors[i], at, end));
        at = end;
    }
    *data_bytes = at;
    char *text = json_dumps(header, JSON_COMPACT);
    json_decref(header);
    size_t unpadded = text == NULL ? 0 : strlen(text);
    *length = (unpadded + 7) / 8 * 8;
    text = bkv_xrealloc(text, *length, 1);
    memset(text + unpadded, ' ', *length - unpadded);
    return text;
}

bkv_status_t bkv_safetensors_create(const char *path, const bkv_tensor_t *tensors, size_t count,
                                    const char *const (*metadata)[2], size_t metadata_count, bkv_safetensors_writer_t **out,
                                    bkv_error_t *err) {
    bkv_safetensors_writer_t *writer = bkv_xcalloc(1, sizeof *writer);
    size_t room = strlen(path) + 32, header_bytes = 0;
    writer->path = bkv_xstrdup(path);
    writer->temporary = bkv_xcalloc(room, 1);
    snprintf(writer->temporary, room, "%s.tmp-%ld", path, (long)getpid());
    writer->out = fopen(writer->temporary, "wbe");
    if (writer->out == NULL) {
        bkv_status_t status = bkv_fail(err, BKV_FAILED_PRECONDITION, "%s: %s", path, strerror(errno));
        bkv_safetensors_abandon(writer);
        return status;
    }
    char *header = make_header(tensors, count, metadata, metadata_count, &header_bytes, &writer->expected);
    uint8_t prefix[BKV_SAFETENSORS_PREFIX];
    for (int i = 0; i < BKV_SAFETENSORS_PREFIX; i++) {
        prefix[i] = (uint8_t)((uint64_t)header_bytes >> (8 * i));
    }
    bool ok = fwrite(prefix, sizeof prefix, 1, writer->out) == 1 && fwrite(header, header_bytes, 1, writer->out) == 1;
    free(header);
    if (!ok) {
        bkv_status_t status = bkv_fail(err, BKV_FAILED_PRECONDITION, "%s: %s", path, strerror(errno));
        bkv_safetensors_abandon(writer);
        return status;
    }
    *out = writer;
    return BKV_OK;
}

bkv_status_t bkv_safetensors_write(bkv_safetensors_writer_t *writer, const void *data, size_t bytes, bkv_error_t *err) {
    if (bytes > writer->expected - writer->written) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: more data than was declared", writer->path);
    }
    if (bytes > 0 && fwrite(data, bytes, 1, writer->out) != 1) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "%s: %s", writer->path, strerror(errno));
    }
    writer->written += bytes;
    return BKV_OK;
}

static void writer_free(bkv_safetensors_writer_t *writer) {
    free(writer->path);
    free(writer->temporary);
    free(writer);
}

bkv_status_t bkv_safetensors_finish(bkv_safetensors_writer_t *writer, bkv_error_t *err) {
    bkv_status_t status = BKV_OK;
    if (writer->written != writer->expected) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %llu bytes of %llu declared were written", writer->path,
                          (unsigned long long)writer->written, (unsigned long long)writer->expected);
        bkv_safetensors_abandon(writer);
        return status;
    }
    // What a full disk refuses may show only when the last buffer goes out.
    bool closed = fclose(writer->out) == 0;
    writer->out = NULL;
    if (!closed || rename(writer->temporary, writer->path) != 0) {
        status = bkv_fail(err, BKV_FAILED_PRECONDITION, "%s: %s", writer->path, strerror(errno));
        bkv_safetensors_abandon(writer);
        return status;
    }
    writer_free(writer);
    return BKV_OK;
}

void bkv_safetensors_abandon(bkv_safetensors_writer_t *writer) {
    if (writer == NULL) {
        return;
    }
    if (writer->out != NULL) {
        fclose(writer->out);
    }
    unlink(writer->temporary);
    writer_free(writer);
}
