// peer.h - who calls: another daemon of the cluster, an operator, or anybody; and what the Peer service's handlers share.
#ifndef BKV_RPC_PEER_H
#define BKV_RPC_PEER_H

#include "daemon/rpc/call.h"

// Whether a daemon of the cluster calls: by TCP, and where that has TLS with a certificate that listen.tls_client_ca vouches for
// and that carries the DNS name cluster.peer_name. FAILED_PRECONDITION: this daemon runs alone; PERMISSION_DENIED says what is
// wrong.
bool bkv_call_is_peer(const bkv_call_t *call, bkv_error_t *err);

// Whether an operator calls: by the unix socket, with the certificate of a daemon of the cluster, or where TCP is plain from this
// host. PERMISSION_DENIED.
bool bkv_call_is_operator(const bkv_call_t *call, bkv_error_t *err);

// The request of a call of Peer's other than Store, unpacked into bump, if a peer has sent it. On failure the call has been ended.
const ProtobufCMessage *bkv_peer_request(bkv_call_t *call, const ProtobufCMessageDescriptor *type, bkv_bump_t *bump);

// Names as they go from daemon to daemon, 48 bytes each; *names lies where the request's bytes do. INVALID_ARGUMENT: these are not
// 1 or more names; RESOURCE_EXHAUSTED: more than peer_batch.
bkv_status_t bkv_peer_names(const bkv_server_t *server, const ProtobufCBinaryData *bytes, const bkv_name_t **names,
                            uint32_t *count, bkv_error_t *err);

#endif
