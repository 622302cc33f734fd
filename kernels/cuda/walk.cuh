// walk.cuh - internal: the self-balancing walk of walk.c by one warp, over a leaf of at most BKV_LEAF tokens whose
// kernel matrix is in shared memory. Every lane holds the signed sum of its token, so that a step is one shuffle.
#ifndef BKV_WALK_CUDA_CUH
#define BKV_WALK_CUDA_CUH

#include "gpu.h"

#include <cuda_bf16.h>

// The walked tokens of a head are split into leaves of this many, one to a lane, each reduced by one warp straight to its
// share: a walk takes as many steps one after another as it has tokens, and a warp's latency is what they cost.
#define BKV_LEAF 32

// walk.c says what these are.
#define WALK_COIN    0.1f
#define VALUE_FLOOR  0.025f
#define EXPONENT_TOP 20.0f

// The largest entry of a kernel matrix: sums of these are still numbers.
#define ENTRY_MOST 1e30f

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

// 32 bits from a key that was mixed already (the finaliser of MurmurHash3).
__device__ __forceinline__ uint32_t random_bits(uint32_t key, uint32_t i) {
    uint32_t z = key ^ i * 0x9e3779b9u;
    z = (z ^ z >> 16) * 0x85ebca6bu;
    z = (z ^ z >> 13) * 0xc2b2ae35u;
    return z ^ z >> 16;
}

// One step of a walk, as the whole warp needs it.
struct walk_step {
    float threshold; // below this the signed sum gives sign 1
    float weight;
    uint32_t token;
    uint32_t row; // where the token's row of the kernel matrix begins
};

// Shared memory of one walk.
struct __align__(16) walk_state {
    walk_step order[BKV_LEAF + 1]; // one more is read, but not used
};

// A kernel matrix of bfloat16, rows `stride` elements apart.
struct leaf_gram {
    const __nv_bfloat16 *entries;
    uint32_t stride;
};

// Puts the tokens still there, those of weight > 0, in a new random order, with each one's threshold for a coin of its own.
__device__ __forceinline__ void walk_order(const leaf_gram &gram, float weight, float own, uint64_t key, uint32_t halving,
                                           walk_state *walk) {
    uint32_t lane = threadIdx.x % 32, bits = random_bits((uint32_t)key, halving);
    // A place for every token by a map that is one to one on 5 bits, then without gaps.
    uint32_t place = (lane * (bits >> 8 | 1) + (bits >> 3)) % 32;
    place ^= place >> 2;
    place = place * (bits >> 16 | 1) % 32;
    uint32_t there = __reduce_or_sync(~0u, weight > 0 ? 1u << place : 0u);
    if (weight > 0) {
        float coin = (float)(random_bits((uint32_t)(key >> 32), halving * BKV_LEAF + lane) >> 8) * 0x1p-24f;
        float pull = weight * own;
        float threshold = pull > 0 ? (0.5f - coin) * 2.0f * WALK_COIN * pull : coin < 0.5f ? INFINITY : -INFINITY;
        walk->order[__popc(there & ((1u << place) - 1))] = {threshold, weight, lane, lane * gram.stride};
    }
    __syncwarp();
}

// Where a walk is: the lane's signed sum, the signs so far (the last in bit 0; set: minus), and what the next step needs, which
// is on its way before it is its turn.
struct walk_place {
    float sum;
    uint32_t signs;
    walk_step step;
    float row;
};

// One step: minus where the sum at the token is above `threshold`. Nothing but arithmetic is between one sum and
// the next, as a predicate would take as long as all of it.
__device__ __forceinline__ void walk_advance(const __nv_bfloat16 *column, const walk_step *next, float threshold,
                                             walk_place *place) {
    walk_step step = *next;
    float row = __bfloat162float(column[step.row]);
    uint32_t difference = __float_as_uint(threshold - __shfl_sync(~0u, place->sum, place->step.token));
    place->sum += __uint_as_float(__float_as_uint(place->step.weight) ^ (difference & 0x80000000u)) * place->row;
    place->signs = __funnelshift_l(difference, place->signs, 1);
    place->step = step;
    place->row = row;
}

// One halving: of the first 2 * drop tokens of the order `drop` lose their weight to the others. weight, sum: the lane's own
// token's weight and signed sum.
__device__ __forceinline__ void walk_halve(const leaf_gram &gram, uint32_t drop, const walk_state *walk, float *weight,
                                           float *sum) {
    uint32_t lane = threadIdx.x % 32, steps = 2 * drop;
    const __nv_bfloat16 *column = gram.entries + lane;
    walk_place place = {*sum, 0, walk->order[0], 0};
    place.row = __bfloat162float(column[place.step.row]);
#pragma unroll 4
    for (uint32_t i = 0; i < drop; i++) {
        walk_advance(column, &walk->order[i + 1], place.step.threshold, &place);
    }
    for (uint32_t i = drop; i < steps; i++) {
        // Once one sign has its half of the steps, all that follow get the other.
        uint32_t minus = __popc(place.signs);
        float threshold = minus == drop ? INFINITY : i - minus == drop ? -INFINITY : place.step.threshold;
        walk_advance(column, &walk->order[i + 1], threshold, &place);
    }
    *sum = place.sum;
    // By how much the weights of sign 1 grow: 2 where all are equal. The sum already counts them twice.
    uint32_t token = lane < steps ? 1u << walk->order[lane].token : 0;
    uint32_t took_part = __reduce_or_sync(~0u, token);
    uint32_t signs = __reduce_or_sync(~0u, lane < steps && !(place.signs >> (steps - 1 - lane) & 1) ? token : 0);
    bool walked = took_part >> lane & 1, mine = signs >> lane & 1;
    // Weights are at most BKV_LEAF: their sums in 16 binary places.
    uint32_t places = (uint32_t)(*weight * 65536.0f + 0.5f);
    uint32_t total = __reduce_add_sync(~0u, walked ? places : 0), kept = __reduce_add_sync(~0u, mine ? places : 0);
    float growth = (float)total / (float)kept;
    for (uint32_t left = growth != 2.0f ? signs : 0; left != 0; left &= left - 1) {
        uint32_t token = (uint32_t)__ffs((int)left) - 1;
        float grows = (growth - 2.0f) * __shfl_sync(~0u, *weight, token);
        *sum += grows * __bfloat162float(column[token * gram.stride]);
    }
    *weight *= !walked ? 1.0f : mine ? growth : 0.0f;
    __syncwarp();
}

// Reduces n <= BKV_LEAF tokens of weight 1 to `target` by one whole warp; returns the weight of the lane's own token, 0 where it
// was dropped. key: of this leaf.
__device__ inline float walk_reduce(const leaf_gram &gram, uint32_t n, uint32_t target, uint64_t key, walk_state *walk) {
    uint32_t lane = threadIdx.x % 32, left = n;
    for (uint32_t i = lane; i <= BKV_LEAF; i += 32) {
        walk->order[i] = {0, 0, 0, 0};
    }
    __syncwarp();
    float weight = lane < n && target > 0 ? 1.0f : 0.0f, sum = 0;
    float own = lane < n ? __bfloat162float(gram.entries[lane * gram.stride + lane]) : 0.0f;
    for (uint32_t halving = 0; left > target && target > 0; halving++) {
        uint32_t drop = min(left - target, left / 2);
        walk_order(gram, weight, own, key, halving, walk);
        walk_halve(gram, drop, walk, &weight, &sum);
        left -= drop;
    }
    return weight;
}

// Where leaf `leaf` of `leaves` begins among n tokens, and by the same rule among the target's.
__device__ __forceinline__ uint32_t leaf_first(uint32_t n, uint32_t leaves, uint32_t leaf) {
    return (uint32_t)((uint64_t)n * leaf / leaves);
}

#endif
