// target.h - where the daemon is and how to connect to it: checked once, used for every connection.
#ifndef BKV_CLIENT_TARGET_H
#define BKV_CLIENT_TARGET_H

#include "balancekv.h"

#include <grpc/grpc.h>

typedef struct bkv_client_target {
    char *address;  // as gRPC takes it: "unix:/path" or "host:port"
    char *tls_name; // NULL: the address's host
    grpc_channel_credentials *credentials;
    bool protected_link; // bytes cannot change on the way: a unix socket or TLS
} bkv_client_target_t;

// Reads and checks options (may be NULL), $BKV_ENDPOINT and the PEM files. INVALID_ARGUMENT names the option.
bkv_status_t bkv_client_target_init(bkv_client_target_t *target, const bkv_client_options_t *options, bkv_error_t *err);
void bkv_client_target_deinit(bkv_client_target_t *target);

// A new channel, sharing nothing with others to the same address. Never NULL: a channel fails its calls when it cannot
// connect. The caller destroys it.
grpc_channel *bkv_client_target_connect(const bkv_client_target_t *target);

#endif
