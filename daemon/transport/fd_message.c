// fd_message.c - what the messages of the fd socket mean; no socket is touched here. See proto/fd_socket.h for the protocol.
#include "daemon/transport/session.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

// Whether these bytes are a message of ours, and it is its turn: any may be the first, after it only GIVE for the same session.
static bool is_in_order(const bkv_fd_peer_t *peer, const bkv_fd_message_t *request, bool has_fd) {
    bool known = request->op == BKV_FD_TAKE || request->op == BKV_FD_GIVE || request->op == BKV_FD_HOLD;
    if (request->magic != BKV_FD_MAGIC || !known || request->status != 0 || has_fd != (request->op == BKV_FD_GIVE)) {
        return false;
    }
    return !peer->named || (request->op == BKV_FD_GIVE && memcmp(request->session, &peer->session, sizeof(peer->session)) == 0);
}

static bkv_status_t claim(bkv_transports_t *transports, bkv_fd_peer_t *peer, const bkv_session_id_t *id,
                          bkv_session_t **session, bkv_error_t *err) {
    if (!peer->named) {
        bkv_status_t status = bkv_session_hold(transports, id, err);
        if (status != BKV_OK) {
            return status;
        }
        *peer = (bkv_fd_peer_t){.named = true, .session = *id};
    }
    return bkv_session_find(transports, id, session, err);
}

// A descriptor that came is taken over.
static bkv_status_t perform(bkv_session_t *session, const bkv_fd_message_t *request, int fd, bkv_fd_answer_t *answer,
                            bkv_error_t *err) {
    const bkv_transport_ops_t *ops = session->ops;
    switch (request->op) {
    case BKV_FD_TAKE:
        return ops->take_fd == NULL ? bkv_fail(err, BKV_INVALID_ARGUMENT, "op: %s has no descriptor for its clients", ops->name)
                                    : ops->take_fd(session->self, session->state, &answer->fd, &answer->message.bytes, err);
    case BKV_FD_GIVE:
        if (ops->give_fd == NULL) {
            close(fd);
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "op: %s takes no descriptors", ops->name);
        }
        return ops->give_fd(session->self, session->state, request->index, fd, err);
    default:
        return BKV_OK;
    }
}

bool bkv_fd_handle(bkv_transports_t *transports, bkv_fd_peer_t *peer, const void *bytes, size_t length, int fd,
                   bkv_fd_answer_t *answer) {
    bkv_fd_message_t request;
    *answer = (bkv_fd_answer_t){.fd = -1};
    if (length == sizeof(request)) {
        memcpy(&request, bytes, sizeof(request));
    }
    if (length != sizeof(request) || !is_in_order(peer, &request, fd >= 0)) {
        if (fd >= 0) {
            close(fd);
        }
        return false;
    }
    answer->message = (bkv_fd_message_t){.magic = BKV_FD_MAGIC, .op = request.op, .index = request.index};
    memcpy(answer->message.session, request.session, sizeof(answer->message.session));
    bkv_session_id_t id;
    memcpy(&id, request.session, sizeof(id));
    bkv_error_t error = {.status = BKV_OK};
    bool found = claim(transports, peer, &id, &answer->session, &error) == BKV_OK;
    if (found) {
        perform(answer->session, &request, fd, answer, &error);
    } else if (fd >= 0) {
        close(fd);
    }
    answer->message.status = error.status;
    snprintf(answer->message.message, sizeof(answer->message.message), "%.*s", (int)sizeof(answer->message.message) - 1,
             error.status != BKV_OK ? error.message : "");
    return found;
}

void bkv_fd_answer_release(bkv_fd_answer_t *answer) {
    if (answer->session != NULL) {
        bkv_session_release(answer->session);
    }
    *answer = (bkv_fd_answer_t){.fd = -1};
}
