// lanes_ref.c - the inner loops in plain C: what every other table is held against. Sums run in fixed lanes, which the compiler
// may keep in whatever registers it has: the result does not depend on it.
#include "lanes.h"

#include "convert.h"
#include "quant.h"
#include "record.h"
#include "vector.h"

#include <math.h>

static float ref_dot(const float *a, const float *b, uint32_t n) {
    return bkv_dot(a, b, n);
}

static void ref_axpy(float a, const float *x, uint32_t n, float *y) {
    bkv_axpy(a, x, n, y);
}

static void ref_weigh(const bkv_rows_t *rows, const float *weight, float *out) {
    for (uint32_t t = 0; t < rows->n; t++) {
        bkv_axpy(weight[t], bkv_rows_at(rows, t), rows->dim, out);
    }
}

static size_t ref_products_scratch(uint32_t na, uint32_t nb, uint32_t dim) {
    return ((size_t)bkv_tile_pad(na) + bkv_tile_pad(nb)) * dim * sizeof(float);
}

// Rows as columns, zero up to `padded`.
static void columns_load(const bkv_rows_t *rows, uint32_t padded, float *columns) {
    for (uint32_t t = 0; t < rows->n; t++) {
        const float *row = bkv_rows_at(rows, t);
        for (uint32_t d = 0; d < rows->dim; d++) {
            columns[(size_t)d * padded + t] = row[d] - (rows->centre ? rows->centre[d] : 0.0f);
        }
    }
    for (uint32_t d = 0; d < rows->dim; d++) {
        for (uint32_t t = rows->n; t < padded; t++) {
            columns[(size_t)d * padded + t] = 0;
        }
    }
}

// Inner products of a 4 x 8 tile of columns: small enough for the registers of any machine.
static void tile_dot(const float *restrict a, uint32_t a_stride, const float *restrict b, uint32_t b_stride, uint32_t dim,
                     float *restrict out, uint32_t stride) {
    float sum[4][8] = {{0}};
    for (uint32_t d = 0; d < dim; d++) {
        const float *x = a + (size_t)d * a_stride, *y = b + (size_t)d * b_stride;
        for (uint32_t r = 0; r < 4; r++) {
            for (uint32_t c = 0; c < 8; c++) {
                sum[r][c] += x[r] * y[c];
            }
        }
    }
    for (uint32_t r = 0; r < 4; r++) {
        memcpy(out + (size_t)r * stride, sum[r], sizeof(sum[r]));
    }
}

static void ref_products(const bkv_rows_t *a, const bkv_rows_t *b, float *out, uint32_t stride, void *scratch) {
    uint32_t rows = bkv_tile_pad(a->n), columns = b ? bkv_tile_pad(b->n) : rows;
    float *left = scratch, *right = b ? left + (size_t)rows * a->dim : left;
    columns_load(a, rows, left);
    if (b) {
        columns_load(b, columns, right);
    }
    for (uint32_t i = 0; i < rows; i += 4) {
        for (uint32_t j = b ? 0 : i / BKV_TILE * BKV_TILE; j < columns; j += 8) {
            tile_dot(left + i, rows, right + j, columns, a->dim, out + (size_t)i * stride + j, stride);
        }
    }
}

static size_t ref_kernel_scratch(uint32_t n, uint32_t key_dim, uint32_t value_dim) {
    size_t padded = bkv_tile_pad(n);
    return padded * padded * sizeof(float) + ref_products_scratch(n, n, key_dim > value_dim ? key_dim : value_dim);
}

static void ref_kernel(const bkv_rows_t *keys, const bkv_rows_t *values, const bkv_kernel_t *kernel, float *gram,
                       void *scratch) {
    uint32_t padded = bkv_tile_pad(keys->n);
    float *products = scratch, top = 0;
    ref_products(keys, NULL, products, padded, products + (size_t)padded * padded);
    ref_products(values, NULL, gram, padded, products + (size_t)padded * padded);
    for (uint32_t i = 0; i < padded; i++) {
        float own = products[(size_t)i * padded + i];
        top = own > top ? own : top;
    }
    float shift = bkv_kernel_shift(kernel, top);
    for (uint32_t i = 0; i < padded; i++) {
        for (uint32_t j = i / BKV_TILE * BKV_TILE; j < padded; j++) {
            size_t at = (size_t)i * padded + j;
            float exponent = products[at] * kernel->scale - shift;
            gram[at] = expf(exponent < kernel->top ? exponent : kernel->top) * (gram[at] + kernel->lift);
        }
    }
    for (uint32_t i = 0; i < padded; i++) {
        for (uint32_t j = 0; j < i / BKV_TILE * BKV_TILE; j++) {
            gram[(size_t)i * padded + j] = gram[(size_t)j * padded + i];
        }
    }
}

static void ref_shares(float *parts, uint32_t tokens, uint32_t rows, uint32_t stride, const float *half, float scale,
                       const float *weight, float *mass) {
    for (uint32_t t = 0; t < tokens; t++, parts += stride) {
        float top = -INFINITY, sum = 0;
        for (uint32_t r = 0; r < rows; r++) {
            parts[r] = (parts[r] - half[r]) * scale;
            top = parts[r] > top ? parts[r] : top;
        }
        for (uint32_t r = 0; r < rows; r++) {
            parts[r] = expf(parts[r] - top);
            sum += parts[r];
        }
        for (uint32_t r = 0; r < rows; r++) {
            parts[r] *= weight[t] / sum;
            mass[r] += parts[r];
        }
    }
}

static void ref_mix(const float *parts, uint32_t tokens, uint32_t rows, uint32_t stride, const float *values, uint32_t dim,
                    float *fit, void *scratch) {
    (void)scratch;
    for (uint32_t t = 0; t < tokens; t++) {
        for (uint32_t r = 0; r < rows; r++) {
            bkv_axpy(parts[(size_t)t * stride + r], values + (size_t)t * dim, dim, fit + (size_t)r * dim);
        }
    }
}

static void ref_quant_values(const float *rows, uint32_t count, uint32_t dim, uint32_t bits, uint8_t *params, uint8_t *codes) {
    uint32_t groups = (dim + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS;
    for (uint32_t t = 0; t < count; t++) {
        bkv_quant_value_row(rows + (size_t)t * dim, dim, bits, params + 4ull * t * groups,
                            codes + (size_t)t * (dim * bits / 8));
    }
}

static void ref_read_keys(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *k) {
    bkv_section_read_range(view, first, count, k, NULL, NULL);
}

static void ref_read_values(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *v) {
    bkv_section_read_range(view, first, count, NULL, v, NULL);
}

const bkv_lanes_t bkv_lanes_ref = {
    .dot = ref_dot,
    .axpy = ref_axpy,
    .weigh = ref_weigh,
    .to_float = bkv_row_to_float,
    .products = ref_products,
    .products_scratch = ref_products_scratch,
    .kernel = ref_kernel,
    .kernel_scratch = ref_kernel_scratch,
    .shares = ref_shares,
    .mix = ref_mix,
    .quant_keys = bkv_quant_key_group,
    .quant_values = ref_quant_values,
    .read_keys = ref_read_keys,
    .read_values = ref_read_values,
};
