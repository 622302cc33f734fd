// link.c - how the daemon gets a worker's GPU memory: Attach names its allocations, and over the fd socket
// (proto/fd_socket.h) go the descriptors of those that have no handle. The connection holds the session for as long as this
// process lives.
#include "client/device/device.h"

#include "proto/answer.h"
#include "proto/fd_socket.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define DETACH_MS 500 // of a session that could not be used
#define NS_PER_MS 1000000ull

// ---- the fd socket ----

static bkv_status_t failed(const char *what, int error, bkv_error_t *err) {
    bool late = error == EAGAIN || error == EWOULDBLOCK;
    return bkv_fail(err, late ? BKV_DEADLINE_EXCEEDED : BKV_UNIMPLEMENTED, "cuda-ipc: fd socket: %s: %s", what,
                    late ? "no answer in time" : strerror(error));
}

// What is left until then as the socket's own limits, at least a millisecond.
static void set_timeouts(int connection, uint64_t deadline_ns) {
    uint64_t now = bkv_client_now_ns(), left_us = now < deadline_ns ? (deadline_ns - now) / 1000 : 0;
    left_us = left_us > 1000 ? left_us : 1000;
    const struct timeval left = {.tv_sec = (time_t)(left_us / 1000000), .tv_usec = (suseconds_t)(left_us % 1000000)};
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &left, sizeof left);
    setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &left, sizeof left);
}

static bkv_status_t connect_to(const bkv_client_endpoint_t *endpoint, uint64_t deadline_ns, int *connection, bkv_error_t *err) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = endpoint->target.address + strlen("unix:");
    int length = snprintf(address.sun_path, sizeof address.sun_path, "%s%s", path, BKV_FD_SUFFIX);
    if (length < 0 || (size_t)length >= sizeof address.sun_path) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "cuda-ipc: the path of the daemon's socket leaves no room for \"%s\"",
                        BKV_FD_SUFFIX);
    }
    *connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (*connection < 0) {
        return failed("socket", errno, err);
    }
    set_timeouts(*connection, deadline_ns);
    return connect(*connection, (const struct sockaddr *)&address, sizeof address) == 0 ? BKV_OK
                                                                                        : failed(address.sun_path, errno, err);
}

static bool send_message(int connection, bkv_fd_message_t *message, int fd) {
    struct iovec data = {.iov_base = message, .iov_len = sizeof *message};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {.bytes = {0}};
    struct msghdr header = {.msg_iov = &data, .msg_iovlen = 1};
    if (fd >= 0) {
        header.msg_control = &control;
        header.msg_controllen = sizeof control;
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        *first = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fd)};
        memcpy(CMSG_DATA(first), &fd, sizeof fd);
    }
    return sendmsg(connection, &header, MSG_NOSIGNAL) == (ssize_t)sizeof *message;
}

// One message and its answer. fd -1: none goes with it.
static bkv_status_t tell(int connection, bkv_fd_op_t op, const uint8_t *session, uint32_t index, int fd, bkv_error_t *err) {
    bkv_fd_message_t message = {.magic = BKV_FD_MAGIC, .op = op, .index = index}, answer;
    memcpy(message.session, session, sizeof message.session);
    if (!send_message(connection, &message, fd)) {
        return failed("send", errno, err);
    }
    ssize_t length = recv(connection, &answer, sizeof answer, 0);
    if (length < 0) {
        return failed("receive", errno, err);
    }
    if (length != sizeof answer || answer.magic != BKV_FD_MAGIC || answer.op != message.op || answer.index != index) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "cuda-ipc: fd socket: %s",
                        length == 0 ? "closed by the daemon" : "not an answer");
    }
    if (answer.status != BKV_OK) {
        char text[sizeof answer.message + 1];
        bkv_answer_text(answer.message, strnlen(answer.message, sizeof answer.message), text, sizeof text);
        return bkv_fail(err, bkv_answer_status(answer.status), "cuda-ipc: fd socket: %s", text);
    }
    return BKV_OK;
}

static bkv_status_t give_chunk(const bkv_device_t *device, const bkv_device_session_t *session, uint32_t index,
                               bkv_error_t *err) {
    int fd = -1, error = bkv_gpu_export_chunk((void *)device->extents[index].base, &fd);
    if (error != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "ranges: memory at %p that cannot be shared: %s",
                        (const void *)device->extents[index].base, bkv_gpu_error(error));
    }
    bkv_status_t status = tell(session->connection, BKV_FD_GIVE, session->id, index, fd, err);
    close(fd);
    return status;
}

// Descriptors of all chunks; with none the connection only holds the session.
static bkv_status_t give_all(const bkv_device_t *device, const bkv_device_session_t *session, uint64_t deadline_ns,
                             bkv_error_t *err) {
    bkv_status_t status = BKV_OK;
    bool any = false;
    for (uint32_t i = 0; status == BKV_OK && i < device->count; i++) {
        if (device->extents[i].chunk) {
            set_timeouts(session->connection, deadline_ns);
            status = give_chunk(device, session, i, err);
            any = true;
        }
    }
    return any ? status : tell(session->connection, BKV_FD_HOLD, session->id, 0, -1, err);
}

static bkv_status_t give_on_device(const bkv_device_t *device, const bkv_device_session_t *session, uint64_t deadline_ns,
                                   bkv_error_t *err) {
    int before, error = bkv_gpu_enter(device->ordinal, &before);
    if (error != 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "device: %d: %s", device->ordinal, bkv_gpu_error(error));
    }
    bkv_status_t status = give_all(device, session, deadline_ns, err);
    bkv_gpu_leave(before);
    return status;
}

// ---- Attach ----

// The request's allocations; messages has room for `count`.
static void describe(const bkv_device_t *device, Balancekv__V1__DeviceAllocation *messages,
                     Balancekv__V1__DeviceAllocation **list) {
    for (uint32_t i = 0; i < device->count; i++) {
        balancekv__v1__device_allocation__init(&messages[i]);
        messages[i].bytes = device->extents[i].bytes;
        if (!device->extents[i].chunk) {
            messages[i].handle =
                (ProtobufCBinaryData){.len = BKV_GPU_HANDLE_BYTES, .data = (uint8_t *)device->extents[i].handle};
        }
        list[i] = &messages[i];
    }
}

static bkv_status_t ask(bkv_device_t *device, uint32_t timeout_ms, Balancekv__V1__AttachResponse **response, bkv_error_t *err) {
    Balancekv__V1__DeviceAllocation *messages = calloc(device->count, sizeof *messages);
    Balancekv__V1__DeviceAllocation **list = calloc(device->count, sizeof *list);
    bkv_status_t status = BKV_RESOURCE_EXHAUSTED;
    if (messages != NULL && list != NULL) {
        describe(device, messages, list);
        Balancekv__V1__DeviceWindow window = BALANCEKV__V1__DEVICE_WINDOW__INIT;
        Balancekv__V1__AttachRequest request = BALANCEKV__V1__ATTACH_REQUEST__INIT;
        window.uuid = (ProtobufCBinaryData){.len = BKV_GPU_UUID_BYTES, .data = device->uuid};
        window.n_allocations = device->count;
        window.allocations = list;
        request.cuda_ipc = &window;
        status = bkv_client_session_ask(device->endpoint, &request, timeout_ms, response, err);
    } else {
        bkv_fail(err, status, "client: out of memory");
    }
    free(messages);
    free(list);
    return status;
}

static bkv_status_t session_make(const bkv_device_t *device, const Balancekv__V1__AttachResponse *response,
                                 uint64_t deadline_ns, bkv_device_session_t **session, bkv_error_t *err) {
    if (response->bytes != device->bytes) {
        return bkv_fail(err, BKV_INTERNAL, "Attach: bytes: %llu, but %llu were shared", (unsigned long long)response->bytes,
                        (unsigned long long)device->bytes);
    }
    bkv_device_session_t *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    memcpy(made->id, response->session.data, sizeof made->id);
    made->connection = -1;
    bkv_status_t status = connect_to(device->endpoint, deadline_ns, &made->connection, err);
    if (status == BKV_OK) {
        status = give_on_device(device, made, deadline_ns, err);
    }
    if (status != BKV_OK) {
        bkv_device_leave(made);
        return status;
    }
    *session = made;
    return BKV_OK;
}

bkv_status_t bkv_device_attach(bkv_device_t *device, uint32_t timeout_ms, bkv_device_session_t **session, bkv_error_t *err) {
    uint64_t deadline_ns = bkv_client_now_ns() + timeout_ms * NS_PER_MS;
    Balancekv__V1__AttachResponse *response;
    bkv_status_t status = ask(device, timeout_ms, &response, err);
    if (status != BKV_OK) {
        return status;
    }
    status = session_make(device, response, deadline_ns, session, err);
    if (status != BKV_OK) {
        bkv_client_session_end(device->endpoint, response->session.data, DETACH_MS);
    }
    balancekv__v1__attach_response__free_unpacked(response, NULL);
    return status;
}

void bkv_device_leave(bkv_device_session_t *session) {
    if (session != NULL) {
        if (session->connection >= 0) {
            close(session->connection);
        }
        free(session);
    }
}
