// share_chunks.cu - the driver's virtual memory management as share.h shows it: what lies behind an address, and chunks that
// are shared by descriptor and mapped one behind the other.
//
// The driver's functions are asked for by name at run time, through the runtime that is linked in: no libcuda is linked, and
// the same binary runs where there is none.
#include "share.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <unistd.h>

// Any version of the driver that we run with has these in the form of CUDA 12.0.
#define DRIVER_VERSION 12000

static void *driver_function(const char *name) {
    void *function = NULL;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, DRIVER_VERSION, cudaEnableDefault, &found);
#else
    cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
        return NULL;
    }
    return found == cudaDriverEntryPointSuccess ? function : NULL;
}

// Calls the driver's function of that name. Its results have the numbers of the runtime's.
#define DRIVER(name, ...)                                                                                                      \
    ([&]() -> int {                                                                                                            \
        decltype(&name) function = (decltype(&name))driver_function(#name);                                                    \
        return function ? (int)function(__VA_ARGS__) : (int)cudaErrorNotSupported;                                             \
    }())

// The runtime makes a thread's context when it is first needed; the driver does not.
static int context_ready(void) {
    cudaError_t error = cudaFree(NULL);
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
    }
    return (int)error;
}

static CUmemAllocationProp chunk_properties(int device) {
    CUmemAllocationProp properties = {};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device;
    return properties;
}

extern "C" int bkv_gpu_extent(const void *address, bkv_gpu_extent_t *extent) {
    CUdeviceptr base = 0;
    size_t bytes = 0;
    int legacy = 0, ordinal = 0, error = context_ready();
    // Of chunks this is the one that the address lies in, not all that are mapped behind one another.
    error = error != 0 ? error : DRIVER(cuMemGetAddressRange, &base, &bytes, (CUdeviceptr)address);
    error = error != 0
                ? error
                : DRIVER(cuPointerGetAttribute, &legacy, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, (CUdeviceptr)address);
    error =
        error != 0 ? error : DRIVER(cuPointerGetAttribute, &ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, (CUdeviceptr)address);
    if (error != 0) {
        return error;
    }
    extent->base = (uint8_t *)base;
    extent->bytes = bytes;
    extent->device = ordinal;
    extent->chunk = legacy == 0;
    return 0;
}

extern "C" int bkv_gpu_bytes_from(const void *address, size_t *bytes) {
    CUdeviceptr base = 0;
    size_t all = 0;
    int error = context_ready();
    error = error != 0 ? error : DRIVER(cuMemGetAddressRange, &base, &all, (CUdeviceptr)address);
    *bytes = error == 0 ? (size_t)(base + all - (CUdeviceptr)address) : 0;
    return error;
}

extern "C" int bkv_gpu_export_chunk(void *base, int *fd) {
    CUmemGenericAllocationHandle handle;
    int error = context_ready();
    error = error != 0 ? error : DRIVER(cuMemRetainAllocationHandle, &handle, base);
    if (error != 0) {
        return error;
    }
    error = DRIVER(cuMemExportToShareableHandle, fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0ull);
    (void)DRIVER(cuMemRelease, handle);
    return error;
}

extern "C" int bkv_gpu_granularity(int device, size_t *bytes) {
    CUmemAllocationProp properties = chunk_properties(device);
    int error = context_ready();
    return error != 0 ? error : DRIVER(cuMemGetAllocationGranularity, bytes, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
}

extern "C" int bkv_gpu_span_reserve(size_t bytes, void **base) {
    CUdeviceptr address = 0;
    int error = context_ready();
    error = error != 0 ? error : DRIVER(cuMemAddressReserve, &address, bytes, (size_t)0, (CUdeviceptr)0, 0ull);
    *base = (void *)address;
    return error;
}

extern "C" void bkv_gpu_span_free(void *base, size_t bytes) {
    (void)DRIVER(cuMemAddressFree, (CUdeviceptr)base, bytes);
}

// Maps all of a chunk, whose handle is given up: the mapping keeps the chunk.
static int span_map(void *at, size_t bytes, CUmemGenericAllocationHandle handle, int device) {
    int error = DRIVER(cuMemMap, (CUdeviceptr)at, bytes, (size_t)0, handle, 0ull);
    (void)DRIVER(cuMemRelease, handle);
    if (error != 0) {
        return error;
    }
    CUmemAccessDesc access = {};
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = device;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    error = DRIVER(cuMemSetAccess, (CUdeviceptr)at, bytes, &access, (size_t)1);
    if (error != 0) {
        bkv_gpu_span_unmap(at, bytes);
    }
    return error;
}

extern "C" int bkv_gpu_span_map(void *at, size_t bytes, int fd, int device) {
    CUmemGenericAllocationHandle handle;
    int error = context_ready();
    error = error != 0 ? error
                       : DRIVER(cuMemImportFromShareableHandle, &handle, (void *)(uintptr_t)fd,
                                CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    return error != 0 ? error : span_map(at, bytes, handle, device);
}

extern "C" int bkv_gpu_span_create(void *at, size_t bytes, int device) {
    CUmemGenericAllocationHandle handle;
    CUmemAllocationProp properties = chunk_properties(device);
    int error = context_ready();
    error = error != 0 ? error : DRIVER(cuMemCreate, &handle, bytes, &properties, 0ull);
    return error != 0 ? error : span_map(at, bytes, handle, device);
}

extern "C" void bkv_gpu_span_unmap(void *at, size_t bytes) {
    (void)DRIVER(cuMemUnmap, (CUdeviceptr)at, bytes);
}
