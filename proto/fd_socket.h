// fd_socket.h - the messages of the fd socket, by which file descriptors pass between a client and the daemon: gRPC cannot.
//
// It is a unix socket of type SOCK_SEQPACKET beside the daemon's own, at its path plus BKV_FD_SUFFIX and with the same
// permissions. A client connects, sends one bkv_fd_message_t, and is answered by one. Fields are in the host's byte order:
// both ends are on the same host. The connection then holds the session: when it closes, for whatever reason, the session
// ends. A session may be held by one connection only. A further message on the same connection is allowed (GIVE, several
// times); anything else closes it.
#ifndef BKV_FD_SOCKET_H
#define BKV_FD_SOCKET_H

#include <stdint.h>

#define BKV_FD_SUFFIX ".fd"
#define BKV_FD_MAGIC  0x46564b42u // "BKVF"

typedef enum bkv_fd_op {
    BKV_FD_TAKE = 1, // asks for the memfd of an shm session; the answer carries it (SCM_RIGHTS)
    BKV_FD_GIVE = 2, // carries the descriptor of allocation `index` of a cuda-ipc session
    BKV_FD_HOLD = 3, // carries nothing: only holds the session
} bkv_fd_op_t;

// A request, and an answer: the same op, status and message filled in.
typedef struct bkv_fd_message {
    uint32_t magic;
    uint32_t op;
    uint8_t session[16];
    uint32_t index;
    uint32_t status;  // of the answer: a bkv_status_t; 0 in requests
    uint64_t bytes;   // of the window (TAKE's answer)
    char message[88]; // of the answer, NUL-terminated: why
} bkv_fd_message_t;

_Static_assert(sizeof(bkv_fd_message_t) == 128, "the fd socket's messages have 128 bytes");

#endif
