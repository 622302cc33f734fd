// balance.cu - the balance codec, one thread block a head: K stays in shared memory until the record's planes are written,
// and V is read where it lies, from memory once and then from the cache. So two heads fit a multiprocessor, and one's waits,
// of which a head has many and each other ones, are the other's turn. balance.c says why each stage is there; select.cuh has
// the first half, this file the second: what is kept, the refit, and the planes. general.cu takes what does not fit.
//
// Against the reference: the walk goes over leaves of BKV_LEAF tokens with coins of its own, kernels are bfloat16, and the
// refit is over the whole head, not each key group by itself.
#include "select.cuh"

#include "codes.cuh"

#include <cuda_runtime.h>

#define MASS_MIN 1e-20f

// Thread blocks that a multiprocessor has under way, if its shared memory allows.
#define HEADS_AT_ONCE 2

// Blocks of one launch: the most that a grid's last extent may be.
#define GRID_BLOCKS 65535u

// Lists the kept and, of these, the walked, and writes the index.
static __device__ void index_write(const head_t &head, const section_layout &at) {
    head_state &state = head.state;
    uint32_t t = threadIdx.x, word = t / 32, fate = t < head.tokens ? state.fate[t] : FATE_DROPPED;
    state.words[0][word] = __ballot_sync(~0u, fate != FATE_DROPPED);
    state.words[1][word] = __ballot_sync(~0u, fate == FATE_WALKED);
    __syncthreads();
    uint32_t kept = bits_before(state.words[0]), walked = bits_before(state.words[1]);
    if (fate != FATE_DROPPED) {
        state.kept[kept] = (uint8_t)t;
        if (at.index_kind == BKV_INDEX_LIST) {
            ((uint32_t *)at.key_plane)[kept] = t;
        }
    }
    if (fate == FATE_WALKED) {
        state.walked[walked] = (uint8_t)t;
        state.place[t] = (uint8_t)walked;
        state.pull[walked] = -0.5f * LOG2E * head.scale * state.square[t];
    }
    if (at.index_kind == BKV_INDEX_BITMAP && t % 32 == 0 && t < head.tokens) {
        ((uint32_t *)at.key_plane)[word] = state.words[0][word];
    }
    if (t == HEAD_TOKENS - 1) {
        state.walked_count = walked + (fate == FATE_WALKED);
    }
    __syncthreads();
}

// Log weights of the kept tokens as float16 base, step and a byte each. By any one warp, once the kept are listed.
static __device__ void weights_write(const head_t &head, const section_layout &at) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32;
    uint32_t least = ~0u, greatest = 0; // bits of positive floats, in the order of these
    for (uint32_t i = lane; i < at.tokens; i += 32) {
        uint32_t weight = __float_as_uint(state.weight[state.kept[i]]);
        least = min(least, weight);
        greatest = max(greatest, weight);
    }
    float low = logf(__uint_as_float(__reduce_min_sync(~0u, least)));
    float high = logf(__uint_as_float(__reduce_max_sync(~0u, greatest)));
    uint16_t base_half = half_saturated(low);
    float base = half_expand(base_half);
    uint16_t step_half = half_saturated(high > base ? (high - base) / 255.0f : 0.0f);
    float step = half_expand(step_half), inverse = step > 0 ? 1.0f / step : 0.0f;
    uint8_t *plane = at.key_plane + at.weights;
    for (uint32_t i = lane; i < at.tokens; i += 32) {
        plane[4 + i] = (uint8_t)code_of(logf(state.weight[state.kept[i]]), inverse, base, 255.0f);
    }
    if (lane == 0) {
        *(uint32_t *)plane = base_half | (uint32_t)step_half << 16;
    }
}

// The shares of 16 tokens from products of keys with all rows; protected tokens give nothing away.
template <class T, uint32_t TILES>
static __device__ __forceinline__ void shares_write(const head_t &head, uint32_t first, T *work, float share[2 * TILES][4]) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, stride = share_stride(state.walked_count);
    uint32_t *to = (uint32_t *)(work + lane / 4 * stride + lane % 4 * 2);
    float scale = head.scale * LOG2E;
#pragma unroll
    for (uint32_t i = 0; i < 2 * TILES; i++) {
        float2 pull = *(const float2 *)&state.pull[8 * i + lane % 4 * 2];
        share[i][0] = share[i][0] * scale + pull.x;
        share[i][1] = share[i][1] * scale + pull.y;
        share[i][2] = share[i][2] * scale + pull.x;
        share[i][3] = share[i][3] * scale + pull.y;
    }
#pragma unroll
    for (uint32_t h = 0; h < 2; h++) { // token first + lane / 4, and 8 more
        float top = -INFINITY, sum = 0;
#pragma unroll
        for (uint32_t i = 0; i < 4 * TILES; i++) {
            top = fmaxf(top, share[i / 2][2 * h + i % 2]);
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
#pragma unroll
        for (uint32_t i = 0; i < 4 * TILES; i++) {
            float *at = &share[i / 2][2 * h + i % 2];
            *at = power_of_two(*at - top);
            sum += *at;
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        uint32_t token = first + lane / 4 + 8 * h;
        bool gives = token < head.tokens && state.fate[token] != FATE_PROTECTED;
        float inverse = gives ? __fdividef(1.0f, sum) : 0.0f;
#pragma unroll
        for (uint32_t i = 0; i < 2 * TILES; i++) {
            if (8 * i < stride - 8) { // stride: of 2 elements
                to[4 * i + 4 * h * stride] = element<T>::pack(share[i][2 * h] * inverse, share[i][2 * h + 1] * inverse);
            }
        }
    }
}

// How much of tokens [start, end) every walked row answers for: a softmax of exp(-|key - row|^2 / (2 sqrt d)), |key|^2
// cancelled. A warp takes 16 or 32 tokens with all rows, at most 16 * TILES, and writes their shares to work[token -
// start][row].
template <class T, uint32_t TILES> static __device__ void refit_shares(const head_t &head, uint32_t start, uint32_t end) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, rows = state.walked_count, stride = share_stride(rows);
    uint32_t keys = shared_address(head.keys), row[TILES];
#pragma unroll
    for (uint32_t i = 0; i < TILES; i++) {
        row[i] = keys + head.key_at(state.walked[min(16 * i + lane / 16 * 8 + lane % 8, rows - 1)], lane / 8 % 2);
    }
    constexpr uint32_t EACH = share_span(16 * TILES) / 16 / HEAD_WARPS; // tiles of 16 tokens
    uint32_t first = start + threadIdx.x / 32 * 16 * EACH, from[EACH];
    float share[EACH][2 * TILES][4] = {};
    if (first >= end) {
        return;
    }
#pragma unroll
    for (uint32_t e = 0; e < EACH; e++) { // past the last tile it is taken again, and not written
        from[e] = keys + head.key_at(min(first + 16 * e, end - 16) + lane % 16, lane / 16);
    }
#pragma unroll 4
    for (uint32_t k = 0; k < head.key_row; k += 32) {
        uint32_t a[EACH][4], b[4];
#pragma unroll
        for (uint32_t e = 0; e < EACH; e++) {
            load_matrices(a[e], from[e] + k);
        }
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++) {
            load_matrices(b, row[tile] + k);
#pragma unroll
            for (uint32_t e = 0; e < EACH; e++) {
                multiply<T>(share[e][2 * tile], a[e], b[0], b[1]);
                multiply<T>(share[e][2 * tile + 1], a[e], b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (uint32_t e = 0; e < EACH; e++) {
        if (first + 16 * e < end) {
            shares_write<T, TILES>(head, first + 16 * e, (T *)head.work + (first + 16 * e - start) * stride, share[e]);
        }
    }
}

// The low, or the high, elements of two pairs.
static __device__ __forceinline__ uint32_t both_low(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x5410);
}
static __device__ __forceinline__ uint32_t both_high(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x7632);
}

// Where a lane is among the values: it takes a pair of its warp's 16 channels, and of each 16 tokens those at 0, 1, 8 and 9
// from its own first one on.
struct value_pairs {
    const uint8_t *next;
    uint32_t token;
    bool takes;

    __device__ __forceinline__ value_pairs(const head_t &head) {
        uint32_t lane = threadIdx.x % 32, at = threadIdx.x / 32 * 32 + lane / 4 * 4;
        token = lane % 4 * 2;
        next = head.value(token) + at;
        takes = at < head.value_row;
    }
    __device__ __forceinline__ void load(const head_t &head, uint32_t pair[4]) {
        int64_t stride = head.values.stride;
        const uint8_t *from[4] = {next, next + stride, next + 8 * stride, next + 9 * stride};
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            bool there = takes && (head.tokens == head.padded || token + i / 2 * 8 + i % 2 < head.tokens);
            pair[i] = there ? __ldg((const uint32_t *)from[i]) : 0;
        }
        next += 16 * stride;
        token += 16;
    }
};

// The walked rows' new values, the means of all values by these shares: 16 channels a warp, of which a lane has a pair, so
// that the columns of one product are the even channels, of the other the odd. They take the shares' place. Values are asked
// for AHEAD times 16 tokens before their turn, the first ones before there are shares. Few rows leave registers to unroll it
// all.
template <class T, uint32_t TILES, uint32_t AHEAD> static __device__ void refit(const head_t &head) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, rows = state.walked_count, stride = share_stride(rows);
    uint32_t shares = shared_address(head.work) + ((lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8) * 2;
    float fit[TILES][2][4] = {}, mass[TILES][4] = {};
    uint32_t ahead[AHEAD][4] = {};
    value_pairs pairs(head);
#pragma unroll
    for (uint32_t i = 0; i < AHEAD; i++) {
        if (16 * i < head.padded) {
            pairs.load(head, ahead[i]);
        }
    }
    constexpr uint32_t span = share_span(16 * TILES);
    for (uint32_t start = 0; start < head.padded; start += span) {
        refit_shares<T, TILES>(head, start, min(start + span, head.padded));
        __syncthreads();
#pragma unroll(TILES <= 2 ? span / 16 / AHEAD : 1)
        for (uint32_t several = start; pairs.takes && several < min(start + span, head.padded); several += 16 * AHEAD) {
#pragma unroll
            for (uint32_t i = 0; i < AHEAD; i++) {
                uint32_t first = several + 16 * i, *pair = ahead[i];
                uint32_t even[2] = {both_low(pair[0], pair[1]), both_low(pair[2], pair[3])};
                uint32_t odd[2] = {both_high(pair[0], pair[1]), both_high(pair[2], pair[3])};
                if (first + 16 * AHEAD < head.padded) {
                    pairs.load(head, pair);
                }
#pragma unroll
                for (uint32_t tile = 0; tile < TILES; tile++) {
                    if (16 * tile < stride - 8 && first < head.padded) {
                        uint32_t a[4];
                        load_matrices_transposed(a, shares + ((first - start) * stride + 16 * tile) * 2);
                        multiply<T>(fit[tile][0], a, even[0], even[1]);
                        multiply<T>(fit[tile][1], a, odd[0], odd[1]);
                        multiply<T>(mass[tile], a, element<T>::ones, element<T>::ones);
                    }
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (uint32_t i = 0; i < 2 * TILES; i++) {
        uint32_t row = 8 * i + lane / 4, c = i % 2 * 2, at = threadIdx.x / 32 * 32 + lane % 4 * 8;
        if (pairs.takes && row < rows) {
            float *even = &fit[i / 2][0][c], *odd = &fit[i / 2][1][c], inverse = __fdividef(1.0f, mass[i / 2][c]);
            uint2 fresh = {element<T>::pack(even[0] * inverse, odd[0] * inverse),
                           element<T>::pack(even[1] * inverse, odd[1] * inverse)};
            bool none = !(mass[i / 2][c] > MASS_MIN);
            *(uint2 *)(head.fit(row) + at) = none ? *(const uint2 *)(head.value(state.walked[row]) + at) : fresh;
        }
    }
    __syncthreads();
}

template <class T> static __device__ void refit_any(const head_t &head) {
    uint32_t rows = head.state.walked_count;
    if (rows <= 16) {
        refit<T, 1, 4>(head);
    } else if (rows <= 32) {
        refit<T, 2, 4>(head);
    } else if (rows <= 64) {
        refit<T, 4, 2>(head);
    } else {
        refit<T, HEAD_WALKED / 16, 2>(head);
    }
}

template <class T> static __device__ void rows_write(const head_t &head, const section_layout &at, const finder_t &finder) {
    uint32_t key_dim = head.job.shape.key_dim;
    for (uint32_t group = 0; group < at.key_groups; group++) {
        uint32_t first = group * at.key_group_tokens, count = group_count(at, group);
        key_ranges<T>(head, first, count, at.key_bits, at.key_plane + at.key_params + 4 * group * key_dim);
        key_codes_any<T>(head, at.key_bits, first, count, at.key_row, at.key_plane + at.key_codes + first * at.key_row);
        if (group + 1 < at.key_groups) {
            __syncthreads(); // before the next one's ranges
        }
    }
    value_codes_any<T>(head, finder, at.value_bits, at.tokens, at.value_row, at.value_plane, at.value_plane + at.value_codes);
}

// The shape that most models have is known at compile time.
#define COMMON_DIM 128

template <class T, bool COMMON>
static __global__ void __launch_bounds__(HEAD_THREADS, HEADS_AT_ONCE)
    balance_kernel(const __grid_constant__ bkv_gpu_job_t job, uint32_t first_block) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ head_state state;
    uint32_t heads = job.shape.heads, index = blockIdx.x, layer = blockIdx.y, number = first_block + blockIdx.z;
    uint32_t section = layer * heads + index;
    const bkv_gpu_block_t &block = job.blocks[number];
    head_t head = {.job = job, .state = state};
    head.tokens = COMMON ? HEAD_TOKENS : job.shape.tokens;
    head.padded = head_padded(head.tokens);
    head.key_row = COMMON ? 2 * COMMON_DIM : job.shape.key_dim * 2;
    head.value_row = COMMON ? 2 * COMMON_DIM : job.shape.value_dim * 2;
    head.keys = shared;
    head.work = shared + head.key_at(head.padded, 0);
    head.values = head_rows(block, true, layer, index);
    head.scale = rsqrtf((float)(head.key_row / 2));
    finder_t finder = {&job.status[number], layer, heads, index, false}, value_finder = finder;
    value_finder.value = true;

    keys_load(head, head_rows(block, false, layer, index));
    rows_prefetch(head, head.values, head.value_row);
    if (threadIdx.x == 0) {
        state.at = section_find(job, number, section);
        state.plan = section_choose(job, block, state.at.tokens);
        state.stream = random_head(job.seed, block.position, section);
    }
    keys_measure<T>(head, finder);
    __syncthreads();
    const section_layout &at = state.at;
    keys_mean<T>(head);
    __syncthreads();
    keys_score<T>(head);
    tokens_protect(head, state.plan);
    __syncthreads();
    leaves_walk<T>(head, value_finder, state.plan.walked);
    __syncthreads();
    index_write(head, at);
    if (state.walked_count > 0) {
        refit_any<T>(head);
    }
    rows_write<T>(head, at, value_finder);
    if (threadIdx.x >= HEAD_THREADS - 32) {
        weights_write(head, at);
    }
    section_pad(job, at);
}

static uint32_t shared_bytes(const bkv_gpu_job_t *job) {
    uint32_t keys = head_padded(job->shape.tokens) * (job->shape.key_dim * 2 + ROW_GAP);
    return keys + head_work_bytes(job->shape.tokens, job->shape.value_dim, job->walked);
}

// What is left of a thread block's shared memory beside head_state, in whole kilobytes.
static uint32_t dynamic_most(uint32_t shared_memory) {
    return (shared_memory - (uint32_t)sizeof(head_state)) / 1024 * 1024;
}

typedef void (*balance_kernel_t)(bkv_gpu_job_t, uint32_t);

static balance_kernel_t kernel_for(bool bf16, bool common) {
    if (common) {
        return bf16 ? balance_kernel<__nv_bfloat16, true> : balance_kernel<__half, true>;
    }
    return bf16 ? balance_kernel<__nv_bfloat16, false> : balance_kernel<__half, false>;
}

extern "C" int bkv_gpu_balance_allow(uint32_t shared_memory) {
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < 4 && error == cudaSuccess; i++) {
        balance_kernel_t kernel = kernel_for(i % 2, i / 2);
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)dynamic_most(shared_memory));
        if (error == cudaSuccess) {
            error =
                cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
        }
    }
    return (int)error;
}

extern "C" bool bkv_gpu_balance_fits(const bkv_gpu_job_t *job) {
    const bkv_shape_t *shape = &job->shape;
    bool dims = shape->key_dim % 64 == 0 && shape->value_dim % 64 == 0 && shape->key_dim <= HEAD_KEY_DIM &&
                shape->value_dim <= HEAD_VALUE_DIM;
    return dims && shape->dtype != BKV_FP32 && shape->tokens <= HEAD_TOKENS && job->walked <= HEAD_WALKED &&
           shared_bytes(job) <= dynamic_most(job->shared_memory);
}

extern "C" int bkv_gpu_balance(const bkv_gpu_job_t *job, void *stream) {
    const bkv_shape_t *shape = &job->shape;
    bool common = shape->key_dim == COMMON_DIM && shape->value_dim == COMMON_DIM && shape->tokens == HEAD_TOKENS;
    balance_kernel_t kernel = kernel_for(shape->dtype == BKV_BF16, common);
    cudaError_t error = cudaSuccess;
    for (uint32_t first = 0; error == cudaSuccess && first < job->count; first += GRID_BLOCKS) {
        uint32_t left = job->count - first;
        dim3 grid(job->shape.heads, job->shape.layers, left < GRID_BLOCKS ? left : GRID_BLOCKS);
        kernel<<<grid, HEAD_THREADS, shared_bytes(job), (cudaStream_t)stream>>>(*job, first);
        error = cudaGetLastError();
    }
    return (int)error;
}
