// grpc_arg.h - arguments of gRPC channels and servers. Keys and strings stay the caller's; gRPC only reads them.
#ifndef BKV_GRPC_ARG_H
#define BKV_GRPC_ARG_H

#include <grpc/grpc.h>

static inline grpc_arg bkv_int_arg(const char *key, int value) {
    return (grpc_arg){.type = GRPC_ARG_INTEGER, .key = (char *)key, .value.integer = value};
}

static inline grpc_arg bkv_string_arg(const char *key, const char *value) {
    return (grpc_arg){.type = GRPC_ARG_STRING, .key = (char *)key, .value.string = (char *)value};
}

#endif
