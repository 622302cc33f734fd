// unpack.h - records as the tensors that attention sees: what `get`, `fold` and `summarize` write.
//
// For each layer N: k.N, v.N F16 [heads, m, dim] (dequantised), logw.N F32 [heads, m], index.N I32 [heads, m] (position in
// the sequence). A head that has fewer than m tokens is padded at its end: logw -infinity, index -1, k and v zero.
#ifndef BKV_CLI_UNPACK_H
#define BKV_CLI_UNPACK_H

#include "client/balancekv.h"
#include "trace.h"

typedef struct bkv_unpack {
    const void *const *records; // validated, in order of position, alike in layers, heads and dims
    size_t count;
    const uint32_t *layer_numbers; // N of each of the records' layers
    const bkv_trace_t *trace;      // with window > 0: its newest tokens come last, as they are, with log weight 0;
    uint32_t window;               //   their layers and heads are the records'
    const char *const (*metadata)[2];
    size_t metadata_count;
    uint64_t saturated; // out: values beyond float16's range, written as +-65504
} bkv_unpack_t;

// Writes the file. INVALID_ARGUMENT: the records do not go together or lie beyond position 2^31.
bkv_status_t bkv_unpack_write(bkv_unpack_t *unpack, const char *path, bkv_error_t *err);

// Bytes that the records' source tokens took as bf16, and the bytes of the records.
uint64_t bkv_unpack_raw_bytes(const void *const *records, size_t count);
uint64_t bkv_unpack_stored_bytes(const void *const *records, size_t count);

// Writes the records one after another into a file. Each says its own length, so that `inspect` can tell them apart.
bkv_status_t bkv_unpack_write_records(const void *const *records, size_t count, const char *path, bkv_error_t *err);

#endif
