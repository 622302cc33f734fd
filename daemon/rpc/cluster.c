// cluster.c - (contract only so far)
#include "daemon/rpc/call.h"

static void refuse(bkv_call_t *call) {
    bkv_error_t error;
    bkv_fail(&error, BKV_FAILED_PRECONDITION, "cluster.etcd: this daemon runs alone");
    bkv_call_fail(call, &error);
}
void bkv_handle_cluster(bkv_call_t *call, bkv_bump_t *bump) {
    (void)bump;
    refuse(call);
}
void bkv_handle_where(bkv_call_t *call, bkv_bump_t *bump) {
    (void)bump;
    refuse(call);
}
void bkv_handle_drain(bkv_call_t *call, bkv_bump_t *bump) {
    (void)bump;
    refuse(call);
}
