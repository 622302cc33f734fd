// shm.c - windows on the daemon's own host: a memfd of the daemon's, taken from its fd socket (proto/fd_socket.h) and mapped.
//
// The connection to the fd socket holds the session, for as long as this process lives or until it leaves.
#include "client/memory/window.h"
#include "client/wire.h"
#include "proto/answer.h"
#include "proto/fd_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define STEP_MS   50 // how often stop is asked
#define NS_PER_MS 1000000ull
#define ROUNDING  (2ull << 20) // what a window may have beyond what was asked for: a large page

typedef struct shm {
    Balancekv__V1__ShmWindow request;
    struct sockaddr_un address; // of the fd socket
    int connection;             // -1: none
    uint8_t *memory;            // NULL: not mapped
    uint64_t bytes;
} shm_t;

static bkv_status_t shm_offer(const bkv_window_args_t *args, Balancekv__V1__AttachRequest *request, void **state,
                              bkv_error_t *err) {
    if (strncmp(args->endpoint, "unix:", 5) != 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "shm: the daemon is not reached by a unix socket");
    }
    shm_t *shm = calloc(1, sizeof *shm);
    if (shm == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "shm: out of memory");
    }
    shm->connection = -1;
    shm->address.sun_family = AF_UNIX;
    size_t room = sizeof shm->address.sun_path;
    int length = snprintf(shm->address.sun_path, room, "%s%s", args->endpoint + 5, BKV_FD_SUFFIX);
    if (length < 0 || (size_t)length >= room) {
        free(shm);
        return bkv_fail(err, BKV_UNIMPLEMENTED, "shm: the path of the daemon's socket leaves no room for \"%s\"",
                        BKV_FD_SUFFIX);
    }
    balancekv__v1__shm_window__init(&shm->request);
    shm->request.bytes = args->bytes;
    request->shm = &shm->request;
    *state = shm;
    return BKV_OK;
}

// ---- the fd socket ----

static bkv_status_t failed(const char *what, int error, bkv_error_t *err) {
    return bkv_fail(err, BKV_UNIMPLEMENTED, "shm: fd socket: %s: %s", what, strerror(error));
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 * NS_PER_MS + (uint64_t)now.tv_nsec;
}

// Waits a step for events, or only that long where fd is -1. An error: the caller has no more time, or no more use for this.
static bkv_status_t wait_step(const bkv_window_args_t *args, int fd, short events, bkv_error_t *err) {
    if (args->stop != NULL && args->stop(args->user)) {
        return bkv_fail(err, BKV_CANCELLED, "shm: the client is being destroyed");
    }
    if (now_ns() >= args->deadline_ns) {
        return bkv_fail(err, BKV_DEADLINE_EXCEEDED, "shm: fd socket: no answer in time");
    }
    struct pollfd ready = {.fd = fd, .events = events};
    (void)poll(&ready, 1, STEP_MS);
    return BKV_OK;
}

// A full backlog is worth waiting for.
static bkv_status_t connect_to(shm_t *shm, const bkv_window_args_t *args, bkv_error_t *err) {
    shm->connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (shm->connection < 0) {
        return failed("socket", errno, err);
    }
    while (connect(shm->connection, (const struct sockaddr *)&shm->address, sizeof shm->address) != 0) {
        if (errno != EAGAIN && errno != EINTR) {
            return failed(shm->address.sun_path, errno, err);
        }
        bkv_status_t status = wait_step(args, -1, 0, err);
        if (status != BKV_OK) {
            return status;
        }
    }
    return BKV_OK;
}

static bkv_status_t ask(const shm_t *shm, const uint8_t *session, bkv_error_t *err) {
    bkv_fd_message_t message = {.magic = BKV_FD_MAGIC, .op = BKV_FD_TAKE};
    memcpy(message.session, session, sizeof message.session);
    ssize_t sent = send(shm->connection, &message, sizeof message, MSG_NOSIGNAL); // it is the first: there is room
    return sent == sizeof message ? BKV_OK : failed("send", errno, err);
}

// The descriptor that came with a message; -1: none.
static int descriptor_of(struct msghdr *message) {
    int fd = -1;
    for (struct cmsghdr *at = CMSG_FIRSTHDR(message); at != NULL; at = CMSG_NXTHDR(message, at)) {
        if (at->cmsg_level == SOL_SOCKET && at->cmsg_type == SCM_RIGHTS && at->cmsg_len == CMSG_LEN(sizeof fd)) {
            memcpy(&fd, CMSG_DATA(at), sizeof fd);
        }
    }
    return fd;
}

// Receives the answer and what came with it; *fd is the caller's, also on failure.
static bkv_status_t receive(const shm_t *shm, const bkv_window_args_t *args, bkv_fd_message_t *answer, int *fd,
                            bkv_error_t *err) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec data = {.iov_base = answer, .iov_len = sizeof *answer};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t length;
    while ((length = recvmsg(shm->connection, &message, MSG_CMSG_CLOEXEC)) < 0 && (errno == EAGAIN || errno == EINTR)) {
        bkv_status_t status = wait_step(args, shm->connection, POLLIN, err);
        if (status != BKV_OK) {
            return status;
        }
    }
    if (length < 0) {
        return failed("receive", errno, err);
    }
    *fd = descriptor_of(&message);
    if (length != sizeof *answer || (message.msg_flags & MSG_TRUNC) != 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "shm: fd socket: %s", length == 0 ? "closed by the daemon" : "not an answer");
    }
    return BKV_OK;
}

static bkv_status_t answer_check(const bkv_fd_message_t *answer, const uint8_t *session, int fd, uint64_t bytes,
                                 bkv_error_t *err) {
    if (answer->magic != BKV_FD_MAGIC || answer->op != BKV_FD_TAKE ||
        memcmp(answer->session, session, sizeof answer->session) != 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "shm: fd socket: not an answer to what was asked");
    }
    if (answer->status != BKV_OK) {
        char text[sizeof answer->message + 1];
        bkv_answer_text(answer->message, strnlen(answer->message, sizeof answer->message), text, sizeof text);
        return bkv_fail(err, bkv_answer_status(answer->status), "shm: fd socket: %s", text);
    }
    if (fd < 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "shm: fd socket: the answer has no descriptor");
    }
    if (answer->bytes != bytes) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "shm: the window has %llu bytes by one answer and %llu by the other",
                        (unsigned long long)answer->bytes, (unsigned long long)bytes);
    }
    return BKV_OK;
}

// Memory that the daemon could shorten would kill us at our next access: its size must be sealed, and as said.
static bkv_status_t map(shm_t *shm, int fd, uint64_t bytes, bkv_error_t *err) {
    struct stat info;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "shm: the window's size is not sealed");
    }
    if (fstat(fd, &info) != 0 || info.st_size < 0 || (uint64_t)info.st_size < bytes) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "shm: the window is smaller than the daemon says");
    }
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "shm: the window cannot be mapped: %s", strerror(errno));
    }
    (void)madvise(memory, bytes, MADV_HUGEPAGE); // without, it is only slower
    shm->memory = memory;
    shm->bytes = bytes;
    return BKV_OK;
}

static bkv_status_t shm_take(void *state, const bkv_window_args_t *args, const Balancekv__V1__AttachResponse *response,
                             uint8_t **memory, uint64_t *bytes, bkv_error_t *err) {
    shm_t *shm = state;
    const uint8_t *session = response->session.data;
    if (response->bytes < BKV_WINDOW_LEAST || response->bytes > args->bytes + ROUNDING) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "shm: a window of %llu bytes", (unsigned long long)response->bytes);
    }
    bkv_fd_message_t answer;
    int fd = -1;
    bkv_status_t status = connect_to(shm, args, err);
    if (status == BKV_OK) {
        status = ask(shm, session, err);
    }
    if (status == BKV_OK) {
        status = receive(shm, args, &answer, &fd, err);
    }
    if (status == BKV_OK) {
        status = answer_check(&answer, session, fd, response->bytes, err);
    }
    if (status == BKV_OK) {
        status = map(shm, fd, response->bytes, err);
    }
    if (fd >= 0) {
        close(fd);
    }
    *memory = shm->memory;
    *bytes = shm->bytes;
    return status;
}

// ---- the end ----

// The mapping stays: nobody but the daemon has the other one, and it has no session left to write for.
static void shm_leave(void *state) {
    shm_t *shm = state;
    close(shm->connection);
    shm->connection = -1;
}

static void shm_close(void *state) {
    shm_t *shm = state;
    if (shm->connection >= 0) {
        close(shm->connection);
    }
    if (shm->memory != NULL) {
        munmap(shm->memory, shm->bytes);
    }
    free(shm);
}

const bkv_window_kind_t bkv_window_shm = {
    .name = "shm",
    .held = true,
    .verified = true,
    .offer = shm_offer,
    .take = shm_take,
    .leave = shm_leave,
    .close = shm_close,
};
