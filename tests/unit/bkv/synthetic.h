// synthetic.h - made-up traces in scratch files for the tests of bkv.
#ifndef BKV_TEST_SYNTHETIC_H
#define BKV_TEST_SYNTHETIC_H

#include "client/bkv/safetensors.h"
#include "kernels/codec.h"

#include <criterion/criterion.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// A fresh scratch path; the file does not exist yet. out has room for 64 characters.
static inline const char *scratch_path(char *out) {
    snprintf(out, 64, "/tmp/bkv-test-XXXXXX");
    int fd = mkstemp(out);
    cr_assert(fd >= 0);
    close(fd);
    unlink(out);
    return out;
}

static inline float synthetic_value(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return (float)(*state >> 8) / (float)(1u << 23) - 1.0f;
}

// A trace with layers `numbers` (k.N, v.N [heads, tokens, dim]) of F16, BF16 or F32, and ids where `ids` is set.
static inline void synthetic_trace(const char *path, const uint32_t *numbers, uint32_t layers, uint32_t heads, uint32_t tokens,
                                   uint32_t key_dim, uint32_t value_dim, bkv_tensor_type_t type, bool ids, uint32_t seed) {
    char names[16][16];
    bkv_tensor_t tensors[17];
    cr_assert(layers <= 8);
    for (uint32_t i = 0; i < 2 * layers; i++) {
        snprintf(names[i], sizeof *names, "%c.%u", i % 2 == 0 ? 'k' : 'v', numbers[i / 2]);
        tensors[i] = (bkv_tensor_t){
            .name = names[i], .type = type, .rank = 3, .shape = {heads, tokens, i % 2 == 0 ? key_dim : value_dim}};
    }
    tensors[2 * layers] = (bkv_tensor_t){.name = "ids", .type = BKV_TENSOR_I32, .rank = 1, .shape = {tokens}};
    bkv_safetensors_writer_t *writer;
    cr_assert_eq(bkv_safetensors_create(path, tensors, 2 * layers + ids, NULL, 0, &writer, NULL), BKV_OK);
    for (uint32_t i = 0; i < 2 * layers; i++) {
        uint64_t count = tensors[i].shape[0] * tensors[i].shape[1] * tensors[i].shape[2];
        for (uint64_t e = 0; e < count; e++) {
            float value = synthetic_value(&seed);
            uint16_t half = type == BKV_TENSOR_F16 ? bkv_float_to_half(value) : bkv_float_to_bf16(value);
            const void *data = type == BKV_TENSOR_F32 ? (void *)&value : (void *)&half;
            cr_assert_eq(bkv_safetensors_write(writer, data, bkv_tensor_type_bytes(type), NULL), BKV_OK);
        }
    }
    for (uint32_t t = 0; ids && t < tokens; t++) {
        int32_t id = (int32_t)(t * 7919 % 8192);
        cr_assert_eq(bkv_safetensors_write(writer, &id, sizeof id, NULL), BKV_OK);
    }
    cr_assert_eq(bkv_safetensors_finish(writer, NULL), BKV_OK);
}

#endif
