// attend_keys_avx512.c - the logits of one piece of a section's keys: queries into digits, codes out of their packing, the
// integer products back to floats. attend_avx512.h has the idea; attend_avx512.c decides on pieces.
#include "attend_avx512.h"

#if defined(__x86_64__)

#include "attend_float.h"
#include "convert.h"
#include "quant.h"

#include <assert.h>
#include <math.h>

// Factors become integers of at most this size: adding 1.5 * 2^23 to a float leaves those in its last 23 bits.
#define DIGITS_TOP 4190000.0f
#define ROUNDER    0x1.8p23f

// Anything smaller would overflow when inverted, and adds nothing to a logit.
#define LEAST 1e-30f

// Tokens of one tile, and tiles that are multiplied together.
#define TOKENS 16
#define TILES  2

#define LINE    64
#define QUAD    4
#define COLUMNS 16
#define SUMS    (TILES * BKV_ATTEND_QUADS * TOKENS * COLUMNS)

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
        order->within = bkv_scratch_take(scratch, slots * sizeof(int32_t));
        order->window = bkv_scratch_take(scratch, slots / 16 * sizeof(int32_t));
        order->factor = bkv_scratch_take(scratch, slots * sizeof(float));
        order->once = bkv_scratch_take(scratch, slots / 16 * sizeof(uint16_t));
        order->q = bkv_scratch_take(scratch, (uint64_t)BKV_ATTEND_ROWS * slots * sizeof(float));
        order->described = false;
    }
    keys->scale = bkv_scratch_take(scratch, slots * sizeof(float));
    keys->zero = bkv_scratch_take(scratch, slots * sizeof(float));
    keys->expanded = bkv_scratch_take(scratch, dim % 32 == 0 ? 0 : (uint64_t)BKV_ATTEND_PIECE * dim);
    keys->codes = bkv_scratch_take(scratch, (uint64_t)2 * TILES * TOKENS * slots);
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

// Sixteen slots whose dims lie close together have their params picked out of four vectors, which is faster than a gather.
static void window_choose(bkv_key_order_t *order, uint32_t dim, uint32_t s) {
    int32_t least = INT32_MAX, most = -1;
    for (uint32_t i = s; i < s + 16; i++) {
        if (order->factor[i] != 0) {
            least = order->dim[i] < least ? order->dim[i] : least;
            most = order->dim[i] > most ? order->dim[i] : most;
        }
    }
    if (dim >= 64 && least > (int32_t)dim - 64) {
        least = (int32_t)dim - 64;
    }
    bool close = dim >= 64 && most - least < 64;
    order->window[s / 16] = close ? least : -1;
    for (uint32_t i = s; i < s + 16; i++) {
        order->within[i] = close && order->factor[i] != 0 ? order->dim[i] - least : 0;
    }
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
    for (uint32_t s = 0; s < order->slots; s += 16) {
        window_choose(order, dim, s);
    }
    order->described = true;
}

// One query in the order of the slots, scaled to DIGITS_TOP; returns the unit.
static float row_arrange(const bkv_keys_t *keys, const bkv_key_order_t *order, const float *q, float *out) {
    __m512 top = _mm512_setzero_ps();
    for (uint32_t s = 0; s < order->slots; s += 16) {
        __m512 x = _mm512_i32gather_ps(_mm512_load_si512(order->dim + s), q, 4);
        x = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(keys->softmax_scale)), _mm512_load_ps(order->factor + s));
        _mm512_store_ps(out + s, x);
        top = _mm512_max_ps(top, _mm512_abs_ps(x));
    }
    float most = _mm512_reduce_max_ps(top);
    __m512 inverse = _mm512_set1_ps(most > LEAST ? DIGITS_TOP / most : 0);
    for (uint32_t s = 0; s < order->slots; s += 16) {
        _mm512_store_ps(out + s, _mm512_mul_ps(_mm512_load_ps(out + s), inverse));
    }
    return most > LEAST ? most / DIGITS_TOP : 0;
}

static bkv_key_order_t *order_get(bkv_keys_t *keys, uint32_t bits) {
    bkv_key_order_t *order = &keys->order[order_of(bits)];
    if (!order->described) {
        order_describe(order, keys->dim, bits);
    }
    if (!order->filled) {
        memset(order->q, 0, (size_t)BKV_ATTEND_ROWS * order->slots * sizeof(float));
        for (uint32_t r = 0; r < BKV_ATTEND_ROWS; r++) {
            order->q_unit[r] =
                r < keys->rows ? row_arrange(keys, order, keys->q + (size_t)r * keys->dim, order->q + (size_t)r * order->slots)
                               : 0;
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

static __m512i params_pick(const bkv_key_order_t *order, uint32_t s, const uint8_t *params) {
    if (order->window[s / 16] < 0) {
        return _mm512_i32gather_epi32(_mm512_load_si512(order->dim + s), params, 4);
    }
    const uint8_t *at = params + 4 * (size_t)order->window[s / 16];
    __m512i within = _mm512_load_si512(order->within + s);
    __m512i low = _mm512_permutex2var_epi32(_mm512_loadu_si512(at), within, _mm512_loadu_si512(at + 64));
    __m512i high = _mm512_permutex2var_epi32(_mm512_loadu_si512(at + 128), within, _mm512_loadu_si512(at + 192));
    return _mm512_mask_mov_epi32(low, _mm512_test_epi32_mask(within, _mm512_set1_epi32(32)), high);
}

// The params of a key group in the order of the slots, scales in units of the largest, which is returned.
static float params_load(bkv_keys_t *keys, const bkv_key_order_t *order, const uint8_t *params) {
    __m512 top = _mm512_setzero_ps();
    for (uint32_t chunk = 0; chunk < order->chunks; chunk++) {
        uint32_t parts = parts_of(order, chunk);
        for (uint32_t step = chunk * order->phases; step < (chunk + 1) * order->phases; step++) {
            for (uint32_t s = step * LINE; s < step * LINE + parts * 16; s += 16) {
                __m512i both = params_pick(order, s, params);
                __m512 scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
                __m512 zero = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
                _mm512_store_ps(keys->scale + s, scale);
                _mm512_store_ps(keys->zero + s, _mm512_maskz_mov_ps(order->once[s / 16], zero));
                top = _mm512_max_ps(top, _mm512_abs_ps(scale));
            }
        }
    }
    float most = _mm512_reduce_max_ps(top);
    __m512 inverse = _mm512_set1_ps(most > LEAST ? 1 / most : 0);
    for (uint32_t s = 0; s < order->slots; s += 16) { // the unused ones, too: they are never read
        _mm512_store_ps(keys->scale + s, _mm512_mul_ps(_mm512_load_ps(keys->scale + s), inverse));
    }
    return most;
}

// For one query: what turns its products back, and its product with the zeros.
typedef struct unit {
    float unit, zero;
} unit_t;

// Four vectors of four 128-bit pieces each, transposed as a matrix of pieces.
static inline void transpose_pieces(__m512i v[4]) {
    __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
    __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// One quad's factors as three signed digits each, and their products with the zeros.
//
// A float between 2^23 and 2^24 is 0x4b400000 + n when it is ROUNDER + n. Its bytes, less 128, 128 and 64, are digits of
// n - 32896, and the last one, 0x4b, becomes 1: the fourth column of products is then the sum of the codes, which pays back
// the 32896.
static void digits_make(const bkv_keys_t *keys, const bkv_key_order_t *order, uint32_t quad, uint32_t quads, float largest,
                        unit_t unit[QUAD], bkv_ahead_t *ahead) {
    const __m512i less = _mm512_set1_epi32((int)0xb6c08080);
    const __m512 rounder = _mm512_set1_ps(ROUNDER);
    // Of four factors: their low digits, middle digits, high digits, ones.
    const __m512i planes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512 zero[QUAD] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (uint32_t chunk = 0; chunk < order->chunks; chunk++) {
        uint32_t parts = parts_of(order, chunk);
        for (uint32_t step = chunk * order->phases; step < (chunk + 1) * order->phases; step++) {
            uint8_t *out = keys->digits + (size_t)(step * quads + quad) * 16 * LINE;
            const float *q = order->q + (size_t)quad * QUAD * order->slots;
            bkv_ahead_step(ahead);
            for (uint32_t s = step * LINE; s < step * LINE + parts * 16; s += 16, out += (size_t)4 * LINE) {
                __m512 scale = _mm512_load_ps(keys->scale + s), zeros = _mm512_load_ps(keys->zero + s);
                __m512i v[QUAD];
                for (uint32_t r = 0; r < QUAD; r++) {
                    __m512 x = _mm512_load_ps(q + (size_t)r * order->slots + s);
                    zero[r] = _mm512_fmadd_ps(x, zeros, zero[r]);
                    v[r] = _mm512_castps_si512(_mm512_fmadd_ps(x, scale, rounder));
                    v[r] = _mm512_shuffle_epi8(_mm512_add_epi8(v[r], less), planes);
                }
                transpose_pieces(v);
                for (uint32_t i = 0; i < 4; i++) {
                    _mm512_store_si512(out + (size_t)i * LINE, v[i]);
                }
            }
        }
    }
    for (uint32_t r = 0; r < QUAD; r++) {
        float q_unit = order->q_unit[quad * QUAD + r];
        unit[r] = (unit_t){.unit = q_unit * largest, .zero = q_unit * _mm512_reduce_add_ps(zero[r])};
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

// Up to 64 packed bytes.
static inline void row_unpack(const uint8_t *from, __mmask64 some, const uint32_t bits, const uint32_t phases,
                              const __m512i *shifts, const __m512i *mask, uint8_t *to) {
    __m512i packed = _mm512_maskz_loadu_epi8(some, from);
    for (uint32_t phase = 0; phase < phases; phase++) {
        __m512i slots = bits == 8 ? packed : _mm512_multishift_epi64_epi8(shifts[phase], packed);
        _mm512_store_si512(to + (size_t)phase * 16 * LINE, _mm512_and_si512(slots, mask[phase]));
    }
}

// Up to sixteen tokens. Called with constant bits and phases. Bytes beyond a row are not read and count as 0.
static inline void rows_unpack(const bkv_key_order_t *order, const uint8_t *rows, uint32_t count, const uint32_t bits,
                               const uint32_t phases, uint8_t *codes, bkv_ahead_t *ahead) {
    __m512i shifts[BKV_ATTEND_PHASES], mask[BKV_ATTEND_PHASES];
    for (uint32_t phase = 0; phase < phases; phase++) {
        phase_fields(bits, phase, &shifts[phase], &mask[phase]);
    }
    uint32_t row = order->row;
    for (uint32_t at = 0; at < row; at += LINE, codes += (size_t)phases * 16 * LINE) {
        __mmask64 some = row - at >= LINE ? ~0ull : (1ull << (row - at)) - 1;
        const uint8_t *from = rows + at;
        uint8_t *to = codes;
        for (uint32_t t = 0; t < count / 4; t++) {
            for (uint32_t j = 0; j < 4; j++, from += row, to += LINE) {
                row_unpack(from, some, bits, phases, shifts, mask, to);
            }
            bkv_ahead_step(ahead);
        }
        for (uint32_t t = 0; t < count % 4; t++, from += row, to += LINE) {
            row_unpack(from, some, bits, phases, shifts, mask, to);
        }
    }
}

static void codes_unpack(const bkv_key_order_t *order, const uint8_t *rows, uint32_t count, uint8_t *codes,
                         bkv_ahead_t *ahead) {
    switch (order->bits) {
    case 2:
        rows_unpack(order, rows, count, 2, 4, codes, ahead);
        return;
    case 3:
        rows_unpack(order, rows, count, 3, 3, codes, ahead);
        return;
    case 4:
        rows_unpack(order, rows, count, 4, 2, codes, ahead);
        return;
    default:
        rows_unpack(order, rows, count, 8, 1, codes, ahead);
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

// Sixteen tokens' sums of one quad, [token][query][low, middle, high digit, codes], to logits of four queries.
static void logits_make(const int32_t *sums, const unit_t unit[QUAD], __m512 logit[QUAD]) {
    __m512 units = four_set(unit[0].unit, unit[1].unit, unit[2].unit, unit[3].unit);
    __m512 zeros = four_set(unit[0].zero, unit[1].zero, unit[2].zero, unit[3].zero);
    const __m512 middle = _mm512_set1_ps(256.0f);
    const __m512 high = _mm512_broadcast_f32x4(_mm_setr_ps(65536.0f, 65536.0f, 32896.0f / 256.0f, 32896.0f / 256.0f));
    __m512i four[4];
    for (uint32_t t = 0; t < 4; t++) {
        __m512 a = row_load(sums, 4 * t), b = row_load(sums, 4 * t + 1);
        __m512 c = row_load(sums, 4 * t + 2), d = row_load(sums, 4 * t + 3);
        // In each 128 bits, one query: low + high of two tokens, their middles and codes; then of four tokens.
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

// The logits of up to TILES tiles of the piece's tokens from t on. False when one is not finite.
static bool logits_write(const bkv_keys_t *keys, const int32_t *sums, const bkv_piece_t *piece, uint32_t t, uint32_t end,
                         const unit_t *unit, float *logits, size_t stride) {
    __mmask16 bad = 0;
    for (; t < end; t += TOKENS) {
        __mmask16 live = (__mmask16)(end - t >= TOKENS ? 0xffff : (1u << (end - t)) - 1);
        __m512 weights = weights_load(piece, t, live);
        for (uint32_t row = 0; row < keys->rows; row += QUAD, sums += (size_t)TOKENS * COLUMNS) {
            __m512 logit[QUAD];
            logits_make(sums, unit + row, logit);
            for (uint32_t r = 0; r < QUAD && row + r < keys->rows; r++) {
                __m512 x = _mm512_add_ps(logit[r], weights);
                bad = _kor_mask16(bad, _mm512_mask_fpclass_ps_mask(live, x, NOT_FINITE));
                x = live == 0xffff ? x : _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), live, x);
                _mm512_storeu_ps(logits + (row + r) * stride + piece->at + t, x);
            }
        }
    }
    return bad == 0;
}

// Both tiles of tokens [t, end).
static void tiles_unpack(const bkv_key_order_t *order, const uint8_t *rows, uint32_t t, uint32_t end, uint8_t *codes,
                         bkv_ahead_t *ahead) {
    for (; t < end; t += TOKENS, codes += (size_t)TOKENS * order->slots) {
        codes_unpack(order, rows + (size_t)t * order->row, end - t < TOKENS ? end - t : TOKENS, codes, ahead);
    }
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
    float largest = params_load(keys, order, piece->key_params);
    uint32_t quads = (keys->rows + QUAD - 1) / QUAD;
    unit_t unit[BKV_ATTEND_QUADS * QUAD] = {{0}};
    for (uint32_t quad = 0; quad < quads; quad++) {
        digits_make(keys, order, quad, quads, largest, unit + (size_t)quad * QUAD, ahead);
    }
    // Some tokens at a time, in three stages that work on neighbours: none waits for what was written just before.
    const uint32_t some = TILES * TOKENS, count = piece->count;
    size_t codes = (size_t)some * order->slots;
    bool finite = true;
    for (uint32_t i = 0; i * some < count + 2 * some; i++) {
        uint32_t first = i * some, end = first + some < count ? first + some : count;
        if (i >= 1 && first - some < count) {
            uint32_t tokens = count - (first - some) < some ? count - (first - some) : some;
            products->scores(keys->codes + (i - 1) % 2 * codes, keys->digits, (tokens + TOKENS - 1) / TOKENS,
                             order->chunks * order->phases, quads, keys->sums + (size_t)((i - 1) % 2) * SUMS);
        }
        if (first < count) {
            tiles_unpack(order, rows, first, end, keys->codes + i % 2 * codes, ahead);
        }
        if (i >= 2 && first - 2 * some < count) {
            uint32_t last = first - some < count ? first - some : count;
            finite &=
                logits_write(keys, keys->sums + (size_t)(i % 2) * SUMS, piece, first - 2 * some, last, unit, logits, stride);
        }
    }
    return finite;
}

uint64_t bkv_keys_steps(const bkv_batch_t *batch) {
    return batch->tokens / 4 + 3ull * batch->count; // of its rows and, about, of its digits
}

static bool score_native(bkv_keys_t *keys, const bkv_piece_t *piece, float *logits, size_t stride, bkv_ahead_t *ahead) {
    uint32_t padded = bkv_wide_pad(keys->dim), whole = (piece->count + 15) / 16 * 16;
    for (uint32_t t = 0; t < piece->count; t++) {
        float *row = keys->k_native + (size_t)t * padded;
        bkv_row_to_float(piece->dtype, piece->keys + (size_t)t * piece->key_row, keys->dim, row);
        memset(row + keys->dim, 0, (padded - keys->dim) * sizeof(float));
        if (t % 4 == 0) {
            bkv_ahead_step(ahead);
        }
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
