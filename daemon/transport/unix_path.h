// unix_path.h - the path of a unix socket: one daemon at a time, and no leftovers of an earlier one. Used for the gRPC socket
// (rpc/listen.c) and for the fd socket (fd_socket.c).
#ifndef BKV_TRANSPORT_UNIX_PATH_H
#define BKV_TRANSPORT_UNIX_PATH_H

#include "kernels/status.h"

// Takes the lock file path + ".lock", which *fd holds until it is closed. FAILED_PRECONDITION ("listen.socket: ..."): another
// daemon has it.
bkv_status_t bkv_unix_path_lock(const char *path, int *fd, bkv_error_t *err);

// Removes a socket that its daemon left behind; nobody serves it, as the caller holds the lock. FAILED_PRECONDITION: something
// else is there.
bkv_status_t bkv_unix_path_clear(const char *path, bkv_error_t *err);

#endif
