// share.h - internal: GPU memory and events that two processes share, and what it takes to move bytes without waiting for them,
// as plain C. share.cu and share_chunks.cu implement it; where there is no nvcc absent_share.c does, by saying so.
//
// Functions return 0 or an error that bkv_gpu_error puts in words, and leave no error behind for a later call of the CUDA
// runtime to report. They work on the calling thread's device: see bkv_gpu_enter.
//
// Two kinds of memory can be shared. What cudaMalloc gave has a handle of 64 bytes that names the whole allocation; the process
// that opens it gets it all at an address of its own. What cuMemCreate gave comes in chunks, each with a file descriptor, and
// is mapped wherever one likes: an allocator that grows a tensor chunk by chunk (PyTorch's expandable segments) has many of
// them behind one range of addresses, and so they are mapped here, one behind the other (bkv_gpu_span_*).
//
// Memory of the second kind lives until the last mapping of it is gone, whatever becomes of the process that made it. Of the
// first kind that is not promised: it holds for processes that die, as the driver counts references, but an allocation must not
// be freed while others have it open.
#ifndef BKV_SHARE_CUDA_H
#define BKV_SHARE_CUDA_H

#include "gpu.h"

#ifdef __cplusplus
extern "C" {
#endif

#define BKV_GPU_HANDLE_BYTES 64
#define BKV_GPU_UUID_BYTES   16

// The answer of bkv_gpu_event_query where there is still something to wait for.
#define BKV_GPU_NOT_YET (-1)

// ---- devices ----

int bkv_gpu_uuid(int device, uint8_t uuid[BKV_GPU_UUID_BYTES]);

// Whether the calling thread's device has failed for good: after a fault in a kernel every call fails until the device is
// reset.
bool bkv_gpu_broken(void);

// Memory of the calling thread's device that nobody has taken.
int bkv_gpu_unused(size_t *bytes);

// Forgets everything that this process has on the device: memory, mappings, streams and events of it must not be used again,
// nor given back. Nobody may be using it meanwhile. Returns an error where the device cannot be used afterwards either, as
// after some faults only a new process can.
int bkv_gpu_reset(int device);

// ---- memory of one's own ----

int bkv_gpu_take(void **memory, size_t bytes); // on the device
void bkv_gpu_give(void *memory);               // waits for the device; NULL is allowed
int bkv_gpu_host_take(void **memory, size_t bytes);
void bkv_gpu_host_give(void *memory); // NULL is allowed

// Pins memory of the process, so that copies to and from it need no help of the processor. whole pages.
int bkv_gpu_pin(void *memory, size_t bytes);
void bkv_gpu_unpin(void *memory);

// ---- streams and events ----

int bkv_gpu_stream_create(void **stream);
void bkv_gpu_stream_destroy(void *stream);

// An event to wait for without using the processor, or one that another process can wait for.
int bkv_gpu_event_create(bool shared, void **event);
void bkv_gpu_event_destroy(void *event); // NULL is allowed
int bkv_gpu_event_record(void *event, void *stream);
int bkv_gpu_event_query(void *event); // 0: what was recorded is done, or nothing ever was
int bkv_gpu_event_wait(void *event);

// The other process's event is one's own to destroy. An event cannot be imported where it was exported.
int bkv_gpu_event_export(void *event, uint8_t handle[BKV_GPU_HANDLE_BYTES]);
int bkv_gpu_event_import(const uint8_t handle[BKV_GPU_HANDLE_BYTES], void **event);

// ---- sharing allocations ----

// What lies behind an address: one allocation, or one chunk.
typedef struct bkv_gpu_extent {
    uint8_t *base;
    size_t bytes;
    int device;
    bool chunk; // shared by descriptor, else by handle
} bkv_gpu_extent_t;
int bkv_gpu_extent(const void *address, bkv_gpu_extent_t *extent);

// Bytes from an address to the end of what it lies in.
int bkv_gpu_bytes_from(const void *address, size_t *bytes);

// base: of an extent. An allocation of cudaMallocAsync, or a chunk that was not made to be shared, has no handle: an error.
int bkv_gpu_export(void *base, uint8_t handle[BKV_GPU_HANDLE_BYTES]);
int bkv_gpu_export_chunk(void *base, int *fd); // the caller closes it

// *bytes: how many there are from *base on. Not in the process that exported it.
int bkv_gpu_import(const uint8_t handle[BKV_GPU_HANDLE_BYTES], void **base, size_t *bytes);
int bkv_gpu_import_close(void *base); // waits for the device

// A range of addresses for chunks. Sizes and places of chunks are multiples of the granularity.
int bkv_gpu_granularity(int device, size_t *bytes);
int bkv_gpu_span_reserve(size_t bytes, void **base);
void bkv_gpu_span_free(void *base, size_t bytes);
// Maps the chunk of a descriptor, which stays the caller's, for reading and writing by `device`. More bytes than the chunk has,
// and a descriptor that is none of a chunk's, are errors of the driver's.
int bkv_gpu_span_map(void *at, size_t bytes, int fd, int device);
void bkv_gpu_span_unmap(void *at, size_t bytes); // waits for the device
// The same with a new chunk that can be shared, as an allocator makes one.
int bkv_gpu_span_create(void *at, size_t bytes, int device);

// ---- gathering ----

// A block in pages, or whose layers lie anywhere, to a payload, [layer][K,V][head][token][dim]. Row (layer, head, token) of K
// is at
//   bases[2 * layer] + pages[token / page_tokens] + head * key_head + token % page_tokens * key_token
// and of V likewise from bases[2 * layer + 1]; all in bytes, all multiples of 16.
typedef struct bkv_gpu_gather {
    const uint64_t *bases; // [2 * layers] addresses, in device memory
    const uint64_t *pages; // [ceil(tokens / page_tokens)], in device memory
    uint64_t key_token, key_head, value_token, value_head;
    uint32_t page_tokens; // at least 1
    bkv_shape_t shape;
    void *payload; // bkv_shape_bytes, aligned to 16
} bkv_gpu_gather_t;

int bkv_gpu_gather(const bkv_gpu_gather_t *gather, void *stream);

#ifdef __cplusplus
}
#endif
#endif
