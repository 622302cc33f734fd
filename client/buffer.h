// buffer.h - memory that records are received into, kept for the next ones: page faults cost more than copying does.
//
// A record's buffer belongs to whoever holds the record, and may be freed after the client has been destroyed.
#ifndef BKV_CLIENT_BUFFER_H
#define BKV_CLIENT_BUFFER_H

#include <stddef.h>

typedef struct bkv_client_buffers bkv_client_buffers_t;

// NULL: out of memory.
bkv_client_buffers_t *bkv_client_buffers_create(void);
void bkv_client_buffers_destroy(bkv_client_buffers_t *buffers); // NULL is allowed

// `length` bytes, 64-byte aligned, contents undefined. NULL: out of memory. Any thread.
void *bkv_client_buffer_take(bkv_client_buffers_t *buffers, size_t length);
void bkv_client_buffer_free(void *bytes); // NULL is allowed

#endif
