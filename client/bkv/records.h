// records.h - what `get` and `fold` do with the records that came: show them, write them to files.
#ifndef BKV_CLI_RECORDS_H
#define BKV_CLI_RECORDS_H

#include "cli.h"
#include "keyset.h"

// Tokens kept per section of a validated record.
typedef struct bkv_kept {
    uint32_t least, most;
    double mean;
} bkv_kept_t;

bkv_kept_t bkv_record_kept(const void *record);

// Writes --out and --record where given and lists the records. All must be BKV_OK.
bkv_status_t bkv_records_emit(const bkv_cli_t *cli, const bkv_keyset_t *keyset, const bkv_record_t *records, size_t count,
                              bkv_error_t *err);

// Frees the records and the array.
void bkv_records_free(bkv_record_t *records, size_t count);

#endif
