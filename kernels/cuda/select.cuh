// select.cuh - internal: the first half of balance.cu: scores, protected outliers, kernel matrices and the walk, as
// selection.c and walk.c do it.
#ifndef BKV_SELECT_CUDA_CUH
#define BKV_SELECT_CUDA_CUH

#include "head.cuh"

// Starts copying a head's keys or values into shared memory; rows up to `padded` become 0.
__device__ inline void rows_load(const head_t &head, rows_t rows, bool value) {
    uint32_t row_bytes = value ? head.value_row : head.key_row, chunks = row_bytes / 16;
    uint32_t step = HEAD_THREADS / chunks, chunk = threadIdx.x % chunks, first = threadIdx.x / chunks;
    uint32_t to = shared_address(value ? head.values : head.keys);
    const uint8_t *from = rows.base + first * rows.stride + chunk * 16;
    int64_t stride = step * rows.stride;
    for (uint32_t row = first; row < head.padded && first < step; row += step, from += stride) {
        uint32_t at = swizzled(row, chunk, row_bytes);
        if (row < head.tokens) {
            copy_async(to + at, from);
        } else {
            *(uint4 *)((value ? head.values : head.keys) + at) = make_uint4(0, 0, 0, 0);
        }
    }
    copy_commit();
}

// Looks at a row element by element, once something about it was suspicious. By value throughout: whose address was taken
// would live in memory ever after.
template <class T>
__device__ __noinline__ void row_find(const uint8_t *matrix, uint32_t row_bytes, finder_t finder, uint32_t token) {
    for (uint32_t c = 0; c < row_bytes / 16; c++) {
        float row[8];
        unpack_eight<T>(*(const uint4 *)(matrix + swizzled(token, c, row_bytes)), row);
        find_eight(finder, token, row, false);
    }
}

// |k|^2 and its inverse root, two lanes a token. Lanes are dealt out so that eight neighbours read from eight bank groups.
template <class T> __device__ inline void keys_measure(const head_t &head, const finder_t &finder) {
    head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, chunks = head.key_row / 16;
    uint32_t token = threadIdx.x / 32 * 16 + lane / 16 * 8 + lane / 2 % 4 * 2 + lane / 8 % 2;
    if (token - token % 16 >= head.padded) {
        return; // the whole warp
    }
    float square = 0, row[8];
    for (uint32_t c = lane % 2; c < chunks; c += 2) {
        unpack_eight<T>(head.chunk(false, token, c), row);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            square += row[i] * row[i];
        }
    }
    square += __shfl_xor_sync(~0u, square, 1);
    if (lane % 2 == 0) {
        float inverse = square > 0 ? rsqrtf(square) : 0.0f;
        state.square[token] = square;
        state.inverse[token] = inverse;
        uint32_t both = element<T>::split(inverse);
        state.unit[0][token] = (uint16_t)both;
        state.unit[1][token] = (uint16_t)(both >> 16);
        if (!(square < SQUARES_SAFE)) {
            row_find<T>(head.keys, head.key_row, finder, token);
        }
    }
}

// The sum of all unit keys and the mean key: three rows of weights times K, eight channels a warp at a time.
template <class T> __device__ inline void keys_mean(const head_t &head) {
    head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, kind = lane / 4, keys = shared_address(head.keys);
    for (uint32_t chunk = threadIdx.x / 32; chunk < head.key_row / 16; chunk += HEAD_WARPS) {
        float sum[4] = {0, 0, 0, 0};
        uint32_t at = keys + swizzled(lane % 16, chunk, head.key_row); // whole 16 rows on, a row is swizzled the same
        const uint32_t *unit = (const uint32_t *)state.unit[kind % 2] + lane % 4;
#pragma unroll 4
        for (uint32_t first = 0; first < head.padded; first += 16, at += 16 * head.key_row, unit += 8) {
            uint32_t b[2], a[4] = {0, 0, 0, 0};
            load_pair_transposed(b, at);
            uint32_t low = unit[0], high = unit[4];
            a[0] = kind < 2 ? low : kind == 2 ? element<T>::ones : 0;
            a[2] = kind < 2 ? high : kind == 2 ? element<T>::ones : 0;
            multiply<T>(sum, a, b[0], b[1]);
        }
        float direction[2] = {sum[0] + __shfl_down_sync(~0u, sum[0], 4), sum[1] + __shfl_down_sync(~0u, sum[1], 4)};
#pragma unroll
        for (uint32_t i = 0; i < 2 && kind % 2 == 0 && kind < 4; i++) {
            uint32_t channel = 8 * chunk + lane % 4 * 2 + i;
            uint32_t both = element<T>::split(kind == 0 ? direction[i] : sum[i] / (float)head.tokens);
            state.vectors[kind][channel] = (uint16_t)both;
            state.vectors[kind + 1][channel] = (uint16_t)(both >> 16);
        }
    }
}

// KeyDiff's score, the cosine with the mean direction, and <k, mean>, with which kernels are centred afterwards: 16 tokens a
// warp.
template <class T> __device__ inline void keys_score(const head_t &head) {
    head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16, vector = lane / 4, keys = shared_address(head.keys);
    if (first >= head.padded) {
        return;
    }
    float sum[4] = {0, 0, 0, 0};
    for (uint32_t k = 0; k < head.key_row / 32; k++) {
        uint32_t a[4];
        load_matrices(a, keys + swizzled(first + lane % 16, 2 * k + lane / 16, head.key_row));
        const uint32_t *part = (const uint32_t *)&state.vectors[vector % 4][16 * k + lane % 4 * 2];
        uint32_t b[2] = {vector < 4 ? part[0] : 0, vector < 4 ? part[4] : 0};
        multiply<T>(sum, a, b[0], b[1]);
    }
    if (lane % 4 < 2) { // columns 0 and 1 are the direction's two parts, 2 and 3 the mean's
        float *to = lane % 4 == 0 ? state.score : state.onto;
        uint32_t token = first + lane / 4;
        to[token] = (sum[0] + sum[1]) * (lane % 4 == 0 ? state.inverse[token] : 1.0f);
        to[token + 8] = (sum[2] + sum[3]) * (lane % 4 == 0 ? state.inverse[token + 8] : 1.0f);
    }
}

// Every token's score as a number that no other token has: the float's order, its last 8 bits given up for the token's own
// number, so that of near-equal scores the older one comes first. Sinks come before all. Also the streams of the leaves.
__device__ inline void scores_number(const head_t &head, uint32_t first, uint64_t key) {
    head_state &state = head.state;
    uint32_t t = threadIdx.x, lane = t % 32;
    if (t < HEAD_TOKENS) {
        uint32_t rank = t < head.tokens ? ((uint32_t)ordered(state.score[t]) ^ 0x80000000u) & ~255u : ~255u;
        state.key[t] = (t < first ? 0 : rank) | t;
        float onto = t < head.tokens ? state.onto[t] : 0;
        for (int other = 16; other > 0; other /= 2) {
            onto += __shfl_xor_sync(~0u, onto, other);
        }
        state.warp_value[t / 32] = onto;
    } else if (t < HEAD_TOKENS + HEAD_LEAVES) {
        state.leaf_key[lane] = random_mix(key, lane);
    }
    __syncthreads();
}

// How many tokens come before each; two threads a token.
__device__ inline void scores_rank(const head_t &head) {
    head_state &state = head.state;
    uint32_t token = threadIdx.x % HEAD_TOKENS, half = threadIdx.x / HEAD_TOKENS, mine = state.key[token], before = 0;
    const uint4 *keys = (const uint4 *)(state.key + half * (HEAD_TOKENS / 2));
#pragma unroll 8
    for (uint32_t i = 0; i < HEAD_TOKENS / 8; i++) {
        uint4 four = keys[i];
        before += (four.x < mine) + (four.y < mine) + (four.z < mine) + (four.w < mine);
    }
    state.rank[half][token] = (uint16_t)before;
    __syncthreads();
}

// Protects the `count` tokens of the lowest ranks, lists the rest and divides it, and the `walked` of it that are to be kept,
// among leaves.
__device__ inline void tokens_protect(const head_t &head, uint32_t count, uint32_t walked) {
    head_state &state = head.state;
    uint32_t t = threadIdx.x, lane = t % 32, word = t / 32;
    float mean_square = 0; // the mean of <k, mean> is <mean, mean>
    for (int i = 0; i < HEAD_TOKENS / 32; i++) {
        mean_square += state.warp_value[i];
    }
    mean_square /= (float)head.tokens;
    __syncthreads();
    bool taken = false, left = false;
    if (t < HEAD_TOKENS) {
        taken = t < head.tokens && (uint32_t)state.rank[0][t] + state.rank[1][t] < count;
        left = t < head.tokens && !taken;
        state.fate[t] = taken ? FATE_PROTECTED : FATE_DROPPED;
        state.weight[t] = 1;
        float top = left ? (state.square[t] - 2 * state.onto[t] + mean_square) * head.scale : 0;
        for (int other = 16; other > 0; other /= 2) {
            top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
        }
        state.warp_value[word] = top;
        state.words[0][word] = __ballot_sync(~0u, left);
    }
    __syncthreads();
    if (t < HEAD_TOKENS) {
        uint32_t before = __popc(state.words[0][word] & ((1u << lane) - 1));
        for (uint32_t i = 0; i < word; i++) {
            before += __popc(state.words[0][i]);
        }
        if (left) {
            state.rest[before] = (uint8_t)t;
        }
    } else if (t <= HEAD_TOKENS + HEAD_LEAVES) {
        uint32_t rest = 0, leaf = t - HEAD_TOKENS;
        float top = 0;
        for (int i = 0; i < HEAD_TOKENS / 32; i++) {
            rest += __popc(state.words[0][i]);
            top = fmaxf(top, state.warp_value[i]);
        }
        uint32_t leaves = (rest + BKV_LEAF - 1) / BKV_LEAF;
        if (leaf <= leaves && leaves > 0) {
            state.leaf_start[leaf] = rest * leaf / leaves;
            state.leaf_kept[leaf] = walked * leaf / leaves;
        }
        if (leaf == 0) {
            state.rest_count = rest;
            state.leaves = leaves;
            state.exponent_base = mean_square * head.scale - (top > EXPONENT_TOP ? top - EXPONENT_TOP : 0);
        }
    }
}

// Inner products of 16 rows with 32 rows of K or V, by one warp; a_row and b_row are the tokens of this lane's matrix rows.
template <class T>
__device__ inline void tile_multiply(const head_t &head, bool value, uint32_t a_row, const uint32_t b_row[2], float sum[4][4]) {
    uint32_t lane = threadIdx.x % 32, row_bytes = value ? head.value_row : head.key_row;
    uint32_t base = shared_address(value ? head.values : head.keys);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        sum[i / 4][i % 4] = 0;
    }
#pragma unroll 4
    for (uint32_t k = 0; k < row_bytes / 32; k++) {
        uint32_t a[4], b[2][4];
        load_matrices(a, base + swizzled(a_row, 2 * k + lane / 16, row_bytes));
        load_matrices(b[0], base + swizzled(b_row[0], 2 * k + lane / 8 % 2, row_bytes));
        load_matrices(b[1], base + swizzled(b_row[1], 2 * k + lane / 8 % 2, row_bytes));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            multiply<T>(sum[j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
}

// 16 rows from `row` on of a leaf's kernel matrix, exp(<k, k'> / sqrt d) (<v, v'> + floor) with keys centred: the leaf is
// places [first, first + n) of the rest.
template <class T>
__device__ inline void leaf_kernel(const head_t &head, const finder_t &finder, uint32_t first, uint32_t n, uint32_t row,
                                   __nv_bfloat16 *gram) {
    const head_state &state = head.state;
    // Places beyond n repeat the last token: their entries are never looked at.
    uint32_t lane = threadIdx.x % 32, token = state.rest[first + min(lane, n - 1)], b_row[2];
    uint32_t a_row = __shfl_sync(~0u, token, row + lane % 16);
    b_row[0] = __shfl_sync(~0u, token, lane / 16 * 8 + lane % 8);
    b_row[1] = __shfl_sync(~0u, token, 16 + lane / 16 * 8 + lane % 8);
    float kernel[4][4], sum[4][4];
    tile_multiply<T>(head, false, a_row, b_row, kernel);
    tile_multiply<T>(head, true, a_row, b_row, sum);
    // An exponent is <k, k'> scale + base - onto scale - onto' scale, in powers of two.
    float scale = head.scale * LOG2E, half = 0.5f * state.exponent_base * LOG2E - state.onto[token] * scale;
    float at_row[2] = {__shfl_sync(~0u, half, row + lane / 4), __shfl_sync(~0u, half, row + lane / 4 + 8)};
    bool safe = true;
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
        float entry[4],
            at_column[2] = {__shfl_sync(~0u, half, 8 * j + lane % 4 * 2), __shfl_sync(~0u, half, 8 * j + lane % 4 * 2 + 1)};
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            entry[c] = exp2f(kernel[j][c] * scale + (at_row[c / 2] + at_column[c % 2])) * (sum[j][c] + VALUE_FLOOR);
            entry[c] = fminf(fmaxf(entry[c], -ENTRY_MOST), ENTRY_MOST); // a number, so that walks always end
            safe = safe && sum[j][c] < SQUARES_SAFE;                    // each |v|^2 is among these
        }
        uint32_t *to = (uint32_t *)(gram + (row + lane / 4) * GRAM_STRIDE + 8 * j + lane % 4 * 2);
        to[0] = element<__nv_bfloat16>::pack(entry[0], entry[1]);
        to[4 * GRAM_STRIDE] = element<__nv_bfloat16>::pack(entry[2], entry[3]); // 8 rows down
    }
    if (!__all_sync(~0u, safe) && lane < n) {
        row_find<T>(head.values, head.value_row, finder, token);
    }
}

// The kernel matrices of all leaves, two warps to each.
template <class T> __device__ inline void leaves_kernel(const head_t &head, const finder_t &finder) {
    uint32_t leaf = threadIdx.x / 32 % HEAD_LEAVES;
    if (leaf < head.state.leaves) {
        uint32_t first = head.state.leaf_start[leaf], n = head.state.leaf_start[leaf + 1] - first;
        __nv_bfloat16 *gram = (__nv_bfloat16 *)head.work + leaf * BKV_LEAF * GRAM_STRIDE;
        leaf_kernel<T>(head, finder, first, n, threadIdx.x / 32 / HEAD_LEAVES * 16, gram);
    }
}

// Where there are fewer to keep than leaves, some leaves keep nothing, and the others' weights grow to stand for all.
__device__ inline float leaves_growth(const head_state &state) {
    uint32_t covered = 0;
    for (uint32_t leaf = 0; leaf < state.leaves; leaf++) {
        bool keeps = state.leaf_kept[leaf + 1] > state.leaf_kept[leaf];
        covered += keeps ? state.leaf_start[leaf + 1] - state.leaf_start[leaf] : 0;
    }
    return (float)state.rest_count / (float)covered;
}

// Reduces the rest to `target` tokens, a warp to a leaf.
__device__ inline void leaves_walk(const head_t &head, uint32_t target) {
    head_state &state = head.state;
    uint32_t leaf = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (leaf >= state.leaves) {
        return;
    }
    uint32_t first = state.leaf_start[leaf], n = state.leaf_start[leaf + 1] - first;
    uint32_t share = state.leaf_kept[leaf + 1] - state.leaf_kept[leaf];
    const __nv_bfloat16 *gram = (const __nv_bfloat16 *)head.work + leaf * BKV_LEAF * GRAM_STRIDE;
    float weight = walk_reduce({gram, GRAM_STRIDE}, n, share, state.leaf_key[leaf], &state.walk[leaf]);
    if (weight > 0) {
        uint32_t token = state.rest[first + lane];
        state.fate[token] = FATE_WALKED;
        state.weight[token] = target < state.leaves ? weight * leaves_growth(state) : weight;
    }
}

#endif
