// gpu.h - internal: what only nvcc can make, as plain C. *.cu implement it; where there is no nvcc, absent.c does,
// by saying so. Everything above it (compress.c, backend.c) is C and is built, checked and tested everywhere.
//
// Functions return 0 or a cudaError_t as int; bkv_gpu_error puts it in words. Streams are cudaStream_t.
#ifndef BKV_GPU_H
#define BKV_GPU_H

#if defined(__cplusplus) && !defined(_Static_assert)
#define _Static_assert static_assert // the same in C++, as far as the headers use it
#endif
#include "summary.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct bkv_gpu_traits {
    uint32_t processors;    // streaming multiprocessors
    uint32_t shared_memory; // bytes that one thread block may have
    uint32_t capability;    // 10 * major + minor
} bkv_gpu_traits_t;

// Devices that a driver offers; 0 also where there is no driver.
uint32_t bkv_gpu_count(void);
// Reads a device's traits and lets our kernels have its shared memory. Leaves the calling thread's device as it was.
int bkv_gpu_open(int device, bkv_gpu_traits_t *traits);
const char *bkv_gpu_error(int error);

// Makes `device` the calling thread's; *before gets the one that was, for the call that puts it back.
int bkv_gpu_enter(int device, int *before);
void bkv_gpu_leave(int before);

// Stream-ordered device memory, copies in any direction, and waiting. The stream of the calling thread is bkv_gpu_own_stream.
void *bkv_gpu_own_stream(void);
int bkv_gpu_alloc(void **memory, size_t bytes, void *stream);
int bkv_gpu_free(void *memory, void *stream);
int bkv_gpu_copy(void *to, const void *from, size_t bytes, void *stream);
int bkv_gpu_wait(void *stream);

// One block of a batch: where its K and V lie (strides in bytes) and what names its record.
typedef struct bkv_gpu_block {
    const uint8_t *keys, *values;
    int64_t key_layer, key_head, key_token;
    int64_t value_layer, value_head, value_token;
    bkv_key_t key;
    bkv_spec_id_t spec_id;
    uint64_t tenant, position;
} bkv_gpu_block_t;

// One call of bkv_cuda_compress: blocks of one shape, whose records differ in their ids and planes alone.
typedef struct bkv_gpu_job {
    bkv_gpu_block_t *blocks; // [count], in the workspace
    uint8_t *preamble;       // header and directory of every record, in the workspace
    uint32_t preamble_bytes;
    uint8_t *records; // [count] records, record_stride bytes apart
    uint64_t record_stride;
    unsigned long long *status; // [count]: BKV_GPU_CLEAN, or what was found first (see bkv_gpu_finding)
    uint8_t *scratch;           // of the general kernel: scratch_stride bytes for each of scratch_count thread blocks
    uint64_t scratch_stride;
    uint64_t seed;
    uint32_t count, scratch_count;
    bkv_shape_t shape;
    uint32_t sink;                      // sequence positions below this are kept
    uint32_t walked;                    // the most tokens that any section keeps from the walk
    uint32_t shared_memory, processors; // of the device
    bool weights;                       // records have BKV_RECORD_WEIGHTS, and sections may drop tokens
} bkv_gpu_job_t;

// A value that no record may hold: the order of these numbers is the order in which a block is scanned.
#define BKV_GPU_CLEAN UINT64_MAX
static inline
#ifdef __CUDACC__
    __device__ __host__
#endif
        uint64_t
        bkv_gpu_finding(uint32_t layer, bool value, uint32_t heads, uint32_t head, uint32_t token, bool finite) {
    return ((((uint64_t)layer * 2 + value) * heads + head) << 24 | token) << 1 | finite;
}

// What one launch of these two takes travels as kernel arguments, which are copied at the call: no host memory need live on.
#define BKV_GPU_SETUP_BLOCKS 64
#define BKV_GPU_UPLOAD_BYTES 8192

// Bytes [first, first + count) of the job's preamble.
int bkv_gpu_upload(const bkv_gpu_job_t *job, const uint8_t *bytes, uint32_t first, uint32_t count, void *stream);
// Writes blocks [first, first + count) of the job to its workspace, and their records' preambles and status.
int bkv_gpu_setup(const bkv_gpu_job_t *job, const bkv_gpu_block_t *blocks, uint32_t first, uint32_t count, void *stream);

// Each of these fills every plane of every record of the job.
int bkv_gpu_raw(const bkv_gpu_job_t *job, void *stream);
int bkv_gpu_dense(const bkv_gpu_job_t *job, void *stream); // all tokens, quantised
int bkv_gpu_balance(const bkv_gpu_job_t *job, void *stream);
int bkv_gpu_general(const bkv_gpu_job_t *job, void *stream);

// Whether bkv_gpu_balance takes this job: 16-bit elements, dims of whole 64 channels and a head that fits the
// shared memory. bkv_gpu_general takes any, slower, and needs scratch for each of its thread blocks.
int bkv_gpu_balance_allow(uint32_t shared_memory); // once for each device: how much there is
bool bkv_gpu_balance_fits(const bkv_gpu_job_t *job);
uint64_t bkv_gpu_general_scratch(const bkv_gpu_job_t *job);

#ifdef __cplusplus
}
#endif
#endif
