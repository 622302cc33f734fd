// peer.c - (contract only so far)
#include "daemon/rpc/call.h"

static void refuse(bkv_call_t *call) {
    bkv_error_t error;
    bkv_fail(&error, BKV_UNIMPLEMENTED, "not yet");
    bkv_call_fail(call, &error);
}
void bkv_handle_peer_have(bkv_call_t *call, bkv_bump_t *bump) {
    (void)bump;
    refuse(call);
}
void bkv_handle_peer_fetch(bkv_call_t *call, bkv_bump_t *bump) {
    (void)bump;
    refuse(call);
}
void bkv_handle_peer_store(bkv_call_t *call, bkv_bump_t *bump) {
    (void)bump;
    refuse(call);
}
void bkv_handle_peer_forget(bkv_call_t *call, bkv_bump_t *bump) {
    (void)bump;
    refuse(call);
}
void bkv_handle_peer_drain(bkv_call_t *call, bkv_bump_t *bump) {
    (void)bump;
    refuse(call);
}
