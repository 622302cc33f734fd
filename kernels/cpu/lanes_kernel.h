// lanes_kernel.h - internal: one block of the walk's kernel, from inner products that have just been made and still lie in the
// nearest cache to its two places in a symmetric matrix. For the vectors that the including file is compiled for.
#ifndef BKV_LANES_KERNEL_H
#define BKV_LANES_KERNEL_H

#include "lanes.h"
#include "vec.h"

#ifdef BKV_VEC

// Rows and columns of a whole block; the last of a matrix may be half.
#define BKV_BLOCK (2 * BKV_TILE)

// Inner products of the keys and of the values of tokens [i, i + rows) with [j, j + columns), rows of BKV_BLOCK floats.
typedef struct bkv_kernel_block {
    _Alignas(64) float keys[BKV_BLOCK * BKV_BLOCK];
    _Alignas(64) float values[BKV_BLOCK * BKV_BLOCK];
    uint32_t i, j, rows, columns; // multiples of BKV_TILE
} bkv_kernel_block_t;

// The block at (i, j), i <= j, of a matrix of `padded` rows and columns.
static inline void kernel_block_place(bkv_kernel_block_t *block, uint32_t i, uint32_t j, uint32_t padded) {
    block->i = i;
    block->j = j;
    block->rows = padded - i < BKV_BLOCK ? padded - i : BKV_BLOCK;
    block->columns = padded - j < BKV_BLOCK ? padded - j : BKV_BLOCK;
}

// Writes the block's kernel to its two places in gram [padded][padded]. Overwrites the block.
static inline void kernel_block_finish(bkv_kernel_block_t *block, const bkv_kernel_t *kernel, float shift, float *gram,
                                       uint32_t padded) {
    float *out = gram + (size_t)block->i * padded + block->j, *mirror = gram + (size_t)block->j * padded + block->i;
    for (uint32_t r = 0; r < block->rows; r++) {
        for (uint32_t c = 0; c < block->columns; c += BKV_VEC) {
            uint32_t at = r * BKV_BLOCK + c;
            vec_t exponent = vec_fma(vec_load(block->keys + at), vec_set(kernel->scale), vec_set(-shift));
            vec_t value = vec_load(block->values + at) + vec_set(kernel->lift);
            value = vec_exp(vec_min(exponent, vec_set(kernel->top))) * value;
            vec_store(block->values + at, value);
            vec_store(out + (size_t)r * padded + c, value);
        }
    }
    if (block->i == block->j) {
        return;
    }
    for (uint32_t r = 0; r < block->rows; r += BKV_VEC) {
        for (uint32_t c = 0; c < block->columns; c += BKV_VEC) {
            vec_t square[BKV_VEC];
            for (uint32_t i = 0; i < BKV_VEC; i++) {
                square[i] = vec_load(block->values + (r + i) * BKV_BLOCK + c);
            }
            vec_transpose(square);
            for (uint32_t i = 0; i < BKV_VEC; i++) {
                vec_store(mirror + (size_t)(c + i) * padded + r, square[i]);
            }
        }
    }
}

#endif
#endif
