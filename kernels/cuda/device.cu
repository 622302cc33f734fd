// device.cu - the CUDA runtime as gpu.h shows it: devices, memory, copies. Nothing here knows about records.
#include "gpu.h"

#include <cuda_runtime.h>

extern "C" uint32_t bkv_gpu_count(void) {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        (void)cudaGetLastError(); // no driver is an answer, not a fault to find later
        return 0;
    }
    return (uint32_t)count;
}

extern "C" const char *bkv_gpu_error(int error) {
    return cudaGetErrorString((cudaError_t)error);
}

extern "C" int bkv_gpu_enter(int device, int *before) {
    cudaError_t error = cudaGetDevice(before);
    if (error == cudaSuccess && *before != device) {
        error = cudaSetDevice(device);
    }
    return (int)error;
}

extern "C" void bkv_gpu_leave(int before) {
    int now;
    if (cudaGetDevice(&now) == cudaSuccess && now != before) {
        (void)cudaSetDevice(before);
    }
}

static cudaError_t attribute(cudaDeviceAttr name, int device, uint32_t *value) {
    int number = 0;
    cudaError_t error = cudaDeviceGetAttribute(&number, name, device);
    *value = (uint32_t)number;
    return error;
}

extern "C" int bkv_gpu_open(int device, bkv_gpu_traits_t *traits) {
    uint32_t major = 0, minor = 0;
    cudaError_t error = attribute(cudaDevAttrMultiProcessorCount, device, &traits->processors);
    if (error == cudaSuccess) {
        error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, &traits->shared_memory);
    }
    if (error == cudaSuccess) {
        error = attribute(cudaDevAttrComputeCapabilityMajor, device, &major);
    }
    if (error == cudaSuccess) {
        error = attribute(cudaDevAttrComputeCapabilityMinor, device, &minor);
    }
    traits->capability = 10 * major + minor;
    int before;
    if (error != cudaSuccess || bkv_gpu_enter(device, &before) != 0) {
        return (int)(error != cudaSuccess ? error : cudaErrorInvalidDevice);
    }
    error = (cudaError_t)bkv_gpu_balance_allow(traits->shared_memory);
    bkv_gpu_leave(before);
    return (int)error;
}

extern "C" void *bkv_gpu_own_stream(void) {
    return (void *)cudaStreamPerThread;
}

extern "C" int bkv_gpu_alloc(void **memory, size_t bytes, void *stream) {
    return (int)cudaMallocAsync(memory, bytes, (cudaStream_t)stream);
}

extern "C" int bkv_gpu_free(void *memory, void *stream) {
    return (int)cudaFreeAsync(memory, (cudaStream_t)stream);
}

extern "C" int bkv_gpu_copy(void *to, const void *from, size_t bytes, void *stream) {
    return (int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, (cudaStream_t)stream);
}

extern "C" int bkv_gpu_wait(void *stream) {
    return (int)cudaStreamSynchronize((cudaStream_t)stream);
}
