// balance_cuda.cu - the balance codec, one thread block a head: K and V are read from memory once and stay in shared memory
// until the record's planes are written. balance_ref.c says why each stage is there; select_cuda.cuh has the first half, this
// file the second: what is kept, the refit, and the planes. general_cuda.cu takes what does not fit.
//
// Against the reference: the walk goes over leaves of BKV_LEAF tokens with coins of its own, kernels are bfloat16, and the
// refit is over the whole head, not each key group by itself.
#include "select_cuda.cuh"

#include <cuda_runtime.h>

#define MASS_MIN 1e-20f

// Brings the walk's weights to their tokens. Where there are fewer to keep than leaves, some leaves keep nothing, and the
// others' weights grow to stand for all.
static __device__ void weights_collect(const head_t &head, uint32_t target) {
    head_state &state = head.state;
    uint32_t rest = state.rest_count, leaves = state.leaves;
    float growth = 1;
    if (target < leaves) {
        uint32_t covered = 0;
        for (uint32_t leaf = 0; leaf < leaves; leaf++) {
            bool kept = leaf_first(target, leaves, leaf + 1) > leaf_first(target, leaves, leaf);
            covered += kept ? leaf_first(rest, leaves, leaf + 1) - leaf_first(rest, leaves, leaf) : 0;
        }
        growth = (float)rest / (float)covered;
    }
    FOR_TOKENS(i, rest) {
        uint32_t leaf = leaves - 1;
        while (i < leaf_first(rest, leaves, leaf)) {
            leaf--;
        }
        float weight = state.walk[leaf].weight[i - leaf_first(rest, leaves, leaf)];
        if (weight > 0) {
            state.fate[state.rest[i]] = FATE_WALKED;
            state.weight[state.rest[i]] = weight * growth;
        }
    }
    __syncthreads();
}

// Lists the kept and, of these, the walked, and writes the index. By one warp.
static __device__ void index_write(const head_t &head, const section_layout &at) {
    head_state &state = head.state;
    uint32_t lane = threadIdx.x, below = (1u << lane) - 1, kept = 0, walked = 0;
    for (uint32_t first = 0; first < head.tokens; first += 32) {
        uint32_t t = first + lane, fate = t < head.tokens ? state.fate[t] : FATE_DROPPED;
        uint32_t keeps = __ballot_sync(~0u, fate != FATE_DROPPED), walks = __ballot_sync(~0u, fate == FATE_WALKED);
        if (fate != FATE_DROPPED) {
            uint32_t place = kept + __popc(keeps & below);
            state.kept[place] = (uint8_t)t;
            if (at.index_kind == BKV_INDEX_LIST) {
                ((uint32_t *)at.key_plane)[place] = t;
            }
        }
        if (fate == FATE_WALKED) {
            state.walked[walked + __popc(walks & below)] = (uint8_t)t;
        }
        if (at.index_kind == BKV_INDEX_BITMAP && lane == 0) {
            ((uint32_t *)at.key_plane)[first / 32] = keeps;
        }
        kept += __popc(keeps);
        walked += __popc(walks);
    }
    if (lane == 0) {
        state.walked_count = walked;
    }
    __syncwarp();
}

// Log weights of the kept tokens as float16 base, step and a byte each. By the warp that wrote the index.
static __device__ void weights_write(const head_t &head, const section_layout &at) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x;
    float low = INFINITY, high = -INFINITY;
    for (uint32_t i = lane; i < at.tokens; i += 32) {
        float weight = logf(state.weight[state.kept[i]]);
        low = fminf(low, weight);
        high = fmaxf(high, weight);
    }
    for (int other = 16; other > 0; other /= 2) {
        low = fminf(low, __shfl_xor_sync(~0u, low, other));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, other));
    }
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
// One warp takes 16 tokens with all rows and writes their shares to work[token][row]; protected tokens give nothing away.
template <class T> static __device__ void refit_shares(const head_t &head, uint32_t stride) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16, rows = state.walked_count;
    if (first >= head.padded) {
        return;
    }
    float share[HEAD_WALKED / 8][4];
    uint32_t keys = shared_address(head.keys), tiles = (rows + 15) / 16;
#pragma unroll
    for (int i = 0; i < HEAD_WALKED / 8; i++) {
        share[i][0] = share[i][1] = share[i][2] = share[i][3] = 0;
    }
#pragma unroll
    for (uint32_t tile = 0; tile < HEAD_WALKED / 16; tile++) {
        if (tile < tiles) {
            uint32_t row = state.walked[min(16 * tile + lane / 16 * 8 + lane % 8, rows - 1)];
            for (uint32_t k = 0; k < head.key_row / 32; k++) {
                uint32_t a[4], b[4];
                load_matrices(a, keys + swizzled(first + lane % 16, 2 * k + lane / 16, head.key_row));
                load_matrices(b, keys + swizzled(row, 2 * k + lane / 8 % 2, head.key_row));
                multiply<T>(share[2 * tile], a, b[0], b[1]);
                multiply<T>(share[2 * tile + 1], a, b[2], b[3]);
            }
        }
    }
    const float log2e = 1.4426950408889634f;
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
    for (uint32_t i = 0; i < HEAD_WALKED / 8; i++) {
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            uint32_t row = 8 * i + lane % 4 * 2 + c % 2;
            float half = row < rows ? 0.5f * state.square[state.walked[row]] : INFINITY;
            share[i][c] = (share[i][c] - half) * head.scale * log2e;
            top[c / 2] = fmaxf(top[c / 2], share[i][c]);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
    }
#pragma unroll
    for (uint32_t i = 0; i < HEAD_WALKED / 8; i++) {
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            share[i][c] = exp2f(share[i][c] - top[c / 2]);
            sum[c / 2] += share[i][c];
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        uint32_t token = first + lane / 4 + 8 * h;
        bool gives = token < head.tokens && state.fate[token] != FATE_PROTECTED;
        sum[h] = gives ? 1.0f / sum[h] : 0.0f;
    }
#pragma unroll
    for (uint32_t i = 0; i < HEAD_WALKED / 8; i++) {
        if (i < 2 * tiles) {
            uint32_t *to = (uint32_t *)((T *)head.work + (first + lane / 4) * stride + 8 * i + lane % 4 * 2);
            to[0] = element<T>::pack(share[i][0] * sum[0], share[i][1] * sum[0]);
            to[4 * stride] = element<T>::pack(share[i][2] * sum[1], share[i][3] * sum[1]); // 8 rows down
        }
    }
}

// The walked rows' new values, the means of all values by these shares: 8 channels a warp. They take the old values' place
// once every warp has read these.
template <class T> static __device__ void refit_values(const head_t &head, uint32_t stride) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, chunk = threadIdx.x / 32, rows = state.walked_count, tiles = (rows + 15) / 16;
    uint32_t shares = shared_address(head.work), values = shared_address(head.values);
    float fit[HEAD_WALKED / 16][4] = {}, mass[HEAD_WALKED / 16][4] = {};
    bool takes = chunk < head.value_row / 16;
    for (uint32_t first = 0; takes && first < head.padded; first += 16) {
        uint32_t b[2];
        load_pair_transposed(b, values + swizzled(first + lane % 16, chunk, head.value_row));
#pragma unroll
        for (uint32_t tile = 0; tile < HEAD_WALKED / 16; tile++) {
            if (tile < tiles) {
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
    for (uint32_t i = 0; i < HEAD_WALKED / 8; i++) {
        uint32_t row = 8 * i + lane / 4, c = i % 2 * 2;
        if (takes && row < rows && mass[i / 2][c] > MASS_MIN) {
            float inverse = 1.0f / mass[i / 2][c];
            *(uint32_t *)(head.values + swizzled(state.walked[row], chunk, head.value_row) + lane % 4 * 4) =
                element<T>::pack(fit[i / 2][c] * inverse, fit[i / 2][c + 1] * inverse);
        }
    }
    __syncthreads();
}

// Kept rows in shared memory, as quant_cuda.cuh fetches them.
template <class T> struct kept_fetch {
    const head_t &head;
    finder_t finder;
    uint32_t first;

    __device__ __forceinline__ void operator()(uint32_t row, uint32_t chunk, float out[8]) const {
        uint32_t token = head.state.kept[first + row];
        unpack_eight<T>(head.chunk(finder.value, token, chunk), out);
        if (finder.value && head.state.fate[token] == FATE_PROTECTED) { // every other value is in some leaf's kernel
            find_eight(finder, token, out, false);
        }
    }
};

template <class T> static __device__ void rows_write(const head_t &head, const section_layout &at, finder_t finder) {
    uint32_t key_dim = head.job.shape.key_dim;
    for (uint32_t group = 0; group < at.key_groups; group++) {
        uint32_t first = group * at.key_group_tokens;
        kept_fetch<T> keys = {head, finder, first};
        quant_keys(keys, group_count(at, group), key_dim, at.key_bits, at.key_plane + at.key_params + 4 * group * key_dim,
                   at.key_plane + at.key_codes + first * at.key_row, head.work);
    }
    finder.value = true;
    kept_fetch<T> values = {head, finder, 0};
    quant_values(values, at.tokens, head.job.shape.value_dim, at.value_bits, at.value_plane, at.value_plane + at.value_codes);
}

// The next head that this multiprocessor will have is brought nearer while few threads have anything to do.
static __device__ void rows_prefetch(const head_t &head, rows_t rows, uint32_t row_bytes) {
    uint32_t lines = row_bytes / 128, thread = threadIdx.x - HEAD_THREADS / 2;
    for (uint32_t i = thread; i < head.tokens * lines; i += HEAD_THREADS / 2) {
        prefetch_l2(rows.base + (int64_t)(i / lines) * rows.stride + i % lines * 128);
    }
}

template <class T>
static __global__ void __launch_bounds__(HEAD_THREADS, 1)
    balance_kernel(const __grid_constant__ bkv_gpu_job_t job, uint32_t ahead) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ head_state state;
    uint32_t heads = job.shape.heads, sections = job.shape.layers * heads;
    uint32_t number = blockIdx.x / sections, section = blockIdx.x % sections, layer = section / heads, index = section % heads;
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
    uint32_t first = head_first(job, block), target = at.tokens - job.protect;
    copy_wait<1>();
    __syncthreads();
    keys_measure<T>(head, finder);
    keys_mean<T>(head);
    keys_score<T>(head);
    if (threadIdx.x < 32) {
        tokens_protect(head, first, job.protect - first);
    }
    copy_wait<0>();
    __syncthreads();
    leaves_kernel<T>(head, value_finder);
    __syncthreads();
    if (threadIdx.x < 32 * state.leaves) {
        leaves_walk(head, target, random_head(job.seed, block.position, section));
    } else if (threadIdx.x >= HEAD_THREADS / 2 && blockIdx.x + ahead < gridDim.x) {
        uint32_t next = blockIdx.x + ahead;
        const bkv_gpu_block_t &other = job.blocks[next / sections];
        rows_prefetch(head, head_rows(other, false, next % sections / heads, next % heads), head.key_row);
        rows_prefetch(head, head_rows(other, true, next % sections / heads, next % heads), head.value_row);
    }
    __syncthreads();
    weights_collect(head, target);
    if (threadIdx.x < 32) {
        index_write(head, at);
        weights_write(head, at);
    }
    __syncthreads();
    uint32_t stride = (state.walked_count + 15) / 16 * 16 + 8;
    refit_shares<T>(head, stride);
    __syncthreads();
    refit_values<T>(head, stride);
    rows_write<T>(head, at, finder);
    section_pad(job, at);
}

static uint32_t shared_bytes(const bkv_gpu_job_t *job) {
    uint32_t rows = head_padded(job->shape.tokens) * (job->shape.key_dim + job->shape.value_dim) * 2;
    return rows + head_work_bytes(job->shape.tokens, job->shape.key_dim, job->section.tokens - job->protect);
}

extern "C" int bkv_gpu_balance_allow(uint32_t shared_memory) {
    int bytes = (int)(shared_memory - sizeof(head_state));
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
    return dims && shape->dtype != BKV_FP32 && shape->tokens <= HEAD_TOKENS && job->section.tokens < shape->tokens &&
           job->section.tokens - job->protect <= HEAD_WALKED &&
           (uint64_t)job->count * shape->layers * shape->heads < 0x7fffffffu &&
           shared_bytes(job) + sizeof(head_state) <= job->shared_memory;
}

extern "C" int bkv_gpu_balance(const bkv_gpu_job_t *job, void *stream) {
    void (*kernel)(bkv_gpu_job_t, uint32_t) =
        job->shape.dtype == BKV_BF16 ? balance_kernel<__nv_bfloat16> : balance_kernel<__half>;
    uint32_t grid = job->count * job->shape.layers * job->shape.heads;
    kernel<<<grid, HEAD_THREADS, shared_bytes(job), (cudaStream_t)stream>>>(*job, job->processors);
    return (int)cudaGetLastError();
}
