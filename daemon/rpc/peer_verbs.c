// peer_verbs.c - (contract only so far)
#include "daemon/rpc/call.h"

static void refuse(bkv_call_t *call) {
    bkv_error_t error;
    bkv_fail(&error, BKV_UNIMPLEMENTED, "not yet");
    bkv_call_fail(call, &error);
}
void bkv_handle_peer_link(bkv_call_t *call, bkv_bump_t *bump) {
    (void)bump;
    refuse(call);
}
void bkv_handle_peer_locate(bkv_call_t *call, bkv_bump_t *bump) {
    (void)bump;
    refuse(call);
}
