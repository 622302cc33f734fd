// select.cuh - internal: the first half of balance.cu: scores, protected outliers, kernel matrices and the walk, as
// selection.c and walk.c do it.
#ifndef BKV_SELECT_CUDA_CUH
#define BKV_SELECT_CUDA_CUH

#include "head.cuh"

// Starts copying a head's keys into shared memory, a row a thread, so that each warp has the 32 tokens it begins with; rows
// up to `padded` become 0.
__device__ inline void keys_load(const head_t &head, rows_t rows) {
    uint32_t t = threadIdx.x, first = t - t % 32;
    uint64_t *arrived = &head.state.arrived[t / 32];
    if (t == first && first < head.tokens) {
        arrivals_begin(arrived, min(32, head.tokens - first) * head.key_row);
    }
    __syncwarp();
    if (t < head.tokens) {
        copy_row(shared_address(head.keys) + head.key_at(t, 0), rows.base + t * rows.stride, head.key_row, arrived);
    } else if (t < head.padded) {
        for (uint32_t c = 0; c < head.key_row / 16; c++) {
            *(uint4 *)(head.keys + head.key_at(t, c)) = make_uint4(0, 0, 0, 0);
        }
    }
}

// Asks for one row of every thread's token to be brought nearer.
__device__ inline void rows_prefetch(const head_t &head, rows_t rows, uint32_t row_bytes) {
    for (uint32_t at = 0; at < row_bytes && threadIdx.x < head.tokens; at += 128) {
        prefetch_l2(rows.base + threadIdx.x * rows.stride + at);
    }
}

// Looks at a row element by element, once something about it was suspicious. By value throughout: whose address was taken
// would live in memory ever after.
template <class T>
__device__ __noinline__ void row_find(const uint8_t *at, uint32_t row_bytes, finder_t finder, uint32_t token) {
    for (uint32_t c = 0; c < row_bytes / 16; c++) {
        float row[8];
        unpack_eight<T>(*(const uint4 *)(at + 16 * c), row);
        find_eight(finder, token, row, false);
    }
}

// |k|^2, the diagonal of K times itself, and its inverse root: 32 tokens a warp.
template <class T> __device__ inline void keys_measure(const head_t &head, const finder_t &finder) {
    head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, token = threadIdx.x, first = token - lane, keys = shared_address(head.keys);
    if (first >= head.tokens) {
        return;
    }
    arrivals_wait(&state.arrived[first / 32]);
    for (uint32_t row = first; row < min(first + 32, head.padded); row += 16) {
        float low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
        uint32_t from = keys + head.key_at(row + lane % 16, lane / 16);
#pragma unroll 8
        for (uint32_t k = 0; k < head.key_row; k += 32) {
            uint32_t a[4];
            load_matrices(a, from + k);
            multiply<T>(low, a, a[0], a[2]);
            multiply<T>(high, a, a[1], a[3]);
        }
        if (lane % 4 == lane / 8) { // on the diagonal
            state.square[row + lane / 4] = lane / 4 % 2 ? low[1] : low[0];
            state.square[row + lane / 4 + 8] = lane / 4 % 2 ? high[3] : high[2];
        }
    }
    __syncwarp();
    if (token < head.padded) {
        float square = state.square[token], inverse = square > 0 ? rsqrtf(square) : 0.0f;
        uint32_t both = element<T>::split(inverse);
        state.inverse[token] = inverse;
        state.unit[0][token] = (uint16_t)both;
        state.unit[1][token] = (uint16_t)(both >> 16);
        state.unit[2][token] = (uint16_t)element<T>::ones;
        if (!(square < SQUARES_SAFE)) {
            row_find<T>(head.keys + head.key_at(token, 0), head.key_row, finder, token);
        }
    }
}

// The sum of all unit keys and the mean key: three rows of weights times K, 16 channels a warp at a time.
template <class T> __device__ inline void keys_mean(const head_t &head) {
    head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, kind = lane / 4, keys = shared_address(head.keys);
    for (uint32_t chunk = threadIdx.x / 32 * 2; chunk < head.key_row / 16; chunk += 2 * HEAD_WARPS) {
        float sum[2][4] = {};
        uint32_t at = keys + head.key_at(lane % 16, chunk + lane / 16);
        const uint32_t *unit = (const uint32_t *)state.unit[min(kind, 2)] + lane % 4; // rows from 3 on are not looked at
#pragma unroll 8
        for (uint32_t first = 0; first < head.padded; first += 16) {
            uint32_t b[4], a[4] = {unit[first / 2], 0, unit[first / 2 + 4], 0};
            load_matrices_transposed(b, at + head.key_at(first, 0));
            multiply<T>(sum[0], a, b[0], b[1]);
            multiply<T>(sum[1], a, b[2], b[3]);
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            float mine = sum[i / 2][i % 2], direction = mine + __shfl_down_sync(~0u, mine, 4);
            if (kind == 0 || kind == 2) {
                uint32_t channel = 8 * (chunk + i / 2) + lane % 4 * 2 + i % 2;
                uint32_t both = element<T>::split(kind == 0 ? direction : mine / (float)head.tokens);
                state.vectors[kind][channel] = (uint16_t)both;
                state.vectors[kind + 1][channel] = (uint16_t)(both >> 16);
            }
        }
    }
}

// KeyDiff's score, the cosine with the mean direction, and <k, mean>, with which kernels are centred afterwards: 32 tokens a
// warp.
template <class T> __device__ inline void keys_score(const head_t &head) {
    head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, first = threadIdx.x - lane, keys = shared_address(head.keys);
    const uint32_t *vector = (const uint32_t *)state.vectors[lane / 4 % 4] + lane % 4; // columns from 4 on are not looked at
    for (uint32_t row = first; row < min(first + 32, head.padded); row += 16) {
        float sum[4] = {0, 0, 0, 0};
        uint32_t from = keys + head.key_at(row + lane % 16, lane / 16);
#pragma unroll 8
        for (uint32_t k = 0; k < head.key_row; k += 32) {
            uint32_t a[4];
            load_matrices(a, from + k);
            multiply<T>(sum, a, vector[k / 4], vector[k / 4 + 4]);
        }
        if (lane % 4 < 2) { // columns 0 and 1 are the direction's two parts, 2 and 3 the mean's
            float *to = lane % 4 == 0 ? state.score : state.onto;
            uint32_t token = row + lane / 4;
            to[token] = (sum[0] + sum[1]) * (lane % 4 == 0 ? state.inverse[token] : 1.0f);
            to[token + 8] = (sum[2] + sum[3]) * (lane % 4 == 0 ? state.inverse[token + 8] : 1.0f);
        }
    }
    __syncwarp();
}

// The thread's token's score as a number that no other token has: the float's order, its last 8 bits given up for the token's
// own number, so that of near-equal scores the older one comes first. Sinks come before all.
__device__ inline uint32_t score_number(const head_t &head, uint32_t sinks) {
    uint32_t t = threadIdx.x;
    uint32_t number = t < head.tokens ? ((uint32_t)ordered(head.state.score[t]) ^ 0x80000000u) & ~255u : ~255u;
    return (t < sinks ? 0 : number) | t;
}

// The limit below which `count` of all numbers are, which differ, bit by bit: by one warp.
__device__ inline uint32_t numbers_limit(const uint32_t *numbers, uint32_t count) {
    uint32_t mine[HEAD_WARPS], any = 0, all = ~0u, below = 0;
#pragma unroll
    for (uint32_t i = 0; i < HEAD_WARPS; i++) {
        mine[i] = numbers[32 * i + threadIdx.x % 32];
        any |= mine[i];
        all &= mine[i];
    }
    all = __reduce_and_sync(~0u, all);
    uint32_t differ = __reduce_or_sync(~0u, any) ^ all; // never 0
    uint32_t bit = 1u << (31 - __clz((int)differ)), limit = all & ~(2 * bit - 1);
    for (; bit != 0 && below != count; bit >>= 1) {
        uint32_t would = 0;
#pragma unroll
        for (uint32_t i = 0; i < HEAD_WARPS; i++) {
            would += mine[i] < (limit | bit);
        }
        would = __reduce_add_sync(~0u, would);
        if (would <= count) {
            limit |= bit;
            below = would;
        }
    }
    return limit;
}

// Tokens before the thread's own that have a bit in `words`.
__device__ inline uint32_t bits_before(const uint32_t words[HEAD_WARPS]) {
    uint32_t before = __popc(words[threadIdx.x / 32] & ((1u << threadIdx.x % 32) - 1));
#pragma unroll
    for (uint32_t i = 0; i < HEAD_WARPS - 1; i++) {
        before += i < threadIdx.x / 32 ? __popc(words[i]) : 0;
    }
    return before;
}

// Protects the tokens that score lowest, lists the rest and divides it, and the part of it that is to be kept, among leaves.
__device__ inline void tokens_protect(const head_t &head, const section_plan &plan) {
    head_state &state = head.state;
    uint32_t t = threadIdx.x, warp = t / 32;
    float onto = t < head.tokens ? state.onto[t] : 0, sum = onto;
    for (int other = 16; other > 0; other /= 2) {
        sum += __shfl_xor_sync(~0u, sum, other);
    }
    state.warp_sum[warp] = sum;
    uint32_t number = state.number[t] = score_number(head, plan.first);
    __syncthreads();
    if (warp == 0) {
        state.limit = numbers_limit(state.number, plan.protect);
    }
    __syncthreads();
    bool taken = number < state.limit, left = t < head.tokens && !taken;
    float mean_square = 0; // the mean of <k, mean> is <mean, mean>
    for (uint32_t i = 0; i < HEAD_WARPS; i++) {
        mean_square += state.warp_sum[i];
    }
    mean_square /= (float)head.tokens;
    state.fate[t] = taken ? FATE_PROTECTED : FATE_DROPPED;
    state.weight[t] = 1;
    if (t < HEAD_WALKED) {
        state.pull[t] = -INFINITY;
    }
    float top = left ? fmaxf((state.square[t] - 2 * onto + mean_square) * head.scale, 0.0f) : 0.0f;
    state.warp_top[warp] = __reduce_max_sync(~0u, __float_as_uint(top)); // in the order of their bits, as none is negative
    state.words[0][warp] = __ballot_sync(~0u, left);
    __syncthreads();
    uint32_t before = bits_before(state.words[0]);
    if (left) {
        state.rest[before] = (uint8_t)t;
    }
    if (t <= HEAD_LEAVES) {
        uint32_t rest = 0, top = 0;
        for (uint32_t i = 0; i < HEAD_WARPS; i++) {
            rest += __popc(state.words[0][i]);
            top = max(top, state.warp_top[i]);
        }
        uint32_t leaves = (rest + BKV_LEAF - 1) / BKV_LEAF;
        if (t <= leaves && leaves > 0) {
            state.leaf_start[t] = rest * t / leaves;
            state.leaf_kept[t] = plan.walked * t / leaves;
        }
        if (t < HEAD_LEAVES) {
            state.leaf_key[t] = random_mix(state.stream, t);
        }
        if (t == 0) {
            float highest = __uint_as_float(top);
            state.rest_count = rest;
            state.leaves = leaves;
            state.exponent_base = mean_square * head.scale - (highest > EXPONENT_TOP ? highest - EXPONENT_TOP : 0);
        }
    }
}

// A symmetric matrix of 32 x 32 in the tensor cores' tiles of 16 rows x 8 columns: lane l has row l / 4, columns 2 * (l % 4)
// and the next, and the same of row l / 4 + 8. The lower left quarter, two tiles, is not worked out.
struct gram_tiles {
    float at[2][4][4] = {};

    static __device__ __forceinline__ bool mirrored(uint32_t row, uint32_t column) {
        return row == 1 && column < 2;
    }
};

// Inner products of 32 tokens' keys: a matrix load's registers serve as rows and as columns. token: this lane's.
template <class T> __device__ inline void keys_gram(const head_t &head, uint32_t token, gram_tiles *sum) {
    uint32_t lane = threadIdx.x % 32, keys = shared_address(head.keys), from[2];
    for (uint32_t i = 0; i < 2; i++) {
        from[i] = keys + head.key_at(__shfl_sync(~0u, token, 16 * i + lane % 16), lane / 16);
    }
#pragma unroll 4
    for (uint32_t k = 0; k < head.key_row; k += 32) {
        uint32_t a[2][4];
        load_matrices(a[0], from[0] + k);
        load_matrices(a[1], from[1] + k);
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            uint32_t r = i / 4, c = i % 4;
            if (!gram_tiles::mirrored(r, c)) {
                multiply<T>(sum->at[r][c], a[r], a[c / 2][c % 2], a[c / 2][c % 2 + 2]);
            }
        }
    }
}

// Pieces of 32 values, 64 bytes each: four rows of 16 bytes a lane.
#define VALUE_PIECE 64

struct value_rows {
    const uint8_t *from[4];
    uint4 ahead[2][4]; // the two pieces that are next, on their way
};

__device__ __forceinline__ void piece_load(value_rows *rows, uint32_t piece) {
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        rows->ahead[piece % 2][i] = __ldg((const uint4 *)(rows->from[i] + VALUE_PIECE * piece));
    }
}

__device__ inline void values_ask(const head_t &head, uint32_t token, value_rows *rows) {
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t i = 0; i < 4; i++) {
        rows->from[i] = head.value(__shfl_sync(~0u, token, 8 * i + lane / 4)) + lane % 4 * 16;
    }
    piece_load(rows, 0);
    piece_load(rows, 1);
}

// Inner products of 32 tokens' values, straight from memory. In which order channels are summed is free, so a lane's 16 bytes
// are what it needs in two products.
template <class T> __device__ inline void values_gram(const head_t &head, value_rows *rows, gram_tiles *sum) {
#pragma unroll
    for (uint32_t piece = 0; piece < HEAD_VALUE_DIM * 2 / VALUE_PIECE; piece++) {
        if (piece * VALUE_PIECE >= head.value_row) {
            break;
        }
        uint4 row[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            row[i] = rows->ahead[piece % 2][i];
        }
        if ((piece + 2) * VALUE_PIECE < head.value_row) {
            piece_load(rows, piece + 2);
        }
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            uint32_t r = i / 4, c = i % 4;
            if (!gram_tiles::mirrored(r, c)) {
                uint32_t first[4] = {row[2 * r].x, row[2 * r + 1].x, row[2 * r].y, row[2 * r + 1].y};
                uint32_t second[4] = {row[2 * r].z, row[2 * r + 1].z, row[2 * r].w, row[2 * r + 1].w};
                multiply<T>(sum->at[r][c], first, row[c].x, row[c].y);
                multiply<T>(sum->at[r][c], second, row[c].z, row[c].w);
            }
        }
    }
}

// A leaf's kernel matrix, exp(<k, k'> / sqrt d) (<v, v'> + floor) with keys centred: the leaf is places [first, first + n) of
// the rest.
template <class T>
__device__ inline void leaf_kernel(const head_t &head, const finder_t &finder, uint32_t first, uint32_t n,
                                   __nv_bfloat16 *gram) {
    const head_state &state = head.state;
    // Places beyond n repeat the last token: their entries are never looked at.
    uint32_t lane = threadIdx.x % 32, token = state.rest[first + min(lane, n - 1)];
    gram_tiles keys, values;
    value_rows rows;
    values_ask(head, token, &rows);
    keys_gram<T>(head, token, &keys);
    values_gram<T>(head, &rows, &values);
    // An exponent is <k, k'> scale + base - onto scale - onto' scale, in powers of two.
    float scale = head.scale * LOG2E, half = 0.5f * state.exponent_base * LOG2E - state.onto[token] * scale, at_row[4];
    for (uint32_t r = 0; r < 4; r++) {
        at_row[r] = __shfl_sync(~0u, half, 8 * r + lane / 4);
    }
    bool safe = true;
#pragma unroll
    for (uint32_t c = 0; c < 4; c++) {
        float at_column[2] = {__shfl_sync(~0u, half, 8 * c + lane % 4 * 2), __shfl_sync(~0u, half, 8 * c + lane % 4 * 2 + 1)};
#pragma unroll
        for (uint32_t r = 0; r < 4; r++) {
            if (gram_tiles::mirrored(r / 2, c)) {
                continue;
            }
            float entry[2];
            uint32_t row = 8 * r + lane / 4, column = 8 * c + lane % 4 * 2;
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                float key = keys.at[r / 2][c][r % 2 * 2 + i], value = values.at[r / 2][c][r % 2 * 2 + i];
                entry[i] = power_of_two(key * scale + (at_row[r] + at_column[i])) * (value + VALUE_FLOOR);
                entry[i] = fminf(fmaxf(entry[i], -ENTRY_MOST), ENTRY_MOST); // a number, so that walks always end
                safe = safe && value < SQUARES_SAFE;                        // each |v|^2 is among these
            }
            uint32_t both = element<__nv_bfloat16>::pack(entry[0], entry[1]);
            *(uint32_t *)(gram + row * GRAM_STRIDE + column) = both;
            if (gram_tiles::mirrored(c / 2, r)) { // this one's mirror image is
                ((uint16_t *)gram)[column * GRAM_STRIDE + row] = (uint16_t)both;
                ((uint16_t *)gram)[(column + 1) * GRAM_STRIDE + row] = (uint16_t)(both >> 16);
            }
        }
    }
    if (!__all_sync(~0u, safe) && lane < n) {
        row_find<T>(head.value(token), head.value_row, finder, token);
    }
    __syncwarp();
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
template <class T> __device__ inline void leaves_walk(const head_t &head, const finder_t &finder, uint32_t target) {
    head_state &state = head.state;
    uint32_t leaf = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (leaf >= state.leaves) {
        return;
    }
    uint32_t first = state.leaf_start[leaf], n = state.leaf_start[leaf + 1] - first;
    uint32_t share = state.leaf_kept[leaf + 1] - state.leaf_kept[leaf];
    __nv_bfloat16 *gram = (__nv_bfloat16 *)head.work + leaf * BKV_LEAF * GRAM_STRIDE;
    leaf_kernel<T>(head, finder, first, n, gram);
    float weight = walk_reduce({gram, GRAM_STRIDE}, n, share, state.leaf_key[leaf], &state.walk[leaf]);
    if (weight > 0) {
        uint32_t token = state.rest[first + lane];
        state.fate[token] = FATE_WALKED;
        state.weight[token] = target < state.leaves ? weight * leaves_growth(state) : weight;
    }
}

#endif
