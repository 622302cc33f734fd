// fd_socket.c - the fd socket itself: binding it, and one thread that serves its connections with epoll. What messages mean is
// fd_message.c's.
//
// A connection is a stranger until it names a session, then a holder. Strangers are few and may not keep silent for long: while
// there is no room for more of them, nobody is accepted, and then those go that have had their time. Holders are as many as there
// are sessions, and those whose session has ended are closed by the next sweep. So a flood makes others wait a little, and keeps
// nobody out.
#include "daemon/transport/fd_socket.h"

#include "daemon/transport/internal.h"
#include "daemon/transport/session.h"
#include "daemon/transport/unix_path.h"

#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define SWEEP_MS 500
#define EVENTS   32
#define BACKLOG  128

typedef struct connection {
    int fd;
    uint64_t since_ms;
    bkv_fd_peer_t peer;
    TAILQ_ENTRY(connection) link; // in strangers until it has named a session, then in holders
} connection_t;

TAILQ_HEAD(connections, connection);

struct bkv_fd_socket {
    bkv_transports_t *transports;
    struct sockaddr_un address;
    int lock, listener, stop, epoll; // descriptors; -1: none
    bool bound, started;
    bool paused; // nobody is accepted before resume_ms
    uint64_t resume_ms, swept_ms;
    uint32_t stranger_count, holder_count;
    struct connections strangers, holders; // oldest first
    pthread_t thread;
};

// ---- connections ----

static void watch(bkv_fd_socket_t *fds, int fd, void *what) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = what};
    int rc = epoll_ctl(fds->epoll, EPOLL_CTL_ADD, fd, &event);
    assert(rc == 0); // fails only for descriptors that are none, and without memory
    (void)rc;
}

static void connection_free(connection_t *connection) {
    close(connection->fd); // which also takes it out of the epoll set
    free(connection);
}

static void stranger_close(bkv_fd_socket_t *fds, connection_t *stranger) {
    TAILQ_REMOVE(&fds->strangers, stranger, link);
    fds->stranger_count--;
    connection_free(stranger);
}

// With it ends the session that it holds, if there is still one.
static void holder_close(bkv_fd_socket_t *fds, connection_t *holder) {
    TAILQ_REMOVE(&fds->holders, holder, link);
    fds->holder_count--;
    bkv_session_lose(fds->transports, &holder->peer.session);
    connection_free(holder);
}

static void connection_close(bkv_fd_socket_t *fds, connection_t *connection) {
    if (connection->peer.named) {
        holder_close(fds, connection);
    } else {
        stranger_close(fds, connection);
    }
}

// Or it would stay readable, and this thread would spin.
static void pause_accepting(bkv_fd_socket_t *fds, uint64_t now_ms) {
    fds->paused = true;
    fds->resume_ms = now_ms + BKV_FD_GRACE_MS;
    epoll_ctl(fds->epoll, EPOLL_CTL_DEL, fds->listener, NULL);
}

// Returns whether there may be more.
static bool accept_one(bkv_fd_socket_t *fds, uint64_t now_ms) {
    if (fds->stranger_count == BKV_FD_STRANGERS) {
        pause_accepting(fds, now_ms);
        return false;
    }
    int fd = accept4(fds->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            pause_accepting(fds, now_ms);
        }
        return false;
    }
    connection_t *connection = malloc(sizeof(*connection));
    if (connection == NULL) {
        close(fd);
        return false;
    }
    *connection = (connection_t){.fd = fd, .since_ms = now_ms};
    TAILQ_INSERT_TAIL(&fds->strangers, connection, link);
    fds->stranger_count++;
    watch(fds, fd, connection);
    return true;
}

static void accept_some(bkv_fd_socket_t *fds, uint64_t now_ms) {
    for (int i = 0; i < BACKLOG && accept_one(fds, now_ms); i++) {
    }
}

static void close_strangers(bkv_fd_socket_t *fds, uint64_t now_ms, uint64_t age_ms) {
    connection_t *stranger = TAILQ_FIRST(&fds->strangers), *next;
    for (; stranger != NULL && now_ms - stranger->since_ms >= age_ms; stranger = next) {
        next = TAILQ_NEXT(stranger, link);
        stranger_close(fds, stranger);
    }
}

// Closes whom nobody needs any more.
static void sweep(bkv_fd_socket_t *fds, uint64_t now_ms) {
    close_strangers(fds, now_ms, BKV_FD_STRANGER_MS);
    connection_t *holder = TAILQ_FIRST(&fds->holders), *next;
    for (; holder != NULL; holder = next) {
        next = TAILQ_NEXT(holder, link);
        if (!bkv_session_alive(fds->transports, &holder->peer.session)) {
            holder_close(fds, holder);
        }
    }
    fds->swept_ms = now_ms;
}

// ---- messages ----

// Takes the descriptors out of a message. Exactly one is kept; more are closed, and then the message is none of ours.
static bool collect_fd(struct msghdr *header, int *fd) {
    bool sound = (header->msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0;
    *fd = -1;
    for (struct cmsghdr *control = CMSG_FIRSTHDR(header); control != NULL; control = CMSG_NXTHDR(header, control)) {
        if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) {
            sound = false;
            continue;
        }
        size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int one;
            memcpy(&one, CMSG_DATA(control) + i * sizeof(int), sizeof(one));
            if (*fd < 0) {
                *fd = one;
            } else {
                close(one);
                sound = false;
            }
        }
    }
    if (!sound && *fd >= 0) {
        close(*fd);
        *fd = -1;
    }
    return sound;
}

static bool send_answer(int fd, const bkv_fd_answer_t *answer) {
    struct iovec bytes = {.iov_base = (void *)&answer->message, .iov_len = sizeof(answer->message)};
    union {
        char room[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {.room = {0}};
    struct msghdr header = {.msg_iov = &bytes, .msg_iovlen = 1};
    if (answer->fd >= 0) {
        header.msg_control = control.room;
        header.msg_controllen = sizeof(control.room);
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        *first = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
        memcpy(CMSG_DATA(first), &answer->fd, sizeof(int));
    }
    return sendmsg(fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)sizeof(answer->message);
}

// One datagram. Returns whether the connection goes on.
static bool serve(bkv_fd_socket_t *fds, connection_t *connection) {
    bkv_fd_message_t message;
    struct iovec bytes = {.iov_base = &message, .iov_len = sizeof(message)};
    union {
        char room[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct msghdr header = {
        .msg_iov = &bytes, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof(control.room)};
    ssize_t length = recvmsg(connection->fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (length < 0) {
        return errno == EAGAIN || errno == EINTR;
    }
    int fd;
    if (!collect_fd(&header, &fd)) {
        return false;
    }
    bool was_named = connection->peer.named;
    bkv_fd_answer_t answer;
    bool goes_on = bkv_fd_handle(fds->transports, &connection->peer, &message, (size_t)length, fd, &answer);
    if (connection->peer.named && !was_named) {
        TAILQ_REMOVE(&fds->strangers, connection, link);
        TAILQ_INSERT_TAIL(&fds->holders, connection, link);
        fds->stranger_count--;
        fds->holder_count++;
    }
    bool sent = answer.message.magic == 0 || send_answer(connection->fd, &answer);
    bkv_fd_answer_release(&answer);
    return goes_on && sent;
}

// ---- the thread ----

// After the events of a turn, which may still name connections that this closes.
static void keep_bounds(bkv_fd_socket_t *fds, uint64_t now_ms) {
    if (fds->paused && now_ms >= fds->resume_ms) {
        if (fds->stranger_count == BKV_FD_STRANGERS) {
            close_strangers(fds, now_ms, BKV_FD_GRACE_MS);
        }
        fds->paused = false;
        watch(fds, fds->listener, fds);
    }
    if (now_ms - fds->swept_ms >= SWEEP_MS || fds->holder_count > fds->transports->config.max_sessions) {
        sweep(fds, now_ms);
    }
}

static int patience_ms(const bkv_fd_socket_t *fds) {
    bool nobody = fds->stranger_count + fds->holder_count == 0;
    return fds->paused ? BKV_FD_GRACE_MS : nobody ? -1 : SWEEP_MS;
}

static void *fd_main(void *argument) {
    bkv_fd_socket_t *fds = argument;
    uint64_t (*now_ms)(void) = fds->transports->config.now_ms;
    struct epoll_event events[EVENTS];
    for (;;) {
        int count = epoll_wait(fds->epoll, events, EVENTS, patience_ms(fds));
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr == NULL) {
                return NULL; // told to stop
            }
            if (events[i].data.ptr == fds) {
                accept_some(fds, now_ms());
            } else if (!serve(fds, events[i].data.ptr)) {
                connection_close(fds, events[i].data.ptr);
            }
        }
        keep_bounds(fds, now_ms());
    }
}

// With all signals blocked: those are the event loop's.
static bkv_status_t start_thread(bkv_fd_socket_t *fds, bkv_error_t *err) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    fds->started = pthread_create(&fds->thread, NULL, fd_main, fds) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!fds->started) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "listen.socket: no thread for the fd socket");
    }
    pthread_setname_np(fds->thread, "bkv-fd");
    return BKV_OK;
}

// ---- binding ----

static bkv_status_t bind_socket(bkv_fd_socket_t *fds, unsigned mode, bkv_error_t *err) {
    const char *path = fds->address.sun_path;
    fds->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    fds->stop = eventfd(0, EFD_CLOEXEC);
    fds->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (fds->listener < 0 || fds->stop < 0 || fds->epoll < 0) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "listen.socket: no descriptor for the fd socket: %s", strerror(errno));
    }
    mode_t mask = umask(0777); // nobody gets in before the permissions are as wanted
    fds->bound = bind(fds->listener, (const struct sockaddr *)&fds->address, sizeof(fds->address)) == 0;
    umask(mask);
    if (!fds->bound) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "listen.socket: cannot bind %s: %s", path, strerror(errno));
    }
    if (chmod(path, (mode_t)mode & 0777) != 0 || listen(fds->listener, BACKLOG) != 0) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "listen.socket_mode: cannot set it on %s: %s", path, strerror(errno));
    }
    watch(fds, fds->listener, fds);
    watch(fds, fds->stop, NULL);
    return BKV_OK;
}

bkv_status_t bkv_fd_socket_create(bkv_transports_t *transports, bkv_fd_socket_t **socket_out, bkv_error_t *err) {
    const bkv_transports_config_t *config = &transports->config;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int length = snprintf(address.sun_path, sizeof(address.sun_path), "%s" BKV_FD_SUFFIX, config->socket_path);
    if (length < 0 || (size_t)length >= sizeof(address.sun_path)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "listen.socket: with " BKV_FD_SUFFIX " longer than %zu bytes: %s",
                        sizeof(address.sun_path) - 1, config->socket_path);
    }
    bkv_fd_socket_t *fds = malloc(sizeof(*fds));
    if (fds == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for the fd socket");
    }
    *fds = (bkv_fd_socket_t){.transports = transports, .address = address, .lock = -1, .listener = -1, .stop = -1, .epoll = -1};
    TAILQ_INIT(&fds->strangers);
    TAILQ_INIT(&fds->holders);
    bkv_status_t status = bkv_unix_path_lock(address.sun_path, &fds->lock, err);
    if (status == BKV_OK) {
        status = bkv_unix_path_clear(address.sun_path, err);
    }
    if (status == BKV_OK) {
        status = bind_socket(fds, config->socket_mode, err);
    }
    if (status == BKV_OK) {
        status = start_thread(fds, err);
    }
    if (status != BKV_OK) {
        bkv_fd_socket_destroy(fds);
        return status;
    }
    *socket_out = fds;
    return BKV_OK;
}

static void close_list(struct connections *list) {
    connection_t *connection;
    while ((connection = TAILQ_FIRST(list)) != NULL) {
        TAILQ_REMOVE(list, connection, link);
        connection_free(connection);
    }
}

void bkv_fd_socket_destroy(bkv_fd_socket_t *fds) {
    if (fds == NULL) {
        return;
    }
    if (fds->started) {
        eventfd_write(fds->stop, 1);
        pthread_join(fds->thread, NULL);
    }
    close_list(&fds->strangers);
    close_list(&fds->holders);
    if (fds->bound) {
        unlink(fds->address.sun_path);
    }
    const int descriptors[] = {fds->epoll, fds->stop, fds->listener, fds->lock};
    for (size_t i = 0; i < sizeof(descriptors) / sizeof(descriptors[0]); i++) {
        if (descriptors[i] >= 0) {
            close(descriptors[i]);
        }
    }
    free(fds);
}
