// target.h - where the daemon is and how to connect to it: checked once, used for every connection.
#ifndef BKV_CLIENT_TARGET_H
#define BKV_CLIENT_TARGET_H

#include "client/balancekv.h"

#include <grpc/grpc.h>

typedef struct bkv_client_target {
    char *address;  // as gRPC takes it: "unix:/path" or "host:port"
    char *tls_name; // NULL: the address's host
    grpc_channel_credentials *credentials;
    bool protected_link; // bytes cannot change on the way: a unix socket or TLS
} bkv_client_target_t;

// A copy of options (NULL: the defaults) whose strings are its own, with $BKV_ENDPOINT and the default filled in.
bkv_status_t bkv_client_options_init(bkv_client_options_t *copy, const bkv_client_options_t *options, bkv_error_t *err);
void bkv_client_options_deinit(bkv_client_options_t *copy);

// Reads and checks the endpoints of such options, and the PEM files: one target for each, at most `most`. TLS is for all that are
// host:port; for a unix socket only where it is the only endpoint. INVALID_ARGUMENT names the option; there is then no target.
bkv_status_t bkv_client_targets_init(bkv_client_target_t *targets, uint32_t most, uint32_t *count,
                                     const bkv_client_options_t *options, bkv_error_t *err);
void bkv_client_target_deinit(bkv_client_target_t *target);

// The same for an address that was learned: host:port alone.
bkv_status_t bkv_client_target_learn(bkv_client_target_t *target, const bkv_client_options_t *options, const char *address);

bool bkv_client_target_local(const bkv_client_target_t *target); // a unix socket

// A new channel, sharing nothing with others to the same address. Never NULL: a channel fails its calls when it cannot
// connect. The caller destroys it.
grpc_channel *bkv_client_target_connect(const bkv_client_target_t *target);

#endif
