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
    uint32_t tokens, weights, tiles;
    uint32_t shape; // kinds; whether weighted << 8; group_tokens << 16; group_tiles << 24
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

// Where a warp is. All lanes hold the same, but for `mine`: lane i has the section of record base + i.
struct walk_t {
    const bkv_gpu_section_t *list;
    uint32_t part, count; // pair * blocks + block of columns; the pair's records
    uint32_t base, at;
    uint32_t tile; // of section `now`
    place_t mine, now;
};

template <class T> __device__ __forceinline__ T lane_get(T value, uint32_t lane) {
    return __shfl_sync(ALL_LANES, value, (int)lane);
}

__device__ __forceinline__ void walk_section(walk_t &walk) {
    walk.now.keys = (const uint8_t *)lane_get((unsigned long long)walk.mine.keys, walk.at);
    walk.now.values = (const uint8_t *)lane_get((unsigned long long)walk.mine.values, walk.at);
    walk.now.tokens = lane_get(walk.mine.tokens, walk.at);
    walk.now.weights = lane_get(walk.mine.weights, walk.at);
    walk.now.tiles = lane_get(walk.mine.tiles, walk.at);
    walk.now.shape = lane_get(walk.mine.shape, walk.at);
}

// The sections of 32 records from `base` on. Returns the number of this lane's first tile.
__device__ inline uint32_t walk_load(walk_t &walk, uint32_t base) {
    bkv_gpu_section_t section;
    const uint4 *at = (const uint4 *)&walk.list[min(base + threadIdx.x % WARP, walk.count - 1)];
    uint4 halves[2] = {at[0], at[1]};
    memcpy(&section, halves, sizeof(section));
    walk.mine.keys = section.keys;
    walk.mine.values = section.values;
    walk.mine.tokens = section.tokens;
    walk.mine.weights = section.weights;
    walk.mine.tiles = (section.tokens + section.group_tokens - 1) / section.group_tokens * section.group_tiles;
    walk.mine.shape = section.kinds | section.weighted << 8 | section.group_tokens << 16 | (uint32_t)section.group_tiles << 24;
    walk.base = base;
    walk.at = 0;
    return section.tile;
}

__device__ inline void walk_open(const bkv_gpu_attend_t &job, walk_t &walk, uint32_t part) {
    uint32_t pair = part / job.blocks, sequence = pair / job.heads, head = pair % job.heads;
    uint32_t from = job.first[sequence];
    walk.part = part;
    walk.count = job.first[sequence + 1] - from;
    walk.list = job.sections + (uint64_t)from * job.heads + (uint64_t)head * walk.count;
}

// Goes to tile `tile` of all. There must be such a tile.
__device__ inline void walk_start(const bkv_gpu_attend_t &job, walk_t &walk, uint64_t tile) {
    uint32_t lane = threadIdx.x % WARP, pairs = job.batch * job.heads, pair = 0;
    uint64_t before = 0;
    for (uint32_t first = 0; first < pairs; first += WARP) {
        uint64_t own = first + lane < pairs ? (uint64_t)pair_tiles(job, first + lane) * job.blocks : 0, upto = own;
        for (uint32_t step = 1; step < WARP; step *= 2) {
            uint64_t other = __shfl_up_sync(ALL_LANES, (unsigned long long)upto, step);
            upto += lane >= step ? other : 0;
        }
        uint32_t beyond = __ballot_sync(ALL_LANES, before + upto > tile);
        if (beyond) {
            uint32_t there = (uint32_t)__ffs((int)beyond) - 1;
            before += lane_get((unsigned long long)(upto - own), there);
            pair = first + there;
            break;
        }
        before += lane_get((unsigned long long)upto, WARP - 1);
    }
    uint32_t tiles = pair_tiles(job, pair), within = (uint32_t)((tile - before) % tiles);
    walk_open(job, walk, pair * job.blocks + (uint32_t)((tile - before) / tiles));
    uint32_t low = 0, high = walk.count; // the section is in [low, high)
    while (high - low > 1) {
        uint32_t step = (high - low + WARP - 1) / WARP, probe = low + lane * step;
        uint32_t reached = __ballot_sync(ALL_LANES, probe < high && walk.list[min(probe, high - 1)].tile <= within);
        low += ((uint32_t)__popc(reached) - 1) * step;
        high = min(low + step, high);
    }
    walk.tile = within - lane_get(walk_load(walk, low), 0);
    walk_section(walk);
}

// To the next tile, which there must be.
__device__ inline void walk_next(const bkv_gpu_attend_t &job, walk_t &walk) {
    if (++walk.tile < walk.now.tiles) {
        return;
    }
    walk.tile = 0;
    walk.at++;
    if (walk.base + walk.at >= walk.count) {
        uint32_t part = walk.part + 1;
        while (pair_tiles(job, part / job.blocks) == 0) {
            part++;
        }
        walk_open(job, walk, part);
        walk_load(walk, 0);
    } else if (walk.at == WARP) {
        walk_load(walk, walk.base + WARP);
    }
    walk_section(walk);
}

// The tokens of the current tile: `count` from `first`, in key group `group`. The last tiles of a short group have none.
struct span_t {
    uint32_t first, count, group;
};

__device__ __forceinline__ span_t walk_span(const walk_t &walk) {
    const uint32_t group_tokens = walk.now.shape >> 16 & 255, group_tiles = walk.now.shape >> 24;
    uint32_t group = walk.tile, piece = 0, length = group_tokens;
    if (group_tiles > 1) {
        group = walk.tile / group_tiles;
        piece = walk.tile - group * group_tiles;
        length = (length + group_tiles - 1) / group_tiles;
        length = (length + BKV_GPU_TILE_STEP - 1) / BKV_GPU_TILE_STEP * BKV_GPU_TILE_STEP;
    }
    uint32_t first = group * group_tokens + piece * length;
    uint32_t end = min(min((group + 1) * group_tokens, first + length), walk.now.tokens);
    return {first, end > first ? end - first : 0, group};
}

// The all-tiles total, by a whole warp.
__device__ inline uint64_t walk_total(const bkv_gpu_attend_t &job) {
    uint32_t pairs = job.batch * job.heads;
    unsigned long long sum = 0;
    for (uint32_t pair = threadIdx.x % WARP; pair < pairs; pair += WARP) {
        sum += pair_tiles(job, pair);
    }
    for (uint32_t step = WARP / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, (int)step);
    }
    return sum * job.blocks;
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
