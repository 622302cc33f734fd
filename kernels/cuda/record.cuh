// record.cuh - internal: record.h for kernels: where a section's parts lie, which rows of a block belong to it, and the
// search for values that no record may hold.
#ifndef BKV_RECORD_CUDA_CUH
#define BKV_RECORD_CUDA_CUH

#include "quant.cuh"

__device__ __forceinline__ uint32_t element_bytes(const bkv_gpu_job_t &job) {
    return job.shape.dtype == BKV_FP32 ? 4 : 2;
}

// bkv_plane_layout of one section, in bytes from the starts of its planes.
struct section_layout {
    uint8_t *key_plane, *value_plane;
    uint32_t tokens, key_bits, value_bits, index_kind;
    uint64_t weights, key_params, key_codes, key_bytes, value_codes, value_bytes;
    uint32_t key_groups, key_group_tokens, value_groups, key_row, value_row;
};

__device__ inline section_layout section_lay(const bkv_gpu_job_t &job, const bkv_section_t &section) {
    section_layout at = {};
    uint32_t m = at.tokens = section.tokens;
    bool native = section.key_bits == BKV_BITS_NATIVE;
    at.key_bits = section.key_bits;
    at.value_bits = section.value_bits;
    at.index_kind = section.index_kind;
    at.weights = section.index_kind == BKV_INDEX_BITMAP ? (job.shape.tokens + 31ull) / 32 * 4
                 : section.index_kind == BKV_INDEX_LIST ? 4ull * m
                                                        : 0;
    at.key_params = at.weights + (job.weights ? (4 + (uint64_t)m + 3) / 4 * 4 : 0);
    at.key_groups = native ? 0 : max(1u, (m + BKV_KEY_GROUP_TOKENS / 2) / BKV_KEY_GROUP_TOKENS);
    at.key_group_tokens = native ? 0 : (m + at.key_groups - 1) / at.key_groups;
    at.key_row = native ? job.shape.key_dim * element_bytes(job) : job.shape.key_dim * section.key_bits / 8;
    at.key_codes = at.key_params + 4ull * at.key_groups * job.shape.key_dim;
    at.key_bytes = (at.key_codes + (uint64_t)m * at.key_row + BKV_RECORD_ALIGN - 1) / BKV_RECORD_ALIGN * BKV_RECORD_ALIGN;
    at.value_groups = native ? 0 : (job.shape.value_dim + BKV_VALUE_GROUP_DIMS - 1) / BKV_VALUE_GROUP_DIMS;
    at.value_row = native ? job.shape.value_dim * element_bytes(job) : job.shape.value_dim * section.value_bits / 8;
    at.value_codes = 4ull * m * at.value_groups;
    at.value_bytes = (at.value_codes + (uint64_t)m * at.value_row + BKV_RECORD_ALIGN - 1) / BKV_RECORD_ALIGN * BKV_RECORD_ALIGN;
    return at;
}

// The layout of section `section` of block `block`, whose record bkv_gpu_setup has begun.
__device__ inline section_layout section_find(const bkv_gpu_job_t &job, uint32_t block, uint32_t section) {
    uint8_t *record = job.records + block * job.record_stride;
    bkv_section_t entry = ((const bkv_section_t *)(record + sizeof(bkv_record_header_t)))[section];
    section_layout at = section_lay(job, entry);
    at.key_plane = record + (uint64_t)entry.key_offset * BKV_RECORD_ALIGN;
    at.value_plane = record + (uint64_t)entry.value_offset * BKV_RECORD_ALIGN;
    return at;
}

// Key group `group`'s rows: 0 for the empty ones at the end of a large section.
__device__ __forceinline__ uint32_t group_count(const section_layout &at, uint32_t group) {
    uint64_t first = (uint64_t)group * at.key_group_tokens;
    return first >= at.tokens ? 0 : min((uint32_t)(at.tokens - first), at.key_group_tokens);
}

// Zeroes what pads both planes and the weights, so that old memory never shows.
__device__ inline void section_pad(const bkv_gpu_job_t &job, const section_layout &at) {
    uint64_t key_end = at.key_codes + (uint64_t)at.tokens * at.key_row;
    uint64_t value_end = at.value_codes + (uint64_t)at.tokens * at.value_row;
    uint32_t i = threadIdx.x;
    if (i < at.key_bytes - key_end) {
        at.key_plane[key_end + i] = 0;
    }
    if (i < at.value_bytes - value_end) {
        at.value_plane[value_end + i] = 0;
    }
    if (job.weights && at.weights + 4 + at.tokens + i < at.key_params) {
        at.key_plane[at.weights + 4 + at.tokens + i] = 0;
    }
}

// One head's keys or values in the caller's memory.
struct rows_t {
    const uint8_t *base;
    int64_t stride;
};

__device__ __forceinline__ rows_t head_rows(const bkv_gpu_block_t &block, bool values, uint32_t layer, uint32_t head) {
    if (values) {
        return {block.values + layer * block.value_layer + head * block.value_head, block.value_token};
    }
    return {block.keys + layer * block.key_layer + head * block.key_head, block.key_token};
}

// What a section does with its tokens.
struct section_plan {
    uint32_t first;   // tokens that are sinks, and kept
    uint32_t protect; // tokens kept for being those or outliers
    uint32_t walked;  // tokens kept from the walk
};

__device__ __forceinline__ section_plan section_choose(const bkv_gpu_job_t &job, const bkv_gpu_block_t &block, uint32_t m) {
    uint32_t n = job.shape.tokens;
    if (m == n) {
        return {n, n, 0};
    }
    uint64_t sink = job.sink > block.position ? job.sink - block.position : 0;
    uint32_t protect = m >= n / 5 ? m * 5 / 8 : m * 3 / 4; // bkv_protect_count
    return {(uint32_t)min((uint64_t)(m / 2), sink), protect, m - protect};
}

// Whose values are being looked at.
struct finder_t {
    unsigned long long *status;
    uint32_t layer, heads, head;
    bool value;
};

__device__ __forceinline__ void find_report(const finder_t &finder, uint32_t token, bool finite) {
    atomicMin(finder.status,
              (unsigned long long)bkv_gpu_finding(finder.layer, finder.value, finder.heads, finder.head, token, finite));
}

// Reports NaN, infinity and, unless `raw`, what is beyond the float16 range.
__device__ __forceinline__ void find_eight(const finder_t &finder, uint32_t token, const float row[8], bool raw) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        most = max(most, __float_as_uint(row[i]) & 0x7fffffffu);
    }
    if (most >= (raw ? 0x7f800000u : 0x477fe001u)) { // infinity; the first float above 65504
        find_report(finder, token, most < 0x7f800000u);
    }
}

#endif
