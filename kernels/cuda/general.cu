// general.cu - the balance codec for any shape: blocks of more than 256 tokens, float32, dims that tensor cores do not
// like, latent keys too wide for shared memory. Rows are read from memory as often as they are needed, in plain float32
// arithmetic; balance.cu is the fast way. The walk is the same, over leaves of BKV_LEAF tokens, and like the reference
// the refit goes key group by key group, so that its cost stays linear in the tokens.
#include "record.cuh"
#include "walk.cuh"

#include <cuda_runtime.h>

#define THREADS     256
#define WARPS       (THREADS / 32)
#define GROUP_MAX   96 // rows of a key group, as in record.h
#define TILE        32 // tokens whose shares are in shared memory at a time; channels of a Gram step
#define GRAM_STRIDE (BKV_LEAF + 8)
#define EACH        (BKV_LEAF / 16) // rows and columns of a leaf's kernel matrix that each of 16 x 16 threads has
#define MASS_MIN    1e-20f

enum { FATE_DROPPED = 0, FATE_WALKED = 1, FATE_PROTECTED = 2 };

// One head, in the thread block's own scratch: an entry for every token.
struct scratch_t {
    float *score, *square, *onto, *weight;
    uint32_t *rest;
    float *fit; // [GROUP_MAX][value_dim]
    uint8_t *fate;
};

static __host__ __device__ uint64_t scratch_bytes(const bkv_shape_t *shape) {
    uint64_t bytes = 20ull * shape->tokens + 4ull * GROUP_MAX * shape->value_dim + shape->tokens;
    return (bytes + 255) / 256 * 256;
}

static __device__ scratch_t scratch_carve(const bkv_gpu_job_t &job) {
    uint64_t n = job.shape.tokens;
    float *base = (float *)(job.scratch + blockIdx.x * job.scratch_stride);
    return {base,
            base + n,
            base + 2 * n,
            base + 3 * n,
            (uint32_t *)base + 4 * n,
            base + 5 * n,
            (uint8_t *)(base + 5 * n + (uint64_t)GROUP_MAX * job.shape.value_dim)};
}

struct general_state {
    union {
        float vectors[2][BKV_MAX_DIM]; // sum of unit keys, mean key
        uint8_t ranges[QUANT_KEYS_SHARED(BKV_MAX_DIM)];
    };
    union {
        struct {
            float panel[BKV_LEAF][TILE + 1];
            __nv_bfloat16 gram[BKV_LEAF * GRAM_STRIDE];
        };
        float share[TILE][GROUP_MAX];
    };
    walk_state walk;
    uint32_t histogram[256];
    uint32_t leaf[BKV_LEAF];   // tokens
    uint32_t kept[GROUP_MAX];  // tokens of the key group
    uint8_t slot[GROUP_MAX];   // of a kept row among the walked ones, or 255
    uint8_t walked[GROUP_MAX]; // rows
    float mass[GROUP_MAX];
    float mean_square, exponent_shift;
    uint32_t rest_count, walked_count, found, need, end;
};

struct general_head {
    const bkv_gpu_job_t &job;
    general_state &state;
    scratch_t scratch;
    rows_t keys, values;
    float scale;

    __device__ __forceinline__ void eight(bool value, uint32_t token, uint32_t chunk, float out[8]) const {
        const rows_t &rows = value ? values : keys;
        load_eight(rows.base + (int64_t)token * rows.stride + chunk * 8 * element_bytes(job), job.shape.dtype, out);
    }

    __device__ __forceinline__ float one(bool value, uint32_t token, uint32_t channel) const {
        const rows_t &rows = value ? values : keys;
        const uint8_t *at = rows.base + (int64_t)token * rows.stride + channel * element_bytes(job);
        return job.shape.dtype == BKV_FP32   ? *(const float *)at
               : job.shape.dtype == BKV_BF16 ? __uint_as_float((uint32_t) * (const uint16_t *)at << 16)
                                             : half_expand(*(const uint16_t *)at);
    }
};

static __device__ __forceinline__ float warp_sum(float value) {
    for (int other = 16; other > 0; other /= 2) {
        value += __shfl_xor_sync(~0u, value, other);
    }
    return value;
}

static __device__ __forceinline__ float warp_max(float value) {
    for (int other = 16; other > 0; other /= 2) {
        value = fmaxf(value, __shfl_xor_sync(~0u, value, other));
    }
    return value;
}

// |k|^2 of every token, its inverse root where the score will be, and a look at every element.
static __device__ void keys_measure(const general_head &head, finder_t finder) {
    uint32_t lane = threadIdx.x % 32, n = head.job.shape.tokens;
    for (uint32_t t = threadIdx.x / 32; t < n; t += WARPS) {
        float sum = 0, row[8];
        finder.value = false;
        for (uint32_t c = lane; c < head.job.shape.key_dim / 8; c += 32) {
            head.eight(false, t, c, row);
            find_eight(finder, t, row, false);
            for (int i = 0; i < 8; i++) {
                sum += row[i] * row[i];
            }
        }
        finder.value = true;
        for (uint32_t c = lane; c < head.job.shape.value_dim / 8; c += 32) {
            head.eight(true, t, c, row);
            find_eight(finder, t, row, false);
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            head.scratch.square[t] = sum;
            head.scratch.score[t] = sum > 0 ? 1.0f / sqrtf(sum) : 0.0f;
        }
    }
    __syncthreads();
}

static __device__ void keys_score(const general_head &head) {
    general_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, n = head.job.shape.tokens, dim = head.job.shape.key_dim;
    for (uint32_t c = threadIdx.x; c < dim; c += THREADS) {
        float direction = 0, mean = 0;
        for (uint32_t t = 0; t < n; t++) {
            float value = head.one(false, t, c);
            direction += head.scratch.score[t] * value;
            mean += value;
        }
        state.vectors[0][c] = direction;
        state.vectors[1][c] = mean / (float)n;
    }
    __syncthreads();
    for (uint32_t t = threadIdx.x / 32; t < n; t += WARPS) {
        float score = 0, onto = 0, row[8];
        for (uint32_t c = lane; c < dim / 8; c += 32) {
            head.eight(false, t, c, row);
            for (int i = 0; i < 8; i++) {
                score += row[i] * state.vectors[0][8 * c + i];
                onto += row[i] * state.vectors[1][8 * c + i];
            }
        }
        score = warp_sum(score);
        onto = warp_sum(onto);
        if (lane == 0) {
            head.scratch.score[t] *= score;
            head.scratch.onto[t] = onto;
        }
    }
    if (threadIdx.x < 32) {
        float sum = 0;
        for (uint32_t c = lane; c < dim; c += 32) {
            sum += state.vectors[1][c] * state.vectors[1][c];
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            state.mean_square = sum;
        }
    }
    __syncthreads();
}

static __device__ __forceinline__ uint32_t score_key(const general_head &head, uint32_t t) {
    return (uint32_t)ordered(head.scratch.score[t]) ^ 0x80000000u;
}

// The k-th smallest score of the tokens from `first` on, eight bits at a time; state.need: how many equal ones belong to the k.
static __device__ uint32_t score_select(const general_head &head, uint32_t first, uint32_t k) {
    general_state &state = head.state;
    uint32_t found = 0;
    if (threadIdx.x == 0) {
        state.need = k;
    }
    for (int shift = 24; shift >= 0; shift -= 8) {
        state.histogram[threadIdx.x] = 0;
        __syncthreads();
        for (uint32_t t = first + threadIdx.x; t < head.job.shape.tokens; t += THREADS) {
            uint32_t key = score_key(head, t);
            if ((uint64_t)key >> (shift + 8) == (uint64_t)found >> (shift + 8)) {
                atomicAdd(&state.histogram[key >> shift & 255], 1u);
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            uint32_t bin = 0, need = state.need;
            while (state.histogram[bin] < need) {
                need -= state.histogram[bin++];
            }
            state.need = need;
            state.found = bin;
        }
        __syncthreads();
        found |= state.found << shift;
    }
    return found;
}

// Fates and the list of the rest, in order, by one warp.
static __device__ void tokens_protect(const general_head &head, uint32_t first, uint32_t count, uint32_t limit) {
    general_state &state = head.state;
    uint32_t lane = threadIdx.x, below = (1u << lane) - 1, ties = count > 0 ? state.need : 0, rest = 0;
    float top = 0;
    for (uint32_t start = 0; start < head.job.shape.tokens; start += 32) {
        uint32_t t = start + lane;
        bool inside = t < head.job.shape.tokens, judged = inside && t >= first && count > 0;
        uint32_t key = judged ? score_key(head, t) : ~0u;
        uint32_t equal = __ballot_sync(~0u, judged && key == limit);
        bool taken = t < first || (judged && key < limit) || ((equal >> lane & 1) && __popc(equal & below) < ties);
        ties -= min(ties, (uint32_t)__popc(equal));
        uint32_t left = __ballot_sync(~0u, inside && !taken);
        if (inside) {
            head.scratch.fate[t] = taken ? FATE_PROTECTED : FATE_DROPPED;
            head.scratch.weight[t] = 1;
        }
        if (left >> lane & 1) {
            head.scratch.rest[rest + __popc(left & below)] = t;
            top = fmaxf(top, (head.scratch.square[t] - 2 * head.scratch.onto[t] + state.mean_square) * head.scale);
        }
        rest += __popc(left);
    }
    top = warp_max(top);
    if (lane == 0) {
        state.rest_count = rest;
        state.exponent_shift = top > EXPONENT_TOP ? top - EXPONENT_TOP : 0;
    }
}

// Inner products of all pairs of the leaf's tokens; each thread has EACH x EACH of them.
static __device__ void leaf_products(const general_head &head, bool value, uint32_t n, float sum[EACH][EACH]) {
    general_state &state = head.state;
    uint32_t dim = value ? head.job.shape.value_dim : head.job.shape.key_dim;
    uint32_t row = threadIdx.x / 16 * EACH, column = threadIdx.x % 16 * EACH;
    for (int i = 0; i < EACH * EACH; i++) {
        sum[i / EACH][i % EACH] = 0;
    }
    for (uint32_t first = 0; first < dim; first += TILE) {
        for (uint32_t i = threadIdx.x; i < BKV_LEAF * TILE; i += THREADS) {
            uint32_t t = i / TILE, c = first + i % TILE;
            state.panel[t][i % TILE] = t < n && c < dim ? head.one(value, state.leaf[t], c) : 0.0f;
        }
        __syncthreads();
        for (uint32_t c = 0; c < TILE; c++) {
            float a[EACH], b[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                a[i] = state.panel[row + i][c];
                b[i] = state.panel[column + i][c];
            }
#pragma unroll
            for (int i = 0; i < EACH * EACH; i++) {
                sum[i / EACH][i % EACH] += a[i / EACH] * b[i % EACH];
            }
        }
        __syncthreads();
    }
}

static __device__ void leaf_kernel(const general_head &head, uint32_t n) {
    general_state &state = head.state;
    uint32_t row = threadIdx.x / 16 * EACH, column = threadIdx.x % 16 * EACH;
    float kernel[EACH][EACH], sum[EACH][EACH];
    leaf_products(head, false, n, kernel);
    leaf_products(head, true, n, sum);
    for (uint32_t i = 0; i < EACH; i++) {
        for (uint32_t j = 0; j < EACH; j++) {
            float onto_row = row + i < n ? head.scratch.onto[state.leaf[row + i]] : 0;
            float onto_column = column + j < n ? head.scratch.onto[state.leaf[column + j]] : 0;
            float exponent = (kernel[i][j] - onto_row - onto_column + state.mean_square) * head.scale - state.exponent_shift;
            state.gram[(row + i) * GRAM_STRIDE + column + j] =
                __float2bfloat16(fminf(fmaxf(expf(exponent) * (sum[i][j] + VALUE_FLOOR), -ENTRY_MOST), ENTRY_MOST));
        }
    }
    __syncthreads();
}

// Leaf after leaf is reduced to its share of `target`; where there are fewer to keep than leaves, some keep nothing and the
// others' weights grow.
static __device__ void tokens_walk(const general_head &head, uint32_t target, uint64_t key) {
    general_state &state = head.state;
    uint32_t rest = state.rest_count, leaves = (rest + BKV_LEAF - 1) / BKV_LEAF;
    float growth = 1;
    if (target < leaves) {
        uint32_t covered = 0;
        for (uint32_t leaf = 0; leaf < leaves; leaf++) {
            bool kept = leaf_first(target, leaves, leaf + 1) > leaf_first(target, leaves, leaf);
            covered += kept ? leaf_first(rest, leaves, leaf + 1) - leaf_first(rest, leaves, leaf) : 0;
        }
        growth = (float)rest / (float)covered;
    }
    for (uint32_t leaf = 0; leaf < leaves; leaf++) {
        uint32_t first = leaf_first(rest, leaves, leaf), n = leaf_first(rest, leaves, leaf + 1) - first;
        uint32_t share = leaf_first(target, leaves, leaf + 1) - leaf_first(target, leaves, leaf);
        if (threadIdx.x < n) {
            state.leaf[threadIdx.x] = head.scratch.rest[first + threadIdx.x];
        }
        __syncthreads();
        leaf_kernel(head, n);
        if (threadIdx.x < 32) {
            float weight = walk_reduce({state.gram, GRAM_STRIDE}, n, share, random_mix(key, leaf), &state.walk);
            if (weight > 0) {
                head.scratch.fate[state.leaf[threadIdx.x]] = FATE_WALKED;
                head.scratch.weight[state.leaf[threadIdx.x]] = weight * growth;
            }
        }
        __syncthreads();
    }
}

// Index and log weights, by one warp.
static __device__ void index_write(const general_head &head, const section_layout &at) {
    uint32_t lane = threadIdx.x, below = (1u << lane) - 1, n = head.job.shape.tokens, kept = 0;
    float low = INFINITY, high = -INFINITY;
    for (uint32_t t = lane; t < n; t += 32) {
        if (head.scratch.fate[t] != FATE_DROPPED) {
            float weight = logf(head.scratch.weight[t]);
            low = fminf(low, weight);
            high = fmaxf(high, weight);
        }
    }
    low = -warp_max(-low);
    high = warp_max(high);
    uint16_t base_half = half_saturated(low);
    float base = half_expand(base_half);
    uint16_t step_half = half_saturated(high > base ? (high - base) / 255.0f : 0.0f);
    float step = half_expand(step_half), inverse = step > 0 ? 1.0f / step : 0.0f;
    uint8_t *weights = at.key_plane + at.weights;
    if (lane == 0) {
        *(uint32_t *)weights = base_half | (uint32_t)step_half << 16;
    }
    for (uint32_t start = 0; start < n; start += 32) {
        uint32_t t = start + lane;
        bool keep = t < n && head.scratch.fate[t] != FATE_DROPPED;
        uint32_t keeps = __ballot_sync(~0u, keep), place = kept + __popc(keeps & below);
        if (keep) {
            weights[4 + place] = (uint8_t)code_of(logf(head.scratch.weight[t]), inverse, base, 255.0f);
            if (at.index_kind == BKV_INDEX_LIST) {
                ((uint32_t *)at.key_plane)[place] = t;
            }
        }
        if (at.index_kind == BKV_INDEX_BITMAP && lane == 0) {
            ((uint32_t *)at.key_plane)[start / 32] = keeps;
        }
        kept += __popc(keeps);
    }
}

// Lists the next `count` kept tokens from `done` on and where the next group's tokens begin, by one warp.
static __device__ void group_gather(const general_head &head, uint32_t done, uint32_t count) {
    general_state &state = head.state;
    uint32_t lane = threadIdx.x, below = (1u << lane) - 1, n = head.job.shape.tokens, kept = 0, walked = 0, end = n;
    for (uint32_t start = done; start < n && end == n; start += 32) {
        uint32_t t = start + lane, fate = t < n ? head.scratch.fate[t] : FATE_DROPPED;
        uint32_t keeps = __ballot_sync(~0u, fate != FATE_DROPPED), place = kept + __popc(keeps & below);
        bool mine = fate != FATE_DROPPED && place < count;
        uint32_t walks = __ballot_sync(~0u, mine && fate == FATE_WALKED),
                 beyond = __ballot_sync(~0u, fate != FATE_DROPPED && !mine);
        if (mine) {
            uint32_t slot = walked + __popc(walks & below);
            state.kept[place] = t;
            state.slot[place] = fate == FATE_WALKED ? (uint8_t)slot : 255;
            if (fate == FATE_WALKED) {
                state.walked[slot] = (uint8_t)place;
            }
        }
        kept += __popc(keeps);
        walked += __popc(walks);
        end = beyond ? start + (uint32_t)__ffs((int)beyond) - 1 : end;
    }
    if (lane == 0) {
        state.walked_count = walked;
        state.end = end;
    }
}

// What each walked row of the group answers for, of TILE tokens from `first` on; one warp takes a token, a lane a row.
static __device__ void refit_shares(const general_head &head, uint32_t first, uint32_t end) {
    general_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, rows = state.walked_count;
    for (uint32_t i = threadIdx.x / 32; i < TILE; i += WARPS) {
        uint32_t t = first + i;
        bool gives = t < end && head.scratch.fate[t] != FATE_PROTECTED;
        float share[GROUP_MAX / 32], top = -INFINITY, sum = 0;
        for (uint32_t j = 0; j < GROUP_MAX / 32; j++) {
            uint32_t r = 32 * j + lane;
            share[j] = -INFINITY;
            if (gives && r < rows) {
                uint32_t row = state.kept[state.walked[r]];
                float dot = 0, a[8], b[8];
                for (uint32_t c = 0; c < head.job.shape.key_dim / 8; c++) {
                    head.eight(false, t, c, a);
                    head.eight(false, row, c, b);
                    for (int e = 0; e < 8; e++) {
                        dot += a[e] * b[e];
                    }
                }
                share[j] = (dot - 0.5f * head.scratch.square[row]) * head.scale;
            }
            top = fmaxf(top, share[j]);
        }
        top = warp_max(top);
        for (uint32_t j = 0; j < GROUP_MAX / 32; j++) {
            share[j] = gives ? expf(share[j] - top) : 0.0f;
            sum += share[j];
        }
        sum = warp_sum(sum);
        for (uint32_t j = 0; j < GROUP_MAX / 32; j++) {
            state.share[i][32 * j + lane] = gives ? share[j] / sum : 0.0f;
        }
    }
    __syncthreads();
}

// The group's walked rows get the mean value of what they answer for, among tokens [first, end).
static __device__ void group_refit(const general_head &head, uint32_t first, uint32_t end) {
    general_state &state = head.state;
    uint32_t rows = state.walked_count, dim = head.job.shape.value_dim;
    for (uint32_t i = threadIdx.x; i < rows * dim; i += THREADS) {
        head.scratch.fit[i] = 0;
    }
    if (threadIdx.x < GROUP_MAX) {
        state.mass[threadIdx.x] = 0;
    }
    for (uint32_t tile = first; rows > 0 && tile < end; tile += TILE) {
        refit_shares(head, tile, end);
        uint32_t count = min((uint32_t)TILE, end - tile);
        for (uint32_t i = threadIdx.x; i < rows * dim; i += THREADS) {
            float sum = head.scratch.fit[i];
            for (uint32_t t = 0; t < count; t++) {
                sum += state.share[t][i / dim] * head.one(true, tile + t, i % dim);
            }
            head.scratch.fit[i] = sum;
        }
        if (threadIdx.x < rows) {
            for (uint32_t t = 0; t < count; t++) {
                state.mass[threadIdx.x] += state.share[t][threadIdx.x];
            }
        }
        __syncthreads();
    }
}

// Rows of a key group for quant.cuh: walked values from the refit, all else from memory.
struct group_fetch {
    const general_head &head;
    bool value;

    __device__ __forceinline__ void operator()(uint32_t row, uint32_t chunk, float out[8]) const {
        const general_state &state = head.state;
        uint32_t slot = value ? state.slot[row] : 255;
        if (slot == 255 || !(state.mass[slot] > MASS_MIN)) {
            head.eight(value, state.kept[row], chunk, out);
            return;
        }
        const float *fit = head.scratch.fit + (uint64_t)slot * head.job.shape.value_dim + 8 * chunk;
        for (int i = 0; i < 8; i++) {
            out[i] = fit[i] / state.mass[slot];
        }
    }
};

static __device__ void rows_write(const general_head &head, const section_layout &at) {
    const bkv_shape_t &shape = head.job.shape;
    uint32_t done = 0;
    for (uint32_t group = 0; group < at.key_groups; group++) {
        uint32_t count = group_count(at, group);
        uint64_t first = (uint64_t)group * at.key_group_tokens;
        if (threadIdx.x < 32) {
            group_gather(head, done, count);
        }
        __syncthreads();
        uint32_t end = head.state.end;
        group_refit(head, done, end);
        done = end;
        quant_keys(group_fetch{head, false}, count, shape.key_dim, at.key_bits,
                   at.key_plane + at.key_params + 4ull * group * shape.key_dim,
                   at.key_plane + at.key_codes + first * at.key_row, head.state.ranges);
        quant_values(group_fetch{head, true}, count, shape.value_dim, at.value_bits,
                     at.value_plane + 4 * first * at.value_groups, at.value_plane + at.value_codes + first * at.value_row);
        __syncthreads();
    }
}

static __global__ void __launch_bounds__(THREADS) general_kernel(const __grid_constant__ bkv_gpu_job_t job) {
    __shared__ general_state state;
    uint32_t heads = job.shape.heads, sections = job.shape.layers * heads;
    for (uint64_t at = blockIdx.x; at < (uint64_t)job.count * sections; at += gridDim.x) {
        uint32_t number = (uint32_t)(at / sections), section = (uint32_t)(at % sections);
        uint32_t layer = section / heads, index = section % heads;
        const bkv_gpu_block_t &block = job.blocks[number];
        general_head head = {job,
                             state,
                             scratch_carve(job),
                             head_rows(block, false, layer, index),
                             head_rows(block, true, layer, index),
                             rsqrtf((float)job.shape.key_dim)};
        section_layout layout = section_find(job, number, section);
        section_plan plan = section_choose(job, block, layout.tokens);
        uint32_t count = plan.protect - plan.first, limit = 0;
        keys_measure(head, {&job.status[number], layer, heads, index, false});
        keys_score(head);
        if (count > 0) {
            limit = score_select(head, plan.first, count);
        }
        if (threadIdx.x < 32) {
            tokens_protect(head, plan.first, count, limit);
        }
        __syncthreads();
        tokens_walk(head, plan.walked, random_head(job.seed, block.position, section));
        if (threadIdx.x < 32) {
            index_write(head, layout);
        }
        rows_write(head, layout);
        section_pad(job, layout);
        __syncthreads();
    }
}

extern "C" uint64_t bkv_gpu_general_scratch(const bkv_gpu_job_t *job) {
    return scratch_bytes(&job->shape);
}

extern "C" int bkv_gpu_general(const bkv_gpu_job_t *job, void *stream) {
    general_kernel<<<job->scratch_count, THREADS, 0, (cudaStream_t)stream>>>(*job);
    return (int)cudaGetLastError();
}
