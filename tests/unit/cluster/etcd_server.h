// etcd_server.h - a real etcd of a test's own, on free ports and in a folder that goes with it; to be killed, stopped, wiped.
#ifndef BKV_TEST_CLUSTER_ETCD_SERVER_H
#define BKV_TEST_CLUSTER_ETCD_SERVER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

typedef struct etcd_server {
    char folder[64];
    int port, peer_port;
    bool tls;             // with the files of etcd_server_certificates
    uint64_t quota_bytes; // 0: etcd's own
    char endpoint[32];
    pid_t pid; // 0: not running
} etcd_server_t;

// Makes the folder and chooses ports; starts nothing.
void etcd_server_init(etcd_server_t *server);
void etcd_server_start(etcd_server_t *server);
void etcd_server_kill(etcd_server_t *server); // kill -9, as a power cut
void etcd_server_stop(etcd_server_t *server); // SIGSTOP; returns when it has stopped
void etcd_server_continue(etcd_server_t *server);
void etcd_server_wipe(etcd_server_t *server);  // while it is not running: its data are gone
void etcd_server_clear(etcd_server_t *server); // kills it, removes the folder

// Runs `etcdctl arguments` and waits until it succeeds, for at most 20 s, as etcd may just be starting.
void etcd_server_control(const etcd_server_t *server, const char *arguments);

// Makes a CA, a certificate for 127.0.0.1 and one for a client: folder/{ca,server,client,other-ca}.{pem,key}.
void etcd_server_certificates(etcd_server_t *server);

// A port that nobody listens on.
int free_port(void);

// A socket that takes connections and never says a word.
int silent_endpoint(int *port);

#endif
