// balance.cu - the balance codec, one thread block a head: K and V are read from memory once and stay in shared memory
// until the record's planes are written. balance.c says why each stage is there; select.cuh has the first half, this
// file the second: what is kept, the refit, and the planes. general.cu takes what does not fit.
//
// Against the reference: the walk goes over leaves of BKV_LEAF tokens with coins of its own, kernels are bfloat16, and the
// refit is over the whole head, not each key group by itself.
#include "select.cuh"

#include "codes.cuh"

#include <cuda_runtime.h>

#define MASS_MIN 1e-20f

// Blocks of one launch: the most that a grid's last extent may be.
#define GRID_BLOCKS 65535u

// Lists the kept and, of these, the walked, and writes the index.
static __device__ void index_write(const head_t &head, const section_layout &at) {
    head_state &state = head.state;
    uint32_t t = threadIdx.x, lane = t % 32, word = t / 32, below = (1u << lane) - 1;
    uint32_t fate = t < head.tokens ? state.fate[t] : FATE_DROPPED;
    if (t < HEAD_TOKENS) {
        state.words[0][word] = __ballot_sync(~0u, fate != FATE_DROPPED);
        state.words[1][word] = __ballot_sync(~0u, fate == FATE_WALKED);
    }
    __syncthreads();
    if (t < HEAD_TOKENS) {
        uint32_t kept = __popc(state.words[0][word] & below), walked = __popc(state.words[1][word] & below);
        for (uint32_t i = 0; i < word; i++) {
            kept += __popc(state.words[0][i]);
            walked += __popc(state.words[1][i]);
        }
        if (fate != FATE_DROPPED) {
            state.kept[kept] = (uint8_t)t;
            if (at.index_kind == BKV_INDEX_LIST) {
                ((uint32_t *)at.key_plane)[kept] = t;
            }
        }
        if (fate == FATE_WALKED) {
            state.walked[walked] = (uint8_t)t;
        }
        if (at.index_kind == BKV_INDEX_BITMAP && lane == 0 && t < head.tokens) {
            ((uint32_t *)at.key_plane)[word] = state.words[0][word];
        }
        if (t == HEAD_TOKENS - 1) {
            state.walked_count = walked + (fate == FATE_WALKED);
        }
    }
    __syncthreads();
}

// Log weights of the kept tokens as float16 base, step and a byte each. By any one warp, once the kept are listed.
static __device__ void weights_write(const head_t &head, const section_layout &at) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32;
    float low = INFINITY, high = -INFINITY;
    for (uint32_t i = lane; i < at.tokens; i += 32) {
        float weight = state.weight[state.kept[i]];
        low = fminf(low, weight);
        high = fmaxf(high, weight);
    }
    for (int other = 16; other > 0; other /= 2) {
        low = fminf(low, __shfl_xor_sync(~0u, low, other));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, other));
    }
    low = logf(low);
    high = logf(high);
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

// How much of each token every walked row answers for: a softmax of exp(-|key - row|^2 / (2 sqrt d)), |key|^2 cancelled.
// One warp takes 16 tokens with all rows, at most 16 * TILES, and writes their shares to work[token][row]; protected tokens
// give nothing away.
template <class T, uint32_t TILES> static __device__ void refit_shares(const head_t &head) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16, rows = state.walked_count;
    if (first >= head.padded) {
        return;
    }
    float share[2 * TILES][4];
    uint32_t keys = shared_address(head.keys), stride = share_stride(rows), row[TILES];
#pragma unroll
    for (uint32_t i = 0; i < 2 * TILES; i++) {
        share[i][0] = share[i][1] = share[i][2] = share[i][3] = 0;
        row[i / 2] = state.walked[min(i / 2 * 16 + lane / 16 * 8 + lane % 8, rows - 1)];
    }
#pragma unroll 4
    for (uint32_t k = 0; k < head.key_row / 32; k++) {
        uint32_t a[4], b[4];
        load_matrices(a, keys + swizzled(first + lane % 16, 2 * k + lane / 16, head.key_row));
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++) {
            load_matrices(b, keys + swizzled(row[tile], 2 * k + lane / 8 % 2, head.key_row));
            multiply<T>(share[2 * tile], a, b[0], b[1]);
            multiply<T>(share[2 * tile + 1], a, b[2], b[3]);
        }
    }
    float scale = head.scale * LOG2E, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
    for (uint32_t i = 0; i < 2 * TILES; i++) {
#pragma unroll
        for (uint32_t c = 0; c < 2; c++) {
            uint32_t r = 8 * i + lane % 4 * 2 + c;
            float half = r < rows ? -0.5f * scale * state.square[state.walked[r]] : -INFINITY;
            share[i][c] = share[i][c] * scale + half;
            share[i][c + 2] = share[i][c + 2] * scale + half;
            top[0] = fmaxf(top[0], share[i][c]);
            top[1] = fmaxf(top[1], share[i][c + 2]);
        }
    }
#pragma unroll
    for (uint32_t h = 0; h < 2; h++) {
        top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
#pragma unroll
        for (uint32_t i = 0; i < 4 * TILES; i++) {
            float *at = &share[i / 2][2 * h + i % 2];
            *at = exp2f(*at - top[h]);
            sum[h] += *at;
        }
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        uint32_t token = first + lane / 4 + 8 * h;
        bool gives = token < head.tokens && state.fate[token] != FATE_PROTECTED;
        sum[h] = gives ? 1.0f / sum[h] : 0.0f;
    }
    uint32_t *to = (uint32_t *)((T *)head.work + (first + lane / 4) * stride + lane % 4 * 2);
#pragma unroll
    for (uint32_t i = 0; i < 2 * TILES; i++) {
        if (8 * i < stride - 8) {
            to[4 * i] = element<T>::pack(share[i][0] * sum[0], share[i][1] * sum[0]);
            to[4 * i + 4 * stride] = element<T>::pack(share[i][2] * sum[1], share[i][3] * sum[1]); // 8 rows down
        }
    }
}

// The walked rows' new values, the means of all values by these shares: 8 channels a warp. They take the old values' place
// once every warp has read these.
template <class T, uint32_t TILES> static __device__ void refit_values(const head_t &head) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, chunk = threadIdx.x / 32, rows = state.walked_count, stride = share_stride(rows);
    uint32_t shares = shared_address(head.work), values = shared_address(head.values);
    float fit[TILES][4] = {}, mass[TILES][4] = {};
    bool takes = chunk < head.value_row / 16;
#pragma unroll 4
    for (uint32_t first = 0; takes && first < head.padded; first += 16) {
        uint32_t b[2];
        load_pair_transposed(b, values + swizzled(first + lane % 16, chunk, head.value_row));
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++) {
            if (16 * tile < stride - 8) {
                uint32_t a[4];
                load_matrices_transposed(
                    a, shares + ((first + lane / 16 * 8 + lane % 8) * stride + 16 * tile + lane / 8 % 2 * 8) * 2);
                multiply<T>(fit[tile], a, b[0], b[1]);
                multiply<T>(mass[tile], a, element<T>::ones, element<T>::ones);
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < 2 * TILES; i++) {
        uint32_t row = 8 * i + lane / 4, c = i % 2 * 2;
        if (takes && row < rows && mass[i / 2][c] > MASS_MIN) {
            float inverse = 1.0f / mass[i / 2][c];
            *(uint32_t *)(head.values + swizzled(state.walked[row], chunk, head.value_row) + lane % 4 * 4) =
                element<T>::pack(fit[i / 2][c] * inverse, fit[i / 2][c + 1] * inverse);
        }
    }
}

template <class T, uint32_t TILES> static __device__ void refit(const head_t &head) {
    refit_shares<T, TILES>(head);
    __syncthreads();
    refit_values<T, TILES>(head);
    __syncthreads();
}

template <class T> static __device__ void refit_any(const head_t &head) {
    uint32_t rows = head.state.walked_count;
    if (rows <= 16) {
        refit<T, 1>(head);
    } else if (rows <= 32) {
        refit<T, 2>(head);
    } else if (rows <= 64) {
        refit<T, 4>(head);
    } else {
        refit<T, HEAD_WALKED / 16>(head);
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

static __device__ void rows_prefetch(const head_t &head, rows_t rows, uint32_t row_bytes) {
    uint32_t lines = row_bytes / 128, thread = threadIdx.x - HEAD_THREADS / 2;
    for (uint32_t i = thread; i < head.tokens * lines; i += HEAD_THREADS / 2) {
        prefetch_l2(rows.base + (int64_t)(i / lines) * rows.stride + i % lines * 128);
    }
}

// The next head that this multiprocessor is likely to get is brought nearer while half of the threads have nothing to do.
static __device__ void next_prefetch(const head_t &head, uint32_t section, uint32_t number) {
    uint32_t heads = head.job.shape.heads, sections = head.job.shape.layers * heads;
    section += head.job.processors;
    number += section / sections;
    section %= sections;
    if (number < head.job.count) {
        const bkv_gpu_block_t &block = head.job.blocks[number];
        rows_prefetch(head, head_rows(block, false, section / heads, section % heads), head.key_row);
        rows_prefetch(head, head_rows(block, true, section / heads, section % heads), head.value_row);
    }
}

template <class T>
static __global__ void __launch_bounds__(HEAD_THREADS, 1)
    balance_kernel(const __grid_constant__ bkv_gpu_job_t job, uint32_t first_block) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ head_state state;
    uint32_t heads = job.shape.heads, index = blockIdx.x, layer = blockIdx.y, number = first_block + blockIdx.z;
    uint32_t section = layer * heads + index;
    const bkv_gpu_block_t &block = job.blocks[number];
    head_t head = {.job = job, .state = state, .tokens = job.shape.tokens, .padded = head_padded(job.shape.tokens)};
    head.key_row = job.shape.key_dim * 2;
    head.value_row = job.shape.value_dim * 2;
    head.keys = shared;
    head.values = head.keys + head.padded * head.key_row;
    head.work = head.values + head.padded * head.value_row;
    head.scale = rsqrtf((float)job.shape.key_dim);
    finder_t finder = {&job.status[number], layer, heads, index, false}, value_finder = finder;
    value_finder.value = true;

    rows_load(head, head_rows(block, false, layer, index), false);
    rows_load(head, head_rows(block, true, layer, index), true);
    section_layout at = section_find(job, number, section);
    section_plan plan = section_choose(job, block, at.tokens);
    copy_wait<1>();
    __syncthreads();
    keys_measure<T>(head, finder);
    __syncthreads();
    keys_mean<T>(head);
    __syncthreads();
    keys_score<T>(head);
    __syncthreads();
    scores_number(head, plan.first, random_head(job.seed, block.position, section));
    scores_rank(head);
    tokens_protect(head, plan.protect, plan.walked);
    copy_wait<0>();
    __syncthreads();
    leaves_kernel<T>(head, value_finder);
    __syncthreads();
    if (threadIdx.x < HEAD_THREADS / 2) {
        leaves_walk(head, plan.walked);
    } else {
        next_prefetch(head, section, number);
    }
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
    uint32_t rows = head_padded(job->shape.tokens) * (job->shape.key_dim + job->shape.value_dim) * 2;
    return rows + head_work_bytes(job->shape.tokens, job->shape.key_dim, job->walked);
}

// What is left of a thread block's shared memory beside head_state, in whole kilobytes.
static uint32_t dynamic_most(uint32_t shared_memory) {
    return (shared_memory - (uint32_t)sizeof(head_state)) / 1024 * 1024;
}

extern "C" int bkv_gpu_balance_allow(uint32_t shared_memory) {
    int bytes = (int)dynamic_most(shared_memory);
    cudaError_t error = cudaFuncSetAttribute(balance_kernel<__nv_bfloat16>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(balance_kernel<__half>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
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
    void (*kernel)(bkv_gpu_job_t, uint32_t) =
        job->shape.dtype == BKV_BF16 ? balance_kernel<__nv_bfloat16> : balance_kernel<__half>;
    cudaError_t error = cudaSuccess;
    for (uint32_t first = 0; error == cudaSuccess && first < job->count; first += GRID_BLOCKS) {
        uint32_t left = job->count - first;
        dim3 grid(job->shape.heads, job->shape.layers, left < GRID_BLOCKS ? left : GRID_BLOCKS);
        kernel<<<grid, HEAD_THREADS, shared_bytes(job), (cudaStream_t)stream>>>(*job, first);
        error = cudaGetLastError();
    }
    return (int)error;
}
