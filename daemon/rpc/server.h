// server.h - the gRPC C core server: listens, turns calls into pipeline requests, and answers.
//
// Threads: `threads` completion-queue threads run the short parts of every call; long work is the pipeline's, whose callbacks
// start the answering batches. Nothing blocks a completion-queue thread.
#ifndef BKV_SERVER_H
#define BKV_SERVER_H

#include "daemon/cluster/cluster.h"
#include "daemon/observe/metrics.h"
#include "daemon/pipeline/pipeline.h"
#include "daemon/transport/transport.h"

typedef struct bkv_server bkv_server_t;

typedef struct bkv_server_config {
    bkv_pipeline_t *pipeline; // outlive the server
    bkv_store_t *store;
    bkv_transports_t *transports;       // outlive the server; NULL: everything goes inline
    bkv_cluster_t *cluster;             // outlives the server; NULL: this daemon runs alone
    const char *peer_name;              // DNS name in the certificates of the cluster's daemons, who alone may use Peer
    const bkv_metric_source_t *sources; // for Stats; the server adds its own
    size_t source_count;
    const char *version, *backend;
    uint64_t boot_epoch;
    const char *socket_path; // NULL or "": no unix socket
    unsigned socket_mode;
    const char *tcp; // NULL or "": no TCP
    bool insecure;
    const char *tls_cert, *tls_key, *tls_client_ca; // NULL or "": none
    uint32_t threads, max_calls;
    uint32_t max_batch, peer_batch; // names of one call: a client's, another daemon's
    uint64_t max_message, max_block;
    uint64_t op_timeout_ms;
} bkv_server_config_t;

// Counters: X(name, is_counter, help)
#define BKV_SERVER_METRICS(X)                                                                                                  \
    X(calls_total, true, "calls accepted")                                                                                     \
    X(calls_failed_total, true, "calls that ended with an error status")                                                       \
    X(calls_cancelled_total, true, "calls that the client gave up or that broke off")                                          \
    X(calls_open, false, "calls in flight")                                                                                    \
    X(bytes_received_total, true, "payload bytes received")                                                                    \
    X(bytes_sent_total, true, "record bytes sent")

// Binds and serves. A socket in use by a live daemon (its lock file, socket_path + ".lock", is flocked) or a port taken:
// FAILED_PRECONDITION with the address; a non-loopback TCP address without TLS or `insecure`, or bad TLS files:
// INVALID_ARGUMENT.
bkv_status_t bkv_server_start(const bkv_server_config_t *config, bkv_server_t **server, bkv_error_t *err);

// The port bound when config->tcp ended in ":0"; 0 without TCP.
int bkv_server_port(const bkv_server_t *server);

// May be changed while serving (SIGHUP).
void bkv_server_set_op_timeout(bkv_server_t *server, uint64_t op_timeout_ms);

// Begins the end: health says NOT_SERVING, new calls get UNAVAILABLE, calls in flight go on.
void bkv_server_drain(bkv_server_t *server);

// Calls in flight now.
uint32_t bkv_server_open_calls(const bkv_server_t *server);

// Cancels what is still in flight, stops and frees. Returns when no handler runs and no pin is held by the server. The pipeline
// must still be alive.
void bkv_server_stop(bkv_server_t *server);

#endif
