// support.h - what the GPU tests share: blocks in any layout on host and device, the real trace, attention in float64, and
// checks that count. They need nvcc, gcc and make alone: no test framework.
#ifndef BKV_TESTS_GPU_SUPPORT_H
#define BKV_TESTS_GPU_SUPPORT_H

#include "cuda/bkv_cuda.h"

// Checks: a failed one says what it saw and is counted; the program goes on.
void check_begin(const char *name);
void check_that(bool good, const char *format, ...) __attribute__((format(printf, 2, 3)));
int check_end(void); // exit status: 0 when nothing failed

// The last resort of a test: something that must work did not.
#define REQUIRE(good, ...) require((good), __FILE__, __LINE__, __VA_ARGS__)
void require(bool good, const char *file, int line, const char *format, ...) __attribute__((format(printf, 4, 5)));

// Seeded numbers.
typedef struct draw {
    uint64_t state;
} draw_t;
double draw_unit(draw_t *draw);
double draw_gauss(draw_t *draw);

// Device memory of a test; freed with the process.
void *device_take(size_t bytes);
void device_put(void *to, const void *from, size_t bytes);
void device_get(void *to, const void *from, size_t bytes);

// How the K and V of `blocks` blocks lie in one piece of memory.
typedef enum layout {
    LAYOUT_PAYLOAD,    // block after block, [layer][K,V][head][token][dim]
    LAYOUT_HEADS_LAST, // [layer][K,V][block][token][head][dim], as paged engines have it; both dims the same
    LAYOUT_TOKENS,     // K [layer][block][head][token][dim], then V likewise
    LAYOUT_LATENT,     // MLA: one head, V is the first value_dim of each key
    LAYOUT_COUNT
} layout_t;

typedef struct blocks {
    uint32_t count;
    layout_t layout;
    size_t bytes;
    uint8_t *host, *device; // the same bytes
    bkv_block_t *at_host, *at_device;
    bkv_record_id_t *ids;
} blocks_t;

// Blocks of Gaussian K and V whose keys share a mean and a few of which stand out, as real ones do.
void blocks_make(const bkv_shape_t *shape, uint32_t count, layout_t layout, uint64_t seed, blocks_t *blocks);
// Blocks of given K and V: float [head][token][dim] each, block after block along the tokens.
void blocks_fill(const bkv_shape_t *shape, uint32_t count, const float *keys, const float *values, blocks_t *blocks);
void blocks_free(blocks_t *blocks);
float block_element(const bkv_block_t *block, bool value, uint32_t layer, uint32_t head, uint32_t token, uint32_t i);
// Changes one element on both sides.
void blocks_poke(blocks_t *blocks, uint32_t block, bool value, uint32_t layer, uint32_t head, uint32_t token, uint32_t i,
                 float number);

// Records of all blocks at once by the device, at a stride; statuses too. The memory comes from malloc.
uint8_t *compress_device(const bkv_cuda_t *cuda, const blocks_t *blocks, const bkv_codec_params_t *params, size_t *stride,
                         size_t *length, uint64_t *status);
// One block's record by a backend on the host.
uint8_t *compress_host(const char *backend, const blocks_t *blocks, uint32_t block, const bkv_codec_params_t *params,
                       size_t *length, bkv_error_t *err);

// Relative error of attention over a record's section against the block itself, in float64: sum of squares of the difference
// and of the exact output over `queries` queries, float [queries][key_dim].
void attention_error(const bkv_block_t *block, const void *record, uint32_t layer, uint32_t head, const float *queries,
                     uint32_t count, double *difference, double *exact);

// The trace: K and V of one of its layers and the queries of one query head. False when the file is not there.
typedef struct trace {
    uint32_t heads, tokens, dim, queries;
    float *keys, *values; // [heads][tokens][dim]
    float *q;             // [query heads][queries][dim]
    uint32_t query_heads;
} trace_t;
bool trace_read(const char *path, uint32_t layer, trace_t *trace);

#endif
