// lanes_amx.c - products of matrices on the tiles of AMX: factors rounded to bfloat16, sums in float. lanes_avx512.c has the rest
// of the inner loops, and the table.
//
// A tile is 16 rows of 64 bytes. TDPBF16PS takes 16 rows of 32 elements of one factor ("by rows"); and of the other, for each
// pair of its 32 elements, a row with that pair of 16 columns ("by pairs"): its transpose in units of 32 bits.
#include "lanes.h"

#if defined(__x86_64__)

#include "lanes_amx.h"
#include "lanes_kernel.h"

#include <string.h>

#define TILE_DIMS  32
#define TILE_BYTES 1024

// One factor: [tiles of 16 rows or columns][steps of 32 elements to sum over] tiles, zero where there is nothing.
typedef struct operand {
    uint8_t *tiles;
    uint32_t steps;
} operand_t;

static uint32_t steps_of(uint32_t dim) {
    return (dim + TILE_DIMS - 1) / TILE_DIMS;
}

static uint8_t *tile_at(const operand_t *operand, uint32_t tile, uint32_t step) {
    return operand->tiles + ((size_t)tile * operand->steps + step) * TILE_BYTES;
}

size_t bkv_amx_products_scratch(uint32_t na, uint32_t nb, uint32_t dim) {
    return (size_t)(bkv_tile_pad(na) + bkv_tile_pad(nb)) / BKV_TILE * steps_of(dim) * TILE_BYTES;
}

// 32 elements of a row, about the centre, from d on, as bfloat16.
static inline vec_t row_load(const float *row, const float *centre, uint32_t d, uint32_t dim) {
    vec_t low = vec_load_part(row + d, dim - d), high = vec_set(0);
    low = centre ? low - vec_load_part(centre + d, dim - d) : low;
    if (dim - d > BKV_VEC) {
        high = vec_load_part(row + d + BKV_VEC, dim - d - BKV_VEC);
        high = centre ? high - vec_load_part(centre + d + BKV_VEC, dim - d - BKV_VEC) : high;
    }
    return (vec_t)_mm512_cvtne2ps_pbh(high, low);
}

// Turns a tile by rows into one by pairs, or back; in place where from is to.
static void tile_turn(const uint8_t *from, uint8_t *to) {
    vec_t block[BKV_TILE];
    memcpy(block, from, TILE_BYTES);
    vec_transpose(block);
    memcpy(to, block, TILE_BYTES);
}

// Rows to sum the elements of, in either order or (NULL: not this one) both.
static void rows_load(const bkv_rows_t *rows, const operand_t *by_rows, const operand_t *by_pairs) {
    const operand_t *first = by_rows ? by_rows : by_pairs;
    for (uint32_t tile = 0; tile * BKV_TILE < rows->n; tile++) {
        for (uint32_t r = 0; r < BKV_TILE; r++) {
            uint32_t t = tile * BKV_TILE + r;
            for (uint32_t d = 0; d < rows->dim; d += TILE_DIMS) {
                vec_t row = t < rows->n ? row_load(bkv_rows_at(rows, t), rows->centre, d, rows->dim) : vec_set(0);
                memcpy(tile_at(first, tile, d / TILE_DIMS) + (size_t)r * sizeof(row), &row, sizeof(row));
            }
        }
        for (uint32_t step = 0; by_pairs && step < by_pairs->steps; step++) {
            tile_turn(tile_at(first, tile, step), tile_at(by_pairs, tile, step));
        }
    }
}

// A matrix of n rows of `stride` floats, of which the first `columns` are there, whose rows are summed over: by pairs as it
// lies, or turned.
static void columns_load(const float *matrix, uint32_t n, uint32_t columns, uint32_t stride, bool turn, const operand_t *out) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                                5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (uint32_t step = 0; step < out->steps; step++) {
        for (uint32_t pair = 0; pair < BKV_TILE; pair++) {
            uint32_t t = step * TILE_DIMS + 2 * pair;
            const float *row = matrix + (size_t)t * stride;
            for (uint32_t c = 0; c < columns; c += BKV_TILE) {
                vec_t even = t < n ? vec_load_part(row + c, columns - c) : vec_set(0);
                vec_t odd = t + 1 < n ? vec_load_part(row + stride + c, columns - c) : vec_set(0);
                __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
                _mm512_storeu_si512(tile_at(out, c / BKV_TILE, step) + (size_t)pair * 64,
                                    _mm512_permutexvar_epi16(interleave, both));
            }
        }
        for (uint32_t tile = 0; turn && tile * BKV_TILE < columns; tile++) {
            tile_turn(tile_at(out, tile, step), tile_at(out, tile, step));
        }
    }
}

// Configuration of the tile registers: palette 1, all eight whole.
static void tiles_begin(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config;
    _Static_assert(sizeof(config) == 64, "as LDTILECFG reads it");
    memset(&config, 0, sizeof(config));
    config.palette = 1;
    for (uint32_t i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
}

// Tiles (i, j), (i, j + 1), (i + 1, j), (i + 1, j + 1) of the product, the first at `out`; the second row or column only where there is one.
static void block_product(const operand_t *a, const operand_t *b, uint32_t i, uint32_t j, bool two_rows, bool two_columns,
                          float *out, uint32_t stride) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (uint32_t step = 0; step < a->steps; step++) {
        _tile_loadd(4, tile_at(a, i, step), 64);
        _tile_loadd(6, tile_at(b, j, step), 64);
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) {
            _tile_loadd(7, tile_at(b, j + 1, step), 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (two_rows) {
            _tile_loadd(5, tile_at(a, i + 1, step), 64);
            _tile_dpbf16ps(2, 5, 6);
            if (two_columns) {
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    size_t bytes = stride * sizeof(float);
    _tile_stored(0, out, bytes);
    if (two_columns) {
        _tile_stored(1, out + BKV_TILE, bytes);
    }
    if (two_rows) {
        _tile_stored(2, out + (size_t)BKV_TILE * stride, bytes);
        if (two_columns) {
            _tile_stored(3, out + (size_t)BKV_TILE * stride + BKV_TILE, bytes);
        }
    }
}

void bkv_amx_products(const bkv_rows_t *a, const bkv_rows_t *b, float *out, uint32_t stride, void *scratch) {
    uint32_t rows = bkv_tile_pad(a->n) / BKV_TILE, columns = b ? bkv_tile_pad(b->n) / BKV_TILE : rows;
    operand_t left = {scratch, steps_of(a->dim)}, right = left;
    right.tiles += (size_t)rows * left.steps * TILE_BYTES;
    rows_load(a, &left, b ? NULL : &right);
    if (b) {
        rows_load(b, NULL, &right);
    }
    tiles_begin();
    for (uint32_t i = 0; i < rows; i += 2) {
        for (uint32_t j = b ? 0 : i; j < columns; j += 2) {
            block_product(&left, &right, i, j, i + 1 < rows, j + 1 < columns, out + ((size_t)i * stride + j) * BKV_TILE,
                          stride);
        }
    }
    _tile_release();
}

size_t bkv_amx_kernel_scratch(uint32_t n, uint32_t key_dim, uint32_t value_dim) {
    return bkv_amx_products_scratch(n, n, key_dim) + bkv_amx_products_scratch(n, n, value_dim);
}

// Both factors of products of rows with themselves; returns where they end.
static uint8_t *both_load(const bkv_rows_t *rows, uint8_t *at, operand_t *by_rows, operand_t *by_pairs) {
    size_t bytes = (size_t)bkv_tile_pad(rows->n) / BKV_TILE * steps_of(rows->dim) * TILE_BYTES;
    *by_rows = (operand_t){at, steps_of(rows->dim)};
    *by_pairs = (operand_t){at + bytes, steps_of(rows->dim)};
    rows_load(rows, by_rows, by_pairs);
    return at + 2 * bytes;
}

// The largest square of n rows: the diagonal of their products.
static float largest_square(const operand_t *by_rows, const operand_t *by_pairs, uint32_t n) {
    float products[BKV_TILE * BKV_TILE], largest = 0;
    for (uint32_t tile = 0; tile * BKV_TILE < n; tile++) {
        block_product(by_rows, by_pairs, tile, tile, false, false, products, BKV_TILE);
        for (uint32_t r = 0; r < BKV_TILE; r++) {
            float square = products[r * (BKV_TILE + 1)];
            largest = square > largest ? square : largest;
        }
    }
    return largest;
}

static void both_products(const operand_t *by_rows, const operand_t *by_pairs, const bkv_kernel_block_t *block, float *out) {
    block_product(by_rows, by_pairs, block->i / BKV_TILE, block->j / BKV_TILE, block->rows > BKV_TILE,
                  block->columns > BKV_TILE, out, BKV_BLOCK);
}

void bkv_amx_kernel(const bkv_rows_t *keys, const bkv_rows_t *values, const bkv_kernel_t *kernel, float *gram, void *scratch) {
    uint32_t padded = bkv_tile_pad(keys->n);
    operand_t k_rows, k_pairs, v_rows, v_pairs;
    both_load(values, both_load(keys, scratch, &k_rows, &k_pairs), &v_rows, &v_pairs);
    tiles_begin();
    float shift = bkv_kernel_shift(kernel, largest_square(&k_rows, &k_pairs, keys->n));
    bkv_kernel_block_t block;
    for (uint32_t i = 0; i < padded; i += BKV_BLOCK) {
        for (uint32_t j = i; j < padded; j += BKV_BLOCK) {
            kernel_block_place(&block, i, j, padded);
            both_products(&k_rows, &k_pairs, &block, block.keys);
            both_products(&v_rows, &v_pairs, &block, block.values);
            kernel_block_finish(&block, kernel, shift, gram, padded);
        }
    }
    _tile_release();
}

// Adds a block's first `rows` rows to those of fit, which end after `columns` columns.
static void block_add(float block[BKV_BLOCK][BKV_BLOCK], uint32_t rows, uint32_t columns, float *fit, uint32_t dim) {
    for (uint32_t r = 0; r < rows; r++, fit += dim) {
        for (uint32_t c = 0; c < BKV_BLOCK && c < columns; c += BKV_TILE) {
            vec_store_part(fit + c, columns - c, vec_load_part(fit + c, columns - c) + vec_load(&block[r][c]));
        }
    }
}

void bkv_amx_mix(const float *parts, uint32_t tokens, uint32_t rows, uint32_t stride, const float *values, uint32_t dim,
                 float *fit, void *scratch) {
    operand_t left = {scratch, steps_of(tokens)}, right = left;
    right.tiles += (size_t)bkv_tile_pad(rows) / BKV_TILE * left.steps * TILE_BYTES;
    columns_load(parts, tokens, bkv_tile_pad(rows), stride, true, &left);
    columns_load(values, tokens, dim, dim, false, &right);
    _Alignas(64) float block[BKV_BLOCK][BKV_BLOCK];
    tiles_begin();
    for (uint32_t i = 0; i < rows; i += BKV_BLOCK) {
        for (uint32_t j = 0; j < dim; j += BKV_BLOCK) {
            bool two_rows = i + BKV_TILE < rows, two_columns = j + BKV_TILE < dim;
            block_product(&left, &right, i / BKV_TILE, j / BKV_TILE, two_rows, two_columns, block[0], BKV_BLOCK);
            block_add(block, two_rows ? BKV_BLOCK : BKV_TILE, dim - j, fit + (size_t)i * dim + j, dim);
        }
    }
    _tile_release();
}

#endif
