// codes.cuh - internal: quantising a head's kept rows where they lie, keys and new values in shared memory: what quant.cuh
// does anywhere, with 16-bit minima and maxima and two multiply-adds a code. Codes that fall between two steps may differ
// from the reference's by rounding; scales and zeros are chosen as there.
#ifndef BKV_CODES_CUDA_CUH
#define BKV_CODES_CUDA_CUH

#include "head.cuh"

// 2^23: what is added to it is rounded to a whole number, which the float's last bits then are.
#define WHOLE      8388608.0f
#define WHOLE_BITS 0x4b000000u

// The factor and term that bring a value to its share of the range, 0 to 1.
__device__ __forceinline__ float2 code_pair(const quant_params &chosen, uint32_t bits) {
    float inverse = chosen.inverse / (float)((1u << bits) - 1u);
    return make_float2(inverse, -chosen.zero * inverse);
}

template <uint32_t BITS> __device__ __forceinline__ uint32_t code_bits(float value, float factor, float term) {
    return __float_as_uint(__fmaf_rn(__saturatef(__fmaf_rn(value, factor, term)), (float)((1u << BITS) - 1u), WHOLE));
}

// Packs 32 codes as summary.h says as they come, in the order 0 to 31 and known at compile time.
template <uint32_t BITS> struct code_packer {
    uint32_t words[BITS] = {};

    __device__ __forceinline__ void put(uint32_t i, uint32_t bits) {
        uint32_t code = bits - WHOLE_BITS;
        if (BITS == 3 && i >= 30) {
#pragma unroll
            for (uint32_t w = 0; w < BITS; w++) {
                words[w] |= (code >> w & 1) << (i == 30 ? 15 : 31);
            }
        } else if (BITS == 3) {
            words[i / 10] += code << (i % 10 / 5 * 16 + i % 5 * 3);
        } else {
            words[i * BITS / 32] += code << i * BITS % 32;
        }
    }

    __device__ __forceinline__ void store(uint8_t *at) const {
#pragma unroll
        for (uint32_t w = 0; w < BITS; w++) {
            ((uint32_t *)at)[w] = words[w];
        }
    }
};

// The ranges of `count` kept rows from `first` on, channel by channel: 16 channels a warp, each lane a sixteenth of the rows
// of eight. Leaves factor and term of every channel in state.channel, params in the record. Greatest numbers are the least
// ones of the other sign, so that after one exchange a lane looks for one sort only; from exchange to exchange half as many.
template <class T>
__device__ void key_ranges(const head_t &head, uint32_t first, uint32_t count, uint32_t bits, uint8_t *params) {
    head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t two = threadIdx.x / 32; two < head.key_row / 32; two += HEAD_WARPS) {
        uint32_t least[4], greatest[4];
        for (uint32_t t = min(lane / 2, count - 1), turn = 0; turn == 0 || t < count; t += 16, turn++) {
            uint4 row = head.key(state.kept[first + t], 2 * two + lane % 2);
            uint32_t word[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                least[i] = turn == 0 ? word[i] : element<T>::least(least[i], word[i]);
                greatest[i] = turn == 0 ? word[i] : element<T>::greatest(greatest[i], word[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t negative = greatest[i] ^ 0x80008000u;
            uint32_t other = __shfl_xor_sync(~0u, lane < 16 ? negative : least[i], 16);
            least[i] = element<T>::least(lane < 16 ? least[i] : negative, other);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t other = __shfl_xor_sync(~0u, lane & 8 ? least[i] : least[i + 2], 8);
            least[i] = element<T>::least(lane & 8 ? least[i + 2] : least[i], other);
        }
        uint32_t other = __shfl_xor_sync(~0u, lane & 4 ? least[0] : least[1], 4);
        uint32_t pair = element<T>::least(lane & 4 ? least[1] : least[0], other);
        pair = element<T>::least(pair, __shfl_xor_sync(~0u, pair, 2));
        uint32_t far = __shfl_xor_sync(~0u, pair, 16) ^ 0x80008000u; // for lanes 0 to 15 the greatest
        if (lane < 16) {
            float2 from = element<T>::unpack(pair), to = element<T>::unpack(far);
            uint32_t channel = 16 * two + lane % 2 * 8 + lane / 4 * 2 + lane / 2 % 2;
            quant_params chosen = params_choose(lane & 2 ? from.y : from.x, lane & 2 ? to.y : to.x, bits);
            ((uint32_t *)params)[channel] = chosen.word;
            state.channel[channel] = code_pair(chosen, bits);
        }
    }
    __syncthreads();
}

// Codes of a key group: a warp takes 16 rows and 2 runs of 32 channels at a time, a thread one row of one run.
template <class T, uint32_t BITS>
__device__ void key_codes(const head_t &head, uint32_t first, uint32_t count, uint32_t row_bytes, uint8_t *codes) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, runs = head.key_row / 64, tiles = (count + 15) / 16;
    for (uint32_t task = threadIdx.x / 32; task < tiles * (runs / 2); task += HEAD_WARPS) {
        uint32_t t = task % tiles * 16 + lane % 16, run = task / tiles * 2 + lane / 16;
        if (t >= count) {
            continue;
        }
        uint32_t token = state.kept[first + t];
        code_packer<BITS> packer;
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            float row[8];
            unpack_eight<T>(head.key(token, 4 * run + c), row);
#pragma unroll
            for (uint32_t i = 0; i < 8; i += 2) {
                float4 two = *(const float4 *)&state.channel[32 * run + 8 * c + i];
                packer.put(8 * c + i, code_bits<BITS>(row[i], two.x, two.y));
                packer.put(8 * c + i + 1, code_bits<BITS>(row[i + 1], two.z, two.w));
            }
        }
        packer.store(codes + t * row_bytes + run * 4 * BITS);
    }
}

// Values of all kept rows, a walked one's from the refit: a warp takes 16 rows of one group of 64 channels, two lanes a row,
// warps in the opposite order to keys. What the walk never saw is looked at here.
template <class T, uint32_t BITS>
__device__ void value_codes(const head_t &head, finder_t finder, uint32_t count, uint32_t row_bytes, uint8_t *params,
                            uint8_t *codes) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, groups = head.value_row / 128, tiles = (count + 15) / 16;
    for (uint32_t task = HEAD_WARPS - 1 - threadIdx.x / 32; task < tiles * groups; task += HEAD_WARPS) {
        uint32_t t = task % tiles * 16 + lane % 16, group = task / tiles, run = 2 * group + lane / 16;
        uint32_t token = state.kept[min(t, count - 1)], word[16];
        bool walked = state.fate[token] == FATE_WALKED;
        const uint4 *from = (const uint4 *)(walked ? head.fit(state.place[token]) : head.value(token)) + 4 * run;
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            *(uint4 *)(word + 4 * c) = from[c];
        }
        uint32_t least = word[0], greatest = word[0];
        float squares = 0;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float2 pair = element<T>::unpack(word[i]);
            squares += pair.x * pair.x + pair.y * pair.y;
            least = element<T>::least(least, word[i]);
            greatest = element<T>::greatest(greatest, word[i]);
        }
        least = element<T>::least(least, __shfl_xor_sync(~0u, least, 16));
        greatest = element<T>::greatest(greatest, __shfl_xor_sync(~0u, greatest, 16));
        if (!(squares < SQUARES_SAFE) && !walked) {
            row_find<T>(head.value(token), head.value_row, finder, token);
        }
        if (t >= count) {
            __syncwarp();
            continue;
        }
        float2 low = element<T>::unpack(least), high = element<T>::unpack(greatest);
        quant_params chosen = params_choose(fminf(low.x, low.y), fmaxf(high.x, high.y), BITS);
        float2 both = code_pair(chosen, BITS);
        if (lane < 16) {
            ((uint32_t *)params)[t * groups + group] = chosen.word;
        }
        code_packer<BITS> packer;
#pragma unroll
        for (uint32_t i = 0; i < 16; i++) {
            float2 pair = element<T>::unpack(word[i]);
            packer.put(2 * i, code_bits<BITS>(pair.x, both.x, both.y));
            packer.put(2 * i + 1, code_bits<BITS>(pair.y, both.x, both.y));
        }
        packer.store(codes + t * row_bytes + run * 4 * BITS);
        __syncwarp();
    }
}

template <class T>
__device__ void key_codes_any(const head_t &head, uint32_t bits, uint32_t first, uint32_t count, uint32_t row_bytes,
                              uint8_t *codes) {
    switch (bits) {
    case 2:
        return key_codes<T, 2>(head, first, count, row_bytes, codes);
    case 3:
        return key_codes<T, 3>(head, first, count, row_bytes, codes);
    case 4:
        return key_codes<T, 4>(head, first, count, row_bytes, codes);
    default:
        return key_codes<T, 8>(head, first, count, row_bytes, codes);
    }
}

template <class T>
__device__ void value_codes_any(const head_t &head, finder_t finder, uint32_t bits, uint32_t count, uint32_t row_bytes,
                                uint8_t *params, uint8_t *codes) {
    switch (bits) {
    case 2:
        return value_codes<T, 2>(head, finder, count, row_bytes, params, codes);
    case 3:
        return value_codes<T, 3>(head, finder, count, row_bytes, params, codes);
    case 4:
        return value_codes<T, 4>(head, finder, count, row_bytes, params, codes);
    default:
        return value_codes<T, 8>(head, finder, count, row_bytes, params, codes);
    }
}

#endif
