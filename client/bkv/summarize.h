// summarize.h - compressing a whole trace off-line, block by block as the daemon would: the same spans, positions, seed.
#ifndef BKV_CLI_SUMMARIZE_H
#define BKV_CLI_SUMMARIZE_H

#include "trace.h"

typedef struct bkv_summarize {
    bkv_codec_params_t params;
    uint32_t block_tokens;
    uint32_t window;              // newest tokens left out
    uint64_t budget;              // all folded into at most so many bytes; 0: see the next two, without them a record per block
    uint32_t fold_rate;           // in place of budget: all folded into bf16 bytes / fold_rate
    bkv_profile_t profile;        // of the fold, a record per band; count 0: one record
    uint32_t threads;             // 0: one per CPU
    const bkv_backend_t *backend; // not NULL
    bool quiet;                   // no progress bar
} bkv_summarize_t;

// Records in order of position, sealed. raw_bytes: their source tokens as bf16; stored_bytes: theirs.
typedef struct bkv_summaries {
    void **records;
    size_t count;
    uint64_t raw_bytes, stored_bytes;
} bkv_summaries_t;

// INVALID_ARGUMENT: nothing to compress, values that are not finite, or too little of it for the rate, which holds for
// whatever this returns with BKV_OK. Deinit also after failure. The same options make the same bytes with any number of
// threads.
bkv_status_t bkv_summarize_trace(const bkv_trace_t *trace, const bkv_summarize_t *options, bkv_summaries_t *summaries,
                                 bkv_error_t *err);
void bkv_summaries_deinit(bkv_summaries_t *summaries);

#endif
