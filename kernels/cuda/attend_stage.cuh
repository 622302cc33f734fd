// attend_stage.cuh - internal: bringing a tile into a warp's shared memory, asynchronously, while another is worked on.
//
// From sm_90 on the copy engine does it: one instruction of one lane for each piece of consecutive memory, and a barrier in
// shared memory that counts the bytes as they come. Before, all lanes copy 16 bytes each, again and again.
#ifndef BKV_ATTEND_STAGE_CUDA_CUH
#define BKV_ATTEND_STAGE_CUDA_CUH

#include "attend_codes.cuh"
#include "attend_walk.cuh"

// One tile on its way or there. Places are offsets into the thread block's shared memory.
struct stage_t {
    uint32_t part, count;  // count: tokens
    uint32_t shape;        // as in place_t
    uint32_t weight_range; // float16 base and step
    uint32_t weights;      // [count] codes
    uint32_t key_params;   // [key_dim / 32] pieces of 32 words, 144 bytes apart
    uint32_t keys, values; // rows, see row_stride
    uint32_t value_params;
};

// Bytes from one row to the next in shared memory.
template <int KIND, int DIM> __device__ __forceinline__ constexpr uint32_t row_stride() {
    constexpr uint32_t row = DIM * kind_words(KIND) / 8;
    return KIND != BKV_GPU_BITS3 && row % 64 == 0 ? row + 16 : row;
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

// The pieces of a tile: of these, the rows that are padded are copied one by one.
struct pieces_t {
    piece_t weights, params, scales, keys, values; // params: of the first 32 channels, the others' follow
};

template <int DIM> __device__ __forceinline__ bool rows_apart(uint32_t kind) {
    return bkv_gpu_row_padded(kind, DIM);
}

#if __CUDA_ARCH__ >= 900

// All by one lane, but rows one by one by all lanes.
template <int KEY_DIM, int VALUE_DIM>
__device__ __forceinline__ void pieces_copy(const pieces_t &pieces, uint8_t *shared, copies_t &copies, uint32_t key_kind,
                                            uint32_t value_kind, uint32_t count) {
    const uint32_t lane = threadIdx.x % WARP, base = shared_address(shared);
    const bool key_rows = rows_apart<KEY_DIM>(key_kind), value_rows = rows_apart<VALUE_DIM>(value_kind);
    if (lane == 0) {
        copies_expect(copies, pieces.weights.bytes + pieces.scales.bytes + KEY_DIM / 32 * pieces.params.bytes +
                                  (key_rows ? count : 1) * pieces.keys.bytes + (value_rows ? count : 1) * pieces.values.bytes);
        if (pieces.weights.bytes > 0) {
            copies_start(copies, base + pieces.weights.to, pieces.weights.from, pieces.weights.bytes);
        }
        if (pieces.scales.bytes > 0) {
            copies_start(copies, base + pieces.scales.to, pieces.scales.from, pieces.scales.bytes);
        }
        if (pieces.params.bytes > 0) {
#pragma unroll
            for (uint32_t i = 0; i < KEY_DIM / 32; i++) {
                copies_start(copies, base + pieces.params.to + 144 * i, pieces.params.from + 128 * i, pieces.params.bytes);
            }
        }
        if (!key_rows) {
            copies_start(copies, base + pieces.keys.to, pieces.keys.from, pieces.keys.bytes);
        }
        if (!value_rows) {
            copies_start(copies, base + pieces.values.to, pieces.values.from, pieces.values.bytes);
        }
    }
    if (key_rows || value_rows) {
        __syncwarp();
    }
    for (uint32_t t = lane; key_rows && t < count; t += WARP) {
        uint32_t row = bkv_gpu_row_bytes(key_kind, KEY_DIM);
        copies_start(copies, base + pieces.keys.to + t * (row + 16), pieces.keys.from + t * row, pieces.keys.bytes);
    }
    for (uint32_t t = lane; value_rows && t < count; t += WARP) {
        uint32_t row = bkv_gpu_row_bytes(value_kind, VALUE_DIM);
        copies_start(copies, base + pieces.values.to + t * (row + 16), pieces.values.from + t * row, pieces.values.bytes);
    }
}

#else

__device__ __forceinline__ void rows_share(uint32_t base, const piece_t &rows, bool apart, uint32_t row, uint32_t count) {
    if (!apart) {
        return copies_share(base + rows.to, rows.from, rows.bytes);
    }
    const uint32_t pieces = row / 16 + 1;
    for (uint32_t i = threadIdx.x % WARP; i < count * pieces; i += WARP) {
        uint32_t t = i / pieces, at = 16 * (i % pieces);
        if (at < rows.bytes) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(base + rows.to + 16 * i),
                         "l"(rows.from + t * row + at)
                         : "memory");
        }
    }
}

template <int KEY_DIM, int VALUE_DIM>
__device__ __forceinline__ void pieces_copy(const pieces_t &pieces, uint8_t *shared, copies_t &, uint32_t key_kind,
                                            uint32_t value_kind, uint32_t count) {
    const uint32_t base = shared_address(shared);
    copies_share(base + pieces.weights.to, pieces.weights.from, pieces.weights.bytes);
    copies_share(base + pieces.scales.to, pieces.scales.from, pieces.scales.bytes);
    for (uint32_t i = 0; i < KEY_DIM / 32 && pieces.params.bytes > 0; i++) {
        copies_share(base + pieces.params.to + 144 * i, pieces.params.from + 128 * i, pieces.params.bytes);
    }
    rows_share(base, pieces.keys, rows_apart<KEY_DIM>(key_kind), bkv_gpu_row_bytes(key_kind, KEY_DIM), count);
    rows_share(base, pieces.values, rows_apart<VALUE_DIM>(value_kind), bkv_gpu_row_bytes(value_kind, VALUE_DIM), count);
}

#endif

// Starts to copy the walk's current tile to `to`. The kinds are those of the tile's shape, constants where they can be.
template <int KEY_DIM, int VALUE_DIM>
__device__ __forceinline__ void stage_copy(const walk_t &walk, const span_t &span, uint32_t key_kind, uint32_t value_kind,
                                           uint8_t *shared, uint32_t to, copies_t &copies, stage_t &stage) {
    const uint32_t groups = (VALUE_DIM + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS;
    const uint32_t key_row = bkv_gpu_row_bytes(key_kind, KEY_DIM), value_row = bkv_gpu_row_bytes(value_kind, VALUE_DIM);
    const uint32_t room = (span.count + BKV_GPU_TILE_STEP - 1) / BKV_GPU_TILE_STEP * BKV_GPU_TILE_STEP;
    pieces_t pieces;
    stage.weights = piece_cut(pieces.weights, to, walk.now.keys + 4 + span.first, span.count);
    pieces.weights.bytes = is_weighted(walk.now.shape) ? pieces.weights.bytes : 0;
    to += room + 16;
    stage.key_params = piece_cut(pieces.params, to, section_params(walk.now) + span.group * 4 * KEY_DIM, 128);
    pieces.params.bytes = key_kind <= BKV_GPU_BITS8 ? pieces.params.bytes : 0;
    to += bkv_gpu_params_room(key_kind, KEY_DIM);
    stage.keys = piece_cut(pieces.keys, to, section_keys(walk.now, key_kind, KEY_DIM) + (uint64_t)span.first * key_row,
                           rows_apart<KEY_DIM>(key_kind) ? key_row : key_row * span.count);
    to += bkv_gpu_rows_room(key_kind, KEY_DIM, room);
    stage.value_params = piece_cut(pieces.scales, to, walk.now.values + 4ull * groups * span.first, 4 * groups * span.count);
    pieces.scales.bytes = value_kind <= BKV_GPU_BITS8 ? pieces.scales.bytes : 0;
    to += bkv_gpu_scales_room(value_kind, VALUE_DIM, room);
    stage.values =
        piece_cut(pieces.values, to, section_values(walk.now, value_kind, VALUE_DIM) + (uint64_t)span.first * value_row,
                  rows_apart<VALUE_DIM>(value_kind) ? value_row : value_row * span.count);
    pieces_copy<KEY_DIM, VALUE_DIM>(pieces, shared, copies, key_kind, value_kind, span.count);
}

// Starts to copy the walk's current tile to `to`. The caller commits.
template <int KEY_DIM, int VALUE_DIM>
__device__ __forceinline__ void stage_fill(const walk_t &walk, uint8_t *shared, uint32_t to, copies_t &copies, stage_t &stage) {
    const uint32_t three = BKV_GPU_BITS3, keys = key_kind(walk.now.shape), values = value_kind(walk.now.shape);
    span_t span = walk_span(walk);
    stage.part = walk.part;
    stage.count = span.count;
    stage.shape = walk.now.shape;
    stage.weight_range = walk.now.weights;
    if (span.count == 0) {
        return;
    }
    if (keys == three && values == three) {
        stage_copy<KEY_DIM, VALUE_DIM>(walk, span, three, three, shared, to, copies, stage);
    } else {
        stage_copy<KEY_DIM, VALUE_DIM>(walk, span, keys, values, shared, to, copies, stage);
    }
}

#endif
