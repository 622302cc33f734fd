// status.h - how anything in balancekvd says that it worked or why it did not.
//
// One list of statuses for kernels, daemon and client. Each has a gRPC code, so that a status survives the wire
// (daemon/rpc maps it out, client/ maps it back). What a caller of ours did wrong in code asserts instead.
#ifndef BKV_STATUS_H
#define BKV_STATUS_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define BKV_API               __attribute__((visibility("default")))
#define BKV_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define BKV_API
#define BKV_PRINTF(fmt, args)
#endif

// X(name, gRPC code, what it means to the caller)
#define BKV_STATUS_LIST(X)                                                                                                     \
    X(OK, 0, "done")                                                                                                           \
    X(CANCELLED, 1, "the caller gave up before it was done")                                                                   \
    X(INVALID_ARGUMENT, 3, "the request itself is wrong; repeating it cannot help")                                            \
    X(DEADLINE_EXCEEDED, 4, "not done within its deadline")                                                                    \
    X(NOT_FOUND, 5, "no such spec, block or lease here")                                                                       \
    X(ALREADY_EXISTS, 6, "the key is there already (a Put treats this as success)")                                            \
    X(PERMISSION_DENIED, 7, "this peer or tenant may not do that")                                                             \
    X(RESOURCE_EXHAUSTED, 8, "a configured bound is reached: memory, quota, entries or message size")                          \
    X(FAILED_PRECONDITION, 9, "not possible in the present state; the message says what must come first")                      \
    X(UNIMPLEMENTED, 12, "this build or this machine cannot do that")                                                          \
    X(INTERNAL, 13, "a fault of ours; please report the message")                                                              \
    X(BUSY, 14, "too much in flight right now; retry after a pause")                                                           \
    X(DATA_LOSS, 15, "what is stored failed its checksum; it has been dropped")                                                \
    X(UNAUTHENTICATED, 16, "no valid credentials were presented")

typedef enum bkv_status {
#define X(name, code, text) BKV_##name = (code),
    BKV_STATUS_LIST(X)
#undef X
} bkv_status_t;

#define BKV_MESSAGE_MAX 256

// A status with a message that names the cause (field, value, limit). Functions that take a `bkv_error_t *err` fill it
// when they return something other than BKV_OK and leave it alone otherwise; NULL is allowed and means "status only".
typedef struct bkv_error {
    bkv_status_t status;
    char message[BKV_MESSAGE_MAX];
} bkv_error_t;

// "INVALID_ARGUMENT" and the like; "UNKNOWN" for a number that is none of ours. Never NULL.
BKV_API const char *bkv_status_name(bkv_status_t status);

// The meaning of a status in words. Never NULL.
BKV_API const char *bkv_status_text(bkv_status_t status);

// Fills *err (if not NULL) and returns status, so that `return bkv_fail(err, BKV_NOT_FOUND, "...", ...)` reads well.
// Messages longer than BKV_MESSAGE_MAX are cut.
BKV_API bkv_status_t bkv_fail(bkv_error_t *err, bkv_status_t status, const char *format, ...) BKV_PRINTF(3, 4);

#ifdef __cplusplus
}
#endif
#endif
