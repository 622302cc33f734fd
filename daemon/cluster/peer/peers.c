// peers.c - (contract only so far)
#include "daemon/cluster/peer/peers.h"

bkv_status_t bkv_peers_create(const bkv_peers_config_t *config, bkv_peers_t **peers, bkv_error_t *err) {
    (void)config, (void)err;
    *peers = NULL;
    return BKV_OK;
}
void bkv_peers_destroy(bkv_peers_t *peers) {
    (void)peers;
}
void bkv_peers_keep(bkv_peers_t *peers, const bkv_view_t *view, const bkv_view_t *other) {
    (void)peers, (void)view, (void)other;
}
bkv_peer_t *bkv_peers_get(bkv_peers_t *peers, const bkv_member_t *member) {
    (void)peers, (void)member;
    return NULL;
}
bkv_peer_t *bkv_peer_hold(bkv_peer_t *peer) {
    return peer;
}
void bkv_peer_release(bkv_peer_t *peer) {
    (void)peer;
}
void bkv_peers_metrics(bkv_peers_t *peers, bkv_peers_metrics_t *metrics) {
    (void)peers;
    *metrics = (bkv_peers_metrics_t){0};
}
void bkv_peer_get_health(const bkv_peer_t *peer, bkv_peer_health_t *health) {
    (void)peer;
    *health = (bkv_peer_health_t){0};
}
bkv_status_t bkv_peer_have(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                           bkv_peer_have_t done, void *user, bkv_error_t *err) {
    (void)peer, (void)names, (void)count, (void)deadline_ms, (void)done, (void)user;
    return bkv_fail(err, BKV_UNIMPLEMENTED, "peers");
}
bkv_status_t bkv_peer_fetch(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                            const bkv_fetch_sink_t *sink, void *user, bkv_peer_call_t **call, bkv_error_t *err) {
    (void)peer, (void)names, (void)count, (void)deadline_ms, (void)sink, (void)user, (void)call;
    return bkv_fail(err, BKV_UNIMPLEMENTED, "peers");
}
void bkv_peer_cancel(bkv_peer_call_t *call) {
    (void)call;
}
bkv_status_t bkv_peer_store(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                            bkv_peer_store_t done, void *user, bkv_error_t *err) {
    (void)peer, (void)names, (void)count, (void)deadline_ms, (void)done, (void)user;
    return bkv_fail(err, BKV_UNIMPLEMENTED, "peers");
}
bkv_status_t bkv_peer_forget(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                             bkv_peer_forget_t done, void *user, bkv_error_t *err) {
    (void)peer, (void)names, (void)count, (void)deadline_ms, (void)done, (void)user;
    return bkv_fail(err, BKV_UNIMPLEMENTED, "peers");
}
bkv_status_t bkv_peer_drain(bkv_peer_t *peer, bkv_drain_order_t order, uint64_t deadline_ms, bkv_peer_drain_t done, void *user,
                            bkv_error_t *err) {
    (void)peer, (void)order, (void)deadline_ms, (void)done, (void)user;
    return bkv_fail(err, BKV_UNIMPLEMENTED, "peers");
}
