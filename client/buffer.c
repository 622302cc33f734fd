// buffer.c - see buffer.h. Each buffer is preceded by a 64-byte head that says where it came from.
#include "client/buffer.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#define HEAD 64

// What is kept for the next records at most. Smaller buffers are malloc's business.
#define KEEP_BYTES    (64u << 20)
#define KEEP_COUNT    32
#define KEEP_SMALLEST (64u << 10)

// From this size on, buffers are made of huge pages where the system has them: 512 times fewer faults.
#define HUGE (2u << 20)

typedef struct buffer {
    bkv_client_buffers_t *buffers; // NULL: too small to be kept
    size_t capacity;               // head included
    struct buffer *next;
} buffer_t;

_Static_assert(sizeof(buffer_t) <= HEAD, "the head holds a buffer_t");

struct bkv_client_buffers {
    pthread_mutex_t lock;
    buffer_t *kept; // latest first
    size_t kept_bytes, kept_count;
    size_t users; // buffers taken, and the client
    bool closed;
};

bkv_client_buffers_t *bkv_client_buffers_create(void) {
    bkv_client_buffers_t *buffers = calloc(1, sizeof *buffers);
    if (buffers != NULL) {
        pthread_mutex_init(&buffers->lock, NULL);
        buffers->users = 1;
    }
    return buffers;
}

// Takes one off the list; the lock must be held.
static buffer_t *unlink_at(bkv_client_buffers_t *buffers, buffer_t **at) {
    buffer_t *buffer = *at;
    *at = buffer->next;
    buffers->kept_bytes -= buffer->capacity;
    buffers->kept_count--;
    return buffer;
}

// One user less. The last one frees everything. The lock must be held; it is released.
static void leave(bkv_client_buffers_t *buffers) {
    bool last = --buffers->users == 0;
    pthread_mutex_unlock(&buffers->lock);
    if (last) {
        pthread_mutex_destroy(&buffers->lock);
        free(buffers);
    }
}

void bkv_client_buffers_destroy(bkv_client_buffers_t *buffers) {
    if (buffers == NULL) {
        return;
    }
    pthread_mutex_lock(&buffers->lock);
    buffers->closed = true;
    while (buffers->kept != NULL) {
        free(unlink_at(buffers, &buffers->kept));
    }
    leave(buffers);
}

static buffer_t *buffer_allocate(size_t capacity) {
    if (capacity < HUGE) {
        return aligned_alloc(HEAD, (capacity + HEAD - 1) / HEAD * HEAD);
    }
    size_t rounded = (capacity + HUGE - 1) / HUGE * HUGE;
    buffer_t *buffer = aligned_alloc(HUGE, rounded);
    if (buffer != NULL) {
        (void)madvise(buffer, rounded, MADV_HUGEPAGE); // without, it is only slower
    }
    return buffer;
}

// A kept one that is large enough and not wastefully large; the lock must be held.
static buffer_t *find(bkv_client_buffers_t *buffers, size_t capacity) {
    for (buffer_t **at = &buffers->kept; *at != NULL; at = &(*at)->next) {
        if ((*at)->capacity >= capacity && (*at)->capacity / 2 <= capacity) {
            return unlink_at(buffers, at);
        }
    }
    return NULL;
}

void *bkv_client_buffer_take(bkv_client_buffers_t *buffers, size_t length) {
    size_t capacity = length + HEAD;
    bool keep = capacity >= KEEP_SMALLEST && capacity <= KEEP_BYTES;
    buffer_t *buffer = NULL;
    if (keep) {
        pthread_mutex_lock(&buffers->lock);
        buffers->users++;
        buffer = find(buffers, capacity);
        pthread_mutex_unlock(&buffers->lock);
    }
    if (buffer == NULL && (buffer = buffer_allocate(capacity)) != NULL) {
        buffer->capacity = capacity;
    }
    if (buffer == NULL) {
        if (keep) {
            pthread_mutex_lock(&buffers->lock);
            leave(buffers);
        }
        return NULL;
    }
    buffer->buffers = keep ? buffers : NULL;
    return (unsigned char *)buffer + HEAD;
}

// Forgets the oldest until there is room for one more; the lock must be held.
static void make_room(bkv_client_buffers_t *buffers, size_t capacity) {
    while (buffers->kept != NULL && (buffers->kept_count == KEEP_COUNT || buffers->kept_bytes + capacity > KEEP_BYTES)) {
        buffer_t **at = &buffers->kept;
        while ((*at)->next != NULL) {
            at = &(*at)->next;
        }
        free(unlink_at(buffers, at));
    }
}

void bkv_client_buffer_free(void *bytes) {
    if (bytes == NULL) {
        return;
    }
    buffer_t *buffer = (buffer_t *)(void *)((unsigned char *)bytes - HEAD);
    bkv_client_buffers_t *buffers = buffer->buffers;
    if (buffers == NULL) {
        free(buffer);
        return;
    }
    pthread_mutex_lock(&buffers->lock);
    if (buffers->closed) {
        free(buffer);
    } else {
        make_room(buffers, buffer->capacity);
        buffer->next = buffers->kept;
        buffers->kept = buffer;
        buffers->kept_bytes += buffer->capacity;
        buffers->kept_count++;
    }
    leave(buffers);
}
