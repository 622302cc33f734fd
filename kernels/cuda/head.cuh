// head.cuh - internal: what the stages of balance.cu share: the shared memory of one head, and how its rows are read.
#ifndef BKV_HEAD_CUDA_CUH
#define BKV_HEAD_CUDA_CUH

#include "mma.cuh"
#include "record.cuh"
#include "walk.cuh"

#define HEAD_THREADS   256
#define HEAD_WARPS     (HEAD_THREADS / 32)
#define HEAD_TOKENS    256 // at most
#define HEAD_KEY_DIM   256
#define HEAD_VALUE_DIM 128
#define HEAD_WALKED    96 // tokens kept by the walk
#define HEAD_LEAVES    (HEAD_TOKENS / BKV_LEAF)
#define GRAM_STRIDE    (BKV_LEAF + 8) // elements: the rows of a matrix load are in different banks
#define ROW_GAP        16             // bytes between rows in shared memory, for the same reason

static_assert(HEAD_TOKENS == HEAD_THREADS && HEAD_WARPS == HEAD_LEAVES, "a token a thread, a leaf a warp");

// Squares up to this sum prove that no element is beyond the float16 range, nor NaN.
#define SQUARES_SAFE 4.29e9f

// What becomes of a token.
enum { FATE_DROPPED = 0, FATE_WALKED = 1, FATE_PROTECTED = 2 };

struct head_state {
    walk_state walk[HEAD_LEAVES];
    // Numbers for the tensor cores as two 16-bit ones each, what the first leaves over being the second: 1 / |k| by token,
    // and a third row of ones; by channel the sum of unit keys and the mean key. Each row begins in other banks.
    uint16_t unit[3][HEAD_TOKENS + 8];
    union {
        uint16_t vectors[4][HEAD_KEY_DIM + 8];
        float2 channel[HEAD_KEY_DIM]; // later, of the key group being written: see code_pair
    };
    float square[HEAD_TOKENS]; // |k|^2
    float inverse[HEAD_TOKENS];
    float score[HEAD_TOKENS];     // the rarest keys have the smallest
    uint32_t number[HEAD_TOKENS]; // the same in another form, all different
    float onto[HEAD_TOKENS];      // <k, mean>
    float weight[HEAD_TOKENS];
    float pull[HEAD_WALKED]; // of each walked row: -|k|^2 / (2 sqrt d) in powers of two, and past the last one -infinity
    uint8_t fate[HEAD_TOKENS];
    uint8_t rest[HEAD_TOKENS];   // what is walked over, ascending
    uint8_t kept[HEAD_TOKENS];   // ascending
    uint8_t walked[HEAD_TOKENS]; // of these, those that came from the walk
    uint8_t place[HEAD_TOKENS];  // of a walked token among these
    uint64_t leaf_key[HEAD_LEAVES];
    uint32_t leaf_start[HEAD_LEAVES + 1]; // among the rest
    uint32_t leaf_kept[HEAD_LEAVES + 1];  // likewise among what the walk keeps
    uint32_t words[2][HEAD_TOKENS / 32];  // a bit for every token
    float warp_sum[HEAD_WARPS];
    uint32_t warp_top[HEAD_WARPS];
    uint32_t limit; // of the numbers that are protected
    uint32_t rest_count, walked_count, leaves;
    float exponent_base; // what every exponent of the kernel gets: half of it for each of its two tokens
    section_layout at;
    section_plan plan;
    uint64_t stream;              // of random numbers
    uint64_t arrived[HEAD_WARPS]; // see arrivals_begin
};

// One head on its way: K in shared memory, V where the caller has it, and a piece of shared memory for whatever a stage
// needs.
struct head_t {
    const bkv_gpu_job_t &job;
    head_state &state;
    uint8_t *keys, *work;
    rows_t values;
    uint32_t tokens, padded;     // padded: to whole 16 rows; those beyond are 0
    uint32_t key_row, value_row; // bytes
    float scale;                 // 1 / sqrt(key_dim)

    // Where 16-byte chunk `at` of a token's key is, from `keys` on.
    __device__ __forceinline__ uint32_t key_at(uint32_t token, uint32_t at) const {
        return token * (key_row + ROW_GAP) + at * 16;
    }
    __device__ __forceinline__ uint4 key(uint32_t token, uint32_t at) const {
        return *(const uint4 *)(keys + key_at(token, at));
    }
    __device__ __forceinline__ const uint8_t *value(uint32_t token) const {
        return values.base + token * values.stride;
    }
    // The new value of walked row `place`, once there is one.
    __device__ __forceinline__ uint8_t *fit(uint32_t place) const {
        return work + place * (value_row + ROW_GAP);
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

// Tokens whose shares are in memory at a time.
__host__ __device__ constexpr uint32_t share_span(uint32_t rows) {
    return rows <= 32 ? HEAD_TOKENS : HEAD_TOKENS / 2;
}

// Bytes of head_t.work: the largest of what the stages put there.
__host__ __device__ inline uint32_t head_work_bytes(uint32_t tokens, uint32_t value_dim, uint32_t walked) {
    uint32_t grams = HEAD_LEAVES * BKV_LEAF * GRAM_STRIDE * 2;
    uint32_t span = share_span(walked), padded = head_padded(tokens);
    uint32_t shares = (padded < span ? padded : span) * share_stride(walked) * 2;
    uint32_t fits = walked * (value_dim * 2 + ROW_GAP);
    return most(grams, most(shares, fits));
}

#define LOG2E 1.4426950408889634f

#endif
