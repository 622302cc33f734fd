// refold.h - folding records that are in memory, band by band, as the daemon does with those in its store: the same plan
// (kernels/cool.h), the same tree, the same bytes but for their keys.
#ifndef BKV_CLI_REFOLD_H
#define BKV_CLI_REFOLD_H

#include "client/balancekv.h"

typedef struct bkv_refold {
    const bkv_backend_t *backend;
    const void *const *records; // consecutive, oldest first, validated
    uint32_t count;
    uint64_t budget; // most bytes of all results together; 0 with a profile: what its rates come to
    uint64_t seed;
    const uint8_t *shares;        // as in bkv_codec_params_t
    const bkv_profile_t *profile; // count 0: one record
} bkv_refold_t;

// results has room for BKV_FOLD_RECORDS; those made, oldest first, are sealed and the caller's to free.
bkv_status_t bkv_refold(const bkv_refold_t *refold, void **results, size_t *count, bkv_error_t *err);

// A sealed copy of a record, no larger than it must be; free() it. INTERNAL: no reader would take it.
bkv_status_t bkv_record_keep(const void *record, size_t length, void **kept, bkv_error_t *err);

#endif
