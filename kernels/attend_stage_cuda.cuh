// attend_stage_cuda.cuh - internal: bringing a tile into a warp's shared memory, asynchronously, in pieces of 16 bytes.
#ifndef BKV_ATTEND_STAGE_CUDA_CUH
#define BKV_ATTEND_STAGE_CUDA_CUH

#include "attend_codes_cuda.cuh"
#include "attend_walk_cuda.cuh"

// One tile on its way or there. Places are offsets into the thread block's shared memory.
struct stage_t {
    uint32_t part, count;        // count: tokens
    uint32_t kinds, has_weights; // as in bkv_gpu_section_t
    uint32_t weight_range;       // float16 base and step
    uint32_t weights;            // [count] codes
    uint32_t key_params, keys;   // see params_word; rows
    uint32_t value_params, values;
};

__device__ __forceinline__ void copy_start(uint8_t *shared, uint32_t to, const uint8_t *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared + to)),
                 "l"(from)
                 : "memory");
}

__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all but the last `LEFT` groups of copies are there.
template <int LEFT> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// `bytes` bytes as they lie. Returns where the first of them will be.
__device__ __forceinline__ uint32_t copy_plain(uint8_t *shared, uint32_t to, const uint8_t *from, uint32_t bytes) {
    uint32_t skew = (uint32_t)(uintptr_t)from & 15, pieces = (skew + bytes + 15) / 16;
    from -= skew;
    for (uint32_t i = threadIdx.x % WARP; i < pieces; i += WARP) {
        copy_start(shared, to + 16 * i, from + 16 * i);
    }
    return to + skew;
}

// A key group's params, which every lane reads at 128 times its number: with 16 more bytes every 128.
__device__ __forceinline__ uint32_t copy_params(uint8_t *shared, uint32_t to, const uint8_t *from, uint32_t bytes) {
    uint32_t skew = (uint32_t)(uintptr_t)from & 15, pieces = (skew + bytes + 15) / 16;
    from -= skew;
    for (uint32_t i = threadIdx.x % WARP; i < pieces; i += WARP) {
        copy_start(shared, to + 16 * i + i / 8 * 16, from + 16 * i);
    }
    return to + skew;
}

// The word of params that is `i` < 32 words behind a multiple of 32 words, which `place`, a result of copy_params with 144 added
// for each 32 words, stands for.
__device__ __forceinline__ uint32_t params_word(const uint8_t *shared, uint32_t place, int i) {
    uint32_t more = i >= 29 && (place & 15) + 4 * i >= 128 ? 16 : 0; // past the padding
    return *(const uint32_t *)(shared + place + 4 * i + more);
}

// Rows, one by one where they are padded. All of them start at the same place between two multiples of 16 then.
template <int KIND, int DIM>
__device__ __forceinline__ uint32_t copy_rows(uint8_t *shared, uint32_t to, const uint8_t *from, uint32_t count) {
    const uint32_t row = DIM * (uint32_t)kind_words(KIND) / 8;
    if constexpr (KIND == BKV_GPU_BITS3 || row % 64 != 0) {
        return copy_plain(shared, to, from, count * row);
    } else {
        const uint32_t most = row / 16 + 1;
        uint32_t skew = (uint32_t)(uintptr_t)from & 15, pieces = skew ? most : most - 1;
        from -= skew;
        for (uint32_t i = threadIdx.x % WARP; i < count * most; i += WARP) {
            uint32_t t = i / most, piece = i % most;
            if (piece < pieces) {
                copy_start(shared, to + 16 * i, from + row * t + 16 * piece);
            }
        }
        return to + skew;
    }
}

template <int DIM>
__device__ __forceinline__ uint32_t copy_rows_of(uint32_t kind, uint8_t *shared, uint32_t to, const uint8_t *codes,
                                                 uint64_t first, uint32_t count) {
    const uint8_t *from = codes + first * bkv_gpu_row_bytes(kind, DIM);
    switch (kind) {
    case BKV_GPU_BITS2:
        return copy_rows<BKV_GPU_BITS2, DIM>(shared, to, from, count);
    case BKV_GPU_BITS3:
        return copy_rows<BKV_GPU_BITS3, DIM>(shared, to, from, count);
    case BKV_GPU_BITS4:
        return copy_rows<BKV_GPU_BITS4, DIM>(shared, to, from, count);
    case BKV_GPU_BITS8:
        return copy_rows<BKV_GPU_BITS8, DIM>(shared, to, from, count);
    default:
        return copy_rows<BKV_GPU_BF16, DIM>(shared, to, from, count);
    }
}

// Starts to copy the walk's current tile to `to`. The caller commits.
template <int KEY_DIM, int VALUE_DIM>
__device__ __forceinline__ void stage_fill(const walk_t &walk, uint8_t *shared, uint32_t to, stage_t &stage) {
    const uint32_t groups = (VALUE_DIM + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS;
    const bkv_gpu_section_t &section = walk.now;
    span_t span = walk_span(walk);
    uint32_t key_kind = section.kinds & 15, value_kind = section.kinds >> 4;
    uint32_t room = (span.count + BKV_GPU_TILE_STEP - 1) / BKV_GPU_TILE_STEP * BKV_GPU_TILE_STEP;
    stage.part = walk.part;
    stage.count = span.count;
    stage.kinds = section.kinds;
    stage.has_weights = section.weighted;
    stage.weight_range = section.weights;
    if (span.count == 0) {
        return;
    }
    if (section.weighted) {
        stage.weights = copy_plain(shared, to, section.keys + 4 + span.first, span.count);
    }
    to += room + 16;
    if (key_kind <= BKV_GPU_BITS8) {
        stage.key_params = copy_params(shared, to, section_params(section) + span.group * 4 * KEY_DIM, 4 * KEY_DIM);
        to += bkv_gpu_params_room(BKV_GPU_BITS8, KEY_DIM);
    }
    stage.keys = copy_rows_of<KEY_DIM>(key_kind, shared, to, section_keys(section, KEY_DIM), span.first, span.count);
    to += bkv_gpu_rows_room(key_kind, KEY_DIM, room);
    if (value_kind <= BKV_GPU_BITS8) {
        stage.value_params = copy_plain(shared, to, section.values + 4ull * groups * span.first, 4 * groups * span.count);
        to += 4 * groups * room + 16;
    }
    stage.values = copy_rows_of<VALUE_DIM>(value_kind, shared, to, section_values(section, VALUE_DIM), span.first, span.count);
}

#endif
