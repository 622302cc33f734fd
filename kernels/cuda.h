// cuda.h - compressing KV that already lies on an NVIDIA GPU, and attending over the records there.
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

// ---- attention (attend_cuda.cu) ----
// ---- end of attention ----

#ifdef __cplusplus
}
#endif
#endif
