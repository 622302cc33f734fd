// lanes_amx.c - products of rows on the tiles of AMX: factors rounded to bfloat16, sums in float. lanes_avx512.c has the rest of
// the inner loops, and the table.
//
// A tile is 16 rows of 64 bytes. TDPBF16PS takes 16 rows of 32 elements of a; and of b 16 rows of pairs of elements, one row for
// each pair of dims with a pair for each of 16 columns: the transpose of b's 16 rows by pairs, 32 bits.
#include "lanes.h"

#if defined(__AMX_BF16__)

#include "lanes_amx.h"
#include "vec.h"

#include <string.h>

#define TILE_DIMS  32
#define TILE_BYTES 1024

// Operands: [tiles of 16 rows][steps of 32 dims] tiles, zero where there is no row or dim.
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

// Either order may be NULL.
static void operand_load(const bkv_rows_t *rows, const operand_t *by_rows, const operand_t *by_pairs) {
    for (uint32_t tile = 0; tile * BKV_TILE < rows->n; tile++) {
        for (uint32_t d = 0; d < rows->dim; d += TILE_DIMS) {
            vec_t block[BKV_TILE];
            for (uint32_t r = 0; r < BKV_TILE; r++) {
                uint32_t t = tile * BKV_TILE + r;
                block[r] = t < rows->n ? row_load(bkv_rows_at(rows, t), rows->centre, d, rows->dim) : vec_set(0);
            }
            if (by_rows) {
                memcpy(tile_at(by_rows, tile, d / TILE_DIMS), block, TILE_BYTES);
            }
            if (by_pairs) {
                vec_transpose(block);
                memcpy(tile_at(by_pairs, tile, d / TILE_DIMS), block, TILE_BYTES);
            }
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

// Tiles (i, j), (i, j + 1), (i + 1, j), (i + 1, j + 1) of the product; the second row or column only where there is one.
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
    float *at = out + (size_t)i * BKV_TILE * stride + (size_t)j * BKV_TILE;
    size_t bytes = stride * sizeof(float);
    _tile_stored(0, at, bytes);
    if (two_columns) {
        _tile_stored(1, at + BKV_TILE, bytes);
    }
    if (two_rows) {
        _tile_stored(2, at + (size_t)BKV_TILE * stride, bytes);
        if (two_columns) {
            _tile_stored(3, at + (size_t)BKV_TILE * stride + BKV_TILE, bytes);
        }
    }
}

void bkv_amx_products(const bkv_rows_t *a, const bkv_rows_t *b, float *out, uint32_t stride, void *scratch) {
    uint32_t rows = bkv_tile_pad(a->n) / BKV_TILE, columns = b ? bkv_tile_pad(b->n) / BKV_TILE : rows;
    operand_t left = {scratch, steps_of(a->dim)}, right = left;
    right.tiles += (size_t)rows * left.steps * TILE_BYTES;
    operand_load(a, &left, b ? NULL : &right);
    if (b) {
        operand_load(b, NULL, &right);
    }
    tiles_begin();
    for (uint32_t i = 0; i < rows; i += 2) {
        for (uint32_t j = b ? 0 : i; j < columns; j += 2) {
            block_product(&left, &right, i, j, i + 1 < rows, j + 1 < columns, out, stride);
        }
    }
    _tile_release();
}

#endif
