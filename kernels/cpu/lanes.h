// lanes.h - internal: the inner loops of compression and folding, one table for each instruction set. balance.c and its
// neighbours and dense.c are the one driver over them: they say what is computed, a table how fast.
//
// lanes_ref.c defines each operation in plain C. lanes_avx2.c and lanes_avx512.c are the vector code of lanes_vector.h in two
// widths; lanes_amx.c takes that of AVX-512 and multiplies matrices with tiles. Another table may round differently (sums in
// another order, exp to 1e-6, with AMX the factors of matrix products to bfloat16), and always rounds the same way.
//
// Rows are contiguous floats; dims are multiples of 8. Memory that is read or written belongs to the caller and does not
// overlap unless said so. All of it is re-entrant.
#ifndef BKV_LANES_H
#define BKV_LANES_H

#include "summary.h"

// Rows and columns of matrices are padded to this: the tile of AMX, one register of AVX-512, two of AVX2.
#define BKV_TILE 16

static inline uint32_t bkv_tile_pad(uint32_t n) {
    return (n + BKV_TILE - 1) / BKV_TILE * BKV_TILE;
}

// Rows of a matrix, perhaps picked from a larger one, perhaps about a centre.
typedef struct bkv_rows {
    const float *rows;
    const uint32_t *list; // row i is rows[list[i]]; NULL: rows[i]
    const float *centre;  // [dim], subtracted from each; NULL: nothing is
    uint32_t n, dim;
} bkv_rows_t;

static inline const float *bkv_rows_at(const bkv_rows_t *rows, uint32_t i) {
    return rows->rows + (size_t)(rows->list ? rows->list[i] : i) * rows->dim;
}

typedef struct bkv_kernel {
    float scale, top, lift;
} bkv_kernel_t;

// What takes the largest exponent of a kernel down to its top. No inner product is larger than the largest square.
static inline float bkv_kernel_shift(const bkv_kernel_t *kernel, float largest_square) {
    float exponent = largest_square * kernel->scale;
    return exponent > kernel->top ? exponent - kernel->top : 0.0f;
}

typedef struct bkv_lanes {
    // Inner product of n elements.
    float (*dot)(const float *a, const float *b, uint32_t n);

    // y += a * x
    void (*axpy)(float a, const float *x, uint32_t n, float *y);

    // out[i] += sum over t of weight[t] * rows[t][i].
    void (*weigh)(const bkv_rows_t *rows, const float *weight, float *out);

    // n elements of a dtype, at any address, to float.
    void (*to_float)(bkv_dtype_t dtype, const void *src, size_t n, float *out);

    // out[i][j] = <a_i, b_j>, rows of `stride` floats, for i < pad(a->n) and j < pad(b->n), where what is not there counts as 0.
    // b NULL means a itself, and then only j >= i / 16 * 16 are sure to be written. a and b have the same dim; stride is at
    // least pad(b->n); scratch: products_scratch bytes, 64-byte aligned.
    void (*products)(const bkv_rows_t *a, const bkv_rows_t *b, float *out, uint32_t stride, void *scratch);
    size_t (*products_scratch)(uint32_t na, uint32_t nb, uint32_t dim); // where b is NULL, nb is na

    // The walk's kernel over the same n tokens' keys and values, all of gram [pad(n)][pad(n)], where what is not there counts as 0:
    //   gram[i][j] = exp(min(<k_i, k_j> * scale - shift, top)) * (<v_i, v_j> + lift)
    // shift is what brings the largest <k_i, k_i> * scale down to top, and not below 0. scratch: kernel_scratch bytes.
    void (*kernel)(const bkv_rows_t *keys, const bkv_rows_t *values, const bkv_kernel_t *kernel, float *gram, void *scratch);
    size_t (*kernel_scratch)(uint32_t n, uint32_t key_dim, uint32_t value_dim);

    // Softmax over rows, for each token t < tokens: parts[t][r] = weight[t] * softmax_r(scale * (parts[t][r] - half[r])), and
    // mass[r] += parts[t][r]. stride, a multiple of BKV_TILE, is the length of a row of parts; half[r] is INFINITY for r in
    // [rows, pad(rows)), where parts are finite and may be overwritten, and so may mass.
    void (*shares)(float *parts, uint32_t tokens, uint32_t rows, uint32_t stride, const float *half, float scale,
                   const float *weight, float *mass);

    // fit[r][i] += sum over t of parts[t][r] * values[t][i], r < rows, i < dim. stride is that of parts, a multiple of BKV_TILE,
    // and parts are finite up to pad(rows); fit has pad(rows) rows. scratch: products_scratch(rows, dim, tokens) bytes.
    void (*mix)(const float *parts, uint32_t tokens, uint32_t rows, uint32_t stride, const float *values, uint32_t dim,
                float *fit, void *scratch);

    // bkv_quant_key_group of quant.h, and bkv_quant_value_row over `count` rows.
    void (*quant_keys)(const float *rows, uint32_t count, uint32_t dim, uint32_t bits, uint8_t *params, uint8_t *codes,
                       float *scratch);
    void (*quant_values)(const float *rows, uint32_t count, uint32_t dim, uint32_t bits, uint8_t *params, uint8_t *codes);

    // Keys or values of rows [first, first + count) of a section, as bkv_section_read gives them: the same to the bit.
    void (*read_keys)(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *k);
    void (*read_values)(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *v);
} bkv_lanes_t;

extern const bkv_lanes_t bkv_lanes_ref;
#if defined(__x86_64__)
extern const bkv_lanes_t bkv_lanes_avx2, bkv_lanes_avx512, bkv_lanes_amx;
#endif

#endif
