// attend_launch.cuh - internal: the kernels that do the attention, and which dims each takes.
#ifndef BKV_ATTEND_LAUNCH_CUDA_CUH
#define BKV_ATTEND_LAUNCH_CUDA_CUH

#include "attend_gpu.h"

#include <cuda_runtime.h>

// The most warps of a thread block: what a multiprocessor's registers are shared by.
#define NARROW_WARPS  12
#define WIDE_WARPS    8
#define GENERAL_WARPS 8

// (64, 64), (96, 96), (128, 128).
int attend_narrow(const bkv_gpu_attend_t *job, cudaStream_t stream);
// (192, 128), (256, 256).
int attend_wide(const bkv_gpu_attend_t *job, cudaStream_t stream);
// All others, and elements of float32.
int attend_general(const bkv_gpu_attend_t *job, cudaStream_t stream);

#endif
