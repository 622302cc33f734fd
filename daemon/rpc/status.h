// status.h - our statuses as gRPC's: the only place where the two meet on the daemon's side.
#ifndef BKV_RPC_STATUS_H
#define BKV_RPC_STATUS_H

#include "kernels/status.h"

#include <grpc/status.h>

// The code to put on the wire; GRPC_STATUS_UNKNOWN for a number that is none of ours.
grpc_status_code bkv_status_to_grpc(bkv_status_t status);

#endif
