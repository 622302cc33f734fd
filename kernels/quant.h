// quant.h - internal: 2, 3, 4 and 8 bit codes, their packing and their float16 scale and zero. value = zero + scale * code.
#ifndef BKV_QUANT_H
#define BKV_QUANT_H

#include "summary.h"

// Packs `n` codes (a multiple of 8, each below 2^bits) into n * bits / 8 bytes as summary.h describes, and back.
void bkv_codes_pack(const uint8_t *codes, uint32_t n, uint32_t bits, uint8_t *out);
void bkv_codes_unpack(const uint8_t *packed, uint32_t n, uint32_t bits, uint8_t *codes);

// One key group: `count` rows of `dim` floats, quantised per channel.
//   params [dim] {float16 scale, zero}; codes [count] packed rows
// A group of no rows has params 0. Values beyond the float16 range are stored as the nearest that fits. scratch: 4 * dim
// floats.
void bkv_quant_key_group(const float *rows, uint32_t count, uint32_t dim, uint32_t bits, uint8_t *params, uint8_t *codes,
                         float *scratch);

// One value row of `dim` floats, quantised over groups of BKV_VALUE_GROUP_DIMS channels.
//   params [ceil(dim / 64)] {float16 scale, zero}; codes one packed row
void bkv_quant_value_row(const float *row, uint32_t dim, uint32_t bits, uint8_t *params, uint8_t *codes);

#endif
