// codec.h - compressing blocks into records, folding records, attending over records: what a backend can do.
//
// A backend is one implementation of this small table: `ref` (portable C, the definition of the result), later AVX2,
// AVX-512 and CUDA. All functions are pure: no I/O, no globals, no allocation (workspace is the caller's), re-entrant.
// The same inputs, seed and backend give the same bytes; a block's record does not depend on anything else.
//
// What the codecs mean:
//   raw      every token, the source's own bytes
//   dense8   every token, int8        (about 1.9x smaller than bf16)
//   dense4   every token, int4        (about 3.5x)
//   balance  BalanceKV at a byte rate of 8, 16 or 32 against bf16: protect the outliers, halve the rest by a
//            self-balancing walk, weight what stays, refit its values to what it stands for, quantise (arXiv 2502.07861;
//            see balance.c for each stage). Where the rate leaves room for every token, every token is kept
#ifndef BKV_CODEC_H
#define BKV_CODEC_H

#include "summary.h"

#ifdef __cplusplus
extern "C" {
#endif

#define BKV_DEFAULT_SINK 32
#define BKV_MIN_RATE     2
#define BKV_MAX_RATE     64

typedef struct bkv_codec_params {
    bkv_codec_t codec;
    uint32_t rate; // balance only, BKV_MIN_RATE..BKV_MAX_RATE: bytes of the block as bf16 / bytes of its record >= rate
    uint32_t sink; // tokens at sequence positions below this are always kept (as far as the budget allows)
    uint64_t seed; // of the walk
    // balance only: one byte for each section of the block, [layers][heads], 1..255: in which proportion the sections share the
    // record's bytes; NULL: equally. A few heads carry most of a model's loss, and which ones is a property of the model:
    // measured once, it is worth more than any other choice here (see plan.c). The caller's memory; must outlive the params.
    const uint8_t *shares;
} bkv_codec_params_t;

typedef struct bkv_fold_params {
    uint64_t budget;       // the record is never larger, in bytes
    uint64_t seed;         // of the walk
    const uint8_t *shares; // as in bkv_codec_params_t, one for each section of the records
} bkv_fold_params_t;

// Names a record: copied into its header.
typedef struct bkv_record_id {
    bkv_key_t key;
    bkv_spec_id_t spec_id;
    uint64_t tenant;
    uint64_t position; // of the block's first token in its sequence
} bkv_record_id_t;

// Where a block's K and V lie in memory. Element (layer, head, token, i) of K is at
//   keys + layer * key_stride.layer + head * key_stride.head + token * key_stride.token + i * dtype bytes
// (strides in bytes), V likewise; the innermost dim is contiguous. The memory is the caller's and is only read.
typedef struct bkv_stride {
    int64_t layer, head, token;
} bkv_stride_t;

typedef struct bkv_block {
    bkv_shape_t shape;
    const void *keys, *values;
    bkv_stride_t key_stride, value_stride;
} bkv_block_t;

// Queries of `layers` consecutive layers against one or more records of the same sequence.
//   q    [layers][query_heads][queries][key_dim] float32
//   out  [layers][query_heads][queries][value_dim] float32: softmax-weighted mean of the values, weights included
//   lse  [layers][query_heads][queries] float32: log of the sum of w * exp(scale * <q, k>); -INFINITY over no tokens
// Query head j reads KV head j / (query_heads / heads) (GQA). scale 0 means 1 / sqrt(key_dim).
typedef struct bkv_attend_args {
    uint32_t layers, first_layer; // first_layer: index within the record of q's first layer
    uint32_t query_heads, queries;
    float scale;
    const float *q;
    float *out, *lse;
} bkv_attend_args_t;

typedef struct bkv_backend {
    const char *name;
    // True when this machine can run it.
    bool (*available)(void);
    // compress refuses what no record may hold itself, head by head as it reads them; else bkv_compress looks at all of the
    // block first, which takes memory as long again.
    bool checks_values;
    // The three operations below; see the functions of the same names for their contracts.
    bkv_status_t (*compress)(const bkv_block_t *block, const bkv_codec_params_t *params, const bkv_record_id_t *id,
                             void *record, size_t capacity, void *workspace, size_t *length, bkv_error_t *err);
    bkv_status_t (*fold)(const void *const *records, uint32_t count, const bkv_record_id_t *id, const bkv_fold_params_t *params,
                         void *record, void *workspace, size_t *length, bkv_error_t *err);
    bkv_status_t (*attend)(const void *const *records, uint32_t count, const bkv_attend_args_t *args, void *workspace,
                           bkv_error_t *err);
    size_t (*compress_workspace)(const bkv_shape_t *shape, const bkv_codec_params_t *params);
    size_t (*fold_workspace)(const void *const *records, uint32_t count, uint64_t budget);
    size_t (*attend_workspace)(const void *const *records, uint32_t count, const bkv_attend_args_t *args);
} bkv_backend_t;

// The backend of that name ("ref"), or the best one available here for name NULL or "auto". NULL if there is none such.
// Thread-safe; the table is static.
BKV_API const bkv_backend_t *bkv_backend_get(const char *name);

// Every backend in this build, best first; the list ends with NULL.
BKV_API const bkv_backend_t *const *bkv_backend_list(void);

// Checks codec parameters from outside; INVALID_ARGUMENT names the field.
BKV_API bkv_status_t bkv_codec_check(const bkv_codec_params_t *params, bkv_error_t *err);

// Whether a block of that shape has a record with those params, both checked: tokens that are too few for the rate, or so many
// that the record would be larger than any may be, are INVALID_ARGUMENT.
BKV_API bkv_status_t bkv_codec_check_shape(const bkv_codec_params_t *params, const bkv_shape_t *shape, bkv_error_t *err);

// An upper bound of a block's record in bytes, exact for raw, dense8 and dense4. For balance it is
// max(bf16 bytes / rate, smallest possible record) rounded down to BKV_RECORD_ALIGN. Checked arguments only.
BKV_API uint64_t bkv_codec_bound(const bkv_shape_t *shape, const bkv_codec_params_t *params);

// Scratch bytes that bkv_compress / bkv_fold / bkv_attend need, 64-byte aligned; at least 1.
BKV_API size_t bkv_compress_workspace(const bkv_backend_t *backend, const bkv_shape_t *shape, const bkv_codec_params_t *params);
BKV_API size_t bkv_fold_workspace(const bkv_backend_t *backend, const void *const *records, uint32_t count, uint64_t budget);
BKV_API size_t bkv_attend_workspace(const bkv_backend_t *backend, const void *const *records, uint32_t count,
                                    const bkv_attend_args_t *args);

// Compresses one block into a record (checksum 0: seal it). record: 16-byte aligned, capacity >= bkv_codec_bound.
// block->keys, block->values and record may not overlap, but for raw, where K and V may already lie at their final place in
// the record (see bkv_raw_payload). NaN or infinity in K or V: INVALID_ARGUMENT naming tensor, layer, head and token; so is a
// value beyond +-65504 with any codec but raw, as scales and zeros are float16 and no clamped value is stored silently.
// A block so small that no record fits its rate: INVALID_ARGUMENT.
BKV_API bkv_status_t bkv_compress(const bkv_backend_t *backend, const bkv_block_t *block, const bkv_codec_params_t *params,
                                  const bkv_record_id_t *id, void *record, size_t capacity, void *workspace, size_t *length,
                                  bkv_error_t *err);

// Where a raw record's payload starts, and thereby where a Put's bytes can be received in place: the payload is
// [layer][K,V][head][token][dim] and fills the rest of the record.
BKV_API size_t bkv_raw_payload(const bkv_shape_t *shape);

// Writes a raw record's header and directory (checksum 0) and returns its length: what is left is the payload, which may come
// in pieces. The shape must be checked; the caller sees to bkv_values_finite and the checksum.
BKV_API size_t bkv_raw_begin(const bkv_shape_t *shape, const bkv_record_id_t *id, void *record);

// False when any of n values is NaN or infinite. values: aligned to the dtype.
BKV_API bool bkv_values_finite(bkv_dtype_t dtype, const void *values, size_t n);

// The contiguous block that such a payload is.
BKV_API void bkv_block_from_payload(const bkv_shape_t *shape, const void *payload, bkv_block_t *block);

// One summary of consecutive blocks: merge-and-reduce (arXiv 2502.07861, section 4: a binary tree whose nodes halve what
// they merge) over the records, oldest first, each validated and of the same layers, heads and dims (positions must
// follow one another). The result has flag FOLD, tokens = sum of tokens, position = the first's, and is at most
// params->budget bytes. Children that fit as they are, are concatenated without loss beyond requantisation. Time is linear in the tokens
// that the children keep; the workspace is 21 bytes for each of those of one head, about 200 for each record, and at most
// 640 KiB + 6 KiB * the larger dim. A budget under the smallest
// possible record, or records that do not fit together: INVALID_ARGUMENT. record: 16-byte aligned, `budget` bytes
// of room.
BKV_API bkv_status_t bkv_fold(const bkv_backend_t *backend, const void *const *records, uint32_t count,
                              const bkv_record_id_t *id, const bkv_fold_params_t *params, void *record, void *workspace,
                              size_t *length, bkv_error_t *err);

// Weighted attention over validated records of one shape family, in one softmax: numerator and denominator use the same
// log weights. INVALID_ARGUMENT when layers or heads do not match.
BKV_API bkv_status_t bkv_attend(const bkv_backend_t *backend, const void *const *records, uint32_t count,
                                const bkv_attend_args_t *args, void *workspace, bkv_error_t *err);

// Merges the attention over two disjoint sets of tokens into the first: (out_a, lse_a) becomes that of the union.
// rows x value_dim floats and rows floats. -INFINITY on either side is "no tokens".
BKV_API void bkv_attend_merge(float *out_a, float *lse_a, const float *out_b, const float *lse_b, size_t rows,
                              uint32_t value_dim);

// Element conversion, round to nearest even.
BKV_API float bkv_half_to_float(uint16_t half);
BKV_API uint16_t bkv_float_to_half(float value); // saturates to +-65504
BKV_API float bkv_bf16_to_float(uint16_t bits);
BKV_API uint16_t bkv_float_to_bf16(float value);

#ifdef __cplusplus
}
#endif
#endif
