// seal.h - a record's checksum. The only part of kernels/ that needs libxxhash.
#ifndef BKV_SEAL_H
#define BKV_SEAL_H

#include "summary.h"

#ifdef __cplusplus
extern "C" {
#endif

// XXH3-64 of the record's bytes [24, length). length >= sizeof(bkv_record_header_t).
BKV_API uint64_t bkv_record_checksum(const void *record, size_t length);

// Writes the checksum into the header: the last thing done to a record before it is shown to anybody.
BKV_API void bkv_record_seal(void *record);

// DATA_LOSS unless header.length == length and the checksum matches. The header must hold at least 128 readable bytes.
BKV_API bkv_status_t bkv_record_verify(const void *record, size_t length, bkv_error_t *err);

#ifdef __cplusplus
}
#endif
#endif
