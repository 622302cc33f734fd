// share.c - see share.h.
#include "share.h"

#include "proto/fd_socket.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static const uint8_t secret[15] = "a fake session";

static void session_of(size_t number, uint8_t *session) {
    session[0] = (uint8_t)(number + 1);
    memcpy(session + 1, secret, sizeof secret);
}

static bool number_of(const uint8_t *session, size_t length, size_t *number) {
    *number = session[0] - 1u;
    return length == 16 && *number < SHARE_WINDOWS && memcmp(session + 1, secret, sizeof secret) == 0;
}

// ---- the fd socket ----

static void send_answer(int connection, const bkv_fd_message_t *answer, size_t length, int fd) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {.bytes = {0}};
    struct iovec data = {.iov_base = (void *)answer, .iov_len = length};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *head = CMSG_FIRSTHDR(&message);
        *head = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fd)};
        memcpy(CMSG_DATA(head), &fd, sizeof fd);
    }
    (void)!sendmsg(connection, &message, MSG_NOSIGNAL);
}

// False: the connection is to be closed.
static bool take(share_t *share, int connection, const bkv_fd_message_t *request) {
    size_t number, length = sizeof *request;
    bkv_fd_message_t answer = *request;
    share_lie_t lie = (share_lie_t)atomic_load(&share->lie);
    cr_assert(request->magic == BKV_FD_MAGIC && request->op == BKV_FD_TAKE && request->status == 0);
    cr_assert(number_of(request->session, 16, &number));
    atomic_fetch_add(&share->takes, 1);
    pthread_mutex_lock(&share->lock);
    int fd = share->windows[number].fd;
    answer.bytes = share->windows[number].bytes;
    pthread_mutex_unlock(&share->lock);
    switch (lie) {
    case SHARE_NO_DESCRIPTOR:
        fd = -1;
        break;
    case SHARE_OTHER_SIZE:
        answer.bytes *= 2;
        break;
    case SHARE_OTHER_SESSION:
        answer.session[5] ^= 1;
        break;
    case SHARE_OTHER_OP:
        answer.op = BKV_FD_HOLD;
        break;
    case SHARE_SHORT:
        length /= 2;
        break;
    case SHARE_REFUSES:
        answer.status = BKV_FAILED_PRECONDITION;
        memset(answer.message, 'x', sizeof answer.message); // without an end
        fd = -1;
        break;
    case SHARE_HANGS_UP:
        return false;
    case SHARE_SILENT:
        return true;
    default:
        break;
    }
    send_answer(connection, &answer, length, fd);
    return true;
}

static void *serve(void *argument) {
    share_t *share = argument;
    struct pollfd ready[2 + SHARE_WINDOWS];
    nfds_t count = 2;
    ready[0] = (struct pollfd){.fd = share->stop[0], .events = POLLIN};
    ready[1] = (struct pollfd){.fd = share->listener, .events = POLLIN};
    for (;;) {
        poll(ready, count, -1);
        if (ready[0].revents != 0) {
            break;
        }
        for (nfds_t i = 2; i < count; i++) {
            bkv_fd_message_t request;
            if (ready[i].revents != 0 &&
                (recv(ready[i].fd, &request, sizeof request, 0) != sizeof request || !take(share, ready[i].fd, &request))) {
                close(ready[i].fd);
                ready[i--] = ready[--count];
            }
        }
        if (ready[1].revents != 0) {
            int connection = accept(share->listener, NULL, NULL);
            cr_assert(connection >= 0 && count < sizeof ready / sizeof ready[0]);
            ready[count++] = (struct pollfd){.fd = connection, .events = POLLIN};
        }
    }
    for (nfds_t i = 2; i < count; i++) {
        close(ready[i].fd);
    }
    return NULL;
}

void share_start(share_t *share, const fake_place_t *place, uint64_t most) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    *share = (share_t){.most = most, .epoch = 1};
    snprintf(share->path, sizeof share->path, "%s%s", place->path, BKV_FD_SUFFIX);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", share->path);
    pthread_mutex_init(&share->lock, NULL);
    share->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    cr_assert(bind(share->listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(share->listener, 8) == 0);
    cr_assert(pipe(share->stop) == 0);
    cr_assert(pthread_create(&share->thread, NULL, serve, share) == 0);
}

void share_stop(share_t *share) {
    cr_assert(write(share->stop[1], "", 1) == 1);
    pthread_join(share->thread, NULL);
    close(share->listener);
    close(share->stop[0]);
    close(share->stop[1]);
    unlink(share->path);
    for (size_t i = 0; i < SHARE_WINDOWS; i++) {
        if (share->windows[i].memory != NULL) {
            munmap(share->windows[i].memory, share->windows[i].bytes);
            close(share->windows[i].fd);
        }
    }
    pthread_mutex_destroy(&share->lock);
}

// ---- Attach, Detach ----

static size_t window_make(share_t *share, uint64_t bytes) {
    share_lie_t lie = (share_lie_t)atomic_load(&share->lie);
    int fd = memfd_create("share", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    cr_assert(fd >= 0 && ftruncate(fd, (off_t)(lie == SHARE_TOO_SMALL ? bytes - 4096 : bytes)) == 0);
    uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    cr_assert(memory != MAP_FAILED);
    if (lie != SHARE_NOT_SEALED) {
        cr_assert(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0);
    }
    size_t number = atomic_fetch_add(&share->attaches, 1);
    cr_assert(number < SHARE_WINDOWS);
    pthread_mutex_lock(&share->lock);
    share->windows[number].fd = fd;
    share->windows[number].memory = memory;
    share->windows[number].bytes = bytes;
    pthread_mutex_unlock(&share->lock);
    return number;
}

void share_attach(fake_call_t *call, share_t *share) {
    Balancekv__V1__AttachRequest *request = fake_read(call, &balancekv__v1__attach_request__descriptor);
    if (request == NULL) {
        return; // the client has given up already
    }
    cr_assert(request->shm != NULL && request->verbs == NULL && request->cuda_ipc == NULL);
    uint64_t bytes = request->shm->bytes < share->most ? request->shm->bytes : share->most;
    balancekv__v1__attach_request__free_unpacked(request, NULL);
    uint8_t session[16];
    session_of(window_make(share, bytes), session);
    Balancekv__V1__AttachResponse response = BALANCEKV__V1__ATTACH_RESPONSE__INIT;
    response.session = (ProtobufCBinaryData){.len = sizeof session, .data = session};
    response.bytes = bytes;
    response.idle_ms = 300000;
    response.boot_epoch = share->epoch;
    fake_write(call, &response.base);
    fake_finish(call, GRPC_STATUS_OK, "");
}

void share_detach(fake_call_t *call, share_t *share) {
    Balancekv__V1__DetachRequest *request = fake_read(call, &balancekv__v1__detach_request__descriptor);
    size_t number;
    if (request == NULL) {
        return;
    }
    cr_assert(number_of(request->session.data, request->session.len, &number));
    balancekv__v1__detach_request__free_unpacked(request, NULL);
    atomic_fetch_add(&share->detaches, 1);
    Balancekv__V1__DetachResponse response = BALANCEKV__V1__DETACH_RESPONSE__INIT;
    fake_write(call, &response.base);
    fake_finish(call, GRPC_STATUS_OK, "");
}

uint8_t *share_memory(share_t *share, size_t number) {
    pthread_mutex_lock(&share->lock);
    uint8_t *memory = share->windows[number].memory;
    pthread_mutex_unlock(&share->lock);
    return memory;
}

uint8_t *share_at(share_t *share, const Balancekv__V1__Place *place, uint64_t bytes) {
    size_t number;
    if (!number_of(place->session.data, place->session.len, &number)) {
        return NULL;
    }
    pthread_mutex_lock(&share->lock);
    uint8_t *memory = share->windows[number].memory;
    uint64_t all = share->windows[number].bytes;
    pthread_mutex_unlock(&share->lock);
    bool within = memory != NULL && place->offset % 64 == 0 && place->offset <= all && bytes <= all - place->offset;
    return within ? memory + place->offset : NULL;
}
