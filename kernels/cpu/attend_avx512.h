// attend_avx512.h - internal: attention over codes as AVX-512 and AMX do it, without turning codes into floats.
//
// The codes of a section are small integers, so its inner products are integer products once the scales are moved into the
// other factor:
//   keys    <q, k_t> = sum_i (q_i scale_i) code_ti + <q, zero>        scale and zero of a channel, one set a key group
//   values  sum_t p_t v_ti = sum_t (p_t scale_tg) code_ti + sum_t p_t zero_tg      of a token and its 64 channels g
// The factors in brackets are rounded to integers and cut into signed bytes, "digits". Codes (unsigned bytes) times digits is
// what vpdpbusd and the tiles of AMX multiply exactly; the only errors are those roundings:
//   keys    three digits: 2^-23 of the query's largest element times the group's largest scale
//   values  two digits: 2^-15 of the largest factor of a query within a batch of tokens
// The second unit has to be found by looking at every factor: tokens that take most of the attention often have tiny values.
//
// Codes are never put in their order. One vpmultishiftqb cuts 64 fields out of 64 packed bytes wherever they lie; the
// fields of all phases together are "slots", and the queries are brought into the order of the slots instead, once a call. The
// six bits that make codes 30 and 31 of a group of three-bit codes take a slot each, whose query carries their 1, 2 or 4.
//
//   attend_avx512.c         the course of a call: batches of tokens, softmax, the result; and the products with VNNI
//   attend_keys_avx512.c    logits of one piece of a section
//   attend_values_avx512.c  what a batch's values add to the result
//   attend_amx.c            the products with AMX
#ifndef BKV_ATTEND_AVX512_H
#define BKV_ATTEND_AVX512_H

#include "backend.h"

// Query rows that share one pass over the codes; four of them ("a quad") fill the sixteen columns of a tile of digits.
#define BKV_ATTEND_ROWS  8
#define BKV_ATTEND_QUADS 2

// Tokens whose softmax is taken at once, padding included, and the rounding up of each piece within them.
#define BKV_ATTEND_BATCH 320
#define BKV_ATTEND_STEP  4

// The most tokens of one piece: a key group, or native keys.
#define BKV_ATTEND_PIECE BKV_KEY_GROUP_MAX

// The most pieces of a batch: each takes at least one step.
#define BKV_ATTEND_PIECES (BKV_ATTEND_BATCH / BKV_ATTEND_STEP)

// Slots of the largest dim, and phases of the narrowest code. A step is 64 slots: one phase of 64 packed bytes.
#define BKV_ATTEND_PHASES 4

// Consecutive kept tokens of one section with one set of key params. Pointers reach into the record.
typedef struct bkv_piece {
    const uint8_t *keys, *key_params; // of the piece's first token; of its group
    const uint8_t *weights;           // the section's base and step, or NULL
    const uint8_t *values, *value_params;
    const uint8_t *values_end;                // of the plane, padding included
    const uint8_t *keys_ahead, *values_ahead; // where to start fetching: the section's first piece brings the params of all
    uint32_t first, count;                    // token within the section; tokens
    uint32_t at;                              // of the first token within the batch
    uint32_t key_row, value_row;
    uint8_t key_bits, value_bits;
    bkv_dtype_t dtype;
} bkv_piece_t;

typedef struct bkv_batch {
    bkv_piece_t pieces[BKV_ATTEND_PIECES];
    uint32_t count, tokens;          // pieces; tokens with padding
    uint64_t key_bytes, value_bytes; // from the planes, params included
} bkv_batch_t;

// Products of codes and digits, for one or two quads of queries. Logits: scores_begin, then any number of `scores`, each of one
// or two tiles of sixteen tokens, over 64 slots of each of `steps` steps:
//   codes [tiles][steps][16 tokens][64], digits [steps][quads][16][16 columns][4], sums [tiles][quads][16 tokens][16 columns]
// where digits[s][q][i][c][j] belongs to slot 4 i + j. Values: values_begin, then any number of sums over chunks of 64 tokens:
// `clear`, `take` for each chunk, `give`. In one such sum there may be two sets of digits, 0 and 1, for the same codes.
//   digits [16 rows][64], codes [phases][16][16 slots][4 tokens], sums [sets][phases][16 rows][16 slots]
// of which one quad has only the first eight rows. Every call of a sum is given the same `sums`. end follows all of it.
typedef struct bkv_products {
    void (*scores_begin)(void);
    void (*scores)(const uint8_t *codes, const uint8_t *digits, uint32_t tiles, uint32_t steps, uint32_t quads, int32_t *sums);
    void (*values_begin)(uint32_t quads);
    void (*clear)(uint32_t sets, uint32_t phases, int32_t *sums);
    void (*take)(uint32_t set, const uint8_t *digits, const uint8_t *codes, uint32_t phases, uint32_t quads, int32_t *sums);
    void (*give)(uint32_t sets, uint32_t phases, int32_t *sums);
    void (*end)(void);
} bkv_products_t;

// The order in which the codes of one width come out of a key row. slots = chunks * phases * 64.
typedef struct bkv_key_order {
    uint32_t bits, phases, chunks, slots;
    uint32_t row; // packed bytes
    int32_t *dim;
    int32_t *within; // [slots]: dim - window, for loading params
    int32_t *window; // [slots / 16]: a dim at most 63 below the slots', -1 where there is none
    float *factor;   // 0 where no code is, 2^w for bit w alone
    uint16_t *once;  // [slots / 16]: where a code's zero counts
    float *q;        // [BKV_ATTEND_ROWS][slots]: factor * query, in units of q_unit
    float q_unit[BKV_ATTEND_ROWS];
    bool described, filled;
} bkv_key_order_t;

typedef struct bkv_keys {
    uint32_t dim, rows; // rows <= BKV_ATTEND_ROWS
    const float *q;     // [rows][dim] of the call
    float softmax_scale;
    bkv_key_order_t order[4]; // of 2, 3, 4 and 8 bits
    float *scale, *zero;      // [slots]: of the piece, scale in units of its largest
    uint8_t *expanded;        // [BKV_ATTEND_PIECE][dim]: three-bit rows that end in a bit string, a byte for each code
    uint8_t *codes, *digits;
    int32_t *sums;
    float *q_native, *k_native; // [BKV_ATTEND_ROWS] and [BKV_ATTEND_PIECE] rows of dim, padded to 16
} bkv_keys_t;

// Values are taken in pieces of 16 packed bytes; column n holds phase n % phases of piece n / phases.
typedef struct bkv_values {
    uint32_t dim, rows, groups;
    uint32_t bits;       // of the codes that acc holds; 0: none yet
    uint32_t columns;    // of acc
    float *acc;          // [BKV_ATTEND_ROWS][columns][16 slots]
    float *zero_sum;     // [BKV_ATTEND_ROWS][groups]: sum of p * zero
    float *out;          // [BKV_ATTEND_ROWS][dim padded to 16]: what is in its place already
    float *scale, *zero; // [groups][BKV_ATTEND_BATCH]
    uint8_t *digits;     // [chunks of 64 tokens][groups][16][64]
    uint8_t *codes;
    uint8_t *expanded; // [BKV_ATTEND_BATCH][dim], as above
    float *v_native;   // [BKV_ATTEND_PIECE][dim padded to 16]
    int32_t *sums;
} bkv_values_t;

// Bytes to be fetched ahead of their use, some lines with each step of the work meanwhile: all at once would wait for each
// other.
typedef struct bkv_ahead {
    const bkv_batch_t *batch;
    uint32_t piece; // next
    uint32_t lines; // a step
    bool values;    // planes: values, or keys
    const uint8_t *at, *end;
} bkv_ahead_t;

// Key or value planes of a batch, in that many steps.
void bkv_ahead_start(bkv_ahead_t *ahead, const bkv_batch_t *batch, bool values, uint64_t steps);

void bkv_ahead_step(bkv_ahead_t *ahead);

// Memory for keys and values of these dims; with scratch->base NULL only its size.
void bkv_keys_carve(bkv_keys_t *keys, uint32_t dim, bkv_scratch_t *scratch);
void bkv_values_carve(bkv_values_t *values, uint32_t dim, bkv_scratch_t *scratch);

// New queries: rows [rows][dim] floats.
void bkv_keys_start(bkv_keys_t *keys, const float *q, uint32_t rows, float softmax_scale);
void bkv_values_start(bkv_values_t *values, uint32_t rows);

// How many steps of fetching ahead the work on a batch takes.
uint64_t bkv_keys_steps(const bkv_batch_t *batch);
uint64_t bkv_values_steps(const bkv_values_t *values, const bkv_batch_t *batch);

// Logits of a piece, [rows][stride] from column piece->at on: up to 15 more columns are overwritten. False when one is not
// finite.
bool bkv_keys_score(bkv_keys_t *keys, const bkv_products_t *products, const bkv_piece_t *piece, float *logits, size_t stride,
                    bkv_ahead_t *ahead);

// Adds the values of a batch, whose probabilities are p [rows][stride], 0 in the padding up to whole chunks of 64 tokens. What
// was there is first multiplied by shrink [rows].
void bkv_values_add(bkv_values_t *values, const bkv_products_t *products, const bkv_batch_t *batch, const float *p,
                    size_t stride, const float *shrink, bkv_ahead_t *ahead);

// The result so far times inverse [rows], to out [rows][dim].
void bkv_values_finish(bkv_values_t *values, const float *inverse, float *out);

// The whole call.
bkv_status_t bkv_wide_attend(const bkv_products_t *products, const void *const *records, uint32_t count,
                             const bkv_attend_args_t *args, void *workspace, bkv_error_t *err);
size_t bkv_wide_attend_workspace(const void *const *records, uint32_t count, const bkv_attend_args_t *args);

#endif
