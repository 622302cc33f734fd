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
#define TILE   256 // sums of one column: 16 rows of 16 slots
#define PIECE  16  // packed bytes of each of four tokens that make a line

// The largest number of 16 bits that two signed digits hold is 0x7f7f; a little less, as floats round.
#define DIGITS_TOP 32600.0f
#define LEAST      1e-30f

// For vrangeps: the larger absolute value, without its sign.
#define LARGER_SIZE 0x0b

static uint32_t phases_of(uint32_t bits) {
    assert(bits >= 2 && bits <= 8);
    return bits == 3 ? 3 : 8 / bits;
}

static uint32_t columns_of(uint32_t dim, uint32_t bits) {
    return (dim * bits / 8 + PIECE - 1) / PIECE * phases_of(bits);
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
    values->codes = bkv_scratch_take(scratch, (uint64_t)2 * BKV_ATTEND_PHASES * 16 * LINE);
    values->expanded = bkv_scratch_take(scratch, dim % 32 == 0 ? 0 : (uint64_t)BKV_ATTEND_BATCH * dim);
    values->v_native = bkv_scratch_take(scratch, (uint64_t)BKV_ATTEND_PIECE * padded * sizeof(float));
    values->sums = bkv_scratch_take(scratch, (uint64_t)2 * BKV_ATTEND_PHASES * TILE * sizeof(int32_t));
}

void bkv_values_start(bkv_values_t *values, uint32_t rows) {
    values->rows = rows;
    values->bits = 0;
    memset(values->out, 0, (size_t)rows * bkv_wide_pad(values->dim) * sizeof(float));
}

// The channel and the factor of slot `slot` of `phase` of a piece; UINT32_MAX where the row has ended.
static uint32_t slot_channel(uint32_t bits, uint32_t row, uint32_t piece, uint32_t phase, uint32_t slot, float *factor) {
    uint32_t half = piece * (PIECE / 2) + slot / 2, p = 2 * phase + slot % 2;
    *factor = 1;
    if (2 * half >= row) {
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
    if (values->bits == 0) {
        return;
    }
    uint32_t padded = bkv_wide_pad(values->dim), bits = values->bits, phases = phases_of(bits);
    for (uint32_t i = 0; i < values->columns * 16; i++) {
        float factor;
        uint32_t column = i / 16;
        uint32_t channel = slot_channel(bits, values->dim * bits / 8, column / phases, column % phases, i % 16, &factor);
        for (uint32_t r = 0; channel != UINT32_MAX && r < values->rows; r++) {
            values->out[(size_t)r * padded + channel] += factor * values->acc[(size_t)r * values->columns * 16 + i];
        }
    }
    for (uint32_t r = 0; r < values->rows; r++) {
        for (uint32_t i = 0; i < values->dim; i++) {
            values->out[(size_t)r * padded + i] += values->zero_sum[r * values->groups + i / BKV_VALUE_GROUP_DIMS];
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

static inline void params_store(__m512i both, __mmask16 fits, float *scale, float *zero) {
    _mm512_mask_storeu_ps(scale, fits, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both)));
    _mm512_mask_storeu_ps(zero, fits, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16))));
}

// Scales and zeros of up to sixteen tokens from `at` in the batch on, of which `room` have a place.
static void params_place(bkv_values_t *values, const uint8_t *params, uint32_t count, uint32_t at, uint32_t room) {
    const __m512i ramp = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    uint32_t groups = values->groups;
    __mmask16 live = (__mmask16)(count >= 16 ? 0xffff : (1u << count) - 1);
    __mmask16 fits = (__mmask16)(room >= 16 ? 0xffff : (1u << room) - 1);
    float *scale = values->scale + at, *zero = values->zero + at;
    if (groups == 2 && count >= 16) { // the usual heads of 128: even and odd ones of two vectors
        __m512i a = _mm512_loadu_si512(params), b = _mm512_loadu_si512(params + 64), even = _mm512_add_epi32(ramp, ramp);
        params_store(_mm512_permutex2var_epi32(a, even, b), fits, scale, zero);
        __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
        params_store(_mm512_permutex2var_epi32(a, odd, b), fits, scale + BKV_ATTEND_BATCH, zero + BKV_ATTEND_BATCH);
        return;
    }
    __m512i stride = _mm512_mullo_epi32(ramp, _mm512_set1_epi32((int)groups));
    for (uint32_t g = 0; g < groups; g++, scale += BKV_ATTEND_BATCH, zero += BKV_ATTEND_BATCH) {
        params_store(_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), live, stride, params + 4 * (size_t)g, 4), fits, scale,
                     zero);
    }
}

// Scales and zeros of every token of the batch, group by group; 0 in the padding.
static void params_load(bkv_values_t *values, const bkv_batch_t *batch) {
    for (uint32_t i = 0; i < batch->count; i++) {
        const bkv_piece_t *piece = &batch->pieces[i];
        for (uint32_t t = 0; t < piece->count; t += 16) {
            params_place(values, piece->value_params + 4 * (size_t)t * values->groups, piece->count - t, piece->at + t,
                         BKV_ATTEND_BATCH - (piece->at + t));
        }
    }
    uint32_t whole = (batch->tokens + 63) / 64 * 64;
    for (uint32_t g = 0; g < values->groups; g++) {
        size_t end = (size_t)g * BKV_ATTEND_BATCH + batch->tokens;
        memset(values->scale + end, 0, (whole - batch->tokens) * sizeof(float));
        memset(values->zero + end, 0, (whole - batch->tokens) * sizeof(float));
    }
}

// Largest |p * scale|, and zero_sum += p * zero.
static float factors_scan(bkv_values_t *values, uint32_t tokens, uint32_t r, uint32_t g, const float *p) {
    const float *scale = values->scale + (size_t)g * BKV_ATTEND_BATCH, *zero = values->zero + (size_t)g * BKV_ATTEND_BATCH;
    __m512 top[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (uint32_t t = 0; t < tokens; t += 32) {
        for (uint32_t j = 0; j < 2; j++) {
            __m512 x = _mm512_loadu_ps(p + t + 16 * j);
            top[j] = _mm512_range_ps(top[j], _mm512_mul_ps(x, _mm512_load_ps(scale + t + 16 * j)), LARGER_SIZE);
            sum[j] = _mm512_fmadd_ps(x, _mm512_load_ps(zero + t + 16 * j), sum[j]);
        }
    }
    values->zero_sum[r * values->groups + g] += _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
    return _mm512_reduce_max_ps(_mm512_max_ps(top[0], top[1]));
}

// One query's p * scale as two signed digits each, to rows 2 r and 2 r + 1 of every chunk's tile; returns the unit.
//
// Packing works within 128 bits, so of a chunk's sixteen fours of tokens, four 4 k + l lands in place 4 l + k: place_of_four.
static float digits_make(bkv_values_t *values, uint32_t tokens, uint32_t r, uint32_t g, const float *p) {
    const float *scale = values->scale + (size_t)g * BKV_ATTEND_BATCH;
    float most = factors_scan(values, tokens, r, g, p);
    __m512 inverse = _mm512_set1_ps(most > LEAST ? DIGITS_TOP / most : 0);
    uint8_t *out = values->digits + ((size_t)g * 16 + 2 * r) * LINE;
    for (uint32_t t = 0; t < tokens; t += 64, out += (size_t)values->groups * 16 * LINE) {
        __m512i n[4];
        for (uint32_t j = 0; j < 4; j++) {
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(p + t + 16 * j), _mm512_load_ps(scale + t + 16 * j));
            n[j] = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
        }
        __m512i a = _mm512_packs_epi32(n[0], n[1]), b = _mm512_packs_epi32(n[2], n[3]);
        // n = low + 256 * high, where low is n's last byte read as a signed one.
        const __m512i last = _mm512_set1_epi16(0xff), half = _mm512_set1_epi16(0x80);
        __m512i low = _mm512_packus_epi16(_mm512_and_si512(a, last), _mm512_and_si512(b, last));
        __m512i high = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8),
                                          _mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
        _mm512_store_si512(out, low);
        _mm512_store_si512(out + LINE, high);
    }
    return most > LEAST ? most / DIGITS_TOP : 0;
}

static const uint16_t place_of_four[16] = {0 * LINE, 4 * LINE, 8 * LINE,  12 * LINE, 1 * LINE, 5 * LINE, 9 * LINE,  13 * LINE,
                                           2 * LINE, 6 * LINE, 10 * LINE, 14 * LINE, 3 * LINE, 7 * LINE, 11 * LINE, 15 * LINE};

// Sixteen packed bytes of each of four tokens, as eight words of four halves, one of each token: every field of a half can then
// be brought beside those of the other tokens, as the products want them.
static inline __m512i halves_gather(__m512i rows) {
    const __m512i halves = _mm512_setr_epi64(0x3130212011100100, 0x3332232213120302, 0x3534252415140504, 0x3736272617160706,
                                             0x3938292819180908, 0x3b3a2b2a1b1a0b0a, 0x3d3c2d2c1d1c0d0c, 0x3f3e2f2e1f1e0f0e);
    return _mm512_permutexvar_epi8(halves, rows);
}

static inline __m512i four_load(const uint8_t *row, size_t stride) {
    __m512i rows = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)row));
    rows = _mm512_inserti32x4(rows, _mm_loadu_si128((const __m128i *)(row + stride)), 1);
    rows = _mm512_inserti32x4(rows, _mm_loadu_si128((const __m128i *)(row + 2 * stride)), 2);
    rows = _mm512_inserti32x4(rows, _mm_loadu_si128((const __m128i *)(row + 3 * stride)), 3);
    return halves_gather(rows);
}

// The last of a section, perhaps of the record: `count` rows, and not a byte more of each than `bytes`.
static __m512i few_load(const uint8_t *row, size_t stride, uint32_t count, uint32_t bytes) {
    __mmask16 some = (__mmask16)(bytes >= PIECE ? 0xffff : (1u << bytes) - 1);
    __m512i rows = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(some, row));
    rows = _mm512_inserti32x4(rows, _mm_maskz_loadu_epi8(count > 1 ? some : 0, row + (count > 1 ? stride : 0)), 1);
    rows = _mm512_inserti32x4(rows, _mm_maskz_loadu_epi8(count > 2 ? some : 0, row + (count > 2 ? 2 * stride : 0)), 2);
    rows = _mm512_inserti32x4(rows, _mm_maskz_loadu_epi8(count > 3 ? some : 0, row + (count > 3 ? 3 * stride : 0)), 3);
    return halves_gather(rows);
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

static inline void fields_cut(__m512i four, const __m512i *shifts, const __m512i *mask, const uint32_t phases, uint8_t *out) {
    for (uint32_t phase = 0; phase < phases; phase++) {
        __m512i slots = _mm512_multishift_epi64_epi8(shifts[phase], four);
        _mm512_store_si512(out + (size_t)phase * 16 * LINE, _mm512_and_si512(slots, mask[phase]));
    }
}

// A run through the tokens of a batch, four at a time.
typedef struct run {
    const bkv_piece_t *piece;
    uint32_t left, at; // pieces; token within this one
} run_t;

// How many fours from here on may be read in whole pieces: all of their tokens are there, and sixteen bytes of the last.
static uint32_t whole_fours(const bkv_piece_t *piece, uint32_t at, uint32_t offset) {
    uint32_t fours = (piece->count - at) / 4;
    const uint8_t *row = piece->values + (size_t)at * piece->value_row + offset;
    while (fours > 0 && (size_t)(piece->values_end - row) < (size_t)(4 * fours - 1) * piece->value_row + PIECE) {
        fours--;
    }
    return fours;
}

// Sixteen packed bytes from `offset` of every row of the next 64 tokens. Called with constant bits and phases.
static inline void chunk_unpack(run_t *run, uint32_t offset, uint32_t bytes, const uint32_t bits, const uint32_t phases,
                                uint8_t *codes, bkv_ahead_t *ahead) {
    __m512i shifts[BKV_ATTEND_PHASES], mask[BKV_ATTEND_PHASES];
    for (uint32_t phase = 0; phase < phases; phase++) {
        phase_fields(bits, phase, &shifts[phase], &mask[phase]);
    }
    uint32_t steps = 4;
    for (uint32_t i = 0; i < 16 && run->left > 0;) {
        const bkv_piece_t *piece = run->piece;
        size_t stride = piece->value_row;
        const uint8_t *row = piece->values + run->at * stride + offset;
        uint32_t whole = whole_fours(piece, run->at, offset), end = i + whole < 16 ? i + whole : 16;
        run->at += 4 * (end - i);
        while (i < end) {
            if (i % 4 != 0 || i + 4 > end) {
                fields_cut(four_load(row, stride), shifts, mask, phases, codes + place_of_four[i++]);
                row += 4 * stride;
                continue;
            }
            for (uint32_t j = 0; j < 4; j++, row += 4 * stride) { // place_of_four, four at once
                fields_cut(four_load(row, stride), shifts, mask, phases, codes + (size_t)(i / 4 + 4 * j) * LINE);
            }
            i += 4;
            bkv_ahead_step(ahead);
            steps--;
        }
        bool few = i < 16 && run->at < piece->count;
        if (few) {
            fields_cut(few_load(row, stride, piece->count - run->at, bytes), shifts, mask, phases, codes + place_of_four[i++]);
        }
        run->at += 4 * few;
        if (run->at >= piece->count) {
            *run = (run_t){.piece = piece + 1, .left = run->left - 1};
        }
    }
    for (; steps > 0; steps--) {
        bkv_ahead_step(ahead);
    }
}

static void codes_unpack(run_t *run, uint32_t bits, uint32_t offset, uint32_t bytes, uint8_t *codes, bkv_ahead_t *ahead) {
    switch (bits) {
    case 2:
        chunk_unpack(run, offset, bytes, 2, 4, codes, ahead);
        return;
    case 3:
        chunk_unpack(run, offset, bytes, 3, 3, codes, ahead);
        return;
    case 4:
        chunk_unpack(run, offset, bytes, 4, 2, codes, ahead);
        return;
    default:
        chunk_unpack(run, offset, bytes, 8, 1, codes, ahead);
        return;
    }
}

// What one row's sums of a column are worth.
static inline __m512 sums_value(const int32_t *sums, uint32_t r, float unit) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(sums + (size_t)(2 * r) * 16));
    __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(sums + (size_t)(2 * r + 1) * 16));
    return _mm512_mul_ps(_mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), low), _mm512_set1_ps(unit));
}

// Adds the products of a piece to acc. Where the piece has slots of two groups, the second's begin with `split`.
static void sums_take(bkv_values_t *values, uint32_t column, uint32_t phases, uint32_t split, const float *first,
                      const float *second) {
    __mmask16 behind = (__mmask16)(0xffffu << split);
    for (uint32_t r = 0; r < values->rows; r++) {
        float *acc = values->acc + ((size_t)r * values->columns + column) * 16;
        for (uint32_t phase = 0; phase < phases; phase++, acc += 16) {
            __m512 x = sums_value(values->sums + (size_t)phase * TILE, r, first[r]);
            if (behind) {
                x = _mm512_mask_mov_ps(x, behind, sums_value(values->sums + (size_t)(phases + phase) * TILE, r, second[r]));
            }
            _mm512_store_ps(acc, _mm512_add_ps(_mm512_load_ps(acc), x));
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

// The products of sixteen packed bytes of every row with the digits of group g and, with `two`, of the next.
static void piece_sum(bkv_values_t *values, const bkv_products_t *products, const bkv_batch_t *batch, uint32_t offset,
                      uint32_t g, bool two, bkv_ahead_t *ahead) {
    uint32_t quads = (values->rows + 3) / 4, chunks = (batch->tokens + 63) / 64, phases = phases_of(values->bits);
    uint32_t row = values->dim * values->bits / 8, bytes = row - offset < PIECE ? row - offset : PIECE;
    size_t half = (size_t)phases * 16 * LINE;
    run_t run = {.piece = batch->pieces, .left = batch->count};
    products->clear(1 + two, phases, values->sums);
    for (uint32_t chunk = 0; chunk <= chunks; chunk++) { // one is unpacked while the one before is multiplied
        if (chunk < chunks) {
            codes_unpack(&run, values->bits, offset, bytes, values->codes + chunk % 2 * half, ahead);
        }
        if (chunk > 0) {
            const uint8_t *digits = values->digits + ((size_t)(chunk - 1) * values->groups + g) * 16 * LINE;
            const uint8_t *codes = values->codes + (chunk - 1) % 2 * half;
            products->take(0, digits, codes, phases, quads, values->sums);
            if (two) {
                products->take(1, digits + (size_t)16 * LINE, codes, phases, quads, values->sums);
            }
        }
    }
    products->give(1 + two, phases, values->sums);
}

uint64_t bkv_values_steps(const bkv_values_t *values, const bkv_batch_t *batch) {
    const bkv_piece_t *piece = &batch->pieces[0];
    if (piece->value_bits == BKV_BITS_NATIVE) {
        return (batch->tokens + 3) / 4;
    }
    bool expanded = piece->value_bits == 3 && values->dim % 32 != 0;
    return (uint64_t)((expanded ? values->dim : piece->value_row) + PIECE - 1) / PIECE * ((batch->tokens + 63) / 64) * 4 +
           values->rows * (2ull * values->groups + 2);
}

static void add_codes(bkv_values_t *values, const bkv_products_t *products, const bkv_batch_t *batch, uint32_t bits,
                      const float *p, size_t stride, bkv_ahead_t *ahead) {
    if (values->bits != bits) {
        acc_flush(values);
        acc_start(values, bits);
    }
    params_load(values, batch);
    uint32_t chunks = (batch->tokens + 63) / 64, phases = phases_of(bits), row = values->dim * bits / 8;
    float unit[BKV_MAX_DIM / BKV_VALUE_GROUP_DIMS][BKV_ATTEND_ROWS];
    for (uint32_t g = 0; g < values->groups; g++) {
        for (uint32_t r = 0; r < values->rows; r++) {
            unit[g][r] = digits_make(values, chunks * 64, r, g, p + r * stride);
            bkv_ahead_step(ahead);
            bkv_ahead_step(ahead);
        }
    }
    for (uint32_t offset = 0; offset < row; offset += PIECE) {
        uint32_t g = offset / (BKV_VALUE_GROUP_DIMS * bits / 8), next = (g + 1) * (BKV_VALUE_GROUP_DIMS * bits / 8);
        bool two = next < offset + PIECE && next < row;
        piece_sum(values, products, batch, offset, g, two, ahead);
        sums_take(values, offset / PIECE * phases, phases, two ? next - offset : 16, unit[g], unit[two ? g + 1 : g]);
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
            if (t % 4 == 0) {
                bkv_ahead_step(ahead);
            }
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
