// seal.c - XXH3-64 over a record, everything after the checksum field.
#include "seal.h"

#include "record.h"

#include <assert.h>
#include <xxhash.h>

// libxxhash on x86 also has variants that pick AVX2 or AVX-512 at run time, about twice as fast as the SSE2 one that the
// distributions compile in. Not every build of the library exports them, hence weak: absent, it is NULL.
extern __attribute__((weak)) XXH64_hash_t XXH3_64bits_dispatch(const void *input, size_t length);

#define SEALED_FROM 24

_Static_assert(offsetof(bkv_record_header_t, checksum) + sizeof(uint64_t) == SEALED_FROM,
               "the checksum covers what follows it");

uint64_t bkv_record_checksum(const void *record, size_t length) {
    assert(length >= sizeof(bkv_record_header_t));
    const uint8_t *from = (const uint8_t *)record + SEALED_FROM;
    return XXH3_64bits_dispatch ? XXH3_64bits_dispatch(from, length - SEALED_FROM) : XXH3_64bits(from, length - SEALED_FROM);
}

void bkv_record_seal(void *record) {
    bkv_record_header_t *header = record;
    header->checksum = bkv_record_checksum(record, (size_t)header->length);
}

bkv_status_t bkv_record_verify(const void *record, size_t length, bkv_error_t *err) {
    const bkv_record_header_t *header = record;
    if (header->length != length || length < sizeof(*header)) {
        return bkv_fail(err, BKV_DATA_LOSS, "length: the record says %llu bytes, %zu are there",
                        (unsigned long long)header->length, length);
    }
    uint64_t sum = bkv_record_checksum(record, length);
    if (sum != header->checksum) {
        return bkv_fail(err, BKV_DATA_LOSS, "checksum: the record says %016llx, its bytes give %016llx",
                        (unsigned long long)header->checksum, (unsigned long long)sum);
    }
    return BKV_OK;
}
