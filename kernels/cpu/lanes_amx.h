// lanes_amx.h - internal: the inner loops that AMX does better than AVX-512, those over matrices. See bkv_lanes_t in lanes.h.
#ifndef BKV_LANES_AMX_H
#define BKV_LANES_AMX_H

#include "lanes.h"

void bkv_amx_products(const bkv_rows_t *a, const bkv_rows_t *b, float *out, uint32_t stride, void *scratch);
size_t bkv_amx_products_scratch(uint32_t na, uint32_t nb, uint32_t dim);

void bkv_amx_mix(const float *parts, uint32_t tokens, uint32_t rows, uint32_t stride, const float *values, uint32_t dim,
                 float *fit, void *scratch);

void bkv_amx_kernel(const bkv_rows_t *keys, const bkv_rows_t *values, const bkv_kernel_t *kernel, float *gram, void *scratch);
size_t bkv_amx_kernel_scratch(uint32_t n, uint32_t key_dim, uint32_t value_dim);

#endif
