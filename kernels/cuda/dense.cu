// dense.cu - the kernels that keep every token: raw copies, dense8, dense4 and a balance rate with room for all. Also
// what comes before any of them: headers, directories and block descriptions.
#include "record.cuh"

#include <cuda_runtime.h>

#define THREADS 256

struct upload_bytes {
    uint8_t byte[BKV_GPU_UPLOAD_BYTES];
};

static __global__ void upload_kernel(const __grid_constant__ upload_bytes bytes, uint8_t *to, uint32_t count) {
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        to[i] = bytes.byte[i];
    }
}

struct setup_blocks {
    bkv_gpu_block_t block[BKV_GPU_SETUP_BLOCKS];
};

// One thread block begins one record: the preamble that all share, and what is its own in the header.
static __global__ void setup_kernel(const __grid_constant__ bkv_gpu_job_t job, const __grid_constant__ setup_blocks blocks,
                                    uint32_t first) {
    const bkv_gpu_block_t &block = blocks.block[blockIdx.x];
    uint32_t number = first + blockIdx.x;
    uint8_t *record = job.records + number * job.record_stride;
    for (uint32_t i = threadIdx.x; i < job.preamble_bytes / 16; i += blockDim.x) {
        ((uint4 *)record)[i] = ((const uint4 *)job.preamble)[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        bkv_record_header_t *header = (bkv_record_header_t *)record;
        memcpy(header->key, block.key.bytes, sizeof(header->key));
        memcpy(header->spec_id, block.spec_id.bytes, sizeof(header->spec_id));
        header->tenant = block.tenant;
        header->position = block.position;
        job.blocks[number] = block;
        job.status[number] = BKV_GPU_CLEAN;
    }
}

// Both tensors of a section, 8 elements a thread at a time.
static __global__ void __launch_bounds__(THREADS) raw_kernel(const __grid_constant__ bkv_gpu_job_t job) {
    uint32_t sections = job.shape.layers * job.shape.heads, bytes = 8 * element_bytes(job);
    for (uint64_t at = blockIdx.x; at < (uint64_t)job.count * sections; at += gridDim.x) {
        uint32_t block = (uint32_t)(at / sections), section = (uint32_t)(at % sections);
        uint32_t layer = section / job.shape.heads, head = section % job.shape.heads;
        section_layout layout = section_find(job, block, section);
        for (int tensor = 0; tensor < 2; tensor++) {
            rows_t rows = head_rows(job.blocks[block], tensor, layer, head);
            finder_t finder = {&job.status[block], layer, job.shape.heads, head, tensor == 1};
            uint32_t chunks = (tensor ? job.shape.value_dim : job.shape.key_dim) / 8;
            uint8_t *plane = tensor ? layout.value_plane : layout.key_plane;
            for (uint64_t i = threadIdx.x; i < (uint64_t)job.shape.tokens * chunks; i += blockDim.x) {
                uint32_t token = (uint32_t)(i / chunks), chunk = (uint32_t)(i % chunks);
                const uint8_t *from = rows.base + token * rows.stride + chunk * bytes;
                float row[8];
                load_eight(from, job.shape.dtype, row);
                find_eight(finder, token, row, true);
                for (uint32_t b = 0; b < bytes; b += 16) {
                    *(uint4 *)(plane + i * bytes + b) = *(const uint4 *)(from + b);
                }
            }
        }
        section_pad(job, layout);
    }
}

// Rows of one head from `first` on, as quant.cuh fetches them.
struct block_fetch {
    const bkv_gpu_job_t &job;
    rows_t rows;
    finder_t finder;
    uint32_t first;

    __device__ __forceinline__ void operator()(uint32_t row, uint32_t chunk, float out[8]) const {
        load_eight(rows.base + (int64_t)(first + row) * rows.stride + chunk * 8 * element_bytes(job), job.shape.dtype, out);
        find_eight(finder, first + row, out, false);
    }
};

// One key group of one section: its keys, and the same tokens' values.
static __global__ void __launch_bounds__(THREADS) dense_kernel(const __grid_constant__ bkv_gpu_job_t job) {
    __shared__ uint8_t ranges[QUANT_KEYS_SHARED(BKV_MAX_DIM)];
    uint32_t sections = job.shape.layers * job.shape.heads;
    uint32_t groups = max(1u, (job.shape.tokens + BKV_KEY_GROUP_TOKENS / 2) / BKV_KEY_GROUP_TOKENS);
    uint64_t total = (uint64_t)job.count * sections * groups;
    for (uint64_t at = blockIdx.x; at < total; at += gridDim.x) {
        uint32_t group = (uint32_t)(at % groups), section = (uint32_t)(at / groups % sections);
        uint32_t block = (uint32_t)(at / groups / sections);
        uint32_t layer = section / job.shape.heads, head = section % job.shape.heads;
        section_layout layout = section_find(job, block, section);
        uint32_t first = group * layout.key_group_tokens, count = group_count(layout, group);
        finder_t finder = {&job.status[block], layer, job.shape.heads, head, false};
        block_fetch keys = {job, head_rows(job.blocks[block], false, layer, head), finder, first};
        quant_keys(keys, count, job.shape.key_dim, layout.key_bits,
                   layout.key_plane + layout.key_params + 4ull * group * job.shape.key_dim,
                   layout.key_plane + layout.key_codes + (uint64_t)first * layout.key_row, ranges);
        finder.value = true;
        block_fetch values = {job, head_rows(job.blocks[block], true, layer, head), finder, first};
        quant_values(values, count, job.shape.value_dim, layout.value_bits,
                     layout.value_plane + 4ull * first * layout.value_groups,
                     layout.value_plane + layout.value_codes + (uint64_t)first * layout.value_row);
        if (group == 0) {
            section_pad(job, layout);
        }
    }
}

extern "C" int bkv_gpu_upload(const bkv_gpu_job_t *job, const uint8_t *bytes, uint32_t first, uint32_t count, void *stream) {
    upload_bytes all;
    memcpy(all.byte, bytes, count);
    upload_kernel<<<1, THREADS, 0, (cudaStream_t)stream>>>(all, job->preamble + first, count);
    return (int)cudaGetLastError();
}

extern "C" int bkv_gpu_setup(const bkv_gpu_job_t *job, const bkv_gpu_block_t *blocks, uint32_t first, uint32_t count,
                             void *stream) {
    setup_blocks all = {};
    memcpy(all.block, blocks, count * sizeof(*blocks));
    setup_kernel<<<count, THREADS, 0, (cudaStream_t)stream>>>(*job, all, first);
    return (int)cudaGetLastError();
}

static uint32_t grid_for(uint64_t total) {
    return total < 0x7fffffffu ? (uint32_t)total : 0x7fffffffu;
}

extern "C" int bkv_gpu_raw(const bkv_gpu_job_t *job, void *stream) {
    uint64_t total = (uint64_t)job->count * job->shape.layers * job->shape.heads;
    raw_kernel<<<grid_for(total), THREADS, 0, (cudaStream_t)stream>>>(*job);
    return (int)cudaGetLastError();
}

extern "C" int bkv_gpu_dense(const bkv_gpu_job_t *job, void *stream) {
    uint64_t groups = (job->shape.tokens + BKV_KEY_GROUP_TOKENS / 2) / BKV_KEY_GROUP_TOKENS;
    uint64_t total = (uint64_t)job->count * job->shape.layers * job->shape.heads * (groups > 0 ? groups : 1);
    dense_kernel<<<grid_for(total), THREADS, 0, (cudaStream_t)stream>>>(*job);
    return (int)cudaGetLastError();
}
