// verbs.c - (contract only so far)
#include "daemon/cluster/peer/verbs.h"

bkv_status_t bkv_peer_verbs_open(bkv_peers_t *peers, const bkv_peers_config_t *config, bkv_error_t *err) {
    (void)peers, (void)config, (void)err;
    return BKV_OK;
}
void bkv_peer_verbs_close(bkv_peers_t *peers) {
    (void)peers;
}
void bkv_peer_verbs_forget(bkv_peer_t *peer) {
    (void)peer;
}
bool bkv_peer_verbs_fetch(bkv_peer_t *peer, bkv_peer_fetch_t *fetch) {
    (void)peer, (void)fetch;
    return false;
}

bkv_serve_t *bkv_peers_serve(const bkv_peers_t *peers) {
    (void)peers;
    return NULL;
}
