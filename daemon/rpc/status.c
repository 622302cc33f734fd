// status.c - the mapping itself. bkv_status_t was given gRPC's numbers so that it cannot drift; this proves that it has not.
#include "daemon/rpc/status.h"

// BKV_BUSY is the one name that differs: callers read it as UNAVAILABLE, "retry after a pause".
#define GRPC_STATUS_BUSY GRPC_STATUS_UNAVAILABLE

#define X(name, code, text) _Static_assert((int)GRPC_STATUS_##name == (code), "BKV_" #name " has gRPC's number");
BKV_STATUS_LIST(X)
#undef X

grpc_status_code bkv_status_to_grpc(bkv_status_t status) {
    switch (status) {
#define X(name, code, text)                                                                                                    \
    case BKV_##name:                                                                                                           \
        return GRPC_STATUS_##name;
        BKV_STATUS_LIST(X)
#undef X
    }
    return GRPC_STATUS_UNKNOWN;
}
