// head.cuh - internal: what the stages of balance.cu share: the shared memory of one head, and how its rows are read.
#ifndef BKV_HEAD_CUDA_CUH
#define BKV_HEAD_CUDA_CUH

#include "mma.cuh"
#include "record.cuh"
#include "walk.cuh"

#define HEAD_THREADS   512
#define HEAD_WARPS     (HEAD_THREADS / 32)
#define HEAD_TOKENS    256 // at most: 16 rows a warp
#define HEAD_KEY_DIM   256
#define HEAD_VALUE_DIM 128
#define HEAD_WALKED    96 // tokens kept by the walk
#define HEAD_LEAVES    (HEAD_TOKENS / BKV_LEAF)
#define GRAM_STRIDE    (BKV_LEAF + 8) // elements: the rows of a matrix load are in different banks

static_assert(HEAD_TOKENS == 16 * HEAD_WARPS && HEAD_WARPS == 2 * HEAD_LEAVES, "two warps to a leaf");

// Squares up to this sum prove that no element is beyond the float16 range, nor NaN.
#define SQUARES_SAFE 4.29e9f

// What becomes of a token.
enum { FATE_DROPPED = 0, FATE_WALKED = 1, FATE_PROTECTED = 2 };

struct head_state {
    union {
        walk_state walk[HEAD_LEAVES];
        struct {
            uint32_t key[HEAD_TOKENS];     // earlier: by score, all different
            uint16_t rank[2][HEAD_TOKENS]; // how many of either half of the tokens come before
        };
    };
    // Numbers for the tensor cores as two 16-bit ones each, what the first leaves over being the second: 1 / |k| by token; by
    // channel the sum of unit keys and the mean key.
    uint16_t unit[2][HEAD_TOKENS];
    union {
        uint16_t vectors[4][HEAD_KEY_DIM];
        float2 channel[HEAD_KEY_DIM]; // later, of the key group being written: see code_pair
    };
    float square[HEAD_TOKENS]; // |k|^2
    float inverse[HEAD_TOKENS];
    float score[HEAD_TOKENS]; // the rarest keys have the smallest
    float onto[HEAD_TOKENS];  // <k, mean>
    float weight[HEAD_TOKENS];
    uint8_t fate[HEAD_TOKENS];
    uint8_t rest[HEAD_TOKENS];   // what is walked over, ascending
    uint8_t kept[HEAD_TOKENS];   // ascending
    uint8_t walked[HEAD_TOKENS]; // of these, those that came from the walk
    uint64_t leaf_key[HEAD_LEAVES];
    uint32_t leaf_start[HEAD_LEAVES + 1]; // among the rest
    uint32_t leaf_kept[HEAD_LEAVES + 1];  // likewise among what the walk keeps
    uint32_t words[2][HEAD_TOKENS / 32];  // a bit for every token
    float warp_value[HEAD_TOKENS / 32];
    uint32_t rest_count, walked_count, leaves;
    float exponent_base; // what every exponent of the kernel gets: half of it for each of its two tokens
};

// One head on its way: K and V in swizzled rows of shared memory, and a piece of it for whatever a stage needs.
struct head_t {
    const bkv_gpu_job_t &job;
    head_state &state;
    uint8_t *keys, *values, *work;
    uint32_t work_bytes;
    uint32_t tokens, padded;     // padded: to whole 16 rows; those beyond are 0
    uint32_t key_row, value_row; // bytes
    float scale;                 // 1 / sqrt(key_dim)

    __device__ __forceinline__ uint4 chunk(bool value, uint32_t token, uint32_t at) const {
        return *(const uint4 *)((value ? values : keys) + swizzled(token, at, value ? value_row : key_row));
    }
};

// The sizes that host and device must agree on.
__host__ __device__ inline uint32_t head_padded(uint32_t tokens) {
    return (tokens + 15) / 16 * 16;
}

__host__ __device__ inline uint32_t most(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}

// Elements from one token's shares to the next one's, for `rows` walked rows.
__host__ __device__ inline uint32_t share_stride(uint32_t rows) {
    return (rows + 15) / 16 * 16 + 8;
}

// Elements from one slice of a key group's ranges to the next.
__host__ __device__ inline uint32_t range_stride(uint32_t key_dim) {
    return key_dim + 8;
}

// Bytes of head_t.work: the largest of what the stages put there.
__host__ __device__ inline uint32_t head_work_bytes(uint32_t tokens, uint32_t key_dim, uint32_t walked) {
    uint32_t grams = HEAD_LEAVES * BKV_LEAF * GRAM_STRIDE * 2;
    uint32_t shares = head_padded(tokens) * share_stride(walked) * 2;
    uint32_t ranges = 2 * (HEAD_THREADS / (key_dim / 8)) * range_stride(key_dim) * 2;
    return most(grams, most(shares, ranges));
}

#define LOG2E 1.4426950408889634f

#endif
