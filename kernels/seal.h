// seal.h - a record's checksum. The only part of kernels/ that needs libxxhash.
#ifndef BKV_SEAL_H
#define BKV_SEAL_H

#include "summary.h"

#ifdef __cplusplus
extern "C" {
#endif

// XXH3-64 of the record's bytes [24, length), everything after the checksum field, seeded with its first 8 bytes (magic,
// version, codec, flags) as a little-endian integer; the length needs no cover, whoever verifies knows it.
// length >= sizeof(bkv_record_header_t).
BKV_API uint64_t bkv_record_checksum(const void *record, size_t length);

// Writes the checksum into the header: the last thing done to a record before it is shown to anybody.
BKV_API void bkv_record_seal(void *record);

// DATA_LOSS unless header.length == length and the checksum matches. The header must hold at least 128 readable bytes.
BKV_API bkv_status_t bkv_record_verify(const void *record, size_t length, bkv_error_t *err);

// The same sum over a record that comes in pieces: summing each while it is still in the cache costs next to nothing. Not
// thread-safe. NULL: out of memory.
typedef struct bkv_sum bkv_sum_t;
BKV_API bkv_sum_t *bkv_sum_create(void);
BKV_API void bkv_sum_destroy(bkv_sum_t *sum); // NULL is allowed

// Starts with another record.
BKV_API void bkv_sum_restart(bkv_sum_t *sum);

// Sums what is new of the record, whose first `available` bytes are there by now.
BKV_API void bkv_sum_advance(bkv_sum_t *sum, const void *record, size_t available);

// Sums the record's next bytes where they lie elsewhere, as in a piece that is on its way to the record. The record's start,
// more than the checksum field, must have been summed by then.
BKV_API void bkv_sum_append(bkv_sum_t *sum, const void *bytes, size_t length);

// The checksum of the bytes so far, which must be at least sizeof(bkv_record_header_t).
BKV_API uint64_t bkv_sum_value(const bkv_sum_t *sum);

#ifdef __cplusplus
}
#endif
#endif
