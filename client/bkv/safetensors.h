// safetensors.h - reading and writing the safetensors file format (huggingface/safetensors).
//
// A file is: uint64 header length, that many bytes of JSON, tensor data. The JSON maps each name to {dtype, shape,
// data_offsets: [begin, end)}, offsets counted from the start of the data; "__metadata__" maps strings to strings. Tensors
// are row-major, little-endian, and fill the data without hole or overlap.
//
// The reader maps the file and trusts nothing in it: each name, dtype, shape and offset is checked before a tensor is
// shown. (A file that somebody truncates while it is mapped can still end the program with SIGBUS, as with any mmap.)
// What the tensors mean is trace.h's business.
#ifndef BKV_CLI_SAFETENSORS_H
#define BKV_CLI_SAFETENSORS_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BKV_TENSOR_MAX_RANK        8
#define BKV_TENSOR_HEADER_MAX      100000000u // as the format's own implementation
#define BKV_SAFETENSORS_PREFIX     8          // bytes of the header length
#define BKV_SAFETENSORS_MIN_HEADER 2          // "{}"

// X(name in the file, bytes of one element)
#define BKV_TENSOR_TYPES(X)                                                                                                    \
    X(BOOL, 1)                                                                                                                 \
    X(U8, 1)                                                                                                                   \
    X(I8, 1)                                                                                                                   \
    X(F8_E5M2, 1)                                                                                                              \
    X(F8_E4M3, 1)                                                                                                              \
    X(I16, 2)                                                                                                                  \
    X(U16, 2)                                                                                                                  \
    X(F16, 2)                                                                                                                  \
    X(BF16, 2)                                                                                                                 \
    X(I32, 4)                                                                                                                  \
    X(U32, 4)                                                                                                                  \
    X(F32, 4)                                                                                                                  \
    X(I64, 8)                                                                                                                  \
    X(U64, 8)                                                                                                                  \
    X(F64, 8)

typedef enum bkv_tensor_type {
#define X(name, bytes) BKV_TENSOR_##name,
    BKV_TENSOR_TYPES(X)
#undef X
} bkv_tensor_type_t;

typedef struct bkv_tensor {
    const char *name;
    bkv_tensor_type_t type;
    uint32_t rank;
    uint64_t shape[BKV_TENSOR_MAX_RANK];
    uint64_t bytes;
    const uint8_t *data; // any alignment: read elements with memcpy
} bkv_tensor_t;

typedef struct bkv_safetensors bkv_safetensors_t;

const char *bkv_tensor_type_name(bkv_tensor_type_t type);
size_t bkv_tensor_type_bytes(bkv_tensor_type_t type);

// Maps a file for reading. INVALID_ARGUMENT says what is wrong with it, FAILED_PRECONDITION that it cannot be opened. On success
// *file is the caller's.
bkv_status_t bkv_safetensors_open(const char *path, bkv_safetensors_t **file, bkv_error_t *err);

// The same over bytes in memory, which must outlive *file.
bkv_status_t bkv_safetensors_parse(const uint8_t *bytes, size_t length, bkv_safetensors_t **file, bkv_error_t *err);

void bkv_safetensors_close(bkv_safetensors_t *file); // NULL is allowed

// Tensors sorted by name (strcmp). They and all they point to live as long as the file is open.
size_t bkv_safetensors_count(const bkv_safetensors_t *file);
const bkv_tensor_t *bkv_safetensors_at(const bkv_safetensors_t *file, size_t i);
const bkv_tensor_t *bkv_safetensors_find(const bkv_safetensors_t *file, const char *name); // NULL: none such

// A metadata string; NULL: none such.
const char *bkv_safetensors_metadata(const bkv_safetensors_t *file, const char *key);

// ---- writing ----

typedef struct bkv_safetensors_writer bkv_safetensors_writer_t;

// Tensors are declared first (name, type, rank, shape; the rest is ignored), then their data is written in that order.
// The file appears under `path` only when it is finished; until then it is PATH.tmp-PID beside it.
bkv_status_t bkv_safetensors_create(const char *path, const bkv_tensor_t *tensors, size_t count,
                                    const char *const (*metadata)[2], size_t metadata_count, bkv_safetensors_writer_t **writer,
                                    bkv_error_t *err);

// The next bytes of the data: a tensor may come in pieces. The data belongs to the caller.
bkv_status_t bkv_safetensors_write(bkv_safetensors_writer_t *writer, const void *data, size_t bytes, bkv_error_t *err);

// Frees the writer in any case. On success the file is complete and in place; INVALID_ARGUMENT: fewer bytes came than were
// declared. After any failure nothing of the new file remains.
bkv_status_t bkv_safetensors_finish(bkv_safetensors_writer_t *writer, bkv_error_t *err);

// Gives up: removes what was written and frees. NULL is allowed.
void bkv_safetensors_abandon(bkv_safetensors_writer_t *writer);

#endif
