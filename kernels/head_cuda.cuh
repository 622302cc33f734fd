// head_cuda.cuh - internal: what the stages of balance_cuda.cu share: the shared memory of one head, and how its rows are read.
#ifndef BKV_HEAD_CUDA_CUH
#define BKV_HEAD_CUDA_CUH

#include "mma_cuda.cuh"
#include "record_cuda.cuh"
#include "walk_cuda.cuh"

#define HEAD_THREADS   512
#define HEAD_TOKENS    256 // at most
#define HEAD_KEY_DIM   256
#define HEAD_VALUE_DIM 128
#define HEAD_WALKED    128 // tokens kept by the walk
#define HEAD_LEAVES    (HEAD_TOKENS / BKV_LEAF)
#define GRAM_STRIDE    (BKV_LEAF + 8) // elements: rows start in different banks

// Squares up to this sum prove that no element is beyond the float16 range, nor NaN.
#define SQUARES_SAFE 4.29e9f

// What becomes of a token.
enum { FATE_DROPPED = 0, FATE_WALKED = 1, FATE_PROTECTED = 2 };

struct head_state {
    float direction[HEAD_KEY_DIM], mean[HEAD_KEY_DIM]; // sum of unit keys; mean key
    float part[4][HEAD_TOKENS];                        // sums of the halves of rows
    float inverse[HEAD_TOKENS], square[HEAD_TOKENS];   // 1 / |k|, |k|^2
    float score[HEAD_TOKENS];                          // the rarest keys have the smallest
    float onto[HEAD_TOKENS];                           // <k, mean>
    float weight[HEAD_TOKENS];
    walk_state walk[HEAD_LEAVES];
    uint8_t fate[HEAD_TOKENS];
    uint8_t rest[HEAD_TOKENS];   // what is walked over, ascending
    uint8_t kept[HEAD_TOKENS];   // ascending
    uint8_t walked[HEAD_TOKENS]; // of these, those that came from the walk
    uint32_t rest_count, walked_count, leaves;
    float mean_square, exponent_shift;
};

// One head on its way: K and V in swizzled rows of shared memory, and a piece of it for whatever a stage needs.
struct head_t {
    const bkv_gpu_job_t &job;
    head_state &state;
    uint8_t *keys, *values, *work;
    uint32_t tokens, padded; // padded: to whole 16 rows; those beyond are 0
    uint32_t key_row, value_row;
    float scale; // 1 / sqrt(key_dim)

    __device__ __forceinline__ uint4 chunk(bool value, uint32_t token, uint32_t at) const {
        uint32_t row = value ? value_row : key_row;
        return *(const uint4 *)((value ? values : keys) + swizzled(token, at, row));
    }
};

// What is done with V's rows that come back changed, and the sizes that host and device must agree on.
__host__ __device__ inline uint32_t head_padded(uint32_t tokens) {
    return (tokens + 15) / 16 * 16;
}

// Bytes of head_t.work: the largest of what the stages put there.
__host__ __device__ inline uint32_t head_work_bytes(uint32_t tokens, uint32_t key_dim, uint32_t walked) {
    uint32_t sums = HEAD_THREADS / (key_dim / 8) * key_dim * 2 * 4;
    uint32_t grams = (tokens + BKV_LEAF - 1) / BKV_LEAF * BKV_LEAF * GRAM_STRIDE * 2;
    uint32_t shares = head_padded(tokens) * ((walked + 15) / 16 * 16 + 8) * 2;
    uint32_t most = sums > grams ? sums : grams;
    return most > shares ? most : shares;
}

// All threads of the block take the tokens below `count`, one each.
#define FOR_TOKENS(t, count) for (uint32_t t = threadIdx.x; t < (count); t += blockDim.x)

#endif
