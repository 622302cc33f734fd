// bare.h - gRPC C core and nothing else: the yardstick. A server in a process of its own and a client for it, both serving
// one call at a time, so that there is no scheduling to lose time in.
//
// Messages have the shape of balancekvd's: payloads as a stream of messages of at most BKV_BARE_CHUNK bytes that refer to the
// sender's memory; the receiver looks at none of them and copies nothing.
#ifndef BKV_BENCH_BARE_H
#define BKV_BENCH_BARE_H

#include <grpc/grpc.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define BKV_BARE_CHUNK (1 << 20)
#define BKV_BARE_REPLY 80 // bytes of a small message back: what a LookupResponse of 64 keys takes

typedef enum bkv_bare_method {
    BKV_BARE_UNARY,    // a small message there, one back
    BKV_BARE_UPLOAD,   // the payload there, a small message back
    BKV_BARE_DOWNLOAD, // a small message there, the payload back
    BKV_BARE_ECHO,     // the payload there, and when all of it has come, the same bytes back
    BKV_BARE_METHODS
} bkv_bare_method_t;

// Forks the server, listening on `address` ("unix:/path"); it ends with its parent. payload is what Download sends: memory
// shared with nobody, alike in both processes. Call before grpc_init, which does not survive a fork.
pid_t bkv_bare_serve(const char *address, const uint8_t *payload);

typedef struct bkv_bare {
    grpc_channel *channel;
    grpc_completion_queue *queue;
    const uint8_t *payload;
} bkv_bare_t;

// payload holds at least as many bytes as any call sends. Exits the process when the server does not answer: it is a bench.
void bkv_bare_init(bkv_bare_t *bare, const char *address, const uint8_t *payload);
void bkv_bare_deinit(bkv_bare_t *bare);

// One call, waited for; bytes: of the payload (UNARY: of the message, at least 8). Exits the process on failure.
void bkv_bare_call(bkv_bare_t *bare, bkv_bare_method_t method, size_t bytes);

#endif
