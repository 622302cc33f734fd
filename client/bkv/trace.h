// trace.h - a KV cache in a safetensors file, seen as blocks: what `put` and `summarize` read.
//
// k.N and v.N [heads, tokens, dim] for layers N (numbers may have gaps; layers go by ascending number), F16, BF16 or F32,
// all alike but for the last dim, where keys and values may differ. ids [tokens], I32 or I64, are the token ids; without
// them keys are made from positions and contents (see bkv_trace_key).
#ifndef BKV_CLI_TRACE_H
#define BKV_CLI_TRACE_H

#include "client/balancekv.h"
#include "safetensors.h"

typedef struct bkv_trace {
    bkv_safetensors_t *file;
    char *name;                          // metadata "model", else the file's name without folder and suffix
    bkv_shape_t shape;                   // tokens: of the whole trace
    uint32_t *layer_numbers;             // [shape.layers], ascending
    const bkv_tensor_t **keys, **values; // [shape.layers]
    const bkv_tensor_t *ids;             // NULL: none
} bkv_trace_t;

// One block of a trace.
typedef struct bkv_span {
    uint64_t position;
    uint32_t tokens;
} bkv_span_t;

// INVALID_ARGUMENT names the tensor at fault. Deinit also after failure.
bkv_status_t bkv_trace_init(bkv_trace_t *trace, const char *path, bkv_error_t *err);
void bkv_trace_deinit(bkv_trace_t *trace);

// Cuts the first `tokens` tokens of a trace into blocks of block_tokens (1 or more), the last one shorter where they do not
// divide. Where that last one is so short that no record of it could keep the codec's rate, it shares tokens evenly with
// the block before it. *spans is the caller's to free; returns how many.
size_t bkv_trace_plan(const bkv_shape_t *shape, uint64_t tokens, uint32_t block_tokens, const bkv_codec_params_t *params,
                      bkv_span_t **spans);

// The shape of one block.
bkv_shape_t bkv_trace_block_shape(const bkv_trace_t *trace, const bkv_span_t *span);

// Copies a block into `payload`, [layer][K,V][head][token][dim]: bkv_shape_bytes of its shape.
void bkv_trace_gather(const bkv_trace_t *trace, const bkv_span_t *span, void *payload);

// The key of a block after the one with key `parent` (NULL: the first). Without ids, the chain runs over the block's
// position (uint64 little-endian) and a SHA-256 of its payload in the place of token ids. payload may be NULL where there are ids.
bkv_status_t bkv_trace_key(const bkv_trace_t *trace, const bkv_span_t *span, const void *payload, const bkv_spec_id_t *id,
                           const bkv_key_t *parent, bkv_key_t *key, bkv_error_t *err);

// Whether a tensor is the queries of a layer with so many KV heads: F16, BF16 or F32 [query heads, tokens, key_dim].
bkv_status_t bkv_trace_check_queries(const bkv_tensor_t *q, uint32_t kv_heads, uint32_t key_dim, bkv_error_t *err);

// Elements [first, first + count) of an F16, BF16 or F32 tensor as float32.
void bkv_tensor_to_float(const bkv_tensor_t *tensor, uint64_t first, uint64_t count, float *out);

// "k.12" and the like; out has room for 16 characters.
const char *bkv_trace_tensor_name(char kind, uint32_t layer, char *out);

#endif
