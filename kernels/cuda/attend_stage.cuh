// attend_stage.cuh - internal: bringing tiles into a warp's shared memory, asynchronously: its keys while the values of the
// tile before are worked on, then its values while its keys are.
//
// What is to be copied for a tile is an errand. A warp's lanes note those of its next tiles side by side, long before their
// turn comes: where a tile lies takes longer to find out than to say to the copy engine.
//
// From sm_90 on the copy engine does it: one instruction of one lane for each piece of consecutive memory, and a barrier in
// shared memory that counts the bytes as they come. Before, all lanes copy 16 bytes each, again and again.
#ifndef BKV_ATTEND_STAGE_CUDA_CUH
#define BKV_ATTEND_STAGE_CUDA_CUH

#include "attend_codes.cuh"
#include "attend_walk.cuh"

// One tile on its way or there. Places are offsets into the thread block's shared memory.
struct stage_t {
    uint32_t count;        // tokens
    uint32_t shape;        // as in place_t
    uint32_t weight_range; // float16 base and step
    uint32_t weights;      // [count] codes
    uint32_t key_params;   // [key_dim / 32] pieces of 32 words, BKV_GPU_PARAMS_STEP bytes apart
    uint32_t keys, values; // rows, see key_row_at
    uint32_t value_params;
};

// Where row `t` of keys is behind the first. See bkv_gpu_key_unit.
template <int KIND, int DIM> __device__ __forceinline__ uint32_t key_row_at(uint32_t t) {
    constexpr uint32_t row = DIM * kind_words(KIND) / 8;
    if constexpr (KIND == BKV_GPU_BITS3 || row % 64 != 0) {
        return t * row;
    } else {
        constexpr uint32_t rows = 256 % row == 0 ? 256 / row : 1;
        return t / rows * (rows * row + 16) + t % rows * row;
    }
}

__device__ __forceinline__ uint32_t shared_address(const uint8_t *shared) {
    return (uint32_t)__cvta_generic_to_shared(shared);
}

#if __CUDA_ARCH__ >= 900

// The copies of one stage: an mbarrier that the copy engine reports to, and which of its phases is awaited.
struct copies_t {
    uint32_t barrier, phase;
};

__device__ __forceinline__ void copies_open(copies_t &copies, uint8_t *shared, uint32_t number) {
    copies.barrier = shared_address(shared) + 8 * number;
    copies.phase = 0;
    if (threadIdx.x % WARP == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(copies.barrier) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
}

// True in one lane. The compiler knows that it is one, and need not take turns for the copy engine.
__device__ __forceinline__ bool lane_elected() {
    uint32_t elected;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(elected));
    return elected != 0;
}

// Shared memory that was written in the ordinary way is now the copy engine's.
__device__ __forceinline__ void copies_follow() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// One lane says how many bytes are about to come.
__device__ __forceinline__ void copies_expect(const copies_t &copies, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(copies.barrier), "r"(bytes) : "memory");
}

// All of `bytes`, a multiple of 16, by this lane.
__device__ __forceinline__ void copies_start(const copies_t &copies, uint32_t to, const uint8_t *from, uint32_t bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(copies.barrier)
                 : "memory");
}

__device__ __forceinline__ void copies_commit() {}

// Until the stage is there, if anything was copied to it.
__device__ __forceinline__ void copies_wait(copies_t &copies, bool any) {
    if (!any) {
        return;
    }
    uint32_t done = 0;
    while (!done) {
        asm volatile("{\n.reg .pred there;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 there, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, there;\n}"
                     : "=r"(done)
                     : "r"(copies.barrier), "r"(copies.phase)
                     : "memory");
    }
    copies.phase ^= 1;
    __syncwarp();
}

#else

struct copies_t {};

__device__ __forceinline__ void copies_follow() {}

__device__ __forceinline__ void copies_open(copies_t &, uint8_t *, uint32_t) {}

// All lanes of the warp together.
__device__ __forceinline__ void copies_share(uint32_t to, const uint8_t *from, uint32_t bytes) {
    for (uint32_t i = 16 * (threadIdx.x % WARP); i < bytes; i += 16 * WARP) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"(from + i) : "memory");
    }
}

__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// The stage before the last that was committed.
__device__ __forceinline__ void copies_wait(copies_t &, bool) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();
}

#endif

// Consecutive memory, on its way to shared memory: whole multiples of 16 bytes on both sides.
struct piece_t {
    const uint8_t *from;
    uint32_t to, bytes;
};

// `bytes` bytes from `from` on, and where the first of them will be.
__device__ __forceinline__ uint32_t piece_cut(piece_t &piece, uint32_t to, const uint8_t *from, uint32_t bytes) {
    uint32_t skew = (uint32_t)(uintptr_t)from & 15;
    piece.from = from - skew;
    piece.to = to;
    piece.bytes = (skew + bytes + 15) / 16 * 16;
    return to + skew;
}

// The pieces of a tile's keys. before: weights, may be missing; params: `params_count` of them, those of 32 channels each;
// keys: the first unit, where there are units, and key_bytes those of all of them.
struct key_pieces_t {
    piece_t before, params, keys;
    uint32_t params_count, unit, key_bytes;
};

// What is to be copied for a tile, and where it will be. Of the values, scales may be missing.
struct errand_t {
    stage_t stage;
    key_pieces_t keys;
    piece_t scales, values;
};
static_assert(sizeof(errand_t) <= BKV_GPU_ERRAND_ROOM && BKV_GPU_ERRAND_ROOM % 16 == 0, "errands lie side by side");

// Bytes that a copy of the keys' unit `i` takes: `skew` of them lie before it.
__device__ __forceinline__ uint32_t unit_bytes(const key_pieces_t &pieces, uint32_t skew, uint32_t i) {
    return (skew + min(pieces.unit, pieces.key_bytes - i * pieces.unit) + 15) / 16 * 16;
}

#if __CUDA_ARCH__ >= 900

// By one lane, but units by all lanes.
__device__ __forceinline__ void keys_copy(const key_pieces_t &pieces, uint32_t skew, const uint8_t *shared, copies_t &copies) {
    const uint32_t base = shared_address(shared);
    const uint32_t units = pieces.unit != 0 ? (pieces.key_bytes + pieces.unit - 1) / pieces.unit : 0;
    if (lane_elected()) {
        uint32_t keys = pieces.keys.bytes;
        if (units > 0) {
            keys = (units - 1) * unit_bytes(pieces, skew, 0) + unit_bytes(pieces, skew, units - 1);
        }
        copies_expect(copies, pieces.before.bytes + pieces.params_count * pieces.params.bytes + keys);
        if (pieces.before.bytes > 0) {
            copies_start(copies, base + pieces.before.to, pieces.before.from, pieces.before.bytes);
        }
#pragma unroll
        for (uint32_t i = 0; i < pieces.params_count; i++) {
            copies_start(copies, base + pieces.params.to + BKV_GPU_PARAMS_STEP * i, pieces.params.from + 128 * i,
                         pieces.params.bytes);
        }
        if (units == 0) {
            copies_start(copies, base + pieces.keys.to, pieces.keys.from, pieces.keys.bytes);
        }
    }
    if (units > 0) {
        __syncwarp();
        for (uint32_t i = threadIdx.x % WARP; i < units; i += WARP) {
            copies_start(copies, base + pieces.keys.to + i * (pieces.unit + 16), pieces.keys.from + i * pieces.unit,
                         unit_bytes(pieces, skew, i));
        }
    }
}

// By one lane. scales may be missing.
__device__ __forceinline__ void values_copy(const piece_t &scales, const piece_t &values, const uint8_t *shared,
                                            copies_t &copies) {
    const uint32_t base = shared_address(shared);
    if (lane_elected()) {
        copies_expect(copies, scales.bytes + values.bytes);
        if (scales.bytes > 0) {
            copies_start(copies, base + scales.to, scales.from, scales.bytes);
        }
        copies_start(copies, base + values.to, values.from, values.bytes);
    }
}

#else

// All by all lanes together.
__device__ __forceinline__ void keys_copy(const key_pieces_t &pieces, uint32_t skew, const uint8_t *shared, copies_t &) {
    const uint32_t base = shared_address(shared);
    copies_share(base + pieces.before.to, pieces.before.from, pieces.before.bytes);
    for (uint32_t i = 0; i < pieces.params_count; i++) {
        copies_share(base + pieces.params.to + BKV_GPU_PARAMS_STEP * i, pieces.params.from + 128 * i, pieces.params.bytes);
    }
    if (pieces.unit == 0) {
        copies_share(base + pieces.keys.to, pieces.keys.from, pieces.keys.bytes);
        return;
    }
    for (uint32_t i = 0; i * pieces.unit < pieces.key_bytes; i++) {
        copies_share(base + pieces.keys.to + i * (pieces.unit + 16), pieces.keys.from + i * pieces.unit,
                     unit_bytes(pieces, skew, i));
    }
}

__device__ __forceinline__ void values_copy(const piece_t &scales, const piece_t &values, const uint8_t *shared, copies_t &) {
    const uint32_t base = shared_address(shared);
    copies_share(base + scales.to, scales.from, scales.bytes);
    copies_share(base + values.to, values.from, values.bytes);
}

#endif

// Start to copy one half of an errand, all lanes together; nothing for a tile without tokens. Nobody may still read what was
// there before.
__device__ __forceinline__ void keys_start(const errand_t &errand, const uint8_t *shared, copies_t &copies) {
    if (errand.stage.count > 0) {
        keys_copy(errand.keys, errand.stage.keys & 15, shared, copies);
    }
    copies_commit();
}

__device__ __forceinline__ void values_start(const errand_t &errand, const uint8_t *shared, copies_t &copies) {
    if (errand.stage.count > 0) {
        values_copy(errand.scales, errand.values, shared, copies);
    }
    copies_commit();
}

// Notes the keys of some tokens of a section, to be copied to `to`. The kind is that of the section, a constant where it can
// be.
template <int KEY_DIM>
__device__ __forceinline__ void keys_cut(const found_t &found, uint32_t kind, uint32_t to, errand_t &errand) {
    const place_t &section = found.section;
    const uint32_t row = bkv_gpu_row_bytes(kind, KEY_DIM), count = found.span.count;
    key_pieces_t &pieces = errand.keys;
    errand.stage.weights = piece_cut(pieces.before, to, section.keys + 4 + found.span.first, count);
    pieces.before.bytes = is_weighted(section.shape) ? pieces.before.bytes : 0;
    to += (count + 46) / 16 * 16;
    errand.stage.key_params = piece_cut(pieces.params, to, section_params(section) + found.span.group * 4 * KEY_DIM, 128);
    pieces.params_count = kind <= BKV_GPU_BITS8 ? KEY_DIM / 32 : 0;
    to += pieces.params_count * BKV_GPU_PARAMS_STEP;
    pieces.unit = bkv_gpu_key_unit(kind, KEY_DIM);
    pieces.key_bytes = row * count;
    errand.stage.keys =
        piece_cut(pieces.keys, to, section_keys(section, kind, KEY_DIM) + (uint64_t)found.span.first * row, pieces.key_bytes);
}

// The same for a whole section of codes whose rows just follow one another, in fewer pieces: the weights are next to the
// first params, the last params to the keys.
template <int KEY_DIM>
__device__ __forceinline__ void keys_whole(const place_t &section, uint32_t kind, uint32_t to, errand_t &errand) {
    static_assert(KEY_DIM >= 64, "the first params are not the last ones");
    const uint32_t last = KEY_DIM / 32 - 1;
    const uint8_t *params = section_params(section);
    const uint32_t weights = (uint32_t)(params - section.keys);
    key_pieces_t &pieces = errand.keys;
    errand.stage.weights = piece_cut(pieces.before, to, section.keys, weights + 128) + 4;
    errand.stage.key_params = errand.stage.weights - 4 + weights;
    to = errand.stage.key_params / 16 * 16;
    piece_cut(pieces.params, to + BKV_GPU_PARAMS_STEP, params + 128, 128);
    pieces.params_count = last - 1;
    to += last * BKV_GPU_PARAMS_STEP;
    pieces.unit = pieces.key_bytes = 0;
    errand.stage.keys =
        piece_cut(pieces.keys, to, params + 128 * last, 128 + section.tokens * bkv_gpu_row_bytes(kind, KEY_DIM)) + 128;
}

// The same for the values. Of a whole section, its scales are in one piece with them.
template <int VALUE_DIM> __device__ __forceinline__ void values_cut(const found_t &found, uint32_t to, errand_t &errand) {
    const place_t &section = found.section;
    const uint32_t kind = value_kind(section.shape), row = bkv_gpu_row_bytes(kind, VALUE_DIM), count = found.span.count;
    const uint32_t scales = kind > BKV_GPU_BITS8 ? 0 : (VALUE_DIM + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS * 4;
    errand.scales = {};
    if (count == section.tokens) {
        errand.stage.value_params = piece_cut(errand.values, to, section.values, count * (scales + row));
        errand.stage.values = errand.stage.value_params + scales * count;
        return;
    }
    const uint8_t *rows = section.values + (uint64_t)section.tokens * scales + (uint64_t)found.span.first * row;
    errand.stage.value_params =
        piece_cut(errand.scales, to, section.values + (uint64_t)found.span.first * scales, count * scales);
    errand.scales.bytes = scales > 0 ? errand.scales.bytes : 0;
    errand.stage.values = piece_cut(errand.values, to + errand.scales.bytes, rows, count * row);
}

// Notes what is to be copied for a tile, by one lane: keys to `keys_at`, values to `values_at`.
template <int KEY_DIM, int VALUE_DIM>
__device__ __forceinline__ void errand_note(const found_t &found, uint32_t keys_at, uint32_t values_at, errand_t &errand) {
    const uint32_t three = BKV_GPU_BITS3, kind = key_kind(found.section.shape);
    errand.stage.count = found.span.count;
    errand.stage.shape = found.section.shape;
    errand.stage.weight_range = found.section.weights;
    if (kind == three && found.span.count == found.section.tokens) {
        keys_whole<KEY_DIM>(found.section, three, keys_at, errand);
    } else if (kind == three) {
        keys_cut<KEY_DIM>(found, three, keys_at, errand);
    } else {
        keys_cut<KEY_DIM>(found, kind, keys_at, errand);
    }
    values_cut<VALUE_DIM>(found, values_at, errand);
}

#endif
