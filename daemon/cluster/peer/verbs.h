// verbs.h - one-sided reads from another member's arena: what a Fetch gives to RDMA before it asks for a stream.
#ifndef BKV_PEER_VERBS_H
#define BKV_PEER_VERBS_H

#include "daemon/cluster/peer/internal.h"

// Opens the device that config names, for both ends: peers->verbs, which stays NULL where there is none and "auto" or "off" was
// said. The store's arena is registered when a link is first wanted, by either end. INVALID_ARGUMENT, UNIMPLEMENTED: a device that
// was named cannot be used.
bkv_status_t bkv_peer_verbs_open(bkv_peers_t *peers, const bkv_peers_config_t *config, bkv_error_t *err);

// No call is under way any more, and there are no peers. Also after an _open that failed or opened nothing.
void bkv_peer_verbs_close(bkv_peers_t *peers);

// Ends peer->verbs, the link to this peer, if there is one: the last reference to the peer is gone, so no call uses it.
void bkv_peer_verbs_forget(bkv_peer_t *peer);

// A fetch is to start, on its caller's thread: must not block and must not call back. False: nothing was done with it, it goes by
// stream. True: it is read from here, one callback after the other (bkv_peer_fetch_begin, bkv_peer_fetch_end); then, in every
// case and once, bkv_peer_fetch_rest is called on a thread of the peers', and the fetch is no more ours. That must come soon
// after fetch->call.cancelled is set, or its deadline_ms passes.
bool bkv_peer_verbs_fetch(bkv_peer_t *peer, bkv_peer_fetch_t *fetch);

#endif
