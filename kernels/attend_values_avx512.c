// attend_values_avx512.c - what a batch's values add to the result: probabilities into digits, codes out of their packing four
// tokens at a time, the integer products back to floats. attend_avx512.h has the idea.
#include "attend_avx512.h"

#if defined(__x86_64__)

#include "attend_float.h"
#include "convert.h"
#include "quant.h"

#include <assert.h>

#define CHUNKS (BKV_ATTEND_BATCH / 64)
#define LINE   64
#define PIECE  16 // packed bytes of each of four tokens that make a line

// The largest number of 16 bits that two signed digits hold is 0x7f7f; a little less, as floats round.
#define DIGITS_TOP 32600.0f
#define LEAST      1e-30f

static uint32_t phases_of(uint32_t bits) {
    return bits == 3 ? 3 : 8 / bits;
}

// Packed bytes of one group's channels in a row, and pieces of a line that they take.
static uint32_t group_bytes(uint32_t dim, uint32_t bits, uint32_t group) {
    uint32_t channels = dim - group * BKV_VALUE_GROUP_DIMS;
    return (channels < BKV_VALUE_GROUP_DIMS ? channels : BKV_VALUE_GROUP_DIMS) * bits / 8;
}

static uint32_t group_pieces(uint32_t dim, uint32_t bits, uint32_t group) {
    return (group_bytes(dim, bits, group) + PIECE - 1) / PIECE;
}

static uint32_t columns_of(uint32_t dim, uint32_t bits) {
    uint32_t columns = 0;
    for (uint32_t g = 0; g * BKV_VALUE_GROUP_DIMS < dim; g++) {
        columns += group_pieces(dim, bits, g) * phases_of(bits);
    }
    return columns;
}

static uint32_t most_columns(uint32_t dim) {
    uint32_t most = columns_of(dim, 8);
    for (uint32_t bits = 2; bits <= 4; bits++) {
        uint32_t columns = columns_of(dim, bits);
        most = columns > most ? columns : most;
    }
    return most;
}

void bkv_values_carve(bkv_values_t *values, uint32_t dim, bkv_scratch_t *scratch) {
    uint32_t padded = bkv_wide_pad(dim);
    uint64_t groups = (dim + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS;
    values->dim = dim;
    values->groups = (uint32_t)groups;
    values->acc = bkv_scratch_take(scratch, (uint64_t)BKV_ATTEND_ROWS * most_columns(dim) * 16 * sizeof(float));
    values->zero_sum = bkv_scratch_take(scratch, BKV_ATTEND_ROWS * groups * sizeof(float));
    values->out = bkv_scratch_take(scratch, (uint64_t)BKV_ATTEND_ROWS * padded * sizeof(float));
    values->scale = bkv_scratch_take(scratch, groups * BKV_ATTEND_BATCH * sizeof(float));
    values->zero = bkv_scratch_take(scratch, groups * BKV_ATTEND_BATCH * sizeof(float));
    values->digits = bkv_scratch_take(scratch, groups * CHUNKS * 16 * LINE);
    values->codes = bkv_scratch_take(scratch, (uint64_t)CHUNKS * BKV_ATTEND_PHASES * 16 * LINE);
    values->expanded = bkv_scratch_take(scratch, dim % 32 == 0 ? 0 : (uint64_t)BKV_ATTEND_BATCH * dim);
    values->v_native = bkv_scratch_take(scratch, (uint64_t)BKV_ATTEND_PIECE * padded * sizeof(float));
    values->sums = bkv_scratch_take(scratch, (uint64_t)BKV_ATTEND_PHASES * 16 * 16 * sizeof(int32_t));
}

void bkv_values_start(bkv_values_t *values, uint32_t rows) {
    values->rows = rows;
    values->bits = 0;
    memset(values->out, 0, (size_t)rows * bkv_wide_pad(values->dim) * sizeof(float));
}

// The channel within its group, and the factor, of slot `slot` of `phase` of the group's piece; UINT32_MAX where none is.
static uint32_t slot_channel(uint32_t bits, uint32_t bytes, uint32_t piece, uint32_t phase, uint32_t slot, float *factor) {
    uint32_t half = piece * (PIECE / 2) + slot / 2, p = 2 * phase + slot % 2;
    *factor = 1;
    if (2 * half >= bytes) {
        return UINT32_MAX;
    }
    if (bits != 3) {
        return half * (16 / bits) + p;
    }
    uint32_t h = half % 6;
    *factor = p < 5 ? 1.0f : (float)(1u << h / 2);
    return half / 6 * 32 + (p < 5 ? 5 * h + p : 30 + h % 2);
}

// Puts what acc and zero_sum hold in its place in out.
static void acc_flush(bkv_values_t *values) {
    uint32_t padded = bkv_wide_pad(values->dim), column = 0;
    for (uint32_t g = 0; values->bits != 0 && g < values->groups; g++) {
        uint32_t bytes = group_bytes(values->dim, values->bits, g), first = g * BKV_VALUE_GROUP_DIMS;
        for (uint32_t piece = 0; piece * PIECE < bytes; piece++) {
            for (uint32_t phase = 0; phase < phases_of(values->bits); phase++, column++) {
                for (uint32_t slot = 0; slot < 16; slot++) {
                    float factor;
                    uint32_t channel = slot_channel(values->bits, bytes, piece, phase, slot, &factor);
                    for (uint32_t r = 0; channel != UINT32_MAX && r < values->rows; r++) {
                        values->out[(size_t)r * padded + first + channel] +=
                            factor * values->acc[((size_t)r * values->columns + column) * 16 + slot];
                    }
                }
            }
        }
        for (uint32_t r = 0; r < values->rows; r++) {
            float zero = values->zero_sum[r * values->groups + g];
            for (uint32_t i = first; i < values->dim && i < first + BKV_VALUE_GROUP_DIMS; i++) {
                values->out[(size_t)r * padded + i] += zero;
            }
        }
    }
    values->bits = 0;
}

static void acc_start(bkv_values_t *values, uint32_t bits) {
    values->bits = bits;
    values->columns = columns_of(values->dim, bits);
    memset(values->acc, 0, (size_t)values->rows * values->columns * 16 * sizeof(float));
    memset(values->zero_sum, 0, (size_t)values->rows * values->groups * sizeof(float));
}

static void row_scale(float *row, size_t n, float factor) {
    for (size_t i = 0; i < n; i++) {
        row[i] *= factor;
    }
}

static void shrink_all(bkv_values_t *values, const float *shrink) {
    uint32_t padded = bkv_wide_pad(values->dim);
    for (uint32_t r = 0; r < values->rows; r++) {
        if (shrink[r] == 1.0f) {
            continue;
        }
        row_scale(values->out + (size_t)r * padded, padded, shrink[r]);
        if (values->bits != 0) {
            row_scale(values->acc + (size_t)r * values->columns * 16, (size_t)values->columns * 16, shrink[r]);
            row_scale(values->zero_sum + r * values->groups, values->groups, shrink[r]);
        }
    }
}

// Scales and zeros of every token of the batch, group by group; 0 in the padding.
static void params_load(bkv_values_t *values, const bkv_batch_t *batch) {
    const __m512i ramp = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i stride = _mm512_mullo_epi32(ramp, _mm512_set1_epi32((int)values->groups));
    for (uint32_t g = 0; g < values->groups; g++) {
        float *scale = values->scale + (size_t)g * BKV_ATTEND_BATCH, *zero = values->zero + (size_t)g * BKV_ATTEND_BATCH;
        for (uint32_t i = 0; i < batch->count; i++) {
            const bkv_piece_t *piece = &batch->pieces[i];
            for (uint32_t t = 0; t < piece->count; t += 16) {
                uint32_t left = piece->count - t, room = BKV_ATTEND_BATCH - (piece->at + t);
                __mmask16 live = (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1);
                __mmask16 fits = (__mmask16)(room >= 16 ? 0xffff : (1u << room) - 1);
                const uint8_t *at = piece->value_params + 4 * ((size_t)t * values->groups + g);
                __m512i both = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), live, stride, at, 4);
                _mm512_mask_storeu_ps(scale + piece->at + t, fits, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both)));
                both = _mm512_srli_epi32(both, 16);
                _mm512_mask_storeu_ps(zero + piece->at + t, fits, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both)));
            }
        }
        uint32_t whole = (batch->tokens + 63) / 64 * 64;
        memset(scale + batch->tokens, 0, (whole - batch->tokens) * sizeof(float));
        memset(zero + batch->tokens, 0, (whole - batch->tokens) * sizeof(float));
    }
}

// One query's p * scale as two signed digits each, to rows 2 r and 2 r + 1 of every chunk's tile; returns the unit. Sums
// p * zero by the way.
static float digits_make(bkv_values_t *values, uint32_t tokens, uint32_t r, uint32_t g, const float *p) {
    const float *scale = values->scale + (size_t)g * BKV_ATTEND_BATCH, *zero = values->zero + (size_t)g * BKV_ATTEND_BATCH;
    __m512 top = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
    for (uint32_t t = 0; t < tokens; t += 16) {
        __m512 x = _mm512_loadu_ps(p + t);
        top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_mul_ps(x, _mm512_load_ps(scale + t))));
        sum = _mm512_fmadd_ps(x, _mm512_load_ps(zero + t), sum);
    }
    values->zero_sum[r * values->groups + g] += _mm512_reduce_add_ps(sum);
    float most = _mm512_reduce_max_ps(top);
    __m512 inverse = _mm512_set1_ps(most > LEAST ? DIGITS_TOP / most : 0);
    const __m512i lift = _mm512_set1_epi32(0x8080);
    uint8_t *out = values->digits + ((size_t)g * 16 + 2 * r) * LINE;
    size_t chunk = (size_t)values->groups * 16 * LINE;
    for (uint32_t t = 0; t < tokens; t += 16) {
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(p + t), _mm512_load_ps(scale + t));
        __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
        n = _mm512_xor_si512(_mm512_add_epi32(n, lift), lift);
        uint8_t *at = out + t / 64 * chunk + t % 64;
        _mm_store_si128((__m128i *)at, _mm512_cvtepi32_epi8(n));
        _mm_store_si128((__m128i *)(at + LINE), _mm512_cvtepi32_epi8(_mm512_srli_epi32(n, 8)));
    }
    return most > LEAST ? most / DIGITS_TOP : 0;
}

// Sixteen packed bytes of each of four tokens as eight words of four halves, one of each token: every field of a half can then
// be brought beside those of the other tokens, as the products want them.
static inline __m512i four_load(const uint8_t *row, uint32_t stride, uint32_t count, uint32_t bytes, const uint8_t *end) {
    const __m512i halves = _mm512_setr_epi64(0x3130212011100100, 0x3332232213120302, 0x3534252415140504, 0x3736272617160706,
                                             0x3938292819180908, 0x3b3a2b2a1b1a0b0a, 0x3d3c2d2c1d1c0d0c, 0x3f3e2f2e1f1e0f0e);
    __m512i four;
    if (count >= 4 && (size_t)(end - row) >= (size_t)3 * stride + PIECE) {
        four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)row));
        four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(row + stride)), 1);
        four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(row + (size_t)2 * stride)), 2);
        four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(row + (size_t)3 * stride)), 3);
    } else { // the end of the section, perhaps of the record: not a byte beyond
        __mmask16 some = (__mmask16)(bytes >= PIECE ? 0xffff : (1u << bytes) - 1);
        four = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(some, row));
        four = _mm512_inserti32x4(four, _mm_maskz_loadu_epi8(count > 1 ? some : 0, row + (count > 1 ? stride : 0)), 1);
        four = _mm512_inserti32x4(four, _mm_maskz_loadu_epi8(count > 2 ? some : 0, row + (count > 2 ? 2 * stride : 0)), 2);
        four = _mm512_inserti32x4(four, _mm_maskz_loadu_epi8(count > 3 ? some : 0, row + (count > 3 ? 3 * stride : 0)), 3);
    }
    return _mm512_permutexvar_epi8(halves, four);
}

// Which bits of each eight bytes a phase takes: two fields of four halves.
static inline void phase_fields(uint32_t bits, uint32_t phase, __m512i *shifts, __m512i *mask) {
    uint8_t at[8], keep[8];
    for (uint32_t b = 0; b < 8; b++) {
        uint32_t p = 2 * phase + b / 4;
        at[b] = (uint8_t)(16 * (b % 4) + (bits == 3 && p == 5 ? 15 : p * bits));
        keep[b] = (uint8_t)(bits == 3 && p == 5 ? 1 : (1u << bits) - 1);
    }
    uint64_t word;
    memcpy(&word, at, sizeof(word));
    *shifts = _mm512_set1_epi64((long long)word);
    memcpy(&word, keep, sizeof(word));
    *mask = _mm512_set1_epi64((long long)word);
}

// Sixteen packed bytes from `offset` of every row of the batch. Called with constant bits and phases.
static inline void batch_unpack(const bkv_batch_t *batch, uint32_t offset, uint32_t bytes, const uint32_t bits,
                                const uint32_t phases, uint8_t *codes, bkv_ahead_t *ahead, uint32_t lines) {
    __m512i shifts[BKV_ATTEND_PHASES], mask[BKV_ATTEND_PHASES];
    for (uint32_t phase = 0; phase < phases; phase++) {
        phase_fields(bits, phase, &shifts[phase], &mask[phase]);
    }
    for (uint32_t i = 0; i < batch->count; i++) {
        const bkv_piece_t *piece = &batch->pieces[i];
        const uint8_t *row = piece->values + offset;
        uint32_t at = piece->at / 4;
        for (uint32_t t = 0; t < piece->count; t += 4, at++, row += (size_t)4 * piece->value_row) {
            __m512i four = four_load(row, piece->value_row, piece->count - t, bytes, piece->values_end);
            uint8_t *out = codes + ((size_t)(at / 16) * phases * 16 + at % 16) * LINE;
            for (uint32_t phase = 0; phase < phases; phase++) {
                __m512i slots = _mm512_multishift_epi64_epi8(shifts[phase], four);
                _mm512_store_si512(out + (size_t)phase * 16 * LINE, _mm512_and_si512(slots, mask[phase]));
            }
        }
        bkv_ahead_step(ahead, lines);
    }
}

static void codes_unpack(const bkv_batch_t *batch, uint32_t bits, uint32_t offset, uint32_t bytes, uint8_t *codes,
                         bkv_ahead_t *ahead, uint32_t lines) {
    switch (bits) {
    case 2:
        batch_unpack(batch, offset, bytes, 2, 4, codes, ahead, lines);
        return;
    case 3:
        batch_unpack(batch, offset, bytes, 3, 3, codes, ahead, lines);
        return;
    case 4:
        batch_unpack(batch, offset, bytes, 4, 2, codes, ahead, lines);
        return;
    default:
        batch_unpack(batch, offset, bytes, 8, 1, codes, ahead, lines);
        return;
    }
}

// Adds the products of `phases` columns to acc.
static void sums_take(bkv_values_t *values, uint32_t column, uint32_t phases, const float *unit) {
    for (uint32_t r = 0; r < values->rows; r++) {
        __m512 low = _mm512_set1_ps(unit[r]), high = _mm512_set1_ps(unit[r] * 256);
        float *acc = values->acc + ((size_t)r * values->columns + column) * 16;
        for (uint32_t phase = 0; phase < phases; phase++) {
            const int32_t *sums = values->sums + ((size_t)phase * 16 + 2 * r) * 16;
            __m512 x = _mm512_load_ps(acc + (size_t)phase * 16);
            x = _mm512_fmadd_ps(low, _mm512_cvtepi32_ps(_mm512_load_si512(sums)), x);
            x = _mm512_fmadd_ps(high, _mm512_cvtepi32_ps(_mm512_load_si512(sums + 16)), x);
            _mm512_store_ps(acc + (size_t)phase * 16, x);
        }
    }
}

// Three-bit rows that end in a bit string, as rows of bytes: the pieces of *batch then point there.
static void batch_expand(bkv_values_t *values, bkv_batch_t *batch) {
    for (uint32_t i = 0; i < batch->count; i++) {
        bkv_piece_t *piece = &batch->pieces[i];
        uint8_t *rows = values->expanded + (size_t)piece->at * values->dim;
        for (uint32_t t = 0; t < piece->count; t++) {
            bkv_codes_unpack(piece->values + (size_t)t * piece->value_row, values->dim, 3, rows + (size_t)t * values->dim);
        }
        piece->values = rows;
        piece->value_row = values->dim;
        piece->values_end = rows + (size_t)piece->count * values->dim;
    }
}

static void add_codes(bkv_values_t *values, const bkv_products_t *products, const bkv_batch_t *batch, uint32_t bits,
                      const float *p, size_t stride, bkv_ahead_t *ahead) {
    if (values->bits != bits) {
        acc_flush(values);
        acc_start(values, bits);
    }
    params_load(values, batch);
    uint32_t chunks = (batch->tokens + 63) / 64, phases = phases_of(bits), column = 0, offset = 0;
    for (uint32_t g = 0; g < values->groups; g++) {
        float unit[BKV_ATTEND_ROWS];
        for (uint32_t r = 0; r < values->rows; r++) {
            unit[r] = digits_make(values, chunks * 64, r, g, p + r * stride);
        }
        uint32_t bytes = group_bytes(values->dim, bits, g);
        for (uint32_t piece = 0; piece * PIECE < bytes; piece++, column += phases) {
            uint32_t left = bytes - piece * PIECE;
            codes_unpack(batch, bits, offset + piece * PIECE, left, values->codes, ahead, left);
            products->values(values->digits + (size_t)g * 16 * LINE, (size_t)values->groups * 16 * LINE, values->codes, chunks,
                             phases, 2 * values->rows, values->sums);
            sums_take(values, column, phases, unit);
        }
        offset += bytes;
    }
}

static void add_native(bkv_values_t *values, const bkv_batch_t *batch, const float *p, size_t stride, bkv_ahead_t *ahead) {
    uint32_t padded = bkv_wide_pad(values->dim);
    for (uint32_t i = 0; i < batch->count; i++) {
        const bkv_piece_t *piece = &batch->pieces[i];
        for (uint32_t t = 0; t < piece->count; t++) {
            float *row = values->v_native + (size_t)t * padded;
            bkv_row_to_float(piece->dtype, piece->values + (size_t)t * piece->value_row, values->dim, row);
            memset(row + values->dim, 0, (padded - values->dim) * sizeof(float));
            bkv_ahead_step(ahead, piece->value_row / LINE + 1);
        }
        bkv_float_mix(p + piece->at, stride, values->rows, values->v_native, piece->count, padded, values->out);
    }
}

void bkv_values_add(bkv_values_t *values, const bkv_products_t *products, const bkv_batch_t *batch, const float *p,
                    size_t stride, const float *shrink, bkv_ahead_t *ahead) {
    shrink_all(values, shrink);
    uint32_t bits = batch->pieces[0].value_bits;
    if (bits == BKV_BITS_NATIVE) {
        add_native(values, batch, p, stride, ahead);
    } else if (bits == 3 && values->dim % 32 != 0) {
        bkv_batch_t expanded = *batch;
        batch_expand(values, &expanded);
        add_codes(values, products, &expanded, 8, p, stride, ahead);
    } else {
        add_codes(values, products, batch, bits, p, stride, ahead);
    }
}

void bkv_values_finish(bkv_values_t *values, const float *inverse, float *out) {
    acc_flush(values);
    uint32_t padded = bkv_wide_pad(values->dim);
    for (uint32_t r = 0; r < values->rows; r++) {
        for (uint32_t i = 0; i < values->dim; i++) {
            out[(size_t)r * values->dim + i] = inverse[r] * values->out[(size_t)r * padded + i];
        }
    }
}

#endif
