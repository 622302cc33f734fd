// lanes_amx.h - internal: the one inner loop that AMX does better than AVX-512. See bkv_lanes_t.products in lanes.h.
#ifndef BKV_LANES_AMX_H
#define BKV_LANES_AMX_H

#include "lanes.h"

void bkv_amx_products(const bkv_rows_t *a, const bkv_rows_t *b, float *out, uint32_t stride, void *scratch);
size_t bkv_amx_products_scratch(uint32_t na, uint32_t nb, uint32_t dim);

#endif
