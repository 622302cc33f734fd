// bkv_cuda.h - compressing KV that already lies on an NVIDIA GPU, and attending over the records there.
//
// Everything is asynchronous on the caller's stream: no allocation, no synchronisation, no global state; workspace comes from
// the caller. No CUDA header is needed: a stream is a cudaStream_t passed as void *, NULL being the default stream. The
// library carries the CUDA runtime within itself and finds the driver when it is first asked; without one
// bkv_cuda_count is 0 and the rest says BKV_UNIMPLEMENTED.
#ifndef BKV_CUDA_H
#define BKV_CUDA_H

#include "codec.h"

#ifdef __cplusplus
extern "C" {
#endif

// One device, opened. Immutable: any number of threads may use it at once.
typedef struct bkv_cuda bkv_cuda_t;

// How many devices there are.
BKV_API uint32_t bkv_cuda_count(void);

// UNIMPLEMENTED without such a device or without CUDA in this build or in this machine. Close what was opened; work that
// was enqueued goes on.
BKV_API bkv_status_t bkv_cuda_open(uint32_t device, bkv_cuda_t **cuda, bkv_error_t *err);
BKV_API void bkv_cuda_close(bkv_cuda_t *cuda);

// Streaming multiprocessors of the device.
BKV_API uint32_t bkv_cuda_processors(const bkv_cuda_t *cuda);

// Blocks of one shape to records, as bkv_compress does it (same codecs, same stored format, same meaning of params), all by the
// GPU. The result of a block depends on that block, its id and the params alone, not on the rest of the batch; raw, dense8
// and dense4 are byte for byte what every other backend writes.
//
//   blocks    [count] in host memory, of one shape; their keys and values are addresses on the device, 16-byte aligned with
//             strides that are multiples of 16 bytes: any order of [layer][head][block][token][dim], K and V in one tensor or
//             in two, V a view of K's first dims
//   ids       [count] in host memory
//   records   device memory, or host memory that the device can write: record i at records + i * record_stride, 16-byte
//             aligned; record_stride is a multiple of 16 and at least bkv_codec_bound
//   status    [count] device memory: what bkv_cuda_compress_check reads once the stream has come this far
//   workspace device memory, 256-byte aligned, bkv_cuda_compress_workspace bytes
//   stream    cudaStream_t
// The host arrays are read during the call; device memory is the caller's until the stream has done the work.
typedef struct bkv_cuda_compress_args {
    const bkv_block_t *blocks;
    const bkv_record_id_t *ids;
    uint32_t count;
    bkv_codec_params_t params;
    void *records;
    size_t record_stride;
    uint64_t *status;
    void *workspace;
    size_t workspace_bytes;
    void *stream;
} bkv_cuda_compress_args_t;

// Enqueues the work. Every record gets *length bytes (NULL: not wanted); their checksums are 0 (seal them on the host).
// INVALID_ARGUMENT names the field. Values are looked at on the device: see bkv_cuda_compress_check.
BKV_API bkv_status_t bkv_cuda_compress(const bkv_cuda_t *cuda, const bkv_cuda_compress_args_t *args, size_t *length,
                                       bkv_error_t *err);

// Bytes of workspace for `count` blocks of a checked shape with checked params.
BKV_API size_t bkv_cuda_compress_workspace(const bkv_cuda_t *cuda, const bkv_shape_t *shape, const bkv_codec_params_t *params,
                                           uint32_t count);

// What one block's status says, copied to the host after its stream was synchronised: BKV_OK, or INVALID_ARGUMENT naming the
// tensor, layer, head and token of the first value that no record may hold (NaN, infinity, beyond 65504 with any codec but
// raw). Such a block's record must not be used.
BKV_API bkv_status_t bkv_cuda_compress_check(const bkv_shape_t *shape, uint64_t status, bkv_error_t *err);

// ---- attention (attend_host.c) ----

// Queries of one layer of a batch of sequences, each against its own records. All memory is the device's.
//   records  [first[batch]] addresses of records, aligned to 16 bytes. Each must have passed bkv_record_check before it was
//            copied there: the kernels trust what lies in it. Their tokens count as one softmax, in any order
//   first    [batch + 1] ascending: records first[b], ..., first[b + 1] - 1 are those of sequence b; there may be none
//   q        [batch][query_heads][queries][key_dim], aligned to 16 bytes; taken at 11 bits of mantissa
//   out      [batch][query_heads][queries][value_dim]: weighted mean of the values, weights included; 0 over no records
//   lse      [batch][query_heads][queries]: natural log of the sum of w * exp(scale * <q, k>); -INFINITY over no records
// Query head j reads KV head j / (query_heads / heads). scale 0 means 1 / sqrt(key_dim). An engine merges (out, lse) with
// the attention over its own recent window as bkv_attend_merge does.
//
// Sequences whose records are not of the shape given here, or whose `first` is not ascending up to at most max_records, get
// NaN for out and lse, and are not read.
typedef struct bkv_cuda_attend_args {
    const void *q;
    const void *const *records;
    const uint32_t *first;
    void *out;
    float *lse;
    bkv_dtype_t q_dtype, out_dtype;
    bkv_dtype_t dtype;    // of the records' source
    uint32_t batch;       // sequences
    uint32_t max_records; // at least first[batch]
    uint32_t layer;       // within the records
    uint32_t heads;       // of the records
    uint32_t query_heads; // a multiple of heads
    uint32_t queries;     // tokens that ask, of each sequence
    uint32_t key_dim, value_dim;
    float scale;
} bkv_cuda_attend_args_t;

// Bytes of device memory that the call needs: 32 for each head of each of max_records records, and partial results of a few
// thousand queries. 0 for arguments that bkv_cuda_attend refuses. Looks at no address.
BKV_API size_t bkv_cuda_attend_workspace(const bkv_cuda_t *cuda, const bkv_cuda_attend_args_t *args);

// Enqueues the attention: three kernels on `stream`, no allocation, no synchronisation; may be captured into a graph. The
// arguments are copied at the call, what they point to must stay until the work is done. workspace: aligned to 64 bytes, for
// this call alone until then. The result does not change from run to run; it does in its last bits with the device's number
// of processors and with what else is in the batch, as the work is cut evenly.
//
// Fast with (key_dim, value_dim) of (64, 64), (96, 96), (128, 128), (192, 128) and (256, 256) and records of bfloat16 or
// float16 sources, in any mixture of bits; other shapes and float32 sources take a plain kernel, many times slower. Up to 4
// queries of a KV head (8 with values of up to 128 channels) are served by one pass over its records, more by as many as that
// takes. INVALID_ARGUMENT names what cannot be; INTERNAL is a failure of CUDA.
BKV_API bkv_status_t bkv_cuda_attend(const bkv_cuda_t *cuda, const bkv_cuda_attend_args_t *args, void *workspace, void *stream,
                                     bkv_error_t *err);

// ---- end of attention ----

#ifdef __cplusplus
}
#endif
#endif
