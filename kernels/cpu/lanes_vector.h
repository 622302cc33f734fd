// lanes_vector.h - the operations of lanes.h in vectors as wide as the file that includes this is compiled for: lanes_avx2.c and
// lanes_avx512.c, which pack codes in their own way and make the table.
//
// Products are sums of outer products of columns: BKV_VEC_ROWS elements of one matrix, each broadcast, times two vectors of the
// other, in as many accumulators as keep the multipliers busy (Goto and van de Geijn, ACM TOMS 34(3), 2008).
#ifndef BKV_LANES_VECTOR_H
#define BKV_LANES_VECTOR_H

#include "vec.h"

#ifdef BKV_VEC

#include "convert.h"
#include "lanes_kernel.h"
#include "quant.h"

#include <math.h>

// Rows of one block of sums: with two vectors of columns they fill half the registers of either width.
#define BKV_VEC_ROWS (BKV_VEC / 2)

// bkv_codes_pack of quant.h, by the file that includes this.
static void vec_pack(const uint8_t *codes, uint32_t n, uint32_t bits, uint8_t *out);

static float vector_dot(const float *a, const float *b, uint32_t n) {
    vec_t sum[4] = {vec_set(0), vec_set(0), vec_set(0), vec_set(0)};
    uint32_t i = 0;
    for (; i + 4 * BKV_VEC <= n; i += 4 * BKV_VEC) {
        for (uint32_t c = 0; c < 4; c++) {
            sum[c] = vec_fma(vec_load(a + i + c * BKV_VEC), vec_load(b + i + c * BKV_VEC), sum[c]);
        }
    }
    for (; i < n; i += BKV_VEC) {
        sum[0] = vec_fma(vec_load_part(a + i, n - i), vec_load_part(b + i, n - i), sum[0]);
    }
    return vec_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

static void vector_axpy(float a, const float *x, uint32_t n, float *y) {
    vec_t factor = vec_set(a);
    uint32_t i = 0;
    for (; i + BKV_VEC <= n; i += BKV_VEC) {
        vec_store(y + i, vec_fma(factor, vec_load(x + i), vec_load(y + i)));
    }
    if (i < n) {
        vec_store_part(y + i, n - i, vec_fma(factor, vec_load_part(x + i, n - i), vec_load_part(y + i, n - i)));
    }
}

// Up to four vectors of columns at once, in registers.
static inline __attribute__((always_inline)) void weigh_columns(const bkv_rows_t *rows, const float *weight, uint32_t i,
                                                                const uint32_t vectors, float *out) {
    vec_t sum[4];
    uint32_t left = rows->dim - i;
    for (uint32_t c = 0; c < vectors; c++) {
        sum[c] = vec_load_part(out + i + c * BKV_VEC, left - c * BKV_VEC);
    }
    for (uint32_t t = 0; t < rows->n; t++) {
        const float *row = bkv_rows_at(rows, t) + i;
        for (uint32_t c = 0; c < vectors; c++) {
            vec_t part = vectors == 1 ? vec_load_part(row, left) : vec_load(row + c * BKV_VEC);
            sum[c] = vec_fma(vec_set(weight[t]), part, sum[c]);
        }
    }
    for (uint32_t c = 0; c < vectors; c++) {
        vec_store_part(out + i + c * BKV_VEC, left - c * BKV_VEC, sum[c]);
    }
}

static void vector_weigh(const bkv_rows_t *rows, const float *weight, float *out) {
    uint32_t i = 0;
    for (; i + 4 * BKV_VEC <= rows->dim; i += 4 * BKV_VEC) {
        weigh_columns(rows, weight, i, 4, out);
    }
    for (; i < rows->dim; i += BKV_VEC) {
        weigh_columns(rows, weight, i, 1, out);
    }
}

static void vector_to_float(bkv_dtype_t dtype, const void *src, size_t n, float *out) {
    const uint8_t *bytes = src;
    size_t whole = dtype == BKV_FP32 ? 0 : n / BKV_VEC * BKV_VEC;
    if (dtype == BKV_BF16) {
        for (size_t i = 0; i < whole; i += BKV_VEC) {
            vec_store(out + i, vec_from_bf16(bytes + 2 * i));
        }
    } else if (dtype == BKV_FP16) {
        for (size_t i = 0; i < whole; i += BKV_VEC) {
            vec_store(out + i, vec_from_half(bytes + 2 * i));
        }
    }
    bkv_row_to_float(dtype, bytes + bkv_dtype_bytes(dtype) * whole, n - whole, out + whole);
}

// Reading sections is a file of its own.
#include "lanes_read.h"

// -- products

// Strips of BKV_TILE rows as columns: strip s has at [d][c] element d of row 16 s + c, 0 where there is no such row.
static void strips_load(const bkv_rows_t *rows, float *strips) {
    uint32_t dim = rows->dim;
    for (uint32_t first = 0; first < bkv_tile_pad(rows->n); first += BKV_VEC) {
        float *strip = strips + (size_t)(first / BKV_TILE) * BKV_TILE * dim + first % BKV_TILE;
        const float *row[BKV_VEC] = {NULL};
        for (uint32_t r = 0; r < BKV_VEC && first + r < rows->n; r++) {
            row[r] = bkv_rows_at(rows, first + r);
        }
        for (uint32_t d = 0; d < dim; d += BKV_VEC) {
            vec_t block[BKV_VEC], centre = rows->centre ? vec_load_part(rows->centre + d, dim - d) : vec_set(0);
            for (uint32_t r = 0; r < BKV_VEC; r++) {
                block[r] = row[r] ? vec_load_part(row[r] + d, dim - d) - centre : vec_set(0);
            }
            vec_transpose(block);
            uint32_t columns = dim - d < BKV_VEC ? dim - d : BKV_VEC;
            for (uint32_t c = 0; c < columns; c++) {
                vec_store(strip + (size_t)(d + c) * BKV_TILE, block[c]);
            }
        }
    }
}

// sum[r][c] = sum over k < depth of a[k * a_step + r] * (vector c of b at k * b_step + c * b_gap). `width` columns of b are
// there, at most two vectors; it is a constant where this is inlined, so that the sums stay in registers.
static inline __attribute__((always_inline)) void outer_sum(const float *a, size_t a_step, const float *b, size_t b_step,
                                                            size_t b_gap, uint32_t depth, const uint32_t width,
                                                            vec_t sum[BKV_VEC_ROWS][2]) {
    vec_t total[BKV_VEC_ROWS][2];
    for (uint32_t r = 0; r < BKV_VEC_ROWS; r++) {
        total[r][0] = total[r][1] = vec_set(0);
    }
    for (uint32_t k = 0; k < depth; k++, a += a_step, b += b_step) {
        vec_t first = width < BKV_VEC ? vec_load_part(b, width) : vec_load(b);
        vec_t second = width < 2 * BKV_VEC ? first : vec_load(b + b_gap);
        for (uint32_t r = 0; r < BKV_VEC_ROWS; r++) {
            vec_t factor = vec_set(a[r]);
            total[r][0] = vec_fma(factor, first, total[r][0]);
            if (width == 2 * BKV_VEC) {
                total[r][1] = vec_fma(factor, second, total[r][1]);
            }
        }
    }
    for (uint32_t r = 0; r < BKV_VEC_ROWS; r++) {
        sum[r][0] = total[r][0];
        sum[r][1] = total[r][1];
    }
}

// Rows [i, i + BKV_VEC_ROWS) of the products with `vectors` vectors of columns from j on, the first at `out`.
static inline __attribute__((always_inline)) void products_tile(const float *left, const float *right, uint32_t i, uint32_t j,
                                                                uint32_t dim, const uint32_t vectors, float *out,
                                                                uint32_t stride) {
    vec_t sum[BKV_VEC_ROWS][2];
    size_t strip = (size_t)BKV_TILE * dim;
    outer_sum(left + i / BKV_TILE * strip + i % BKV_TILE, BKV_TILE, right + j / BKV_TILE * strip, BKV_TILE,
              BKV_VEC == BKV_TILE ? strip : BKV_VEC, dim, vectors * BKV_VEC, sum);
    for (uint32_t r = 0; r < BKV_VEC_ROWS; r++) {
        for (uint32_t c = 0; c < vectors; c++) {
            vec_store(out + (size_t)r * stride + c * BKV_VEC, sum[r][c]);
        }
    }
}

static size_t vector_products_scratch(uint32_t na, uint32_t nb, uint32_t dim) {
    return ((size_t)bkv_tile_pad(na) + bkv_tile_pad(nb)) * dim * sizeof(float);
}

static void vector_products(const bkv_rows_t *a, const bkv_rows_t *b, float *out, uint32_t stride, void *scratch) {
    uint32_t rows = bkv_tile_pad(a->n), columns = b ? bkv_tile_pad(b->n) : rows;
    float *left = scratch, *right = b ? left + (size_t)rows * a->dim : left;
    strips_load(a, left);
    if (b) {
        strips_load(b, right);
    }
    for (uint32_t i = 0; i < rows; i += BKV_VEC_ROWS) {
        uint32_t j = b ? 0 : i / BKV_TILE * BKV_TILE;
        for (; j + 2 * BKV_VEC <= columns; j += 2 * BKV_VEC) {
            products_tile(left, right, i, j, a->dim, 2, out + (size_t)i * stride + j, stride);
        }
        if (j < columns) {
            products_tile(left, right, i, j, a->dim, 1, out + (size_t)i * stride + j, stride);
        }
    }
}

// -- the walk's kernel

static size_t vector_kernel_scratch(uint32_t n, uint32_t key_dim, uint32_t value_dim) {
    return (size_t)bkv_tile_pad(n) * (key_dim + value_dim) * sizeof(float);
}

// The largest square of a row.
static float strips_largest(const float *strips, uint32_t n, uint32_t dim) {
    vec_t largest = vec_set(0);
    for (uint32_t first = 0; first < n; first += BKV_VEC) {
        const float *strip = strips + (size_t)(first / BKV_TILE) * BKV_TILE * dim + first % BKV_TILE;
        vec_t sum = vec_set(0);
        for (uint32_t d = 0; d < dim; d++) {
            vec_t element = vec_load(strip + (size_t)d * BKV_TILE);
            sum = vec_fma(element, element, sum);
        }
        largest = vec_max(largest, sum);
    }
    return vec_most(largest);
}

static void block_products(const float *strips, uint32_t dim, const bkv_kernel_block_t *block, float *out) {
    for (uint32_t r = 0; r < block->rows; r += BKV_VEC_ROWS) {
        uint32_t c = 0;
        for (; c + 2 * BKV_VEC <= block->columns; c += 2 * BKV_VEC) {
            products_tile(strips, strips, block->i + r, block->j + c, dim, 2, out + r * BKV_BLOCK + c, BKV_BLOCK);
        }
        if (c < block->columns) {
            products_tile(strips, strips, block->i + r, block->j + c, dim, 1, out + r * BKV_BLOCK + c, BKV_BLOCK);
        }
    }
}

static void vector_kernel(const bkv_rows_t *keys, const bkv_rows_t *values, const bkv_kernel_t *kernel, float *gram,
                          void *scratch) {
    uint32_t padded = bkv_tile_pad(keys->n);
    float *key_strips = scratch, *value_strips = key_strips + (size_t)padded * keys->dim;
    strips_load(keys, key_strips);
    strips_load(values, value_strips);
    float shift = bkv_kernel_shift(kernel, strips_largest(key_strips, padded, keys->dim));
    bkv_kernel_block_t block;
    for (uint32_t i = 0; i < padded; i += BKV_BLOCK) {
        for (uint32_t j = i; j < padded; j += BKV_BLOCK) {
            kernel_block_place(&block, i, j, padded);
            block_products(key_strips, keys->dim, &block, block.keys);
            block_products(value_strips, values->dim, &block, block.values);
            kernel_block_finish(&block, kernel, shift, gram, padded);
        }
    }
}

// -- refit

static void vector_shares(float *parts, uint32_t tokens, uint32_t rows, uint32_t stride, const float *half, float scale,
                          const float *weight, float *mass) {
    for (uint32_t t = 0; t < tokens; t++, parts += stride) {
        vec_t top = vec_set(-INFINITY), sum = vec_set(0);
        for (uint32_t r = 0; r < rows; r += BKV_VEC) {
            vec_t logit = (vec_load(parts + r) - vec_load(half + r)) * vec_set(scale);
            vec_store(parts + r, logit);
            top = vec_max(top, logit);
        }
        top = vec_set(vec_most(top));
        for (uint32_t r = 0; r < rows; r += BKV_VEC) {
            vec_t part = vec_exp(vec_load(parts + r) - top);
            vec_store(parts + r, part);
            sum += part;
        }
        vec_t factor = vec_set(weight[t] / vec_sum(sum));
        for (uint32_t r = 0; r < rows; r += BKV_VEC) {
            vec_t part = vec_load(parts + r) * factor;
            vec_store(parts + r, part);
            vec_store(mass + r, vec_load(mass + r) + part);
        }
    }
}

// `width` columns of fit from column i on, a constant where this is inlined.
static inline __attribute__((always_inline)) void mix_columns(const float *parts, uint32_t tokens, uint32_t rows,
                                                              uint32_t stride, const float *values, uint32_t dim, uint32_t i,
                                                              const uint32_t width, float *fit) {
    for (uint32_t r = 0; r < rows; r += BKV_VEC_ROWS) {
        vec_t sum[BKV_VEC_ROWS][2];
        outer_sum(parts + r, stride, values + i, dim, BKV_VEC, tokens, width, sum);
        for (uint32_t at = 0; at < BKV_VEC_ROWS; at++) {
            for (uint32_t c = 0; c * BKV_VEC < width; c++) {
                float *to = fit + (size_t)(r + at) * dim + i + c * BKV_VEC;
                vec_store_part(to, width, vec_load_part(to, width) + sum[at][c]);
            }
        }
    }
}

static void vector_mix(const float *parts, uint32_t tokens, uint32_t rows, uint32_t stride, const float *values, uint32_t dim,
                       float *fit, void *scratch) {
    (void)scratch;
    uint32_t i = 0;
    for (; i + 2 * BKV_VEC <= dim; i += 2 * BKV_VEC) {
        mix_columns(parts, tokens, rows, stride, values, dim, i, 2 * BKV_VEC, fit);
    }
    for (; i + BKV_VEC <= dim; i += BKV_VEC) {
        mix_columns(parts, tokens, rows, stride, values, dim, i, BKV_VEC, fit);
    }
    if (i < dim) {
        mix_columns(parts, tokens, rows, stride, values, dim, i, BKV_DIM_STEP, fit);
    }
}

// -- quantising: the same numbers, bit by bit, as quant.c

static inline vec_t clamp_half(vec_t a) {
    return vec_max(vec_min(a, vec_set(BKV_HALF_MAX)), vec_set(-BKV_HALF_MAX));
}

// Scale and zero as they are stored, scale in the lower half of each lane of the result, so that codes are chosen against what
// the reader will see.
static inline vec_int_t params_choose(vec_t low, vec_t high, float top, vec_t *inverse, vec_t *zero) {
    vec_int_t zero_half = vec_to_half(clamp_half(low));
    *zero = vec_half_to_float(zero_half);
    vec_t range = clamp_half(high) - *zero;
    vec_int_t scale_half = vec_to_half(vec_where_positive(range, range / vec_set(top)));
    vec_t scale = vec_half_to_float(scale_half);
    *inverse = vec_where_positive(scale, vec_set(1.0f) / scale);
    return scale_half | zero_half << 16;
}

static inline void codes_store(vec_t value, vec_t inverse, vec_t zero, float top, uint8_t *codes) {
    vec_t code = (value - zero) * inverse + vec_set(0.5f);
    vec_store_bytes(codes, vec_min(vec_max(code, vec_set(0)), vec_set(top)));
}

// Codes of a few rows on their way from vectors of lanes to packed bytes: packing loads them wider than they were stored, which
// waits until the stores are done.
#define ROWS_AT_ONCE 4

typedef struct row_codes {
    uint8_t rows[ROWS_AT_ONCE][BKV_MAX_DIM + BKV_VEC];
} row_codes_t;

static inline void rows_pack(const row_codes_t *codes, uint32_t count, uint32_t dim, uint32_t bits, uint8_t *out) {
    for (uint32_t t = 0; t < count; t++) {
        vec_pack(codes->rows[t], dim, bits, out + (size_t)t * (dim * bits / 8));
    }
}

// Smallest and largest of one vector of channels over all rows, in four chains.
static inline void channel_ranges(const float *rows, uint32_t count, uint32_t dim, uint32_t width, vec_t *low, vec_t *high) {
    vec_t least[4], most[4];
    for (uint32_t c = 0; c < 4; c++) {
        least[c] = most[c] = vec_load_part(rows, width);
    }
    uint32_t t = 1;
    for (; t + 4 <= count; t += 4) {
        for (uint32_t c = 0; c < 4; c++) {
            vec_t row = vec_load_part(rows + (size_t)(t + c) * dim, width);
            least[c] = vec_min(least[c], row);
            most[c] = vec_max(most[c], row);
        }
    }
    for (; t < count; t++) {
        vec_t row = vec_load_part(rows + (size_t)t * dim, width);
        least[0] = vec_min(least[0], row);
        most[0] = vec_max(most[0], row);
    }
    *low = vec_min(vec_min(least[0], least[1]), vec_min(least[2], least[3]));
    *high = vec_max(vec_max(most[0], most[1]), vec_max(most[2], most[3]));
}

static void vector_quant_keys(const float *rows, uint32_t count, uint32_t dim, uint32_t bits, uint8_t *params, uint8_t *codes,
                              float *scratch) {
    float *inverses = scratch, *zeros = scratch + dim, top = (float)((1u << bits) - 1u);
    if (count == 0) {
        memset(params, 0, 4 * (size_t)dim);
        return;
    }
    for (uint32_t i = 0; i < dim; i += BKV_VEC) {
        uint32_t width = dim - i < BKV_VEC ? dim - i : BKV_VEC;
        vec_t low, high, inverse, zero;
        channel_ranges(rows + i, count, dim, width, &low, &high);
        vec_int_t pair = params_choose(low, high, top, &inverse, &zero);
        memcpy(params + 4 * (size_t)i, &pair, 4 * (size_t)width);
        vec_store_part(inverses + i, width, inverse);
        vec_store_part(zeros + i, width, zero);
    }
    row_codes_t few;
    for (uint32_t first = 0; first < count; first += ROWS_AT_ONCE) {
        uint32_t part = count - first < ROWS_AT_ONCE ? count - first : ROWS_AT_ONCE;
        const float *row = rows + (size_t)first * dim;
        for (uint32_t i = 0; i < dim; i += BKV_VEC) {
            vec_t inverse = vec_load_part(inverses + i, dim - i), zero = vec_load_part(zeros + i, dim - i);
            for (uint32_t t = 0; t < part; t++) {
                codes_store(vec_load_part(row + (size_t)t * dim + i, dim - i), inverse, zero, top, few.rows[t] + i);
            }
        }
        rows_pack(&few, part, dim, bits, codes + (size_t)first * (dim * bits / 8));
    }
}

#define VALUE_GROUPS (BKV_MAX_DIM / BKV_VALUE_GROUP_DIMS)

// Ranges of one group of channels of up to BKV_VEC rows, one row a lane.
static inline void row_ranges(const float *rows, uint32_t count, uint32_t dim, uint32_t width, vec_t *low, vec_t *high) {
    float least[BKV_VEC] = {0}, most[BKV_VEC] = {0};
    for (uint32_t t = 0; t < count; t++) {
        const float *row = rows + (size_t)t * dim;
        vec_t small = vec_load_or(row, width, vec_set(row[0])), large = small;
        for (uint32_t i = BKV_VEC; i < width; i += BKV_VEC) {
            vec_t next = vec_load_or(row + i, width - i, small);
            small = vec_min(small, next);
            large = vec_max(large, next);
        }
        least[t] = vec_least(small);
        most[t] = vec_most(large);
    }
    *low = vec_load(least);
    *high = vec_load(most);
}

static void value_rows(const float *rows, uint32_t count, uint32_t dim, uint32_t bits, uint8_t *params, uint8_t *codes) {
    float inverses[VALUE_GROUPS][BKV_VEC], zeros[VALUE_GROUPS][BKV_VEC], top = (float)((1u << bits) - 1u);
    uint32_t groups = (dim + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS;
    for (uint32_t g = 0; g < groups; g++) {
        uint32_t first = g * BKV_VALUE_GROUP_DIMS, left = dim - first;
        vec_t low, high, inverse, zero;
        row_ranges(rows + first, count, dim, left < BKV_VALUE_GROUP_DIMS ? left : BKV_VALUE_GROUP_DIMS, &low, &high);
        vec_int_t pair = params_choose(low, high, top, &inverse, &zero);
        vec_store(inverses[g], inverse);
        vec_store(zeros[g], zero);
        for (uint32_t t = 0; t < count; t++) {
            memcpy(params + 4 * ((size_t)t * groups + g), (const uint8_t *)&pair + 4 * (size_t)t, 4);
        }
    }
    row_codes_t few;
    for (uint32_t first = 0; first < count; first += ROWS_AT_ONCE) {
        uint32_t part = count - first < ROWS_AT_ONCE ? count - first : ROWS_AT_ONCE;
        for (uint32_t t = 0; t < part; t++) {
            const float *row = rows + (size_t)(first + t) * dim;
            for (uint32_t i = 0; i < dim; i += BKV_VEC) {
                uint32_t g = i / BKV_VALUE_GROUP_DIMS;
                vec_t inverse = vec_set(inverses[g][first + t]), zero = vec_set(zeros[g][first + t]);
                codes_store(vec_load_part(row + i, dim - i), inverse, zero, top, few.rows[t] + i);
            }
        }
        rows_pack(&few, part, dim, bits, codes + (size_t)first * (dim * bits / 8));
    }
}

static void vector_quant_values(const float *rows, uint32_t count, uint32_t dim, uint32_t bits, uint8_t *params,
                                uint8_t *codes) {
    uint32_t groups = (dim + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS;
    for (uint32_t t = 0; t < count; t += BKV_VEC) {
        value_rows(rows + (size_t)t * dim, count - t < BKV_VEC ? count - t : BKV_VEC, dim, bits,
                   params + 4 * (size_t)t * groups, codes + (size_t)t * (dim * bits / 8));
    }
}

// A table of all of the above but for what multiplies matrices: the functions <matrices>_products, ...
#define BKV_LANES_VECTOR(matrices)                                                                                             \
    {                                                                                                                          \
        .dot = vector_dot, .axpy = vector_axpy, .weigh = vector_weigh, .to_float = vector_to_float,                            \
        .products = matrices##_products, .products_scratch = matrices##_products_scratch, .kernel = matrices##_kernel,         \
        .kernel_scratch = matrices##_kernel_scratch, .shares = vector_shares, .mix = matrices##_mix,                           \
        .quant_keys = vector_quant_keys, .quant_values = vector_quant_values, .read_keys = vector_read_keys,                   \
        .read_values = vector_read_values,                                                                                     \
    }

#endif
#endif
