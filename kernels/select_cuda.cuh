// select_cuda.cuh - internal: the first half of balance_cuda.cu: scores, protected outliers, kernel matrices and the walk, as
// selection_ref.c and walk_ref.c do it.
#ifndef BKV_SELECT_CUDA_CUH
#define BKV_SELECT_CUDA_CUH

#include "head_cuda.cuh"

// Starts copying a head's keys or values into shared memory; rows up to `padded` become 0.
__device__ inline void rows_load(const head_t &head, rows_t rows, bool value) {
    uint32_t row_bytes = value ? head.value_row : head.key_row, chunks = row_bytes / 16;
    uint32_t step = HEAD_THREADS / chunks, chunk = threadIdx.x % chunks;
    uint8_t *to = value ? head.values : head.keys;
    for (uint32_t row = threadIdx.x / chunks; row < head.padded && threadIdx.x < step * chunks; row += step) {
        uint8_t *at = to + swizzled(row, chunk, row_bytes);
        if (row < head.tokens) {
            copy_async(shared_address(at), rows.base + (int64_t)row * rows.stride + chunk * 16);
        } else {
            *(uint4 *)at = make_uint4(0, 0, 0, 0);
        }
    }
    copy_commit();
}

// Looks at a row element by element, once something about it was suspicious.
template <class T> __device__ __noinline__ void row_find(const head_t &head, finder_t finder, uint32_t token) {
    uint32_t chunks = (finder.value ? head.value_row : head.key_row) / 16;
    for (uint32_t c = 0; c < chunks; c++) {
        float row[8];
        unpack_eight<T>(head.chunk(finder.value, token, c), row);
        find_eight(finder, token, row, false);
    }
}

// |k|^2 and its inverse root for every token.
template <class T> __device__ inline void keys_measure(const head_t &head, const finder_t &finder) {
    head_state &state = head.state;
    uint32_t token = threadIdx.x % HEAD_TOKENS, half = threadIdx.x / HEAD_TOKENS, chunks = head.key_row / 32;
    if (token < head.padded) {
        float sum = 0, row[8];
        for (uint32_t c = 0; c < chunks; c++) {
            unpack_eight<T>(head.chunk(false, token, half * chunks + c), row);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sum += row[i] * row[i];
            }
        }
        state.part[half][token] = sum;
    }
    __syncthreads();
    FOR_TOKENS(t, head.padded) {
        float square = state.part[0][t] + state.part[1][t];
        state.square[t] = square;
        state.inverse[t] = square > 0 ? 1.0f / sqrtf(square) : 0.0f;
        if (!(square < SQUARES_SAFE)) {
            row_find<T>(head, finder, t);
        }
    }
    __syncthreads();
}

// The sum of all unit keys and the mean key: a slice of the rows for each thread, then a sum over the slices.
template <class T> __device__ inline void keys_mean(const head_t &head) {
    head_state &state = head.state;
    uint32_t chunks = head.key_row / 16, dim = chunks * 8, slices = HEAD_THREADS / chunks;
    uint32_t chunk = threadIdx.x % chunks, slice = threadIdx.x / chunks;
    float *sums = (float *)head.work; // [2][slices][dim]
    if (slice < slices) {
        float direction[8] = {0}, mean[8] = {0}, row[8];
        for (uint32_t t = slice; t < head.padded; t += slices) {
            unpack_eight<T>(head.chunk(false, t, chunk), row);
            float inverse = state.inverse[t];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                direction[i] += inverse * row[i];
                mean[i] += row[i];
            }
        }
        float4 *to = (float4 *)(sums + slice * dim + chunk * 8);
        to[0] = make_float4(direction[0], direction[1], direction[2], direction[3]);
        to[1] = make_float4(direction[4], direction[5], direction[6], direction[7]);
        to += slices * dim / 4;
        to[0] = make_float4(mean[0], mean[1], mean[2], mean[3]);
        to[1] = make_float4(mean[4], mean[5], mean[6], mean[7]);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < 2 * dim; i += blockDim.x) {
        const float *from = sums + (i < dim ? i : i - dim + slices * dim);
        float sum = 0;
        for (uint32_t s = 0; s < slices; s++) {
            sum += from[s * dim];
        }
        if (i < dim) {
            state.direction[i] = sum;
        } else {
            state.mean[i - dim] = sum / (float)head.tokens;
        }
    }
    __syncthreads();
}

// KeyDiff's score, the cosine with the mean direction, and <k, mean>, with which kernels are centred afterwards.
template <class T> __device__ inline void keys_score(const head_t &head) {
    head_state &state = head.state;
    uint32_t token = threadIdx.x % HEAD_TOKENS, half = threadIdx.x / HEAD_TOKENS, chunks = head.key_row / 32;
    if (token < head.padded) {
        float score = 0, onto = 0, row[8];
        for (uint32_t c = half * chunks; c < (half + 1) * chunks; c++) {
            unpack_eight<T>(head.chunk(false, token, c), row);
            const float4 *direction = (const float4 *)(state.direction + 8 * c), *mean = (const float4 *)(state.mean + 8 * c);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float4 d = direction[i], m = mean[i];
                score += row[4 * i] * d.x + row[4 * i + 1] * d.y + row[4 * i + 2] * d.z + row[4 * i + 3] * d.w;
                onto += row[4 * i] * m.x + row[4 * i + 1] * m.y + row[4 * i + 2] * m.z + row[4 * i + 3] * m.w;
            }
        }
        state.part[half][token] = score;
        state.part[2 + half][token] = onto;
    }
    if (threadIdx.x < 32) {
        float sum = 0;
        for (uint32_t i = threadIdx.x; i < head.key_row / 2; i += 32) {
            sum += state.mean[i] * state.mean[i];
        }
        for (int lane = 16; lane > 0; lane /= 2) {
            sum += __shfl_xor_sync(~0u, sum, lane);
        }
        state.mean_square = sum; // the same from every lane
    }
    __syncthreads();
    FOR_TOKENS(t, head.padded) {
        state.score[t] = (state.part[0][t] + state.part[1][t]) * state.inverse[t];
        state.onto[t] = state.part[2][t] + state.part[3][t];
    }
    __syncthreads();
}

// The k-th smallest of the warp's keys, HEAD_TOKENS / 32 in each lane, bit by bit; k counts from 1.
__device__ inline uint32_t warp_select(const uint32_t keys[HEAD_TOKENS / 32], uint32_t k) {
    uint32_t found = 0;
    for (int bit = 31; bit >= 0; bit--) {
        uint32_t trial = found | 1u << bit, below = 0;
#pragma unroll
        for (int i = 0; i < HEAD_TOKENS / 32; i++) {
            below += keys[i] < trial;
        }
        if (__reduce_add_sync(~0u, below) < k) {
            found = trial;
        }
    }
    return found;
}

// Protects the `first` oldest tokens and the `count` rarest after them, and lists the rest. By one warp: lane l has tokens
// l, 32 + l, ...
__device__ inline void tokens_protect(const head_t &head, uint32_t first, uint32_t count) {
    head_state &state = head.state;
    uint32_t lane = threadIdx.x, keys[HEAD_TOKENS / 32], below = (1u << lane) - 1;
#pragma unroll
    for (int i = 0; i < HEAD_TOKENS / 32; i++) {
        uint32_t t = 32 * i + lane;
        keys[i] = t < first || t >= head.tokens ? ~0u : (uint32_t)ordered(state.score[t]) ^ 0x80000000u;
    }
    uint32_t limit = count > 0 ? warp_select(keys, count) : 0, less = 0, rest = 0;
    for (int i = 0; i < HEAD_TOKENS / 32; i++) {
        less += count > 0 && keys[i] < limit;
    }
    uint32_t ties = count - __reduce_add_sync(~0u, less); // of the limit itself the oldest are taken
    float top = 0;
#pragma unroll
    for (int i = 0; i < HEAD_TOKENS / 32; i++) {
        uint32_t t = 32 * i + lane;
        uint32_t equal = __ballot_sync(~0u, count > 0 && keys[i] == limit && t >= first && t < head.tokens);
        bool taken = t < first || (count > 0 && keys[i] < limit) || ((equal >> lane & 1) && __popc(equal & below) < ties);
        ties -= min(ties, (uint32_t)__popc(equal));
        bool left = t < head.tokens && !taken;
        uint32_t more = __ballot_sync(~0u, left);
        if (left) {
            state.rest[rest + __popc(more & below)] = (uint8_t)t;
            top = fmaxf(top, (state.square[t] - 2 * state.onto[t] + state.mean_square) * head.scale);
        }
        if (t < head.tokens) {
            state.fate[t] = taken ? FATE_PROTECTED : FATE_DROPPED;
            state.weight[t] = 1;
        }
        rest += __popc(more);
    }
    for (int other = 16; other > 0; other /= 2) {
        top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
    }
    if (lane == 0) {
        state.rest_count = rest;
        state.leaves = (rest + BKV_LEAF - 1) / BKV_LEAF;
        state.exponent_shift = top > EXPONENT_TOP ? top - EXPONENT_TOP : 0;
    }
}

// Inner products of 32 rows with 32 rows of K or V, by one warp; a_row and b_row are the tokens of this lane's ldmatrix rows.
template <class T>
__device__ inline void tile_multiply(const head_t &head, bool value, const uint32_t a_row[2], const uint32_t b_row[2],
                                     float sum[2][4][4]) {
    uint32_t lane = threadIdx.x % 32, row_bytes = value ? head.value_row : head.key_row;
    uint32_t base = shared_address(value ? head.values : head.keys);
#pragma unroll
    for (int i = 0; i < 32; i++) {
        sum[i / 16][i / 4 % 4][i % 4] = 0;
    }
    for (uint32_t k = 0; k < row_bytes / 32; k++) {
        uint32_t a[2][4], b[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            load_matrices(a[i], base + swizzled(a_row[i], 2 * k + lane / 16, row_bytes));
            load_matrices(b[i], base + swizzled(b_row[i], 2 * k + lane / 8 % 2, row_bytes));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                multiply<T>(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
}

// One 32 x 32 tile of a leaf's kernel matrix, exp(<k, k'> / sqrt d) (<v, v'> + floor) with keys centred, and its mirror image.
template <class T>
__device__ inline void tile_kernel(const head_t &head, const finder_t &finder, uint32_t first, uint32_t n, uint32_t row,
                                   uint32_t column, __nv_bfloat16 *gram) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, a_row[2], b_row[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        // Places beyond n repeat the last token: their entries are never looked at.
        a_row[i] = state.rest[first + min(row + 16 * i + lane % 16, n - 1)];
        b_row[i] = state.rest[first + min(column + 16 * i + lane / 16 * 8 + lane % 8, n - 1)];
    }
    float kernel[2][4][4], sum[2][4][4];
    tile_multiply<T>(head, false, a_row, b_row, kernel);
    tile_multiply<T>(head, true, a_row, b_row, sum);
    const float log2e = 1.4426950408889634f;
    uint32_t at_row = row + lane / 4, at_column = column + lane % 4 * 2;
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        float onto_row[2];
        onto_row[0] = state.onto[state.rest[first + min(at_row + 16 * i, n - 1)]] - state.mean_square;
        onto_row[1] = state.onto[state.rest[first + min(at_row + 16 * i + 8, n - 1)]] - state.mean_square;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            float onto[2], entry[4];
            onto[0] = state.onto[state.rest[first + min(at_column + 8 * j, n - 1)]];
            onto[1] = state.onto[state.rest[first + min(at_column + 8 * j + 1, n - 1)]];
#pragma unroll
            for (uint32_t c = 0; c < 4; c++) {
                float exponent = (kernel[i][j][c] - onto_row[c / 2] - onto[c % 2]) * head.scale - state.exponent_shift;
                entry[c] = exp2f(fminf(exponent, EXPONENT_TOP) * log2e) * (sum[i][j][c] + VALUE_FLOOR);
                uint32_t place = at_row + 16 * i + c / 2 * 8;
                if (place == at_column + 8 * j + c % 2 && place < n && !(sum[i][j][c] < SQUARES_SAFE)) {
                    row_find<T>(head, finder, state.rest[first + place]);
                }
            }
            __syncwarp(); // before instructions of the whole warp
#pragma unroll
            for (uint32_t h = 0; h < 2; h++) {
                uint32_t pair = element<__nv_bfloat16>::pack(entry[2 * h], entry[2 * h + 1]);
                uint32_t top = at_row + 16 * i + 8 * h, left = at_column + 8 * j;
                *(uint32_t *)(gram + top * GRAM_STRIDE + left) = pair;
                if (row != column) {
                    uint32_t mirrored = transpose(pair);
                    uint32_t mirror_row = column + 8 * j + lane / 4, mirror_column = row + 16 * i + 8 * h + lane % 4 * 2;
                    *(uint32_t *)(gram + mirror_row * GRAM_STRIDE + mirror_column) = mirrored;
                }
            }
        }
    }
}

// Every leaf's kernel matrix: three tiles a leaf, the fourth being a mirror image.
template <class T> __device__ inline void leaves_kernel(const head_t &head, const finder_t &finder) {
    uint32_t leaves = head.state.leaves, rest = head.state.rest_count;
    for (uint32_t task = threadIdx.x / 32; task < 3 * leaves; task += HEAD_THREADS / 32) {
        uint32_t leaf = task / 3, tile = task % 3;
        uint32_t first = leaf_first(rest, leaves, leaf), n = leaf_first(rest, leaves, leaf + 1) - first;
        __nv_bfloat16 *gram = (__nv_bfloat16 *)head.work + leaf * BKV_LEAF * GRAM_STRIDE;
        tile_kernel<T>(head, finder, first, n, tile == 2 ? 32 : 0, tile == 0 ? 0 : 32, gram);
    }
}

// One warp a leaf reduces it to its share of `target`.
__device__ inline void leaves_walk(const head_t &head, uint32_t target, uint64_t key) {
    uint32_t leaves = head.state.leaves, rest = head.state.rest_count, leaf = threadIdx.x / 32;
    uint32_t first = leaf_first(rest, leaves, leaf), n = leaf_first(rest, leaves, leaf + 1) - first;
    uint32_t share = leaf_first(target, leaves, leaf + 1) - leaf_first(target, leaves, leaf);
    leaf_gram gram = {(const __nv_bfloat16 *)head.work + leaf * BKV_LEAF * GRAM_STRIDE, GRAM_STRIDE};
    walk_reduce(gram, n, share, random_mix(key, leaf), &head.state.walk[leaf]);
}

#endif
