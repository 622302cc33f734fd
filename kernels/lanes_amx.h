// lanes_amx.h - internal: the one inner loop that AMX does better than AVX-512. See bkv_lanes_t.products in lanes.h.
#ifndef BKV_LANES_AMX_H
#define BKV_LANES_AMX_H

#include <stddef.h>
#include <stdint.h>

void bkv_amx_products(const float *a, uint32_t na, const float *b, uint32_t nb, uint32_t dim, float *out, uint32_t stride,
                      void *scratch);
size_t bkv_amx_products_scratch(uint32_t na, uint32_t nb, uint32_t dim);

#endif
