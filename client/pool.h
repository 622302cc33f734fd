// pool.h - memory for messages on their way out, used again and again so that it stays mapped and in the cache.
//
// A buffer belongs to gRPC once it is a slice and comes back when gRPC lets go of it, on any thread, perhaps after the client
// has been destroyed: the pool lives until then.
#ifndef BKV_CLIENT_POOL_H
#define BKV_CLIENT_POOL_H

#include <grpc/slice.h>

typedef struct bkv_client_pool bkv_client_pool_t;

#define BKV_CLIENT_BUFFER (1 << 20)

// NULL: out of memory.
bkv_client_pool_t *bkv_client_pool_create(void);

// No buffers are taken after this. NULL is allowed.
void bkv_client_pool_destroy(bkv_client_pool_t *pool);

// A slice with a copy of `length` bytes, at most BKV_CLIENT_BUFFER. Any thread.
grpc_slice bkv_client_pool_copy(bkv_client_pool_t *pool, const void *bytes, size_t length);

#endif
