// attend_walk.cuh - internal: which tiles a warp works on. See attend_gpu.h for what a tile is.
#ifndef BKV_ATTEND_WALK_CUDA_CUH
#define BKV_ATTEND_WALK_CUDA_CUH

#include "attend_gpu.h"

#define ALL_LANES 0xffffffffu
#define WARP      32u

// Tiles of a pair; of a broken one, none.
__device__ __forceinline__ uint32_t pair_tiles(const bkv_gpu_attend_t &job, uint32_t pair) {
    uint32_t tiles = job.tiles[pair];
    return tiles == BKV_GPU_BROKEN ? 0 : tiles;
}

// How many of `warps` warps have work: each of these has at least one tile.
__device__ __forceinline__ uint32_t share_warps(uint64_t total, uint32_t warps) {
    return (uint32_t)min((uint64_t)warps, total);
}

// The first tile of warp `warp` of `warps`: they share `total` tiles evenly.
__device__ __forceinline__ uint64_t share_start(uint64_t total, uint32_t warp, uint32_t warps) {
    return total * warp / warps;
}

// The warp whose share holds `tile`.
__device__ __forceinline__ uint32_t share_owner(uint64_t total, uint64_t tile, uint32_t warps) {
    return (uint32_t)(((tile + 1) * warps - 1) / total);
}

// Where warp `warp`'s partial result over part `part` (a pair and a block of its columns) lies. Going through the tiles in
// order, each step moves on to the next warp or the next part, so that no two have the same sum.
__device__ __forceinline__ float *part_at(const bkv_gpu_attend_t &job, uint32_t warp, uint32_t part) {
    return job.parts + (uint64_t)(warp + part) * job.columns * (job.value_dim + 4);
}

// A section as a walk holds it.
struct place_t {
    const uint8_t *keys, *values; // as in bkv_gpu_section_t
    uint32_t tokens, weights;
    uint32_t shape; // kinds; whether weighted << 8; group_tokens << 16; group_tiles << 24: the last word of a bkv_gpu_section_t
};

__device__ __forceinline__ uint32_t key_kind(uint32_t shape) {
    return shape & 15;
}

__device__ __forceinline__ uint32_t value_kind(uint32_t shape) {
    return shape >> 4 & 15;
}

__device__ __forceinline__ bool is_weighted(uint32_t shape) {
    return (shape >> 8 & 1) != 0;
}

__device__ __forceinline__ uint32_t group_tokens(uint32_t shape) {
    return shape >> 16 & 255;
}

__device__ __forceinline__ uint32_t group_tiles(uint32_t shape) {
    return shape >> 24;
}

// Where a warp is. All lanes hold the same.
struct walk_t {
    const bkv_gpu_section_t *list;
    uint32_t part, count, tiles;             // pair * blocks + block of columns; the pair's records and tiles
    uint32_t at, tile;                       // the next tile of the pair, and the section that it, or the one before, is in
    uint32_t next_tiles, next_from, next_to; // of the next part's pair, read long before they are needed
};

// The tokens of a tile: `count` from `first`, in key group `group`. The last tiles of a short group have none.
struct span_t {
    uint32_t first, count, group;
};

// A tile that walk_look found.
struct found_t {
    place_t section;
    span_t span;
};

template <class T> __device__ __forceinline__ T lane_get(T value, uint32_t lane) {
    return __shfl_sync(ALL_LANES, value, (int)lane);
}

// Goes to a part whose pair has `tiles` tiles of the records [from, to).
__device__ inline void walk_open(const bkv_gpu_attend_t &job, walk_t &walk, uint32_t part, uint32_t tiles, uint32_t from,
                                 uint32_t to) {
    const uint32_t next = min((part + 1) / job.blocks, job.batch * job.heads - 1);
    walk.part = part;
    walk.count = to - from;
    walk.tiles = tiles;
    walk.at = walk.tile = 0;
    walk.list = job.sections + (uint64_t)from * job.heads + (uint64_t)(part / job.blocks % job.heads) * walk.count;
    walk.next_tiles = job.tiles[next];
    walk.next_from = job.first[next / job.heads];
    walk.next_to = job.first[next / job.heads + 1];
}

// What a warp has to do: `left` tiles from `start` on, none if left is 0. The search for its pair may begin at `pair`, which
// has `before` tiles before it.
struct share_t {
    uint64_t start, before;
    uint32_t left, pair;
};

// The share of warp `warp` of all. By the whole thread block, each of whose threads counts some of the pairs; sums:
// [blockDim.x] in shared memory. Ends with a barrier. One thread block also leaves behind, for the merge, how many tiles are
// before each pair.
__device__ inline share_t share_find(const bkv_gpu_attend_t &job, uint64_t *sums, uint32_t warp, uint32_t all_warps) {
    const uint32_t lane = threadIdx.x % WARP, pairs = job.batch * job.heads, each = (pairs + blockDim.x - 1) / blockDim.x;
    const uint32_t first = min(threadIdx.x * each, pairs), last = min(first + each, pairs);
    unsigned long long sum = 0;
    for (uint32_t pair = first; pair < last; pair++) {
        sum += pair_tiles(job, pair);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < WARP) { // of each thread's pairs to up to and with them
        unsigned long long before = 0;
        for (uint32_t i = lane; i < blockDim.x; i += WARP) {
            unsigned long long upto = sums[i];
            for (uint32_t step = 1; step < WARP; step *= 2) {
                unsigned long long other = __shfl_up_sync(ALL_LANES, upto, step);
                upto += lane >= step ? other : 0;
            }
            sums[i] = upto += before;
            before = lane_get(upto, WARP - 1);
        }
    }
    __syncthreads();
    if (blockIdx.x == 0) {
        uint64_t before = sums[threadIdx.x] - sum;
        for (uint32_t pair = first; pair < last; pair++) {
            job.before[pair] = before;
            before += pair_tiles(job, pair);
        }
        if (threadIdx.x == blockDim.x - 1) {
            job.before[pairs] = before;
        }
    }
    share_t share = {};
    const uint64_t total = sums[blockDim.x - 1] * job.blocks;
    const uint32_t warps = share_warps(total, all_warps);
    if (warp < warps) {
        share.start = share_start(total, warp, warps);
        share.left = (uint32_t)(share_start(total, warp + 1, warps) - share.start);
        uint32_t low = 0, high = blockDim.x; // the first thread whose sum is beyond the start
        while (low < high) {
            uint32_t middle = (low + high) / 2;
            if (sums[middle] * job.blocks > share.start) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        share.before = (low > 0 ? sums[low - 1] : 0) * job.blocks;
        share.pair = low * each;
    }
    __syncthreads();
    return share;
}

// Goes to the first tile of a share that has one.
__device__ inline void walk_start(const bkv_gpu_attend_t &job, walk_t &walk, const share_t &share) {
    const uint32_t lane = threadIdx.x % WARP;
    uint64_t before = share.before, tile = share.start;
    uint32_t pair = share.pair;
    while (tile - before >= (uint64_t)pair_tiles(job, pair) * job.blocks) {
        before += (uint64_t)pair_tiles(job, pair) * job.blocks;
        pair++;
    }
    uint32_t tiles = pair_tiles(job, pair), within = (uint32_t)((tile - before) % tiles);
    const uint32_t part = pair * job.blocks + (uint32_t)((tile - before) / tiles), sequence = pair / job.heads;
    walk_open(job, walk, part, tiles, job.first[sequence], job.first[sequence + 1]);
    uint32_t low = 0, high = walk.count; // the section is in [low, high)
    while (high - low > 1) {
        uint32_t step = (high - low + WARP - 1) / WARP, probe = low + lane * step;
        uint32_t reached = __ballot_sync(ALL_LANES, probe < high && walk.list[min(probe, high - 1)].tile <= within);
        low += ((uint32_t)__popc(reached) - 1) * step;
        high = min(low + step, high);
    }
    walk.at = low;
    walk.tile = within;
}

// To the next part that has tiles, which there must be.
__device__ inline void walk_forward(const bkv_gpu_attend_t &job, walk_t &walk) {
    uint32_t part = walk.part + 1, tiles = walk.next_tiles, from = walk.next_from, to = walk.next_to;
    if (tiles == 0 || tiles == BKV_GPU_BROKEN) {
        while ((tiles = pair_tiles(job, part / job.blocks)) == 0) {
            part++;
        }
        from = job.first[part / job.blocks / job.heads];
        to = job.first[part / job.blocks / job.heads + 1];
    }
    walk_open(job, walk, part, tiles, from, to);
}

// The tokens of tile `tile` of a section.
__device__ __forceinline__ span_t section_span(const place_t &section, uint32_t tile) {
    const uint32_t tokens = group_tokens(section.shape), tiles = group_tiles(section.shape);
    uint32_t group = tile, piece = 0, length = tokens;
    if (tiles > 1) {
        group = tile / tiles;
        piece = tile - group * tiles;
        length = (length + tiles - 1) / tiles;
        length = (length + BKV_GPU_TILE_STEP - 1) / BKV_GPU_TILE_STEP * BKV_GPU_TILE_STEP;
    }
    uint32_t first = group * tokens + piece * length;
    uint32_t end = min(min((group + 1) * tokens, first + length), section.tokens);
    return {first, end > first ? end - first : 0, group};
}

// Finds the next tiles, side by side: lane i the i-th of them. All are of one part, walk.part; there are at least one, at
// most `left` and BKV_GPU_AHEAD. Returns how many; the walk is behind them then.
__device__ inline uint32_t walk_look(const bkv_gpu_attend_t &job, walk_t &walk, uint32_t left, found_t &found) {
    const uint32_t lane = threadIdx.x % WARP;
    if (walk.tile == walk.tiles) {
        walk_forward(job, walk);
    }
    const uint32_t count = min(min(left, BKV_GPU_AHEAD), walk.tiles - walk.tile), tile = walk.tile + min(lane, count - 1);
    // Each section has a tile or more, so that the tiles are in as many sections at most, behind the first one.
    const uint32_t start = lane <= BKV_GPU_AHEAD && walk.at + lane < walk.count ? walk.list[walk.at + lane].tile : UINT32_MAX;
    uint32_t own = 0; // of the sections from walk.at on: the last that does not start behind the tile
#pragma unroll
    for (uint32_t step = BKV_GPU_AHEAD; step > 0; step /= 2) {
        own += lane_get(start, own + step) <= tile ? step : 0;
    }
    const uint4 *section = (const uint4 *)&walk.list[walk.at + own], places = section[0], rest = section[1];
    found.section.keys = (const uint8_t *)(places.x | (uint64_t)places.y << 32);
    found.section.values = (const uint8_t *)(places.z | (uint64_t)places.w << 32);
    found.section.tokens = rest.x;
    found.section.weights = rest.y;
    found.section.shape = rest.w;
    found.span = section_span(found.section, tile - rest.z);
    walk.tile += count;
    walk.at += lane_get(own, count - 1);
    if (lane <= BKV_GPU_AHEAD / 4) { // four to a line of 128 bytes
        asm volatile("prefetch.global.L1 [%0];" ::"l"(&walk.list[min(walk.at + 4 * lane, walk.count - 1)]));
    }
    return count;
}

// What lane `lane` found, for all lanes.
__device__ __forceinline__ found_t found_get(const found_t &found, uint32_t lane) {
    found_t of;
    of.section.keys = (const uint8_t *)lane_get((unsigned long long)found.section.keys, lane);
    of.section.values = (const uint8_t *)lane_get((unsigned long long)found.section.values, lane);
    of.section.tokens = lane_get(found.section.tokens, lane);
    of.section.weights = lane_get(found.section.weights, lane);
    of.section.shape = lane_get(found.section.shape, lane);
    of.span = {lane_get(found.span.first, lane), lane_get(found.span.count, lane), lane_get(found.span.group, lane)};
    return of;
}

// Where a section's parts lie behind `keys` and `values`. The kind is its own; where it is known, it is a constant.
__device__ __forceinline__ const uint8_t *section_params(const place_t &section) {
    return section.keys + (is_weighted(section.shape) ? (section.tokens + 7) / 4 * 4 : 0);
}

__device__ __forceinline__ const uint8_t *section_keys(const place_t &section, uint32_t kind, uint32_t key_dim) {
    uint32_t groups = max(1u, (section.tokens + BKV_KEY_GROUP_TOKENS / 2) / BKV_KEY_GROUP_TOKENS);
    return section_params(section) + (kind > BKV_GPU_BITS8 ? 0 : (uint64_t)groups * 4 * key_dim);
}

__device__ __forceinline__ const uint8_t *section_values(const place_t &section, uint32_t kind, uint32_t value_dim) {
    uint32_t groups = (value_dim + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS;
    return section.values + (kind > BKV_GPU_BITS8 ? 0 : (uint64_t)section.tokens * 4 * groups);
}

#endif
