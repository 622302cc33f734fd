// oracle.h - what the kernels' tests compare with: blocks of seeded numbers, and a reader of records and an attention in
// float64 that are written from the description in kernels/summary.h and share no code with kernels/.
#ifndef BKV_TEST_ORACLE_H
#define BKV_TEST_ORACLE_H

#include "codec.h"

// A generator of our own, so that a change in kernels/random.h does not change the inputs.
typedef struct oracle_random {
    uint64_t state;
} oracle_random_t;

uint32_t oracle_next(oracle_random_t *random);
double oracle_uniform(oracle_random_t *random); // [0, 1)
double oracle_gauss(oracle_random_t *random);

// 64-byte aligned memory of exactly that size, so that AddressSanitizer sees a byte too many. May be freed, need not be:
// criterion's process ends soon.
void *oracle_exact(size_t bytes);
// Zeroed, and a little more than asked for.
void *oracle_alloc(size_t bytes);

double oracle_half(uint16_t half);

// A block of Gaussian elements times `scale`, contiguous as a Put's payload is.
void oracle_block(const bkv_shape_t *shape, uint64_t seed, double scale, bkv_block_t *block);
// One element of a block, and a way to overwrite it (rounded towards zero to the dtype; NaN and infinity stay so).
double oracle_element(const bkv_block_t *block, bool values, uint32_t layer, uint32_t head, uint32_t token, uint32_t i);
void oracle_put(const bkv_block_t *block, bool values, uint32_t layer, uint32_t head, uint32_t token, uint32_t i, float value);

// Compresses with the reference backend; aborts the test when that fails. The record is sealed by nobody.
void *oracle_compress(const bkv_block_t *block, const bkv_codec_params_t *params, uint64_t position, size_t *length);
// Likewise with any backend.
void *oracle_compress_by(const bkv_backend_t *backend, const bkv_block_t *block, const bkv_codec_params_t *params,
                         uint64_t position, size_t *length);
// As oracle_compress, but returns the status and leaves the message in *err.
bkv_status_t oracle_try(const bkv_block_t *block, const bkv_codec_params_t *params, uint64_t position, bkv_error_t *err);

typedef struct oracle_section {
    uint32_t m, key_dim, value_dim;
    double *k, *v, *logw;
    uint32_t *index;
} oracle_section_t;

// Reads one section of a well-formed record bit by bit.
void oracle_read(const void *record, uint32_t layer, uint32_t head, oracle_section_t *section);

// Softmax attention of one query over `count` sections in one softmax: out [value_dim], returns the log-sum-exp.
double oracle_attend(const oracle_section_t *sections, uint32_t count, const float *q, double scale, double *out);

// Code i of a packed row of `dim` codes, bit by bit.
uint32_t oracle_code(const uint8_t *row, uint32_t dim, uint32_t bits, uint32_t i);

// Calls check with every CPU backend; says aloud which ones this machine does not have.
void oracle_on_every_backend(void (*check)(const bkv_backend_t *backend));

#endif
