// gather.cu - blocks in pages, or with layers anywhere, to payloads: see bkv_gpu_gather_t. One pass over the block at the speed
// of the device's memory, for what the strides of a bkv_block_t cannot say.
#include "share.h"

#include <cuda_runtime.h>

#define UNIT    16 // bytes that a thread moves at a time
#define THREADS 256
#define TURNS   4 // rows that a thread has under way at once

static_assert(BKV_MAX_DIM * 4 / UNIT <= THREADS, "a row is never longer than a thread block");

// Thread blocks: x over the rows of a tensor, y over the tensors, K and V of each layer.
static __global__ void __launch_bounds__(THREADS) gather_kernel(bkv_gpu_gather_t gather, uint32_t element) {
    uint32_t layer = blockIdx.y / 2, value = blockIdx.y % 2, rows = gather.shape.heads * gather.shape.tokens;
    uint32_t key_bytes = gather.shape.key_dim * element, value_bytes = gather.shape.value_dim * element;
    uint32_t row_bytes = value ? value_bytes : key_bytes, units = row_bytes / UNIT, together = THREADS / units;
    uint32_t unit = threadIdx.x % units, mine = threadIdx.x / units;
    if (mine >= together) {
        return;
    }
    const uint8_t *from = (const uint8_t *)(uintptr_t)gather.bases[blockIdx.y] + unit * UNIT;
    uint8_t *to = (uint8_t *)gather.payload + (uint64_t)layer * rows * (key_bytes + value_bytes) +
                  (value ? (uint64_t)rows * key_bytes : 0) + unit * UNIT;
    uint64_t token_stride = value ? gather.value_token : gather.key_token;
    uint64_t head_stride = value ? gather.value_head : gather.key_head;
    uint64_t first = (uint64_t)blockIdx.x * together * TURNS + mine;
    uint4 data[TURNS];
#pragma unroll
    for (uint32_t i = 0; i < TURNS; i++) {
        uint64_t row = first + i * together;
        if (row < rows) {
            uint32_t head = (uint32_t)row / gather.shape.tokens, token = (uint32_t)row % gather.shape.tokens;
            uint32_t page = token / gather.page_tokens, in_page = token % gather.page_tokens;
            data[i] = *(const uint4 *)(from + gather.pages[page] + head * head_stride + in_page * token_stride);
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < TURNS; i++) {
        uint64_t row = first + i * together;
        if (row < rows) {
            *(uint4 *)(to + row * row_bytes) = data[i];
        }
    }
}

extern "C" int bkv_gpu_gather(const bkv_gpu_gather_t *gather, void *stream) {
    const bkv_shape_t *shape = &gather->shape;
    uint32_t element = shape->dtype == BKV_FP32 ? 4 : 2;
    uint32_t most = shape->key_dim > shape->value_dim ? shape->key_dim : shape->value_dim;
    uint64_t rows = (uint64_t)shape->heads * shape->tokens;
    if (rows > INT32_MAX || gather->page_tokens == 0) {
        return (int)cudaErrorInvalidValue;
    }
    uint64_t at_once = (uint64_t)(THREADS / (most * element / UNIT)) * TURNS;
    dim3 grid((uint32_t)((rows + at_once - 1) / at_once), 2 * shape->layers);
    gather_kernel<<<grid, THREADS, 0, (cudaStream_t)stream>>>(*gather, element);
    return (int)cudaGetLastError();
}
