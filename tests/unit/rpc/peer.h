// peer.h - a blocking gRPC client of a few functions, and a daemon's inside (store, pipeline, server) for it to talk to.
#ifndef BKV_TEST_RPC_PEER_H
#define BKV_TEST_RPC_PEER_H

#include "daemon/rpc/server.h"

#include "balancekv.pb-c.h"

#include <grpc/grpc.h>

// ---- the daemon's side ----

typedef struct peer_daemon {
    bkv_store_t *store;
    bkv_pipeline_t *pipeline;
    bkv_server_t *server;
    char directory[64], socket[96];
} peer_daemon_t;

// A configuration that listens on a socket in a new directory; change what a test is about, then peer_daemon_start.
void peer_daemon_init(peer_daemon_t *daemon, bkv_server_config_t *config);
void peer_daemon_start(peer_daemon_t *daemon, const bkv_server_config_t *config); // must succeed
void peer_daemon_stop(peer_daemon_t *daemon);                                     // a server still running is stopped
void peer_daemon_clear(peer_daemon_t *daemon);                                    // store, pipeline, directory

// A gauge of the store's: records pinned by transfers in flight.
uint64_t peer_daemon_pinned(const peer_daemon_t *daemon);

// ---- the client's side ----

typedef struct peer_call {
    grpc_call *call;
    grpc_completion_queue *queue;
    grpc_metadata_array initial, trailing;
    bool started; // initial metadata has been asked for
    grpc_status_code code;
    char *details;       // after peer_end
    char request_id[32]; // likewise: the trailing metadata's
} peer_call_t;

grpc_channel *peer_connect(const char *target);

// Starts a call; timeout_ms 0: no deadline.
void peer_start(grpc_channel *channel, const char *method, unsigned timeout_ms, peer_call_t *call);
bool peer_send(peer_call_t *call, const void *bytes, size_t length); // false: the call has ended
void peer_send_last(peer_call_t *call);                              // half-close
void *peer_receive(peer_call_t *call, size_t *length);               // malloc'd; NULL: no more
void peer_cancel(peer_call_t *call);
grpc_status_code peer_end(peer_call_t *call); // waits for the status; call->details and request_id are set
void peer_free(peer_call_t *call);

// One request, one reply of that type (unpacked, the caller frees it), NULL when the call failed: see *code and the details,
// which are copied to text (NULL: not wanted).
void *peer_unary(grpc_channel *channel, const char *method, const ProtobufCMessage *request,
                 const ProtobufCMessageDescriptor *reply, grpc_status_code *code, char text[256]);

#endif
