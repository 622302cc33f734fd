// pool.c - see pool.h. The free buffers are a list, latest first: what was just sent is still in the cache.
#include "client/pool.h"
#include "proto/handover.h"

#include <assert.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

// Free buffers kept: what a few Puts at once have under way.
#define KEEP 8

// Smaller copies are left to gRPC's own slices.
#define SMALL 65536

typedef struct buffer {
    bkv_client_pool_t *pool;
    struct buffer *next;
    unsigned char bytes[BKV_CLIENT_BUFFER];
} buffer_t;

struct bkv_client_pool {
    pthread_mutex_t lock; // a leaf: buffers come back from inside gRPC
    buffer_t *free;
    size_t free_count;
    size_t out; // buffers that gRPC has
    bool closed;
};

bkv_client_pool_t *bkv_client_pool_create(void) {
    bkv_client_pool_t *pool = calloc(1, sizeof *pool);
    if (pool != NULL) {
        pthread_mutex_init(&pool->lock, NULL);
    }
    return pool;
}

static void pool_free(bkv_client_pool_t *pool) {
    while (pool->free != NULL) {
        buffer_t *buffer = pool->free;
        pool->free = buffer->next;
        free(buffer);
    }
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

void bkv_client_pool_destroy(bkv_client_pool_t *pool) {
    if (pool == NULL) {
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->closed = true;
    bool last = pool->out == 0;
    pthread_mutex_unlock(&pool->lock);
    if (last) {
        pool_free(pool);
    }
}

static void buffer_return(void *user) {
    buffer_t *buffer = user;
    BKV_TAKE_OVER(buffer);
    bkv_client_pool_t *pool = buffer->pool;
    pthread_mutex_lock(&pool->lock);
    pool->out--;
    if (!pool->closed && pool->free_count < KEEP) {
        buffer->next = pool->free;
        pool->free = buffer;
        pool->free_count++;
        buffer = NULL;
    }
    bool last = pool->closed && pool->out == 0;
    pthread_mutex_unlock(&pool->lock);
    free(buffer);
    if (last) {
        pool_free(pool);
    }
}

static buffer_t *buffer_take(bkv_client_pool_t *pool) {
    pthread_mutex_lock(&pool->lock);
    buffer_t *buffer = pool->free;
    if (buffer != NULL) {
        pool->free = buffer->next;
        pool->free_count--;
    }
    pool->out++;
    pthread_mutex_unlock(&pool->lock);
    if (buffer == NULL && (buffer = malloc(sizeof *buffer)) == NULL) {
        abort(); // as gRPC does without memory
    }
    buffer->pool = pool;
    return buffer;
}

grpc_slice bkv_client_pool_copy(bkv_client_pool_t *pool, const void *bytes, size_t length) {
    assert(length <= BKV_CLIENT_BUFFER);
    if (length <= SMALL) {
        return grpc_slice_from_copied_buffer(bytes, length);
    }
    buffer_t *buffer = buffer_take(pool);
    memcpy(buffer->bytes, bytes, length);
    BKV_HAND_OVER(buffer);
    return grpc_slice_new_with_user_data(buffer->bytes, length, buffer_return, buffer);
}
