// relay.c - see relay.h.
#include "relay.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define PIPES  64 // two for each connection
#define LOOK   5  // ms
#define BUFFER 65536

// What one end has written, up to what the other end has taken.
typedef struct flow {
    int from, to; // -1: unused
    uint8_t bytes[BUFFER];
    size_t used, sent;
    bool ended;
} flow_t;

struct relay {
    int listening;
    uint16_t port, to_port;
    pthread_t thread;
    _Atomic bool frozen, stopping;
    flow_t flows[PIPES]; // each connection has two in a row
};

static int open_socket(uint16_t port, bool listens, uint16_t *found) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(address);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int failed = listens ? bind(fd, (struct sockaddr *)&address, length) != 0 || listen(fd, 16) != 0
                         : connect(fd, (struct sockaddr *)&address, length) != 0;
    if (failed) {
        close(fd);
        return -1;
    }
    if (found != NULL) {
        getsockname(fd, (struct sockaddr *)&address, &length);
        *found = ntohs(address.sin_port);
    }
    return fd;
}

static void connection_end(relay_t *relay, size_t first) {
    close(relay->flows[first].from);
    close(relay->flows[first].to);
    relay->flows[first].from = relay->flows[first + 1].from = -1;
}

static void connection_begin(relay_t *relay) {
    int from = accept4(relay->listening, NULL, NULL, SOCK_CLOEXEC);
    int to = from >= 0 ? open_socket(relay->to_port, false, NULL) : -1;
    size_t first = 0;
    while (first < PIPES && relay->flows[first].from >= 0) {
        first += 2;
    }
    if (to < 0 || first == PIPES) {
        close(from);
        close(to);
        return;
    }
    for (size_t i = 0; i < 2; i++) {
        flow_t *flow = &relay->flows[first + i];
        flow->from = i == 0 ? from : to;
        flow->to = i == 0 ? to : from;
        flow->used = flow->sent = 0;
        flow->ended = false;
    }
}

static void flow_move(flow_t *flow) {
    if (flow->sent == flow->used && !flow->ended) {
        ssize_t n = recv(flow->from, flow->bytes, sizeof(flow->bytes), MSG_DONTWAIT);
        flow->ended = n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR);
        flow->used = n > 0 ? (size_t)n : 0;
        flow->sent = 0;
    }
    if (flow->sent < flow->used) {
        ssize_t n = send(flow->to, flow->bytes + flow->sent, flow->used - flow->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        flow->sent += n > 0 ? (size_t)n : 0;
        flow->ended = flow->ended || (n < 0 && errno != EAGAIN && errno != EINTR);
    }
}

static void wait_for_work(relay_t *relay) {
    struct pollfd polls[PIPES + 1] = {{.fd = relay->listening, .events = POLLIN}};
    nfds_t count = 1;
    for (size_t i = 0; i < PIPES; i++) {
        const flow_t *flow = &relay->flows[i];
        if (flow->from >= 0) {
            bool full = flow->sent < flow->used;
            polls[count++] = (struct pollfd){.fd = full ? flow->to : flow->from, .events = full ? POLLOUT : POLLIN};
        }
    }
    poll(polls, count, LOOK);
}

static void *relay_run(void *argument) {
    relay_t *relay = argument;
    while (!atomic_load(&relay->stopping)) {
        if (atomic_load(&relay->frozen)) {
            poll(NULL, 0, LOOK);
            continue;
        }
        wait_for_work(relay);
        struct pollfd incoming = {.fd = relay->listening, .events = POLLIN};
        if (poll(&incoming, 1, 0) > 0) {
            connection_begin(relay);
        }
        for (size_t i = 0; i < PIPES; i += 2) {
            flow_t *flows = &relay->flows[i];
            if (flows[0].from >= 0) {
                flow_move(&flows[0]);
                flow_move(&flows[1]);
                if ((flows[0].ended && flows[0].sent == flows[0].used) || (flows[1].ended && flows[1].sent == flows[1].used)) {
                    connection_end(relay, i);
                }
            }
        }
    }
    return NULL;
}

relay_t *relay_start(uint16_t to_port) {
    relay_t *relay = calloc(1, sizeof(*relay));
    relay->to_port = to_port;
    for (size_t i = 0; i < PIPES; i++) {
        relay->flows[i].from = -1;
    }
    relay->listening = open_socket(0, true, &relay->port);
    cr_assert(relay->listening >= 0);
    cr_assert_eq(pthread_create(&relay->thread, NULL, relay_run, relay), 0);
    return relay;
}

void relay_stop(relay_t *relay) {
    atomic_store(&relay->stopping, true);
    pthread_join(relay->thread, NULL);
    for (size_t i = 0; i < PIPES; i += 2) {
        if (relay->flows[i].from >= 0) {
            connection_end(relay, i);
        }
    }
    close(relay->listening);
    free(relay);
}

uint16_t relay_port(const relay_t *relay) {
    return relay->port;
}

void relay_freeze(relay_t *relay, bool frozen) {
    atomic_store(&relay->frozen, frozen);
}
