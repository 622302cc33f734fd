// attend_gpu.h - internal: one call of attention on a GPU as plain C. attend_host.c checks the caller's arguments and fills
// it in, *.cu run it (absent.c stands in where there was no nvcc).
//
// The work of a call is cut into tiles: some consecutive kept tokens of one section that lie in one key group, and that fit
// the shared memory of a warp. The tiles of a (sequence, KV head) follow one another, record after record; those of all
// pairs are numbered through, and each warp takes an equal share of the numbers. So unequal sequences need no special care,
// and which warp adds what is fixed: results do not change from run to run.
#ifndef BKV_ATTEND_GPU_H
#define BKV_ATTEND_GPU_H

#include "gpu.h"

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __CUDACC__
#define BKV_BOTH static inline __host__ __device__
#else
#define BKV_BOTH static inline
#endif

// How the elements of a plane are stored.
typedef enum bkv_gpu_kind {
    BKV_GPU_BITS2,
    BKV_GPU_BITS3,
    BKV_GPU_BITS4,
    BKV_GPU_BITS8,
    BKV_GPU_BF16,
    BKV_GPU_FP16,
    BKV_GPU_FP32,
    BKV_GPU_KINDS,
} bkv_gpu_kind_t;

// One section as the kernels want it: addresses instead of offsets.
typedef struct bkv_gpu_section {
    const uint8_t *keys;   // the key plane behind its index
    const uint8_t *values; // the value plane
    uint32_t tokens;
    uint32_t weights; // float16 base and step; 0 without weights
    uint32_t tile;    // tiles of the pair's sections before this one
    uint8_t kinds;    // key kind, value kind << 4
    uint8_t weighted;
    uint8_t group_tokens; // of a key group, or of what stands for one where keys are native
    uint8_t group_tiles;  // tiles that a key group is cut into
} bkv_gpu_section_t;

_Static_assert(sizeof(bkv_gpu_section_t) == 32, "two loads of 16 bytes");

// What bkv_gpu_attend_t.tiles says of a pair whose records are not what the caller said they are.
#define BKV_GPU_BROKEN UINT32_MAX

// Tokens in a tile are cut off at multiples of this, the rows of a matrix instruction.
#define BKV_GPU_TILE_STEP 16
// The most tokens in a tile.
#define BKV_GPU_TILE_MAX 80

typedef struct bkv_gpu_attend {
    const void *q;              // [batch][heads][rows][key_dim]
    const void *const *records; // [max_records]
    const uint32_t *first;      // [batch + 1]
    void *out;                  // [batch][heads][rows][value_dim]
    float *lse;                 // [batch][heads][rows]

    bkv_gpu_section_t *sections; // [max_records * heads], in the workspace: those of a pair together
    uint32_t *tiles;             // [batch * heads], in the workspace
    uint64_t *before;            // [batch * heads + 1], in the workspace: tiles of the pairs before, and of all
    float *parts;                // partial results, in the workspace: [warps + batch * heads * blocks][columns][value_dim + 4]

    float scale;
    uint32_t batch, heads, layer, key_dim, value_dim, max_records;
    uint32_t rows;    // queries that read one KV head
    uint32_t columns; // of these, how many a warp serves at once
    uint32_t blocks;  // ceil(rows / columns)
    uint32_t thread_blocks, thread_block_warps;
    uint32_t key_stage, value_stage;             // bytes of a warp's shared memory for a tile; 0 in the general kernel
    uint8_t limit[BKV_GPU_KINDS][BKV_GPU_KINDS]; // the most tokens in a tile, by key and value kind
    uint8_t q_dtype, out_dtype, dtype;           // bkv_dtype_t; the last is the records' source dtype
    bool overlaps;                               // the device can begin with a kernel before the one before it has ended
} bkv_gpu_attend_t;

// Bytes of one row of a plane.
BKV_BOTH uint32_t bkv_gpu_row_bytes(uint32_t kind, uint32_t dim) {
    const uint32_t bits = kind <= BKV_GPU_BITS4 ? kind + 2 : kind == BKV_GPU_BITS8 ? 8 : kind == BKV_GPU_FP32 ? 32 : 16;
    return dim * bits / 8;
}

// In shared memory, rows of keys that would all start at the same bank are cut into units with 16 bytes between. Bytes of a
// unit, whole rows; 0 where rows just follow one another.
BKV_BOTH uint32_t bkv_gpu_key_unit(uint32_t kind, uint32_t dim) {
    uint32_t row = bkv_gpu_row_bytes(kind, dim);
    return kind == BKV_GPU_BITS3 || row % 64 != 0 ? 0 : 256 % row == 0 ? 256 : row;
}

// Shared memory for rows that follow one another, of `tokens` tokens, a multiple of BKV_GPU_TILE_STEP. Copies start and end at
// multiples of 16 bytes of the source, hence the 16 more.
BKV_BOTH uint32_t bkv_gpu_rows_room(uint32_t kind, uint32_t dim, uint32_t tokens) {
    return (tokens * bkv_gpu_row_bytes(kind, dim) + 31) / 16 * 16;
}

// From the params of 32 channels of a key group to the next ones.
#define BKV_GPU_PARAMS_STEP 144

// Shared memory for weights, params and keys of a tile.
BKV_BOTH uint32_t bkv_gpu_key_room(uint32_t kind, uint32_t dim, uint32_t tokens) {
    uint32_t unit = bkv_gpu_key_unit(kind, dim), row = bkv_gpu_row_bytes(kind, dim);
    uint32_t params = kind > BKV_GPU_BITS8 ? 0 : dim / 32 * BKV_GPU_PARAMS_STEP;
    return tokens + 32 + params + (unit != 0 ? tokens * row / unit * (unit + 16) : bkv_gpu_rows_room(kind, dim, tokens));
}

// For scales and values of a tile.
BKV_BOTH uint32_t bkv_gpu_value_room(uint32_t kind, uint32_t dim, uint32_t tokens) {
    uint32_t scales = kind > BKV_GPU_BITS8 ? 0 : 4 * tokens * ((dim + 63) / 64) + 16;
    return scales + bkv_gpu_rows_room(kind, dim, tokens);
}

// What a thread block needs before its warps' own memory.
#define BKV_GPU_BARRIERS_ROOM 256

// The most tiles that a warp finds at once, a power of two, and shared memory to note what is to be copied for one.
#define BKV_GPU_AHEAD       8u
#define BKV_GPU_ERRAND_ROOM 128

// What a device of `shared_memory` bytes a thread block runs these dims with: stages, thread_block_warps and columns. False
// when only the general kernel takes them. Sets nothing else.
bool bkv_gpu_attend_shape(bkv_gpu_attend_t *job, uint32_t shared_memory);

// Enqueues the whole call.
int bkv_gpu_attend(const bkv_gpu_attend_t *job, void *stream);

#ifdef __cplusplus
}
#endif
#endif
