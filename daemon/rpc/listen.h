// listen.h - where the server listens: the unix socket and its lock, the TCP address and its TLS.
#ifndef BKV_RPC_LISTEN_H
#define BKV_RPC_LISTEN_H

#include "daemon/rpc/server.h"

#include <grpc/grpc.h>

// Takes the lock of config->socket_path, clears a socket away that nobody serves any more, binds and sets its permissions.
// *lock_fd holds the lock until it is closed. In use: FAILED_PRECONDITION.
bkv_status_t bkv_listen_unix(grpc_server *server, const bkv_server_config_t *config, int *lock_fd, bkv_error_t *err);

// Binds config->tcp; *port is the one bound. Statuses as bkv_server_start.
bkv_status_t bkv_listen_tcp(grpc_server *server, const bkv_server_config_t *config, int *port, bkv_error_t *err);

// Splits "host:port" ("[::1]:7420" for IPv6); host has room for `room` bytes. INVALID_ARGUMENT.
bkv_status_t bkv_listen_parse(const char *address, char *host, size_t room, uint16_t *port, bkv_error_t *err);

// Whether every address that host stands for is loopback. An empty host stands for all interfaces: no. INVALID_ARGUMENT when
// it stands for none.
bkv_status_t bkv_listen_is_loopback(const char *host, bool *loopback, bkv_error_t *err);

#endif
