// walk.cuh - internal: the self-balancing walk of walk.c by one warp, over a leaf of at most BKV_LEAF tokens whose
// kernel matrix is in shared memory. Every lane holds the signed sum of its token, so that two steps are one exchange.
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
    walk_step order[BKV_LEAF + 4]; // four more are read, but not used
};

// A kernel matrix of bfloat16, rows `stride` elements apart.
struct leaf_gram {
    const __nv_bfloat16 *entries;
    uint32_t stride;
};

// Puts the tokens still there, those of weight > 0, in a new random order, with each one's threshold for a coin of its own.
// Returns where in it the lane's own token is, past its end where that is gone.
__device__ __forceinline__ uint32_t walk_order(const leaf_gram &gram, float weight, float own, uint64_t key, uint32_t halving,
                                               walk_state *walk) {
    uint32_t lane = threadIdx.x % 32, bits = random_bits((uint32_t)key, halving);
    // A place for every token by a map that is one to one on 5 bits, then without gaps.
    uint32_t place = (lane * (bits >> 8 | 1) + (bits >> 3)) % 32;
    place ^= place >> 2;
    place = place * (bits >> 16 | 1) % 32;
    uint32_t there = __reduce_or_sync(~0u, weight > 0 ? 1u << place : 0u);
    place = weight > 0 ? __popc(there & ((1u << place) - 1)) : BKV_LEAF;
    if (weight > 0) {
        float coin = (float)(random_bits((uint32_t)(key >> 32), halving * BKV_LEAF + lane) >> 8) * 0x1p-24f;
        float pull = weight * own;
        float threshold = pull > 0 ? (0.5f - coin) * 2.0f * WALK_COIN * pull : coin < 0.5f ? INFINITY : -INFINITY;
        walk->order[place] = {threshold, weight, lane, lane * gram.stride};
    }
    __syncwarp();
    return place;
}

// Two steps and what they need of the kernel matrix: the lane's entry in the row of each, and that of the one with the other.
struct walk_pair {
    walk_step step[2];
    float row[2], cross;
};

__device__ __forceinline__ void pair_find(const leaf_gram &gram, walk_pair *pair) {
    const __nv_bfloat16 *first = gram.entries + pair->step[0].row;
    pair->row[0] = __bfloat162float(first[threadIdx.x % 32]);
    pair->row[1] = __bfloat162float(gram.entries[pair->step[1].row + threadIdx.x % 32]);
    pair->cross = __bfloat162float(first[pair->step[1].token]);
}

// `steps` steps, an even number, each minus where the lane's signed sum at the token is above the threshold; returns the
// signs, set: minus. Two go together: what the first does to the second's sum all lanes work out, so that both wait for one
// exchange. Nothing but arithmetic is between one sum and the next, as a predicate would take as long as all of it, and what
// the next two need is on its way by then.
__device__ __forceinline__ uint32_t walk_steps(const leaf_gram &gram, const walk_state *walk, uint32_t steps, float *sum) {
    uint32_t signs = 0;
    walk_pair pair = {{walk->order[0], walk->order[1]}}, next = {{walk->order[2], walk->order[3]}};
    pair_find(gram, &pair);
#pragma unroll 2
    for (uint32_t i = 0; i < steps; i += 2) {
        walk_step after[2] = {walk->order[i + 4], walk->order[i + 5]};
        pair_find(gram, &next);
        float mine = *sum, at[2];
        at[0] = __shfl_sync(~0u, mine, pair.step[0].token);
        at[1] = __shfl_sync(~0u, mine, pair.step[1].token);
        uint32_t first = __float_as_uint(pair.step[0].threshold - at[0]);
        float weight = __uint_as_float(__float_as_uint(pair.step[0].weight) ^ (first & 0x80000000u));
        uint32_t second = __float_as_uint(pair.step[1].threshold - (at[1] + weight * pair.cross));
        mine += weight * pair.row[0];
        weight = __uint_as_float(__float_as_uint(pair.step[1].weight) ^ (second & 0x80000000u));
        *sum = mine + weight * pair.row[1];
        signs = __funnelshift_l(second, __funnelshift_l(first, signs, 1), 1);
        pair = next;
        next.step[0] = after[0];
        next.step[1] = after[1];
    }
    return __brev(signs) >> (32 - steps);
}

// Adds `factor` times what steps `which` added as pluses; two at a time, so that their loads wait together.
__device__ __forceinline__ void walk_add(const leaf_gram &gram, const walk_state *walk, uint32_t which, float factor,
                                         float *sum) {
    while (which != 0) {
        uint32_t first = (uint32_t)__ffs((int)which) - 1, last = 31 - (uint32_t)__clz((int)which);
        walk_step a = walk->order[first], b = walk->order[last];
        float b_weight = first == last ? 0 : b.weight;
        *sum += factor * a.weight * __bfloat162float(gram.entries[a.row + threadIdx.x % 32]);
        *sum += factor * b_weight * __bfloat162float(gram.entries[b.row + threadIdx.x % 32]);
        which &= ~(1u << first | 1u << last);
    }
}

// One halving: of the first 2 * drop tokens of the order `drop` lose their weight to the others. weight, sum: the lane's own
// token's weight and signed sum; place: of that token in the order.
__device__ __forceinline__ void walk_halve(const leaf_gram &gram, uint32_t drop, uint32_t place, const walk_state *walk,
                                           float *weight, float *sum) {
    uint32_t steps = 2 * drop, all = ~0u >> (32 - steps), minus = walk_steps(gram, walk, steps, sum);
    // Once one sign has its half of the steps, all that follow get the other: the last ones of the sign that has more.
    bool fewer = __popc(minus) < (int)drop;
    uint32_t more = fewer ? all & ~minus : minus, wrong = 0;
    for (uint32_t excess = (uint32_t)__popc(more) - drop; excess > 0; excess--) {
        wrong |= 1u << (31 - __clz((int)(more ^ wrong)));
    }
    walk_add(gram, walk, wrong, fewer ? -2.0f : 2.0f, sum);
    minus ^= wrong;
    // By how much the weights of sign 1 grow: 2 where all are equal. The sum already counts them twice.
    bool walked = place < steps, mine = walked && !(minus >> place & 1);
    // Weights are at most BKV_LEAF: their sums in 16 binary places.
    uint32_t places = (uint32_t)(*weight * 65536.0f + 0.5f);
    uint32_t total = __reduce_add_sync(~0u, walked ? places : 0), kept = __reduce_add_sync(~0u, mine ? places : 0);
    float growth = 2;
    if (total != 2 * kept) {
        growth = (float)total / (float)kept;
        walk_add(gram, walk, all & ~minus, growth - 2.0f, sum);
    }
    *weight *= !walked ? 1.0f : mine ? growth : 0.0f;
    __syncwarp();
}

// Reduces n <= BKV_LEAF tokens of weight 1 to `target` by one whole warp; returns the weight of the lane's own token, 0 where
// it was dropped. key: of this leaf.
__device__ inline float walk_reduce(const leaf_gram &gram, uint32_t n, uint32_t target, uint64_t key, walk_state *walk) {
    uint32_t lane = threadIdx.x % 32, left = n;
    for (uint32_t i = lane; i < BKV_LEAF + 4; i += 32) {
        walk->order[i] = {0, 0, 0, 0};
    }
    __syncwarp();
    float weight = lane < n && target > 0 ? 1.0f : 0.0f, sum = 0;
    float own = lane < n ? __bfloat162float(gram.entries[lane * gram.stride + lane]) : 0.0f;
    for (uint32_t halving = 0; left > target && target > 0; halving++) {
        uint32_t drop = min(left - target, left / 2);
        uint32_t place = walk_order(gram, weight, own, key, halving, walk);
        walk_halve(gram, drop, place, walk, &weight, &sum);
        left -= drop;
    }
    return weight;
}

// Where leaf `leaf` of `leaves` begins among n tokens, and by the same rule among the target's.
__device__ __forceinline__ uint32_t leaf_first(uint32_t n, uint32_t leaves, uint32_t leaf) {
    return (uint32_t)((uint64_t)n * leaf / leaves);
}

#endif
