// rig.h - a daemon's inside with a client at its socket, and the few calls that most tests of the server need.
#ifndef BKV_TEST_RPC_RIG_H
#define BKV_TEST_RPC_RIG_H

#include "peer.h"
#include "sharing.h"

#define RIG_TOKENS 64
#define RIG_HEADS  2
#define RIG_DIM    32
#define RIG_BLOCK  ((size_t)RIG_TOKENS * RIG_HEADS * 2 * RIG_DIM * sizeof(float)) // one layer, K and V

typedef struct rig {
    peer_daemon_t daemon;
    bkv_server_config_t config;
    grpc_channel *channel;
    char target[128];
    uint8_t spec_id[BKV_SPEC_ID_BYTES];
    Balancekv__V1__Codec codec; // of the specs opened next; rig_start makes it raw
} rig_t;

void rig_start(rig_t *rig); // after peer_daemon_init and changes to rig->config
void rig_open(rig_t *rig);  // all of it, and a spec of RIG_TOKENS
void rig_close(rig_t *rig);

// The same with transports (sharing.h), which are rig->config.transports.
void rig_open_sharing(rig_t *rig);

// Attaches so much memory by shm; must succeed. The memory is zeroed, and lives as long as the rig.
uint8_t *rig_attach(rig_t *rig, size_t bytes, uint8_t session[BKV_SESSION_BYTES]);

// The test model with blocks of so many tokens; it is the one that the functions below use from then on.
void rig_open_spec(rig_t *rig, uint32_t block_tokens);

ProtobufCBinaryData rig_bytes(const void *data, size_t length);
void rig_key(uint32_t number, uint8_t key[BKV_KEY_BYTES]);
float *rig_payload(size_t bytes, uint32_t seed); // finite numbers; the caller's to free

// Messages of a Put: one that begins a block, one with data only. false: the call has ended.
bool rig_send_put(peer_call_t *call, const rig_t *rig, uint32_t number, uint32_t tokens, size_t payload_bytes, const void *data,
                  size_t data_bytes);
bool rig_send_block(peer_call_t *call, const Balancekv__V1__PutBlock *block, const void *data, size_t data_bytes);
bool rig_send_data(peer_call_t *call, const void *data, size_t data_bytes);

void rig_put(rig_t *rig, uint32_t number, uint32_t tokens, const void *payload, size_t bytes); // must succeed
void rig_start_get(rig_t *rig, const uint32_t *numbers, size_t count, unsigned timeout_ms, peer_call_t *call);
void rig_start_get_to(rig_t *rig, const uint32_t *numbers, size_t count, Balancekv__V1__Place *place, peer_call_t *call);
Balancekv__V1__LookupResponse *rig_lookup(rig_t *rig, uint32_t first, size_t count, grpc_status_code *code, char text[256]);
uint32_t rig_resident(rig_t *rig, uint32_t first, size_t count); // how many of these keys

// What the server does a moment after a call has ended; false when it has not after five seconds.
bool rig_becomes_unpinned(const rig_t *rig);
bool rig_reaches_open_calls(const rig_t *rig, uint32_t calls);

#endif
