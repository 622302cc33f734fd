// summary.h - the stored format: one self-describing record for the KV of some tokens, all layers and local heads.
//
// The same bytes are what the store keeps, what the wire carries and what a file holds. Integers are little-endian.
// A record is
//
//     header (bkv_record_header_t, 128 bytes)
//     directory: layers * heads entries (bkv_section_t, 16 bytes), layer-major
//     planes: for each section a key plane and a value plane, each starting at a multiple of 16 bytes
//
// A section is one (layer, head). Its key plane says which tokens are kept and holds their keys; its value plane holds
// their values. The two planes are separate so that a raw record's planes lie exactly as a Put's payload does,
// [layer][K,V][head][token][dim]: the payload is received straight into the record.
//
//     key plane                                                               present when
//       index      which source tokens are kept, ascending (see index_kind)   index_kind != BKV_INDEX_ALL
//       weights    float16 base, float16 step, then m x uint8 code;           BKV_RECORD_WEIGHTS
//                  log weight of token t = base + step * code[t]; padded to 4 bytes
//       params     [groups][key_dim] {float16 scale, float16 zero}            key bits are 2, 3, 4 or 8
//       codes      [m][key_dim], each row packed (see below)
//     value plane
//       params     [m][ceil(value_dim / 64)] {float16 scale, float16 zero}    value bits are 2, 3, 4 or 8
//       codes      [m][value_dim], each row packed
//
// Keys are quantised per channel over groups of consecutive kept tokens: groups = max(1, (m + 32) / 64) groups of
// ceil(m / groups) tokens each, because key channels differ far more than tokens do. The last groups may be shorter, and in
// a section of thousands of tokens empty (params 0). Values
// are quantised per token over groups of 64 channels. value = zero + scale * code. A row of codes takes dim * bits / 8 bytes;
// dims are multiples of 8, so these are whole bytes. With 2, 4 and 8 bits it is a little-endian bit string: code i occupies
// bits [i * bits, (i + 1) * bits). With 3 bits, every 32 codes are six little-endian uint16: number h holds code 5 * h + p in
// bits [3 * p, 3 * p + 3), p < 5, and in bit 15 bit h / 2 of code 30 + h % 2; what is left of a row whose dim is no multiple
// of 32 is a little-endian bit string. So no code straddles two halves of a word, and equal places of both halves come
// out by one mask.
// Bits = BKV_BITS_NATIVE means that the plane holds the source dtype verbatim.
//
// This file describes and validates; codec.h makes records, seal.h sums them.
#ifndef BKV_SUMMARY_H
#define BKV_SUMMARY_H

#include "status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BKV_RECORD_MAGIC   0x53564b42u // "BKVS"
#define BKV_RECORD_VERSION 2
#define BKV_RECORD_ALIGN   16

#define BKV_KEY_BYTES     32
#define BKV_SPEC_ID_BYTES 16

// Limits of the format; anything outside is refused as INVALID_ARGUMENT. Dims must be multiples of BKV_DIM_STEP.
#define BKV_MAX_LAYERS   1024
#define BKV_MAX_HEADS    1024
#define BKV_MAX_SECTIONS 65536
#define BKV_MAX_DIM      1024
#define BKV_DIM_STEP     8
#define BKV_MAX_TOKENS   (1u << 24)

#define BKV_KEY_GROUP_TOKENS 64
#define BKV_VALUE_GROUP_DIMS 64

typedef struct bkv_key {
    uint8_t bytes[BKV_KEY_BYTES];
} bkv_key_t;

typedef struct bkv_spec_id {
    uint8_t bytes[BKV_SPEC_ID_BYTES];
} bkv_spec_id_t;

// What names a record among those of all specs; 48 bytes without a gap, as they also go from daemon to daemon.
typedef struct bkv_name {
    bkv_spec_id_t spec_id;
    bkv_key_t key;
} bkv_name_t;

#define BKV_NAME_BYTES (BKV_SPEC_ID_BYTES + BKV_KEY_BYTES)

typedef enum bkv_dtype { BKV_BF16 = 1, BKV_FP16 = 2, BKV_FP32 = 3 } bkv_dtype_t;

typedef enum bkv_codec { BKV_CODEC_RAW = 1, BKV_CODEC_DENSE8 = 2, BKV_CODEC_DENSE4 = 3, BKV_CODEC_BALANCE = 4 } bkv_codec_t;

typedef enum bkv_index_kind {
    BKV_INDEX_ALL = 0,    // every source token is kept, m = tokens; nothing stored
    BKV_INDEX_BITMAP = 1, // ceil(tokens / 32) little-endian uint32; bit t set: token t is kept
    BKV_INDEX_LIST = 2,   // m x uint32, strictly ascending; used where it is smaller than the bitmap
} bkv_index_kind_t;

#define BKV_BITS_NATIVE 0xff

// Record flags.
#define BKV_RECORD_WEIGHTS 0x01u // sections carry log weights; without it every log weight is 0
#define BKV_RECORD_FOLD    0x02u // a fold of several blocks, not one block
#define BKV_RECORD_SLICE   0x04u // some layers or heads of a larger record (see first_layer, first_head)

typedef struct bkv_record_header {
    uint32_t magic;
    uint16_t version;
    uint8_t codec; // bkv_codec_t
    uint8_t flags;
    uint64_t length;            // of the whole record, header included, in bytes
    uint64_t checksum;          // XXH3-64 of bytes [24, length), seeded with the first 8 bytes as an integer
    uint8_t key[BKV_KEY_BYTES]; // of the block or the fold
    uint8_t spec_id[BKV_SPEC_ID_BYTES];
    uint64_t tenant;                  // first 8 bytes of SHA-256(tenant name): whose quota it counts against
    uint64_t position;                // sequence position of source token 0
    uint32_t tokens;                  // source tokens that this record stands for
    uint16_t layers, heads;           // sections = layers * heads
    uint16_t first_layer, first_head; // of the model; 0 but in a slice
    uint16_t key_dim, value_dim;
    uint8_t dtype;        // bkv_dtype_t of the source
    uint8_t rate;         // bytes rate that was asked of balance; 0 for other codecs and folds
    uint8_t reserved0[6]; // 0
    uint64_t seed;        // of the walk
    uint64_t reserved1;   // 0
} bkv_record_header_t;

_Static_assert(sizeof(bkv_record_header_t) == 128, "the record header is 128 bytes");

typedef struct bkv_section {
    uint32_t key_offset;   // of the key plane from the start of the record, in units of 16 bytes
    uint32_t value_offset; // of the value plane, likewise
    uint32_t tokens;       // m: tokens kept
    uint8_t key_bits;      // 2, 3, 4, 8 or BKV_BITS_NATIVE
    uint8_t value_bits;
    uint8_t index_kind; // bkv_index_kind_t
    uint8_t reserved;
} bkv_section_t;

_Static_assert(sizeof(bkv_section_t) == 16, "a directory entry is 16 bytes");

// What a block or a record covers. tokens may be fewer than a spec's block_tokens: a sequence's last, partial block.
typedef struct bkv_shape {
    uint32_t layers, heads, tokens, key_dim, value_dim;
    bkv_dtype_t dtype;
} bkv_shape_t;

// Where the parts of one section's planes lie, relative to the plane's start, in bytes. Derived, never stored.
typedef struct bkv_plane_layout {
    uint64_t index_bytes;                      // at 0 of the key plane
    uint64_t weights;                          // offset of float16 base, step, codes; only with weights
    uint64_t key_params, key_codes, key_bytes; // key_bytes: the whole key plane, padded to BKV_RECORD_ALIGN
    uint64_t value_codes, value_bytes;         // value params lie at 0
    uint32_t key_groups, key_group_tokens;     // of quantised keys; 0 where native
    uint32_t value_groups;                     // per token; 0 where native
    uint32_t key_row, value_row;               // bytes of one token's codes
} bkv_plane_layout_t;

// One section of a validated record, ready to read. Pointers reach into the record and live as long as it does.
typedef struct bkv_section_view {
    const uint8_t *key_plane, *value_plane;
    bkv_plane_layout_t layout;
    uint32_t tokens, source_tokens, key_dim, value_dim;
    uint8_t key_bits, value_bits, index_kind;
    bool has_weights;
    bkv_dtype_t dtype;
} bkv_section_view_t;

// Bytes of one element. dtype must be valid.
BKV_API size_t bkv_dtype_bytes(bkv_dtype_t dtype);

// "bf16", "fp16", "fp32" / "raw", "dense8", "dense4", "balance"; NULL for anything else. The parse functions return
// false when the text is none of these.
BKV_API const char *bkv_dtype_name(bkv_dtype_t dtype);
BKV_API const char *bkv_codec_name(bkv_codec_t codec);
BKV_API bool bkv_dtype_parse(const char *text, bkv_dtype_t *dtype);
BKV_API bool bkv_codec_parse(const char *text, bkv_codec_t *codec);

// Checks a shape that came from outside against the limits above. INVALID_ARGUMENT names the field.
BKV_API bkv_status_t bkv_shape_check(const bkv_shape_t *shape, bkv_error_t *err);

// Bytes of a block's K and V in its own dtype. The shape must have passed bkv_shape_check.
BKV_API uint64_t bkv_shape_bytes(const bkv_shape_t *shape);

// Sizes of a section that keeps m of `source_tokens` tokens. Arguments must be within the format's limits.
BKV_API void bkv_plane_layout(uint32_t source_tokens, uint32_t m, uint32_t key_dim, uint32_t value_dim, uint8_t key_bits,
                              uint8_t value_bits, bkv_index_kind_t index_kind, bool has_weights, bkv_dtype_t dtype,
                              bkv_plane_layout_t *layout);

// The smaller way to store which m of source_tokens tokens are kept.
BKV_API bkv_index_kind_t bkv_index_choose(uint32_t source_tokens, uint32_t m);

// Validates bytes of unknown origin as a record: magic, version, limits, every plane inside [header+directory, length),
// planes disjoint from the directory, index bitmaps with exactly m bits, lists strictly ascending and in range, finite
// scales and weights, record length == length. Does not look at the checksum (seal.h does). After BKV_OK every function
// below is safe on the record. INVALID_ARGUMENT names the field. Reads `record` once per field; the caller must make sure
// that nobody writes to it meanwhile. record must be 16-byte aligned.
BKV_API bkv_status_t bkv_record_check(const void *record, size_t length, bkv_error_t *err);

// Header only: magic, version, limits, header+directory <= length <= capacity. For recovery scans, where the payload is
// verified by checksum later.
BKV_API bkv_status_t bkv_record_check_header(const void *record, size_t capacity, bkv_error_t *err);

// The section of (layer, head), both counted from 0 within the record. The record must be validated.
BKV_API void bkv_record_section(const void *record, uint32_t layer, uint32_t head, bkv_section_view_t *view);

// The shape of a validated record (tokens = source tokens).
BKV_API void bkv_record_shape(const void *record, bkv_shape_t *shape);

// Reads a section as attention sees it, dequantised to float32. Any output may be NULL.
//   k [m][key_dim], v [m][value_dim], logw [m], index [m] (source token, 0-based within the record)
BKV_API void bkv_section_read(const bkv_section_view_t *view, float *k, float *v, float *logw, uint32_t *index);

// A record that holds only layers [first_layer, +layers) and heads [first_head, +heads) of a validated record. With
// out == NULL only *length is set. Otherwise out needs *length bytes of room (given in *length), 16-byte aligned; the
// new record's checksum is 0 (seal it). Ranges outside the record: INVALID_ARGUMENT.
BKV_API bkv_status_t bkv_record_slice(const void *record, uint32_t first_layer, uint32_t layers, uint32_t first_head,
                                      uint32_t heads, void *out, size_t *length, bkv_error_t *err);

#ifdef __cplusplus
}
#endif
#endif
