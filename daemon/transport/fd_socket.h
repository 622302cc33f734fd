// fd_socket.h - the daemon's end of the fd socket (proto/fd_socket.h): descriptors out and in, and sessions that end with their
// connection.
#ifndef BKV_TRANSPORT_FD_SOCKET_H
#define BKV_TRANSPORT_FD_SOCKET_H

#include "daemon/transport/transport.h"
#include "proto/fd_socket.h"

typedef struct bkv_fd_socket bkv_fd_socket_t;

#define BKV_FD_STRANGERS   128  // connections that have not named a session yet; more wait to be accepted
#define BKV_FD_GRACE_MS    100  // how long each may take to do so, however many others wait
#define BKV_FD_STRANGER_MS 3000 // and how long when nobody waits

// Binds config.socket_path + BKV_FD_SUFFIX with config.socket_mode and starts the thread that serves it. A lock file beside it
// keeps two daemons apart; a socket that nobody serves any more is cleared away. FAILED_PRECONDITION: another daemon has it.
bkv_status_t bkv_fd_socket_create(bkv_transports_t *transports, bkv_fd_socket_t **socket, bkv_error_t *err);

// Closes all connections, which ends no session, and removes the socket. NULL is allowed.
void bkv_fd_socket_destroy(bkv_fd_socket_t *socket);

// ---- the protocol, apart from sockets ----

// What a connection has said so far.
typedef struct bkv_fd_peer {
    bool named; // a session, which it holds
    bkv_session_id_t session;
} bkv_fd_peer_t;

// An answer. `session` keeps fd open until bkv_fd_answer_release.
typedef struct bkv_fd_answer {
    bkv_fd_message_t message;
    int fd;                 // to be sent along; -1: none
    bkv_session_t *session; // NULL: none
} bkv_fd_answer_t;

// One datagram of `length` bytes, which came with `fd` (-1: none), taken over in every case. Returns whether the connection goes
// on: false without an answer (answer->message.magic is 0) for what is no message of ours or comes out of turn, false with one
// where no session was to be had.
bool bkv_fd_handle(bkv_transports_t *transports, bkv_fd_peer_t *peer, const void *bytes, size_t length, int fd,
                   bkv_fd_answer_t *answer);
void bkv_fd_answer_release(bkv_fd_answer_t *answer);

#endif
