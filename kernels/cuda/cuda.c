// cuda.c - opening a device. compress.c and attend.cu use it.
#include "bkv_cuda.h"

#include "device.h"

#include <stdlib.h>

// The oldest that our machine code runs on.
#define CAPABILITY_MIN 80

uint32_t bkv_cuda_count(void) {
    return bkv_gpu_count();
}

bkv_status_t bkv_cuda_init(uint32_t device, bkv_cuda_t *cuda, bkv_error_t *err) {
    uint32_t count = bkv_gpu_count();
    if (device >= count) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "device: %u, there are %u CUDA devices here", device, count);
    }
    *cuda = (bkv_cuda_t){.device = (int)device};
    int error = bkv_gpu_open((int)device, &cuda->traits);
    if (error != 0) {
        return bkv_fail(err, BKV_INTERNAL, "device: %u, %s", device, bkv_gpu_error(error));
    }
    if (cuda->traits.capability < CAPABILITY_MIN) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "device: %u is of compute capability %u.%u, below %d.%d", device,
                        cuda->traits.capability / 10, cuda->traits.capability % 10, CAPABILITY_MIN / 10, CAPABILITY_MIN % 10);
    }
    return BKV_OK;
}

bkv_status_t bkv_cuda_open(uint32_t device, bkv_cuda_t **cuda, bkv_error_t *err) {
    bkv_cuda_t opened;
    bkv_status_t status = bkv_cuda_init(device, &opened, err);
    if (status != BKV_OK) {
        return status;
    }
    *cuda = malloc(sizeof(opened));
    if (!*cuda) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "memory: none for a device");
    }
    **cuda = opened;
    return BKV_OK;
}

void bkv_cuda_close(bkv_cuda_t *cuda) {
    free(cuda);
}

uint32_t bkv_cuda_processors(const bkv_cuda_t *cuda) {
    return cuda->traits.processors;
}
