// bkv_device.h - a worker's GPU memory and balancekvd: blocks are compressed by the daemon straight from where they lie,
// records are brought into GPU memory, and only they cross the bus. For daemons on the same host, reached by their unix socket,
// that see the same GPU. No CUDA header is needed: a stream is a cudaStream_t (or CUstream) passed as void *, NULL being the
// default stream.
//
//   bkv_device_share(client, 0, &(bkv_device_range_t){cache, bytes}, 1, 0, &shared, &err);   once: exports the KV cache
//   bkv_device_put(shared, &spec, blocks, count, stream, 0, results, &err);                  names blocks in it
//   bkv_device_get(shared, &spec, keys, count, NULL, room, room_bytes, stream, 0, records, &err);
//
// Memory may come from cudaMalloc, or from cuMemCreate with handles of type POSIX_FILE_DESCRIPTOR, as PyTorch's expandable
// segments do; not from cudaMallocAsync, whose memory has no handle. What is shared is the whole allocation that an address
// lies in. It must not be freed before bkv_device_unshare; where an allocator unmaps chunks of it, the daemon keeps them until
// then.
//
// Order: `stream` is the one on which the blocks were written, or on which the room was last used. The library records an event
// on it, without waiting, and the daemon begins when that has come (10 s at most). So what is enqueued on the stream afterwards
// may run before the daemon has begun: blocks must not be overwritten, and a room not be touched, until the call has completed.
// The stream must not be capturing a graph.
//
// A call that ends with anything but the daemon's own answer (DEADLINE_EXCEEDED, CANCELLED, BUSY) may leave the daemon at work
// on the memory that it named for a while yet: up to those 10 s, if the event does not come sooner.
//
// What lies in the room has been verified by the daemon, and is not checked again: kernels that read it trust the daemon.
//
// With several endpoints the memory is shared with the first on this host that works, once and for all: what is put from it or got
// into it goes to that daemon alone, and waits for it as with a single endpoint.
//
// After a restart of the daemon, or a fault of the GPU, the memory is shared anew by the next call. Every function is
// thread-safe.
#ifndef BKV_DEVICE_H
#define BKV_DEVICE_H

#include "balancekv.h"

#ifdef __cplusplus
extern "C" {
#endif

// GPU memory that this process shares with the daemon.
typedef struct bkv_device bkv_device_t;

typedef struct bkv_device_range {
    const void *address;
    size_t bytes;
} bkv_device_range_t;

// Shares the allocations that the ranges lie in, all of `device` (CUDA's ordinal in this process). UNIMPLEMENTED: there is no
// such device, the daemon is not on this host or does not see it, and why; INVALID_ARGUMENT: the number of the range whose
// memory cannot be shared, and why. timeout_ms as everywhere. *shared is the caller's.
BKV_API bkv_status_t bkv_device_share(bkv_client_t *client, uint32_t device, const bkv_device_range_t *ranges, size_t count,
                                      uint32_t timeout_ms, bkv_device_t **shared, bkv_error_t *err);

// Ends the sharing, which takes at most half a second, and frees. No call may be using it any more. Before the client's
// destroy. NULL is allowed.
BKV_API void bkv_device_unshare(bkv_device_t *shared);

// How a block lies in shared memory. Element i of token t, KV head h, layer l of K lies at
//   keys[l] + pages[t / page_tokens] * page_stride + h * head_stride + (t % page_tokens) * token_stride + i * element size
// and of V likewise from values[l], with value_token_stride and value_head_stride (0: as K's). Strides are in bytes; they and
// the addresses are multiples of 16. page_count 0: no pages, the block lies in one piece. Every array is the caller's.
typedef struct bkv_kv_layout {
    const void *const *keys;   // [layers of the spec]
    const void *const *values; // likewise; MLA: views into the keys
    const uint64_t *pages;     // [page_count], ceil(tokens / page_tokens) of them
    uint32_t page_count, page_tokens;
    uint64_t page_stride;
    uint64_t token_stride, head_stride;
    uint64_t value_token_stride, value_head_stride;
} bkv_kv_layout_t;

typedef struct bkv_device_put {
    bkv_key_t key;
    uint64_t position;
    uint32_t tokens;
    bkv_codec_t codec; // 0: the spec's
    uint32_t rate;     // 0: the spec's
    uint64_t ttl_ms;   // 0: the daemon's default
    bkv_kv_layout_t layout;
} bkv_device_put_t;

// As bkv_put. The spec must have been opened with this client. INVALID_ARGUMENT also: a block does not lie in shared memory.
BKV_API bkv_status_t bkv_device_put(bkv_device_t *shared, const bkv_spec_id_t *id, const bkv_device_put_t *blocks, size_t count,
                                    void *stream, uint32_t timeout_ms, bkv_put_result_t *results, bkv_error_t *err);

// A record in GPU memory.
typedef struct bkv_device_record {
    bkv_key_t key;
    bkv_status_t status; // RESOURCE_EXHAUSTED: there was no room left for it
    uint64_t offset;     // from the start of the room, a multiple of 64
    uint64_t length;     // of the record; 0 where there is none
} bkv_device_record_t;

// As bkv_get, but into `room`: room_bytes of shared memory, aligned to 64 bytes. The records lie there one after the other. A
// room is large enough with bkv_codec_bound, rounded up to 64, for each. Its contents are undefined where nothing was put.
BKV_API bkv_status_t bkv_device_get(bkv_device_t *shared, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                                    const bkv_range_t *range, void *room, size_t room_bytes, void *stream, uint32_t timeout_ms,
                                    bkv_device_record_t *records, bkv_error_t *err);

// The asynchronous forms, as in balancekv.h: the queue is of the same client, and everything pointed to lives until the
// completion is polled. The event is recorded before these return. FAILED_PRECONDITION in a completion: the daemon has been
// restarted meanwhile; submit it again. Only where it has, or where nothing is shared yet, do these wait for the daemon, at
// most timeout_ms.
BKV_API bkv_status_t bkv_device_put_submit(bkv_queue_t *queue, uint64_t tag, bkv_device_t *shared, const bkv_spec_id_t *id,
                                           const bkv_device_put_t *blocks, size_t count, void *stream, uint32_t timeout_ms,
                                           bkv_put_result_t *results);
BKV_API bkv_status_t bkv_device_get_submit(bkv_queue_t *queue, uint64_t tag, bkv_device_t *shared, const bkv_spec_id_t *id,
                                           const bkv_key_t *keys, size_t count, const bkv_range_t *range, void *room,
                                           size_t room_bytes, void *stream, uint32_t timeout_ms, bkv_device_record_t *records);

#ifdef __cplusplus
}
#endif
#endif
