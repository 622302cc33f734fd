// attend_fast.cuh - internal: attention by matrix instructions, straight from packed codes (attend_codes.cuh), for
// dims that are known at compile time. attend_narrow.cu and attend_wide.cu say which; attend_general.cu takes
// all others.
//
// A warp is on its own, with shared memory for the keys of a tile and for the values of one; no barrier of the thread block
// anywhere. For each tile, with lane = 4 * g + c and columns = queries of the KV head:
//
//   logits   16 tokens x 16 channels times 16 channels x 8 columns. The key group's scales go into the query, the zeros into
//            one dot product for all tokens: <q, zero + scale * code> = <q, zero> + <q * scale, code>. Lane (g, c) unpacks the
//            channels [32 c, 32 c + 32) of tokens g and g + 8.
//   weights  log-weights onto the logits, online softmax (Milakov and Gimelshein, arXiv 1805.02867) with base 2
//   values   16 channels x 16 tokens times 16 tokens x 8 columns. A token's scale goes into its weight, the zeros into
//            one number for each 64 channels. Lane (g, c) unpacks the channels [16 g, 16 g + 16) of tokens 2c, 2c + 1, 2c + 8
//            and 2c + 9, for which the weights change lanes by a transposition of 8 x 8.
//
// A token has one scale for each 64 channels, so a matrix of weights serves half of 128 channels. Where there are four
// columns, the other four of the eight are the same queries again, with the other half's scales; of the sums, only the half
// that goes with its column means anything (the rest is dropped at the end). Eight columns take two matrices.
#ifndef BKV_ATTEND_FAST_CUDA_CUH
#define BKV_ATTEND_FAST_CUDA_CUH

#include "attend_stage.cuh"

#define LOG2E 1.4426950408889634f
#define SUBS  (BKV_GPU_TILE_MAX / BKV_GPU_TILE_STEP)

// Of a sum that has nothing yet, see tile_exponent.
#define EXPONENT_NONE (-64)

template <int KEY, int VALUE, int COLUMNS> struct fast_t {
    static constexpr int KEY_DIM = KEY, VALUE_DIM = VALUE;
    static constexpr int ROUNDS = (KEY + 127) / 128;   // of 128 channels of a key
    static constexpr int CHUNKS = (VALUE + 127) / 128; // of 128 channels of a value
    static constexpr int HALVES = COLUMNS / 4;         // matrices of weights
    static constexpr int GROUPS = (VALUE + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS;
    static constexpr bool TWICE = COLUMNS == 4;

    uint32_t q[ROUNDS * PAIRS]; // of column g, in the order of three-bit codes, times a power of two
    float unit[2];              // of columns 2c and 2c + 1: turns products with q into logits of base 2
    float top[2];               // of these columns: the largest logit
    int exponent;               // what follows is to be multiplied by 2^(exponent + top)
    float sum[2];               // of weights, this lane's share
    float zero[CHUNKS][HALVES][2];
    float out[CHUNKS][HALVES][8][4];
};

template <class F> __device__ __forceinline__ void fast_reset(F &f) {
    f.exponent = EXPONENT_NONE;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        f.top[i] = -INFINITY;
        f.sum[i] = 0;
#pragma unroll
        for (int v = 0; v < F::CHUNKS * F::HALVES; v++) {
            (&f.zero[0][0][0])[2 * v + i] = 0;
        }
    }
#pragma unroll
    for (int i = 0; i < F::CHUNKS * F::HALVES * 32; i++) {
        (&f.out[0][0][0][0])[i] = 0;
    }
}

// Thirty-two elements of a query.
__device__ __forceinline__ void query_load(const void *q, uint32_t dtype, uint64_t first, float *out) {
    if (dtype == BKV_FP32) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float4 four = ((const float4 *)((const float *)q + first))[i];
            out[4 * i] = four.x, out[4 * i + 1] = four.y, out[4 * i + 2] = four.z, out[4 * i + 3] = four.w;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint4 eight = ((const uint4 *)((const uint16_t *)q + first))[i];
        uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 two = dtype == BKV_FP16
                             ? __half22float2(as_half2(words[j]))
                             : make_float2(__uint_as_float(words[j] << 16), __uint_as_float(words[j] & 0xffff0000u));
            out[8 * i + 2 * j] = two.x, out[8 * i + 2 * j + 1] = two.y;
        }
    }
}

// Where the queries of a part are in job.q: elements before row `row` of them, or before the last one there is.
template <class F> __device__ __forceinline__ uint64_t query_row(const bkv_gpu_attend_t &job, uint32_t part, uint32_t row) {
    const uint32_t pair = part / job.blocks, first = part % job.blocks * job.columns;
    return ((uint64_t)pair * job.rows + min(first + row, job.rows - 1)) * F::KEY_DIM;
}

// Says that query_open comes soon.
template <class F> __device__ __forceinline__ void query_fetch(const bkv_gpu_attend_t &job, uint32_t part) {
    const uint32_t lane = threadIdx.x % WARP;
    const uint64_t at = query_row<F>(job, part, lane % 8) + lane / 8 * (F::KEY_DIM / 4);
    asm volatile("prefetch.global.L1 [%0];" ::"l"((const uint8_t *)job.q + at * (job.q_dtype == BKV_FP32 ? 4 : 2)));
}

// The queries of a part. They become float16 with their largest element in [1/4, 1/2): times any scale, that is in range.
template <class F> __device__ __forceinline__ void query_open(const bkv_gpu_attend_t &job, uint32_t part, F &f) {
    const uint32_t lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4;
    const uint64_t first = query_row<F>(job, part, F::TWICE ? g % 4 : g);
    float q[F::ROUNDS * 32], largest = 0;
#pragma unroll
    for (int r = 0; r < F::ROUNDS; r++) {
        bool real = c + 4 * r < F::KEY_DIM / 32;
        query_load(job.q, job.q_dtype, first + (real ? 32 * (c + 4 * r) : 0), q + 32 * r);
#pragma unroll
        for (int i = 0; i < 32; i++) {
            q[32 * r + i] = real ? q[32 * r + i] : 0;
            largest = fmaxf(largest, fabsf(q[32 * r + i]));
        }
    }
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
    int exponent = (int)(__float_as_uint(largest) >> 23) - 127 + 2;
    exponent = largest > 0 ? max(exponent, -100) : 0;
    float shrink = exp2f((float)-exponent);
#pragma unroll
    for (int r = 0; r < F::ROUNDS; r++) {
#pragma unroll
        for (int e = 0; e < PAIRS; e++) {
            int i = kind_lower(BKV_GPU_BITS3, e), j = i + kind_reach(BKV_GPU_BITS3, e);
            f.q[PAIRS * r + e] = as_bits(__floats2half2_rn(q[32 * r + i] * shrink, q[32 * r + j] * shrink));
        }
    }
    float unit = exp2f((float)exponent) * job.scale * LOG2E; // of column g
    f.unit[0] = lane_get(unit, 8 * c);
    f.unit[1] = lane_get(unit, 8 * c + 4);
}

// The query's side of the product with codes, and <q, zero> in the unit of that product.
template <int KIND, class F>
__device__ __forceinline__ void query_scale(const F &f, const uint8_t *shared, const stage_t &stage, uint32_t *b,
                                            float zero[4]) {
    const uint32_t c = threadIdx.x % 4;
    float sums[2][4] = {}; // two, so that a product need not wait for the one before it
#pragma unroll
    for (int r = 0; r < F::ROUNDS; r++) {
        uint32_t group = c + 4 * r < F::KEY_DIM / 32 ? c + 4 * r : 0; // beyond the end q is 0
        const uint32_t *params = (const uint32_t *)(shared + stage.key_params + BKV_GPU_PARAMS_STEP * group);
        uint32_t scales[PAIRS], zeros[PAIRS];
#pragma unroll
        for (int e = 0; e < PAIRS; e++) {
            uint32_t low = params[kind_lower(BKV_GPU_BITS3, e)];
            uint32_t high = params[kind_lower(BKV_GPU_BITS3, e) + kind_reach(BKV_GPU_BITS3, e)];
            scales[e] = halves_low(low, high);
            zeros[e] = halves_high(low, high);
        }
#pragma unroll
        for (int e = 0; e < PAIRS; e += 2) { // rows 0 to 7 are all the same; the others are never looked at
            multiply_add<false>(sums[e / 2 % 2], zeros[e], scales[e], zeros[e + 1], scales[e + 1], f.q[PAIRS * r + e],
                                f.q[PAIRS * r + e + 1]);
        }
#pragma unroll
        for (int e = 0; e < PAIRS; e++) {
            scales[e] = halves_multiply(f.q[PAIRS * r + e], scales[e]);
        }
#pragma unroll
        for (int e = 0; e < PAIRS; e++) {
            const uint32_t shrink = (15u - (uint32_t)kind_shift(KIND, e)) << 10; // 2^-shift as float16
            b[PAIRS * r + e] = pair_reorder<KIND>(scales, e);
            if (kind_shift(KIND, e) != 0) {
                b[PAIRS * r + e] = halves_multiply(b[PAIRS * r + e], shrink | shrink << 16);
            }
        }
    }
    zero[0] = zero[2] = (sums[0][0] + sums[1][0]) * 0x1p-24f;
    zero[1] = zero[3] = (sums[0][1] + sums[1][1]) * 0x1p-24f;
}

// The same where keys are native: the query in their type. bfloat16 takes it in two parts, as it may hold only one.
template <int KIND, class F> __device__ __forceinline__ void query_native(const F &f, uint32_t *b, uint32_t *rest) {
#pragma unroll
    for (int i = 0; i < F::ROUNDS * PAIRS; i++) {
        b[i] = pair_reorder<KIND>(f.q + i / PAIRS * PAIRS, i % PAIRS);
        if constexpr (KIND == BKV_GPU_BF16) {
            float2 q = __half22float2(as_half2(b[i]));
            __nv_bfloat162 near = __floats2bfloat162_rn(q.x, q.y);
            b[i] = as_bits(near);
            rest[i] = as_bits(__floats2bfloat162_rn(q.x - __low2float(near), q.y - __high2float(near)));
        }
    }
}

// Products of 16 tokens with all columns, as multiply_add lays them out.
template <int KIND, class F>
__device__ __forceinline__ void rows_products(const uint8_t *shared, const stage_t &stage, int sub, const uint32_t *b,
                                              const uint32_t *rest, const float zero[4], float s[4]) {
    constexpr bool native = kind_native(KIND), bf16 = KIND == BKV_GPU_BF16;
    constexpr int words = kind_words(KIND);
    const uint32_t g = threadIdx.x % WARP / 4, c = threadIdx.x % 4;
    // Of rows behind the last one, codes are whatever is there; other elements could be NaN.
    uint32_t t = sub * BKV_GPU_TILE_STEP + g, u = t + 8;
    t = native ? min(t, stage.count - 1) : t;
    u = native ? min(u, stage.count - 1) : u;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        s[i] = zero[i];
    }
#pragma unroll
    for (int r = 0; r < F::ROUNDS; r++) {
        uint32_t group = c + 4 * r < F::KEY_DIM / 32 ? c + 4 * r : 0;
        const uint32_t *at = (const uint32_t *)(shared + stage.keys + key_row_at<KIND, F::KEY_DIM>(t)) + group * words;
        const uint32_t *below = (const uint32_t *)(shared + stage.keys + key_row_at<KIND, F::KEY_DIM>(u)) + group * words;
        uint32_t packed[words], x[PAIRS], y[PAIRS];
#pragma unroll
        for (int i = 0; i < words; i++) {
            packed[i] = at[i];
        }
        codes_open<KIND>(packed, x);
#pragma unroll
        for (int i = 0; i < words; i++) {
            packed[i] = below[i];
        }
        codes_open<KIND>(packed, y);
#pragma unroll
        for (int e = 0; e < PAIRS; e += 2) {
            multiply_add<bf16>(s, x[e], y[e], x[e + 1], y[e + 1], b[PAIRS * r + e], b[PAIRS * r + e + 1]);
            if constexpr (bf16) {
                multiply_add<bf16>(s, x[e], y[e], x[e + 1], y[e + 1], rest[PAIRS * r + e], rest[PAIRS * r + e + 1]);
            }
        }
    }
}

// From products to logits of base 2, with weights; -INFINITY behind the last token, if that may be among the 16. largest: of
// this lane's two columns.
template <bool ENDS>
__device__ __forceinline__ void rows_logits(const uint8_t *shared, const stage_t &stage, int sub, float2 range,
                                            const float unit[2], float s[4], float largest[2]) {
    const uint32_t g = threadIdx.x % WARP / 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t t = sub * BKV_GPU_TILE_STEP + g + 8 * i;
        float weight = (float)shared[stage.weights + t] * range.y + range.x; // without weights the range is 0
        weight = !ENDS || t < stage.count ? weight : -INFINITY;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            s[2 * i + j] = s[2 * i + j] * unit[j] + weight;
            largest[j] = fmaxf(largest[j], s[2 * i + j]);
        }
    }
}

// Logits of all tokens of the tile and the largest of each column over all lanes. WHOLE: every step of 16 tokens has some,
// which the compiler may then interleave.
template <int KIND, bool WHOLE, class F>
__device__ __forceinline__ void tile_logits(const F &f, const uint8_t *shared, const stage_t &stage, float s[SUBS][4],
                                            float largest[2]) {
    constexpr bool bf16 = KIND == BKV_GPU_BF16;
    uint32_t b[F::ROUNDS * PAIRS], rest[bf16 ? F::ROUNDS * PAIRS : 1];
    float zero[4] = {0, 0, 0, 0};
    if constexpr (kind_native(KIND)) {
        query_native<KIND>(f, b, rest);
    } else {
        query_scale<KIND>(f, shared, stage, b, zero);
    }
    float2 range = __half22float2(as_half2(stage.weight_range));
    range.x *= LOG2E;
    range.y *= LOG2E;
    const float codes = kind_native(KIND) ? 1.0f : 0x1p24f;
    const float unit[2] = {f.unit[0] * codes, f.unit[1] * codes};
    largest[0] = largest[1] = -INFINITY;
#pragma unroll
    for (int sub = 0; sub < SUBS; sub++) {
        if (!WHOLE && sub * BKV_GPU_TILE_STEP >= stage.count) {
            break;
        }
        rows_products<KIND, F>(shared, stage, sub, b, rest, zero, s[sub]);
        if (WHOLE && sub < SUBS - 1) {
            rows_logits<false>(shared, stage, sub, range, unit, s[sub], largest);
        } else {
            rows_logits<true>(shared, stage, sub, range, unit, s[sub], largest);
        }
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
        largest[0] = fmaxf(largest[0], __shfl_xor_sync(ALL_LANES, largest[0], step));
        largest[1] = fmaxf(largest[1], __shfl_xor_sync(ALL_LANES, largest[1], step));
    }
}

// The exponent that keeps every weight (at most 1) times its scale below 2^8 and the largest scales far from the float16
// that lose bits, whatever the values' magnitude.
template <class F> __device__ __forceinline__ int tile_exponent(const uint8_t *shared, const stage_t &stage) {
    uint32_t largest = 0x3c00; // native values have the scale 1
    if (value_kind(stage.shape) <= BKV_GPU_BITS8) {
        const uint32_t lane = threadIdx.x % WARP, end = stage.count * F::GROUPS;
        half2 both = __floats2half2_rn(0, 0); // scale below, zero above
#pragma unroll
        for (uint32_t i = 0; i < BKV_GPU_TILE_MAX * F::GROUPS; i += WARP) {
            if (i + lane < end) { // elsewhere there is whatever was there before
                both = __hmax2(both, __habs2(as_half2(*(const uint32_t *)(shared + stage.value_params + 4 * lane + 4 * i))));
            }
        }
        largest = __reduce_max_sync(ALL_LANES, as_bits(both) & 0xffff);
    }
    return (int)(largest >> 10) - 22;
}

// Makes room for larger logits or scales in what has been summed up.
template <class F> __device__ __forceinline__ void fast_rescale(F &f, const float largest[2], int exponent) {
    float top[2] = {fmaxf(f.top[0], largest[0]), fmaxf(f.top[1], largest[1])};
    exponent = max(f.exponent, exponent);
    if (!__any_sync(ALL_LANES, top[0] != f.top[0] || top[1] != f.top[1] || exponent != f.exponent)) {
        return;
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float shrink = exp2_fast(f.top[j] - top[j] + (float)(f.exponent - exponent)); // 0 at first, when there is nothing yet
        f.sum[j] *= shrink;
#pragma unroll
        for (int v = 0; v < F::CHUNKS; v++) {
#pragma unroll
            for (int h = 0; h < F::HALVES; h++) {
                f.zero[v][h][j] *= shrink;
#pragma unroll
                for (int e = 0; e < PAIRS; e++) {
                    f.out[v][h][e / 2][e % 2 * 2 + j] *= shrink;
                }
            }
        }
        f.top[j] = top[j];
    }
    f.exponent = exponent;
}

// The weights of 16 tokens as the right-hand side of the product with values; near + rest where that is bfloat16. ENDS: the
// last token may be among them.
template <int KIND, bool ENDS, class F>
__device__ __forceinline__ void rows_weights(F &f, const uint8_t *shared, const stage_t &stage, int sub, const float s[4],
                                             const float base[2], uint32_t near[F::CHUNKS][F::HALVES][2],
                                             uint32_t rest[F::CHUNKS][F::HALVES][2]) {
    const uint32_t g = threadIdx.x % WARP / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float p[2] = {exp2_fast(s[2 * i] - base[0]), exp2_fast(s[2 * i + 1] - base[1])};
        f.sum[0] += p[0];
        f.sum[1] += p[1];
        uint32_t t = sub * BKV_GPU_TILE_STEP + g + 8 * i;
        t = ENDS ? min(t, stage.count - 1) : t;
#pragma unroll
        for (int v = 0; v < F::CHUNKS; v++) {
#pragma unroll
            for (int h = 0; h < F::HALVES; h++) {
                float a = p[0], b = p[1];
                if constexpr (!kind_native(KIND)) {
                    uint32_t group = min(2 * v + (F::TWICE ? c / 2 : h), (uint32_t)F::GROUPS - 1);
                    uint32_t place = stage.value_params + 4 * (t * F::GROUPS + group);
                    float2 params = __half22float2(as_half2(*(const uint32_t *)(shared + place)));
                    f.zero[v][h][0] += p[0] * params.y;
                    f.zero[v][h][1] += p[1] * params.y;
                    a *= params.x;
                    b *= params.x;
                }
                if constexpr (KIND == BKV_GPU_BF16) {
                    __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
                    near[v][h][i] = transpose(as_bits(pair));
                    rest[v][h][i] = transpose(as_bits(__floats2bfloat162_rn(a - __low2float(pair), b - __high2float(pair))));
                } else {
                    near[v][h][i] = transpose(as_bits(__floats2half2_rn(a, b)));
                }
            }
        }
    }
}

// The sixteen channels of this lane of tokens t and u, each pair holding one channel of both.
template <int KIND>
__device__ __forceinline__ void values_open(const uint8_t *shared, uint32_t t_place, uint32_t u_place, uint32_t g,
                                            uint32_t *x) {
    constexpr int words = kind_words(KIND);
    uint32_t both[KIND == BKV_GPU_BITS3 ? 3 : words];
    if constexpr (KIND == BKV_GPU_BITS3) { // a group's 32 channels are in two lanes
        const uint32_t select = g % 2 ? 0x7632u : 0x5410u;
        const uint32_t *t = (const uint32_t *)(shared + t_place) + g / 2 * 3,
                       *u = (const uint32_t *)(shared + u_place) + g / 2 * 3;
#pragma unroll
        for (int i = 0; i < 3; i++) {
            both[i] = __byte_perm(t[i], u[i], select);
        }
    } else {
        const uint32_t *t = (const uint32_t *)(shared + t_place) + g * (words / 2);
        const uint32_t *u = (const uint32_t *)(shared + u_place) + g * (words / 2);
#pragma unroll
        for (int i = 0; i < words / 2; i++) {
            both[2 * i] = halves_low(t[i], u[i]);
            both[2 * i + 1] = halves_high(t[i], u[i]);
        }
    }
    codes_open<KIND>(both, x);
}

// Adds the values of 16 tokens.
template <int KIND, bool ENDS, class F>
__device__ __forceinline__ void rows_values(F &f, const uint8_t *shared, const stage_t &stage, int sub, const float s[4],
                                            const float base[2]) {
    constexpr bool native = kind_native(KIND), bf16 = KIND == BKV_GPU_BF16;
    const uint32_t row = F::VALUE_DIM * kind_words(KIND) / 8, g = threadIdx.x % WARP / 4, c = threadIdx.x % 4;
    uint32_t near[F::CHUNKS][F::HALVES][2], rest[F::CHUNKS][F::HALVES][2], place[4];
    rows_weights<KIND, ENDS>(f, shared, stage, sub, s, base, near, rest);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t t = sub * BKV_GPU_TILE_STEP + 2 * c + i / 2 * 8 + i % 2;
        place[i] = stage.values + (native ? min(t, stage.count - 1) : t) * row;
    }
#pragma unroll
    for (int v = 0; v < F::CHUNKS; v++) {
        const uint32_t chunk = v * 128 * kind_words(KIND) / 8, lane = 128 * v + 16 * g < F::VALUE_DIM ? g : 0;
        uint32_t x[PAIRS], y[PAIRS];
        values_open<KIND>(shared, place[0] + chunk, place[1] + chunk, lane, x);
        values_open<KIND>(shared, place[2] + chunk, place[3] + chunk, lane, y);
#pragma unroll
        for (int e = 0; e < PAIRS; e += 2) {
#pragma unroll
            for (int h = 0; h < F::HALVES; h++) {
                float *d = f.out[v][h][e / 2];
                multiply_add<bf16>(d, x[e], x[e + 1], y[e], y[e + 1], near[v][h][0], near[v][h][1]);
                if constexpr (bf16) {
                    multiply_add<bf16>(d, x[e], x[e + 1], y[e], y[e + 1], rest[v][h][0], rest[v][h][1]);
                }
            }
        }
    }
}

// Adds the values of all tokens of the tile, whose logits are s.
template <int KIND, bool WHOLE, class F>
__device__ __forceinline__ void tile_values(F &f, const uint8_t *shared, const stage_t &stage, const float s[SUBS][4]) {
    const float base[2] = {f.top[0] + (float)f.exponent, f.top[1] + (float)f.exponent};
#pragma unroll
    for (int sub = 0; sub < SUBS; sub++) {
        if (!WHOLE && sub * BKV_GPU_TILE_STEP >= stage.count) {
            break;
        }
        if (WHOLE && sub < SUBS - 1) {
            rows_values<KIND, false>(f, shared, stage, sub, s[sub], base);
        } else {
            rows_values<KIND, true>(f, shared, stage, sub, s[sub], base);
        }
    }
}

#endif
