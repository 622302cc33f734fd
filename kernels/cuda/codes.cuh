// codes.cuh - internal: quantising a head's kept rows where they lie, in shared memory: what quant.cuh does anywhere,
// with 16-bit minima and maxima and two multiply-adds a code. Codes that fall between two steps may differ from the
// reference's by rounding; scales and zeros are chosen as there.
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

// The ranges of `count` kept rows from `first` on, channel by channel: a slice of the rows for each thread, then eight lanes
// over the slices of a pair of channels. Leaves factor and term of every channel in state.channel, params in the record.
template <class T>
__device__ void key_ranges(const head_t &head, uint32_t first, uint32_t count, uint32_t bits, uint8_t *params) {
    head_state &state = head.state;
    uint32_t chunks = head.key_row / 16, dim = chunks * 8, slices = HEAD_THREADS / chunks, lane = threadIdx.x % 32;
    uint32_t chunk = threadIdx.x % chunks, slice = threadIdx.x / chunks, stride = range_stride(dim) / 2;
    uint32_t *low = (uint32_t *)head.work, *high = low + slices * stride; // [slices][dim / 2] pairs
    if (slice < slices && slice < count) {
        uint4 row = head.chunk(false, state.kept[first + slice], chunk);
        uint32_t least[4] = {row.x, row.y, row.z, row.w}, greatest[4] = {row.x, row.y, row.z, row.w};
        for (uint32_t t = slice + slices; t < count; t += slices) {
            row = head.chunk(false, state.kept[first + t], chunk);
            uint32_t word[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                least[i] = element<T>::least(least[i], word[i]);
                greatest[i] = element<T>::greatest(greatest[i], word[i]);
            }
        }
        *(uint4 *)(low + slice * stride + 4 * chunk) = make_uint4(least[0], least[1], least[2], least[3]);
        *(uint4 *)(high + slice * stride + 4 * chunk) = make_uint4(greatest[0], greatest[1], greatest[2], greatest[3]);
    }
    __syncthreads();
    slices = min(slices, count);
    for (uint32_t start = threadIdx.x / 32 * 4; start < dim / 2; start += 4 * HEAD_WARPS) {
        uint32_t pair = start + lane % 4, eighth = min(lane / 4, slices - 1);
        uint32_t least = low[eighth * stride + pair], greatest = high[eighth * stride + pair];
        for (uint32_t s = eighth + 8; s < slices; s += 8) {
            least = element<T>::least(least, low[s * stride + pair]);
            greatest = element<T>::greatest(greatest, high[s * stride + pair]);
        }
#pragma unroll
        for (int other = 4; other < 32; other *= 2) {
            least = element<T>::least(least, __shfl_xor_sync(~0u, least, other));
            greatest = element<T>::greatest(greatest, __shfl_xor_sync(~0u, greatest, other));
        }
        if (lane < 8) {
            float2 from = element<T>::unpack(least), to = element<T>::unpack(greatest);
            uint32_t channel = 2 * pair + lane / 4;
            quant_params chosen = params_choose(lane < 4 ? from.x : from.y, lane < 4 ? to.x : to.y, bits);
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
            unpack_eight<T>(head.chunk(false, token, 4 * run + c), row);
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

// Values of all kept rows: a warp takes 16 rows of one group of 64 channels, two lanes a row, warps in the opposite order to
// keys. What the walk never saw is looked at here.
template <class T, uint32_t BITS>
__device__ void value_codes(const head_t &head, finder_t finder, uint32_t count, uint32_t row_bytes, uint8_t *params,
                            uint8_t *codes) {
    const head_state &state = head.state;
    uint32_t lane = threadIdx.x % 32, groups = head.value_row / 128, tiles = (count + 15) / 16;
    for (uint32_t task = HEAD_WARPS - 1 - threadIdx.x / 32; task < tiles * groups; task += HEAD_WARPS) {
        uint32_t t = task % tiles * 16 + lane % 16, group = task / tiles, run = 2 * group + lane / 16;
        uint32_t token = state.kept[min(t, count - 1)], word[16];
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            *(uint4 *)(word + 4 * c) = head.chunk(true, token, 4 * run + c);
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
        if (!(squares < SQUARES_SAFE) && state.fate[token] == FATE_PROTECTED) {
            row_find<T>(head.values, head.value_row, finder, token);
        }
        if (t >= count) {
            __syncwarp();
            continue;
        }
        float2 from = element<T>::unpack(least), to = element<T>::unpack(greatest);
        quant_params chosen = params_choose(fminf(from.x, from.y), fmaxf(to.x, to.y), BITS);
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
