// device.h - internal: what a bkv_cuda_t holds.
#ifndef BKV_DEVICE_CUDA_H
#define BKV_DEVICE_CUDA_H

#include "bkv_cuda.h"
#include "gpu.h"

struct bkv_cuda {
    int device;
    bkv_gpu_traits_t traits;
};

// In place, for a caller that opens for one call only.
bkv_status_t bkv_cuda_init(uint32_t device, bkv_cuda_t *cuda, bkv_error_t *err);

#endif
