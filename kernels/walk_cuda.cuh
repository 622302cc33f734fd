// walk_cuda.cuh - internal: the self-balancing walk of walk_ref.c by one warp, over a leaf of at most BKV_LEAF tokens whose
// kernel matrix is in shared memory. Every lane holds the signed sums of its tokens, so that a step is one shuffle.
#ifndef BKV_WALK_CUDA_CUH
#define BKV_WALK_CUDA_CUH

#include "gpu.h"

#include <cuda_bf16.h>

// The walked tokens of a head are split into leaves of this many, each reduced by one warp straight to its share: a walk takes
// as many steps one after another as it has tokens, and a warp's latency is what they cost.
#define BKV_LEAF     64
#define LEAF_ENTRIES (BKV_LEAF / 32) // of each lane: tokens LEAF_ENTRIES * lane and the next

// walk_ref.c says what these are.
#define WALK_COIN    0.1f
#define VALUE_FLOOR  0.025f
#define EXPONENT_TOP 20.0f

// splitmix64 as in random.h, but by counter: number i of stream `key`.
__device__ __forceinline__ uint64_t random_at(uint64_t key, uint32_t i) {
    uint64_t z = key + (i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

__device__ __forceinline__ uint64_t random_mix(uint64_t key, uint64_t number) {
    return random_at(key, 0) ^ number;
}

// Stream of one head of one block: the same whatever else is in the batch.
__device__ __forceinline__ uint64_t random_head(uint64_t seed, uint64_t position, uint32_t section) {
    return random_mix(random_mix(seed, position), section);
}

// Shared memory of one walk.
struct walk_state {
    float weight[BKV_LEAF];    // by token; 0: dropped
    float threshold[BKV_LEAF]; // by place in the order: below this the sum gives sign 1
    uint8_t order[BKV_LEAF];
};

// A kernel matrix of bfloat16, rows `stride` elements apart.
struct leaf_gram {
    const __nv_bfloat16 *entries;
    uint32_t stride;

    __device__ __forceinline__ float2 row(uint32_t token, uint32_t lane) const {
        uint32_t pair = *(const uint32_t *)(entries + token * stride + LEAF_ENTRIES * lane);
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }

    __device__ __forceinline__ float own(uint32_t token) const {
        return __bfloat162float(entries[token * stride + token]);
    }
};

static_assert(LEAF_ENTRIES == 2, "a lane's sums are a float2");

// Puts the tokens still there in a new random order, with each one's threshold for a fair coin of its own.
__device__ inline void walk_order(const leaf_gram &gram, uint32_t n, uint64_t key, walk_state *walk) {
    uint32_t lane = threadIdx.x % 32, placed = 0;
    uint64_t bits = random_at(key, 0xffffffffu);
    uint32_t scale = (uint32_t)bits | 1, shift = (uint32_t)(bits >> 32), again = (uint32_t)(bits >> 16) | 1;
    for (uint32_t first = 0; first < BKV_LEAF; first += 32) {
        uint32_t token = ((first + lane) * scale + shift) % BKV_LEAF; // these three are one to one
        token ^= token >> 3;
        token = token * again % BKV_LEAF;
        float weight = token < n ? walk->weight[token] : 0.0f;
        uint32_t there = __ballot_sync(~0u, weight > 0);
        if (weight > 0) {
            uint32_t place = placed + __popc(there & ((1u << lane) - 1));
            float coin = (float)(uint32_t)(random_at(key, token) >> 40) * 0x1p-24f, own = weight * gram.own(token);
            walk->order[place] = (uint8_t)token;
            walk->threshold[place] = own > 0 ? (0.5f - coin) * 2.0f * WALK_COIN * own : coin < 0.5f ? INFINITY : -INFINITY;
        }
        placed += __popc(there);
    }
    __syncwarp();
}

// One halving: of the first 2 * drop tokens of the order `drop` lose their weight to the others. sum: the lane's signed sums.
__device__ inline void walk_halve(const leaf_gram &gram, uint32_t drop, walk_state *walk, float2 *sum) {
    uint32_t lane = threadIdx.x % 32, steps = 2 * drop, left0 = drop, left1 = drop;
    uint32_t token = walk->order[0], next = walk->order[1];
    float2 row = gram.row(token, lane);
    float threshold = walk->threshold[0], weight = walk->weight[token], total = 0, kept = 0;
    uint32_t signs = 0; // bit e: sign of place 32 * e + lane
    for (uint32_t i = 0; i < steps; i++) {
        // What the next step needs is on its way before this one decides.
        uint32_t after = walk->order[min(i + 2, steps - 1)];
        float2 next_row = gram.row(next, lane);
        float next_threshold = walk->threshold[min(i + 1, steps - 1)], next_weight = walk->weight[next];
        float at = __shfl_sync(~0u, token & 1 ? sum->y : sum->x, token / LEAF_ENTRIES);
        bool sign = at < threshold;
        sign = sign ? left1 > 0 : left0 == 0;
        left1 -= sign;
        left0 -= !sign;
        float step = sign ? weight : -weight;
        sum->x += step * row.x;
        sum->y += step * row.y;
        total += weight;
        kept += sign ? weight : 0.0f;
        signs |= i % 32 == lane ? (uint32_t)sign << i / 32 : 0;
        token = next;
        next = after;
        row = next_row;
        threshold = next_threshold;
        weight = next_weight;
    }
    __syncwarp();
    for (uint32_t i = lane; i < steps; i += 32) {
        if (!(signs >> i / 32 & 1)) {
            walk->weight[walk->order[i]] = 0;
        }
    }
    __syncwarp();
    float growth = total / kept; // 2 where all weights are equal
    for (uint32_t i = 0; growth != 2.0f && i < steps; i++) {
        uint32_t at = walk->order[i];
        float2 more = gram.row(at, lane);
        float step = (growth - 2.0f) * walk->weight[at];
        sum->x += step * more.x;
        sum->y += step * more.y;
    }
    __syncwarp();
    for (uint32_t i = lane; i < steps; i += 32) {
        walk->weight[walk->order[i]] *= growth;
    }
    __syncwarp();
}

// Reduces n tokens of weight 1 to `target` by one whole warp; walk->weight says the rest. key: of this leaf.
__device__ inline void walk_reduce(const leaf_gram &gram, uint32_t n, uint32_t target, uint64_t key, walk_state *walk) {
    uint32_t lane = threadIdx.x % 32, left = n;
    for (uint32_t t = lane; t < BKV_LEAF; t += 32) {
        walk->weight[t] = t < n && target > 0 ? 1.0f : 0.0f;
    }
    __syncwarp();
    float2 sum = make_float2(0, 0);
    for (uint32_t halving = 0; left > target && target > 0; halving++) {
        uint32_t drop = min(left - target, left / 2);
        walk_order(gram, n, random_mix(key, halving), walk);
        walk_halve(gram, drop, walk, &sum);
        left -= drop;
    }
}

// Where leaf `leaf` of `leaves` begins among n tokens, and by the same rule among the target's.
__device__ __forceinline__ uint32_t leaf_first(uint32_t n, uint32_t leaves, uint32_t leaf) {
    return (uint32_t)((uint64_t)n * leaf / leaves);
}

#endif
