// safetensors.c - the reader: checks a header of unknown origin. Writing is in safetensors_write.c.
#include "safetensors.h"

#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct bkv_safetensors {
    json_t *header; // owns every name
    bkv_tensor_t *tensors;
    size_t count;
    void *map; // NULL: the bytes are the caller's
    size_t map_length;
};

static const struct {
    const char *name;
    size_t bytes;
} types[] = {
#define X(name, bytes) [BKV_TENSOR_##name] = {#name, (bytes)},
    BKV_TENSOR_TYPES(X)
#undef X
};

const char *bkv_tensor_type_name(bkv_tensor_type_t type) {
    return types[type].name;
}

size_t bkv_tensor_type_bytes(bkv_tensor_type_t type) {
    return types[type].bytes;
}

// Names come from the file and go into messages: show at most this many bytes of them.
#define NAME_SHOWN "%.64s"

static bkv_status_t parse_type(const json_t *entry, bkv_tensor_t *tensor, bkv_error_t *err) {
    const char *name = json_string_value(json_object_get(entry, "dtype"));
    for (size_t i = 0; name != NULL && i < sizeof types / sizeof *types; i++) {
        if (strcmp(name, types[i].name) == 0) {
            tensor->type = (bkv_tensor_type_t)i;
            return BKV_OK;
        }
    }
    return bkv_fail(err, BKV_INVALID_ARGUMENT, NAME_SHOWN ".dtype: \"%.16s\" is not known", tensor->name, name ? name : "");
}

// Fills rank, shape and bytes; the product cannot overflow unnoticed.
static bkv_status_t parse_shape(const json_t *entry, bkv_tensor_t *tensor, bkv_error_t *err) {
    const json_t *shape = json_object_get(entry, "shape");
    if (!json_is_array(shape) || json_array_size(shape) > BKV_TENSOR_MAX_RANK) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, NAME_SHOWN ".shape: not an array of at most %d numbers", tensor->name,
                        BKV_TENSOR_MAX_RANK);
    }
    tensor->rank = (uint32_t)json_array_size(shape);
    tensor->bytes = types[tensor->type].bytes;
    for (uint32_t i = 0; i < tensor->rank; i++) {
        const json_t *dim = json_array_get(shape, i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, NAME_SHOWN ".shape[%u]: not a whole number of 0 or more", tensor->name,
                            i);
        }
        tensor->shape[i] = (uint64_t)json_integer_value(dim);
        if (__builtin_mul_overflow(tensor->bytes, tensor->shape[i], &tensor->bytes)) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, NAME_SHOWN ".shape: too large", tensor->name);
        }
    }
    return BKV_OK;
}

static bkv_status_t parse_offsets(const json_t *entry, const uint8_t *data, uint64_t data_bytes, bkv_tensor_t *tensor,
                                  bkv_error_t *err) {
    const json_t *offsets = json_object_get(entry, "data_offsets");
    const json_t *first = json_array_get(offsets, 0), *second = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(second)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, NAME_SHOWN ".data_offsets: not two whole numbers", tensor->name);
    }
    json_int_t begin = json_integer_value(first), end = json_integer_value(second);
    if (begin < 0 || end < begin || (uint64_t)end > data_bytes) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, NAME_SHOWN ".data_offsets: [%lld, %lld) does not lie in %llu bytes of data",
                        tensor->name, (long long)begin, (long long)end, (unsigned long long)data_bytes);
    }
    if ((uint64_t)(end - begin) != tensor->bytes) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, NAME_SHOWN ".data_offsets: %lld bytes, but its shape needs %llu",
                        tensor->name, (long long)(end - begin), (unsigned long long)tensor->bytes);
    }
    tensor->data = data + begin;
    return BKV_OK;
}

static bkv_status_t check_metadata(json_t *metadata, bkv_error_t *err) {
    const char *key;
    json_t *value;
    if (metadata != NULL && !json_is_object(metadata)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "__metadata__: not an object");
    }
    json_object_foreach(metadata, key, value) {
        if (!json_is_string(value)) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "__metadata__." NAME_SHOWN ": not a string", key);
        }
    }
    return BKV_OK;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const bkv_tensor_t *)a)->name, ((const bkv_tensor_t *)b)->name);
}

static int by_data(const void *a, const void *b) {
    const bkv_tensor_t *left = a, *right = b;
    if (left->data != right->data) {
        return left->data < right->data ? -1 : 1;
    }
    return (left->bytes > right->bytes) - (left->bytes < right->bytes); // empty ones first
}

// The format allows neither holes nor overlaps, so in order of their data the tensors must meet exactly.
static bkv_status_t check_cover(bkv_safetensors_t *file, const uint8_t *data, uint64_t data_bytes, bkv_error_t *err) {
    const uint8_t *at = data;
    qsort(file->tensors, file->count, sizeof *file->tensors, by_data);
    for (size_t i = 0; i < file->count; i++) {
        if (file->tensors[i].data != at) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, NAME_SHOWN ".data_offsets: a hole or an overlap before it",
                            file->tensors[i].name);
        }
        at += file->tensors[i].bytes;
    }
    if (at != data + data_bytes) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "header: %llu bytes at the end belong to no tensor",
                        (unsigned long long)(data + data_bytes - at));
    }
    qsort(file->tensors, file->count, sizeof *file->tensors, by_name);
    return BKV_OK;
}

static bkv_status_t parse_header(bkv_safetensors_t *file, const uint8_t *data, uint64_t data_bytes, bkv_error_t *err) {
    const char *name;
    json_t *entry;
    file->tensors = bkv_xcalloc(json_object_size(file->header), sizeof *file->tensors);
    json_object_foreach(file->header, name, entry) {
        bkv_status_t status;
        if (strcmp(name, "__metadata__") == 0) {
            if ((status = check_metadata(entry, err)) != BKV_OK) {
                return status;
            }
            continue;
        }
        bkv_tensor_t *tensor = &file->tensors[file->count++];
        tensor->name = name;
        if ((status = parse_type(entry, tensor, err)) != BKV_OK || (status = parse_shape(entry, tensor, err)) != BKV_OK ||
            (status = parse_offsets(entry, data, data_bytes, tensor, err)) != BKV_OK) {
            return status;
        }
    }
    return check_cover(file, data, data_bytes, err);
}

bkv_status_t bkv_safetensors_parse(const uint8_t *bytes, size_t length, bkv_safetensors_t **out, bkv_error_t *err) {
    uint64_t header_bytes = 0;
    if (length < BKV_SAFETENSORS_PREFIX + BKV_SAFETENSORS_MIN_HEADER) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "file: %zu bytes are no safetensors file", length);
    }
    for (int i = 0; i < BKV_SAFETENSORS_PREFIX; i++) {
        header_bytes |= (uint64_t)bytes[i] << (8 * i);
    }
    if (header_bytes < BKV_SAFETENSORS_MIN_HEADER || header_bytes > BKV_TENSOR_HEADER_MAX ||
        header_bytes > length - BKV_SAFETENSORS_PREFIX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "file: a header of %llu bytes in %zu (is this a safetensors file?)",
                        (unsigned long long)header_bytes, length);
    }
    const char *text = (const char *)bytes + BKV_SAFETENSORS_PREFIX;
    json_error_t why;
    json_t *header = json_loadb(text, (size_t)header_bytes, JSON_REJECT_DUPLICATES, &why);
    if (!json_is_object(header)) {
        json_decref(header);
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "header: %s", header == NULL ? why.text : "not an object");
    }
    bkv_safetensors_t *file = bkv_xcalloc(1, sizeof *file);
    file->header = header;
    const uint8_t *data = bytes + BKV_SAFETENSORS_PREFIX + header_bytes;
    bkv_status_t status = parse_header(file, data, length - BKV_SAFETENSORS_PREFIX - header_bytes, err);
    if (status != BKV_OK) {
        bkv_safetensors_close(file);
        return status;
    }
    *out = file;
    return BKV_OK;
}

// Maps a regular file; an empty one has no map and no bytes.
static bkv_status_t map_file(const char *path, void **map, size_t *length, bkv_error_t *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "%s: %s", path, strerror(errno));
    }
    struct stat info;
    bkv_status_t status = BKV_OK;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: not a regular file", path);
    } else if (info.st_size < BKV_SAFETENSORS_PREFIX) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: too short for a safetensors file", path);
    } else {
        *length = (size_t)info.st_size;
        *map = mmap(NULL, *length, PROT_READ, MAP_PRIVATE, fd, 0);
        if (*map == MAP_FAILED) {
            status = bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %s", path, strerror(errno));
        }
    }
    close(fd);
    return status;
}

bkv_status_t bkv_safetensors_open(const char *path, bkv_safetensors_t **file, bkv_error_t *err) {
    void *map = NULL;
    size_t length = 0;
    bkv_error_t why = {.status = BKV_OK};
    bkv_status_t status = map_file(path, &map, &length, err);
    if (status != BKV_OK) {
        return status;
    }
    status = bkv_safetensors_parse(map, length, file, &why);
    if (status != BKV_OK) {
        munmap(map, length);
        return bkv_fail(err, status, "%s: %s", path, why.message);
    }
    (*file)->map = map;
    (*file)->map_length = length;
    return BKV_OK;
}

void bkv_safetensors_close(bkv_safetensors_t *file) {
    if (file == NULL) {
        return;
    }
    if (file->map != NULL) {
        munmap(file->map, file->map_length);
    }
    json_decref(file->header);
    free(file->tensors);
    free(file);
}

size_t bkv_safetensors_count(const bkv_safetensors_t *file) {
    return file->count;
}

const bkv_tensor_t *bkv_safetensors_at(const bkv_safetensors_t *file, size_t i) {
    return &file->tensors[i];
}

const bkv_tensor_t *bkv_safetensors_find(const bkv_safetensors_t *file, const char *name) {
    bkv_tensor_t key = {.name = name};
    return file->count == 0 ? NULL : bsearch(&key, file->tensors, file->count, sizeof key, by_name);
}

const char *bkv_safetensors_metadata(const bkv_safetensors_t *file, const char *key) {
    return json_string_value(json_object_get(json_object_get(file->header, "__metadata__"), key));
}
