// member.h - a daemon's inside that is of a cluster, listens on TCP, and another daemon's calls to it. Its etcd is one that cannot
// be reached: what the Peer service answers, it answers from its own store.
#ifndef BKV_TEST_RPC_MEMBER_H
#define BKV_TEST_RPC_MEMBER_H

#include "rig.h"

#include "daemon/cluster/cluster.h"

#include "peer.pb-c.h"

typedef struct member {
    rig_t rig;              // by the unix socket, as a worker
    grpc_channel *channel;  // by TCP, as another daemon
    uint64_t record_length; // of the records of member_put
} member_t;

void member_open(member_t *member);
void member_close(member_t *member);

// Of records of the spec that is open.
bkv_name_t member_name(const member_t *member, uint32_t number);

// Puts blocks of other contents as a worker would, numbered from `first` on.
void member_put(member_t *member, uint32_t first, uint32_t count);

// Calls of Peer by TCP. The replies are the caller's; NULL: see *code and text.
Balancekv__Cluster__V1__HaveResponse *member_have(member_t *member, const void *names, size_t bytes, grpc_status_code *code,
                                                  char text[256]);
Balancekv__Cluster__V1__ForgetResponse *member_forget(member_t *member, const void *names, size_t bytes, grpc_status_code *code,
                                                      char text[256]);

// A record's bytes, fetched; NULL: it is not there. *ttl_ms may be NULL.
uint8_t *member_fetch(member_t *member, uint32_t number, size_t *length, uint64_t *ttl_ms);

// Store, message by message. record NULL: data only. false: the call has ended.
void member_start_store(member_t *member, unsigned timeout_ms, peer_call_t *call);
bool member_send(peer_call_t *call, const Balancekv__Cluster__V1__StoreRecord *record, const void *data, size_t data_bytes);
bool member_send_record(peer_call_t *call, const bkv_name_t *name, uint64_t ttl_ms, const void *record, size_t length);

// Ends the stream; the reply, the caller's, or NULL: call->code and details.
Balancekv__Cluster__V1__StoreResponse *member_end_store(peer_call_t *call);

#endif
