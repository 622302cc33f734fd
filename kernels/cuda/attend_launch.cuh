// attend_launch.cuh - internal: the kernels that do the attention, and which dims each takes.
#ifndef BKV_ATTEND_LAUNCH_CUDA_CUH
#define BKV_ATTEND_LAUNCH_CUDA_CUH

#include "attend_gpu.h"

#include <cuda_runtime.h>

// A call's kernels follow one another. From sm_90 on each is brought in while the one before it is still at work, and waits
// for it where it says so: launch_awaits, before it touches anything that another kernel writes or has written. launch_follows
// is where it lets the next one come.
__device__ __forceinline__ void launch_follows() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void launch_awaits() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Starts such a kernel behind another one of the call.
template <class... Args>
int launch_behind(void (*kernel)(Args...), uint32_t thread_blocks, dim3 threads, size_t shared, cudaStream_t stream,
                  const bkv_gpu_attend_t *job, uint32_t warps) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = thread_blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = job->overlaps ? 1 : 0;
    return (int)cudaLaunchKernelEx(&config, kernel, *job, warps);
}

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
