// attend_keys_avx512.c - the logits of one piece of a section's keys: queries into digits, codes out of their packing, the
// integer products back to floats. attend_avx512.h has the idea; attend_avx512.c decides on pieces.
#include "attend_avx512.h"

#if defined(__x86_64__)

#include "attend_float.h"
#include "convert.h"
#include "quant.h"

#include <assert.h>
#include <math.h>

// The largest number of 24 bits that three signed digits hold is 0x7f7f7f; a little less, as floats round.
#define DIGITS_TOP 8355000.0f

// Units below this would overflow when inverted; queries so small add nothing to a logit.
#define LEAST 1e-30f

#define LINE    64
#define QUAD    4
#define COLUMNS 16
#define SUMS    (BKV_ATTEND_QUADS * 16 * COLUMNS)

// NaN, quiet and signalling, and both infinities, for vfpclassps.
#define NOT_FINITE 0x99

static uint32_t order_of(uint32_t bits) {
    return bits == 8 ? 3 : bits - 2;
}

static uint32_t most_slots(uint32_t dim) {
    uint32_t most = 0;
    for (uint32_t bits = 2; bits <= 8; bits = bits == 4 ? 8 : bits + 1) {
        uint32_t phases = bits == 3 ? 3 : 8 / bits, slots = (dim * bits / 8 + LINE - 1) / LINE * phases * LINE;
        most = slots > most ? slots : most;
    }
    return most;
}

void bkv_keys_carve(bkv_keys_t *keys, uint32_t dim, bkv_scratch_t *scratch) {
    uint32_t slots = most_slots(dim), padded = bkv_wide_pad(dim);
    keys->dim = dim;
    for (uint32_t i = 0; i < 4; i++) {
        bkv_key_order_t *order = &keys->order[i];
        order->dim = bkv_scratch_take(scratch, slots * sizeof(int32_t));
        order->factor = bkv_scratch_take(scratch, slots * sizeof(float));
        order->once = bkv_scratch_take(scratch, slots / 16 * sizeof(uint16_t));
        order->q = bkv_scratch_take(scratch, (uint64_t)BKV_ATTEND_ROWS * slots * sizeof(float));
        order->described = false;
    }
    keys->scale = bkv_scratch_take(scratch, slots * sizeof(float));
    keys->zero = bkv_scratch_take(scratch, slots * sizeof(float));
    keys->expanded = bkv_scratch_take(scratch, dim % 32 == 0 ? 0 : (uint64_t)BKV_ATTEND_PIECE * dim);
    keys->codes = bkv_scratch_take(scratch, (uint64_t)2 * 16 * slots);
    keys->digits = bkv_scratch_take(scratch, (uint64_t)BKV_ATTEND_QUADS * QUAD * 4 * slots);
    keys->sums = bkv_scratch_take(scratch, (uint64_t)2 * SUMS * sizeof(int32_t));
    keys->q_native = bkv_scratch_take(scratch, (uint64_t)BKV_ATTEND_ROWS * padded * sizeof(float));
    keys->k_native = bkv_scratch_take(scratch, (uint64_t)BKV_ATTEND_PIECE * padded * sizeof(float));
}

void bkv_keys_start(bkv_keys_t *keys, const float *q, uint32_t rows, float softmax_scale) {
    assert(rows <= BKV_ATTEND_ROWS);
    keys->q = q;
    keys->rows = rows;
    keys->softmax_scale = softmax_scale;
    for (uint32_t i = 0; i < 4; i++) {
        keys->order[i].filled = false;
    }
    uint32_t padded = bkv_wide_pad(keys->dim);
    memset(keys->q_native, 0, (size_t)rows * padded * sizeof(float));
    for (uint32_t r = 0; r < rows; r++) {
        memcpy(keys->q_native + (size_t)r * padded, q + (size_t)r * keys->dim, keys->dim * sizeof(float));
    }
}

// What lies in phase `phase` of byte `byte` of a three-bit row that is whole groups of 32 codes.
static void slot_of_three(uint32_t byte, uint32_t phase, int32_t *dim, float *factor, bool *once) {
    uint32_t half = byte / 2, group = half / 6, h = half % 6, p = 2 * phase + byte % 2;
    *dim = (int32_t)(32 * group + (p < 5 ? 5 * h + p : 30 + h % 2));
    *factor = p < 5 ? 1.0f : (float)(1u << h / 2);
    *once = p < 5 || h < 2;
}

static void order_describe(bkv_key_order_t *order, uint32_t dim, uint32_t bits) {
    order->bits = bits;
    order->phases = bits == 3 ? 3 : 8 / bits;
    order->row = dim * bits / 8;
    order->chunks = (order->row + LINE - 1) / LINE;
    order->slots = order->chunks * order->phases * LINE;
    memset(order->once, 0, order->slots / 16 * sizeof(uint16_t));
    for (uint32_t slot = 0; slot < order->slots; slot++) {
        uint32_t byte = slot / LINE / order->phases * LINE + slot % LINE, phase = slot / LINE % order->phases;
        order->dim[slot] = 0;
        order->factor[slot] = 0;
        bool once = false;
        if (byte < order->row && bits == 3) {
            slot_of_three(byte, phase, &order->dim[slot], &order->factor[slot], &once);
        } else if (byte < order->row) {
            order->dim[slot] = (int32_t)(byte * order->phases + phase);
            order->factor[slot] = 1;
            once = true;
        }
        order->once[slot / 16] = (uint16_t)(order->once[slot / 16] | (uint32_t)once << slot % 16);
    }
    order->described = true;
}

static bkv_key_order_t *order_get(bkv_keys_t *keys, uint32_t bits) {
    bkv_key_order_t *order = &keys->order[order_of(bits)];
    if (!order->described) {
        order_describe(order, keys->dim, bits);
    }
    if (!order->filled) {
        __m512 scale = _mm512_set1_ps(keys->softmax_scale);
        memset(order->q, 0, (size_t)BKV_ATTEND_ROWS * order->slots * sizeof(float));
        for (uint32_t r = 0; r < keys->rows; r++) {
            const float *q = keys->q + (size_t)r * keys->dim;
            for (uint32_t s = 0; s < order->slots; s += 16) {
                __m512 x = _mm512_i32gather_ps(_mm512_load_si512(order->dim + s), q, 4);
                x = _mm512_mul_ps(_mm512_mul_ps(x, scale), _mm512_load_ps(order->factor + s));
                _mm512_store_ps(order->q + (size_t)r * order->slots + s, x);
            }
        }
        order->filled = true;
    }
    return order;
}

// Sixteen slots in use at a time: the empty ones at the end of a step are skipped.
static uint32_t parts_of(const bkv_key_order_t *order, uint32_t chunk) {
    uint32_t bytes = order->row - chunk * LINE;
    return bytes >= LINE ? LINE / 16 : (bytes + 15) / 16;
}

// The params of a key group in the order of the slots.
static void params_load(bkv_keys_t *keys, const bkv_key_order_t *order, const uint8_t *params) {
    for (uint32_t chunk = 0; chunk < order->chunks; chunk++) {
        for (uint32_t part = 0; part < parts_of(order, chunk); part++) {
            for (uint32_t phase = 0; phase < order->phases; phase++) {
                uint32_t s = (chunk * order->phases + phase) * LINE + part * 16;
                __m512i both = _mm512_i32gather_epi32(_mm512_load_si512(order->dim + s), params, 4);
                __m512 scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
                __m512 zero = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
                _mm512_store_ps(keys->scale + s, scale);
                _mm512_store_ps(keys->zero + s, _mm512_maskz_mov_ps(order->once[s / 16], zero));
            }
        }
    }
}

// For one query: what turns its factors into integers, what turns their products back, and its product with the zeros.
typedef struct unit {
    float inverse, unit, zero;
} unit_t;

static void units_find(const bkv_keys_t *keys, const bkv_key_order_t *order, uint32_t quad, unit_t unit[QUAD]) {
    __m512 top[QUAD], zero[QUAD];
    const float *q[QUAD];
    for (uint32_t r = 0; r < QUAD; r++) {
        top[r] = zero[r] = _mm512_setzero_ps();
        q[r] = order->q + (size_t)(quad * QUAD + r) * order->slots;
    }
    for (uint32_t chunk = 0; chunk < order->chunks; chunk++) {
        uint32_t parts = parts_of(order, chunk);
        for (uint32_t step = chunk * order->phases; step < (chunk + 1) * order->phases; step++) {
            for (uint32_t s = step * LINE; s < step * LINE + parts * 16; s += 16) {
                __m512 scale = _mm512_load_ps(keys->scale + s), zeros = _mm512_load_ps(keys->zero + s);
                for (uint32_t r = 0; r < QUAD; r++) {
                    __m512 x = _mm512_load_ps(q[r] + s);
                    top[r] = _mm512_max_ps(top[r], _mm512_abs_ps(_mm512_mul_ps(x, scale)));
                    zero[r] = _mm512_fmadd_ps(x, zeros, zero[r]);
                }
            }
        }
    }
    for (uint32_t r = 0; r < QUAD; r++) {
        float most = _mm512_reduce_max_ps(top[r]);
        unit[r].inverse = most > LEAST ? DIGITS_TOP / most : 0;
        unit[r].unit = most > LEAST ? most / DIGITS_TOP : 0;
        unit[r].zero = _mm512_reduce_add_ps(zero[r]);
    }
}

// Four vectors of four 128-bit pieces each, transposed as a matrix of pieces.
static inline void transpose_pieces(__m512i v[4]) {
    __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
    __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// One quad's factors as three signed digits each. x + 0x808080 has no negative digit; taking 0x80 from each makes them signed
// and their sum x again.
static void digits_make(const bkv_keys_t *keys, const bkv_key_order_t *order, uint32_t quad, uint32_t quads,
                        const unit_t unit[QUAD]) {
    const __m512i lift = _mm512_set1_epi32(0x00808080);
    // Of four factors: their low digits, middle digits, high digits, nothing.
    const __m512i planes =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, -128, -128, -128, -128));
    for (uint32_t chunk = 0; chunk < order->chunks; chunk++) {
        uint32_t parts = parts_of(order, chunk);
        for (uint32_t step = chunk * order->phases; step < (chunk + 1) * order->phases; step++) {
            uint8_t *out = keys->digits + (size_t)(step * quads + quad) * 16 * LINE;
            for (uint32_t part = 0; part < parts; part++) {
                uint32_t s = step * LINE + part * 16;
                __m512 scale = _mm512_load_ps(keys->scale + s);
                __m512i v[QUAD];
                for (uint32_t r = 0; r < QUAD; r++) {
                    __m512 x = _mm512_mul_ps(_mm512_load_ps(order->q + (size_t)(quad * QUAD + r) * order->slots + s), scale);
                    v[r] = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(unit[r].inverse)));
                    v[r] = _mm512_xor_si512(_mm512_add_epi32(v[r], lift), lift);
                    v[r] = _mm512_shuffle_epi8(v[r], planes);
                }
                transpose_pieces(v);
                for (uint32_t i = 0; i < 4; i++) {
                    _mm512_store_si512(out + (size_t)(part * 4 + i) * LINE, v[i]);
                }
            }
        }
    }
}

// Which bits of each eight bytes a phase takes, and how many of them.
static inline void phase_fields(uint32_t bits, uint32_t phase, __m512i *shifts, __m512i *mask) {
    uint8_t at[8], keep[8];
    for (uint32_t b = 0; b < 8; b++) {
        uint32_t p = 2 * phase + b % 2;
        at[b] = (uint8_t)(bits != 3 ? 8 * b + bits * phase : p < 5 ? 16 * (b / 2) + 3 * p : 16 * (b / 2) + 15);
        keep[b] = (uint8_t)(bits == 3 && p == 5 ? 1 : (1u << bits) - 1);
    }
    uint64_t word;
    memcpy(&word, at, sizeof(word));
    *shifts = _mm512_set1_epi64((long long)word);
    memcpy(&word, keep, sizeof(word));
    *mask = _mm512_set1_epi64((long long)word);
}

// Up to sixteen tokens. Called with constant bits and phases. Bytes beyond a row are not read and count as 0.
static inline void rows_unpack(const bkv_key_order_t *order, const uint8_t *rows, uint32_t count, const uint32_t bits,
                               const uint32_t phases, uint8_t *codes) {
    __m512i shifts[BKV_ATTEND_PHASES], mask[BKV_ATTEND_PHASES];
    for (uint32_t phase = 0; phase < phases; phase++) {
        phase_fields(bits, phase, &shifts[phase], &mask[phase]);
    }
    uint32_t row = order->row;
    for (uint32_t at = 0; at < row; at += LINE, codes += (size_t)phases * 16 * LINE) {
        __mmask64 some = row - at >= LINE ? ~0ull : (1ull << (row - at)) - 1;
        for (uint32_t t = 0; t < count; t++) {
            __m512i packed = _mm512_maskz_loadu_epi8(some, rows + (size_t)t * row + at);
            for (uint32_t phase = 0; phase < phases; phase++) {
                __m512i slots = bits == 8 ? packed : _mm512_multishift_epi64_epi8(shifts[phase], packed);
                _mm512_store_si512(codes + ((size_t)phase * 16 + t) * LINE, _mm512_and_si512(slots, mask[phase]));
            }
        }
    }
}

static void codes_unpack(const bkv_key_order_t *order, const uint8_t *rows, uint32_t count, uint8_t *codes) {
    switch (order->bits) {
    case 2:
        rows_unpack(order, rows, count, 2, 4, codes);
        return;
    case 3:
        rows_unpack(order, rows, count, 3, 3, codes);
        return;
    case 4:
        rows_unpack(order, rows, count, 4, 2, codes);
        return;
    default:
        rows_unpack(order, rows, count, 8, 1, codes);
        return;
    }
}

static __m512 weights_load(const bkv_piece_t *piece, uint32_t t, __mmask16 live) {
    if (!piece->weights) {
        return _mm512_setzero_ps();
    }
    __m512 base = _mm512_set1_ps(bkv_half_expand(bkv_load_u16(piece->weights)));
    __m512 step = _mm512_set1_ps(bkv_half_expand(bkv_load_u16(piece->weights + 2)));
    __m128i code = _mm_maskz_loadu_epi8(live, piece->weights + 4 + piece->first + t);
    return _mm512_add_ps(base, _mm512_mul_ps(step, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(code))));
}

static __m512 four_set(float a, float b, float c, float d) {
    __m512 all = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_set1_ps(a)), _mm_set1_ps(b), 1);
    return _mm512_insertf32x4(_mm512_insertf32x4(all, _mm_set1_ps(c), 2), _mm_set1_ps(d), 3);
}

static inline __m512 row_load(const int32_t *sums, uint32_t token) {
    return _mm512_cvtepi32_ps(_mm512_load_si512(sums + (size_t)token * COLUMNS));
}

// Sixteen tokens' sums of one quad, [token][query][low, middle, high digit, nothing], to logits of four queries.
static void logits_make(const int32_t *sums, const unit_t unit[QUAD], __m512 logit[QUAD]) {
    __m512 units = four_set(unit[0].unit, unit[1].unit, unit[2].unit, unit[3].unit);
    __m512 zeros = four_set(unit[0].zero, unit[1].zero, unit[2].zero, unit[3].zero);
    const __m512 middle = _mm512_set1_ps(256.0f), high = _mm512_set1_ps(65536.0f);
    __m512i four[4];
    for (uint32_t t = 0; t < 4; t++) {
        __m512 a = row_load(sums, 4 * t), b = row_load(sums, 4 * t + 1);
        __m512 c = row_load(sums, 4 * t + 2), d = row_load(sums, 4 * t + 3);
        // In each 128 bits, one query: low + high of two tokens, their middles; then of four tokens.
        __m512 ab = _mm512_fmadd_ps(_mm512_unpackhi_ps(a, b), high, _mm512_unpacklo_ps(a, b));
        __m512 cd = _mm512_fmadd_ps(_mm512_unpackhi_ps(c, d), high, _mm512_unpacklo_ps(c, d));
        __m512 all = _mm512_fmadd_ps(_mm512_shuffle_ps(ab, cd, 0xee), middle, _mm512_shuffle_ps(ab, cd, 0x44));
        four[t] = _mm512_castps_si512(_mm512_fmadd_ps(all, units, zeros));
    }
    transpose_pieces(four);
    for (uint32_t r = 0; r < QUAD; r++) {
        logit[r] = _mm512_castsi512_ps(four[r]);
    }
}

// The logits of the piece's tokens from t on, sixteen or what is left. False when one is not finite.
static bool logits_write(const bkv_keys_t *keys, const int32_t *sums, const bkv_piece_t *piece, uint32_t t, const unit_t *unit,
                         float *logits, size_t stride) {
    uint32_t left = piece->count - t;
    __mmask16 live = (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1), bad = 0;
    __m512 weights = weights_load(piece, t, live);
    for (uint32_t row = 0; row < keys->rows; row += QUAD) {
        __m512 logit[QUAD];
        logits_make(sums + (size_t)row / QUAD * 16 * COLUMNS, unit + row, logit);
        for (uint32_t r = 0; r < QUAD && row + r < keys->rows; r++) {
            __m512 x = _mm512_add_ps(logit[r], weights);
            bad = _kor_mask16(bad, _mm512_mask_fpclass_ps_mask(live, x, NOT_FINITE));
            x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), live, x);
            _mm512_storeu_ps(logits + (row + r) * stride + piece->at + t, x);
        }
    }
    return bad == 0;
}

static bool score_codes(bkv_keys_t *keys, const bkv_products_t *products, const bkv_piece_t *piece, float *logits,
                        size_t stride, bkv_ahead_t *ahead) {
    uint32_t bits = piece->key_bits;
    const uint8_t *rows = piece->keys;
    if (bits == 3 && keys->dim % 32 != 0) {
        for (uint32_t t = 0; t < piece->count; t++) {
            bkv_codes_unpack(rows + (size_t)t * piece->key_row, keys->dim, 3, keys->expanded + (size_t)t * keys->dim);
        }
        bits = 8;
        rows = keys->expanded;
    }
    const bkv_key_order_t *order = order_get(keys, bits);
    params_load(keys, order, piece->key_params);
    uint32_t quads = (keys->rows + QUAD - 1) / QUAD;
    unit_t unit[BKV_ATTEND_QUADS * QUAD];
    for (uint32_t quad = 0; quad < quads; quad++) {
        units_find(keys, order, quad, unit + (size_t)quad * QUAD);
        digits_make(keys, order, quad, quads, unit + (size_t)quad * QUAD);
    }
    // Sixteen tokens at a time, in three stages that work on neighbours: none waits for what was written just before.
    uint32_t tiles = (piece->count + 15) / 16, lines = order->row / (LINE / 16) + 1;
    bool finite = true;
    for (uint32_t i = 0; i < tiles + 2; i++) {
        if (i < tiles) {
            uint32_t some = piece->count - 16 * i < 16 ? piece->count - 16 * i : 16;
            codes_unpack(order, rows + (size_t)16 * i * order->row, some, keys->codes + (size_t)(i % 2) * 16 * order->slots);
            bkv_ahead_step(ahead, lines);
        }
        if (i >= 1 && i - 1 < tiles) {
            products->scores(keys->codes + (size_t)((i - 1) % 2) * 16 * order->slots, keys->digits,
                             order->chunks * order->phases, quads, keys->sums + (size_t)((i - 1) % 2) * SUMS);
        }
        if (i >= 2) {
            finite &= logits_write(keys, keys->sums + (size_t)(i % 2) * SUMS, piece, 16 * (i - 2), unit, logits, stride);
        }
    }
    return finite;
}

static bool score_native(bkv_keys_t *keys, const bkv_piece_t *piece, float *logits, size_t stride, bkv_ahead_t *ahead) {
    uint32_t padded = bkv_wide_pad(keys->dim), whole = (piece->count + 15) / 16 * 16;
    for (uint32_t t = 0; t < piece->count; t++) {
        float *row = keys->k_native + (size_t)t * padded;
        bkv_row_to_float(piece->dtype, piece->keys + (size_t)t * piece->key_row, keys->dim, row);
        memset(row + keys->dim, 0, (padded - keys->dim) * sizeof(float));
        bkv_ahead_step(ahead, piece->key_row / LINE + 1);
    }
    float weights[(BKV_ATTEND_PIECE + 15) / 16 * 16];
    for (uint32_t t = 0; t < whole; t += 16) {
        uint32_t left = piece->count - t;
        _mm512_storeu_ps(weights + t, weights_load(piece, t, (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1)));
    }
    bkv_float_scores(keys->q_native, keys->rows, keys->k_native, piece->count, padded, keys->softmax_scale, weights,
                     logits + piece->at, stride);
    for (uint32_t r = 0; r < keys->rows; r++) {
        float *row = logits + r * stride + piece->at;
        if (bkv_row_exceeds(BKV_FP32, row, piece->count, false)) {
            return false;
        }
        for (uint32_t t = piece->count; t < whole; t++) {
            row[t] = -INFINITY;
        }
    }
    return true;
}

bool bkv_keys_score(bkv_keys_t *keys, const bkv_products_t *products, const bkv_piece_t *piece, float *logits, size_t stride,
                    bkv_ahead_t *ahead) {
    return piece->key_bits == BKV_BITS_NATIVE ? score_native(keys, piece, logits, stride, ahead)
                                              : score_codes(keys, products, piece, logits, stride, ahead);
}

#endif
