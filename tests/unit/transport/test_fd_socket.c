// test_fd_socket.c - the fd socket over real sockets: who gets in, what is answered, what is closed; and no descriptor stays.
#include "fixture.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define WINDOW UINT64_C(65536)

// One request on a connection of its own; returns the connection.
static int ask(fixture_t *fixture, bkv_fd_op_t op, const bkv_session_id_t *id, bkv_fd_message_t *answer, int *fd) {
    int peer = peer_connect(fixture);
    const bkv_fd_message_t request = peer_message(op, id);
    peer_send(peer, &request, sizeof(request), NULL, 0);
    cr_assert(peer_receive(peer, answer, fd));
    return peer;
}

static void assert_closed(int peer) {
    bkv_fd_message_t answer;
    int fd;
    cr_assert_not(peer_receive(peer, &answer, &fd));
    close(peer);
}

Test(fd_socket, has_the_permissions_asked_for_and_goes_with_the_daemon) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    struct stat status;
    cr_assert_eq(stat(fixture.fd_socket, &status), 0);
    cr_assert(S_ISSOCK(status.st_mode));
    cr_assert_eq(status.st_mode & 0777, 0600);
    fixture_close(&fixture); // asserts that it is gone
}

Test(fd_socket, one_daemon_at_a_time) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_transports_t *second = NULL;
    bkv_error_t err;
    cr_assert_eq(bkv_transports_create(&fixture.config, &second, &err), BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(err.message, "another daemon"), "%s", err.message);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    bkv_fd_message_t answer;
    int fd, peer = ask(&fixture, BKV_FD_HOLD, &id, &answer, &fd);
    cr_assert_eq(answer.status, BKV_OK, "and the first one's socket still works");
    close(peer);
    bkv_transports_destroy(fixture.transports);

    int stale = socket(AF_UNIX, SOCK_SEQPACKET, 0); // as a killed daemon leaves it
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", fixture.fd_socket);
    cr_assert_eq(bind(stale, (const struct sockaddr *)&address, sizeof(address)), 0);
    close(stale);
    cr_assert_eq(bkv_transports_create(&fixture.config, &fixture.transports, &err), BKV_OK, "%s", err.message);
    bkv_transports_destroy(fixture.transports);

    int file = open(fixture.fd_socket, O_CREAT | O_RDWR, 0600);
    close(file);
    cr_assert_eq(bkv_transports_create(&fixture.config, &second, &err), BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(err.message, "not a socket"), "%s", err.message);
    cr_assert_eq(unlink(fixture.fd_socket), 0, "what is not ours is left alone");
    cr_assert_eq(bkv_transports_create(&fixture.config, &fixture.transports, &err), BKV_OK, "%s", err.message);
    fixture_close(&fixture);
}

Test(fd_socket, a_session_ends_with_its_connection) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    uint8_t *window;
    int peer = peer_take(&fixture, &id, WINDOW, &window);
    window[0] = 42;
    close(peer);
    WAIT_UNTIL(fixture_metrics(&fixture).sessions == 0);
    cr_assert_eq(fixture_metrics(&fixture).sessions_lost_total, 1);
    cr_assert_eq(window[0], 42, "the client's mapping stays the client's");
    munmap(window, WINDOW);
    fixture_close(&fixture);
}

Test(fd_socket, a_detached_session_leaves_its_connection_nothing) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    bkv_fd_message_t answer;
    int fd, peer = ask(&fixture, BKV_FD_HOLD, &id, &answer, &fd);
    cr_assert_eq(fd, -1);
    cr_assert_eq(bkv_session_detach(fixture.transports, &id, NULL, NULL, NULL), BKV_OK);
    WAIT_UNTIL(fixture_metrics(&fixture).sessions == 0); // its thread may still be on its way back from the answer
    fixture_advance(1000);
    assert_closed(peer);
    cr_assert_eq(fixture_metrics(&fixture).sessions_lost_total, 0, "it had ended in order");
    fixture_close(&fixture);
}

Test(fd_socket, a_session_has_one_holder) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW), unknown = {.bytes = {1}};
    uint8_t *window;
    bkv_fd_message_t answer;
    int fd, peer = peer_take(&fixture, &id, WINDOW, &window);
    const bkv_fd_op_t ops[] = {BKV_FD_TAKE, BKV_FD_HOLD};
    for (size_t i = 0; i < 2; i++) {
        int thief = ask(&fixture, ops[i], &id, &answer, &fd);
        cr_assert_eq(answer.status, BKV_FAILED_PRECONDITION);
        cr_assert_eq(fd, -1);
        assert_closed(thief);
        int stranger = ask(&fixture, ops[i], &unknown, &answer, &fd);
        cr_assert_eq(answer.status, BKV_FAILED_PRECONDITION);
        cr_assert_not_null(strstr(answer.message, "session"));
        cr_assert_eq(fd, -1);
        assert_closed(stranger);
    }
    cr_assert(bkv_session_alive(fixture.transports, &id), "none of it ended the session");
    close(peer);
    munmap(window, WINDOW);
    fixture_close(&fixture);
}

Test(fd_socket, what_is_no_message_of_ours_closes_the_connection) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    const bkv_fd_message_t good = peer_message(BKV_FD_TAKE, &id);
    bkv_fd_message_t bad[5] = {good, good, good, good, good};
    bad[0].magic ^= 1;
    bad[1].op = 0;
    bad[2].op = 4;
    bad[3].op = UINT32_MAX;
    bad[4].status = 1;
    for (size_t i = 0; i < 5; i++) {
        int peer = peer_connect(&fixture);
        peer_send(peer, &bad[i], sizeof(bad[i]), NULL, 0);
        assert_closed(peer);
    }
    uint8_t bytes[65536] = {0};
    memcpy(bytes, &good, sizeof(good));
    const size_t lengths[] = {1, 4, sizeof(good) - 1, sizeof(good) + 1, 4096, sizeof(bytes)};
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        int peer = peer_connect(&fixture);
        peer_send(peer, bytes, lengths[i], NULL, 0);
        assert_closed(peer);
    }
    cr_assert(bkv_session_alive(fixture.transports, &id));
    fixture_close(&fixture);
}

Test(fd_socket, descriptors_that_nobody_asked_for_are_closed) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    const bkv_fd_message_t take = peer_message(BKV_FD_TAKE, &id), give = peer_message(BKV_FD_GIVE, &id);
    int fds[8];
    for (size_t i = 0; i < 8; i++) {
        fds[i] = open("/dev/null", O_RDWR | O_CLOEXEC);
    }
    size_t before = open_descriptors();
    for (size_t round = 0; round < 20; round++) {
        int peer = peer_connect(&fixture);
        peer_send(peer, &take, sizeof(take), fds, 1 + round % 8); // TAKE brings none
        assert_closed(peer);
        peer = peer_connect(&fixture);
        peer_send(peer, &give, sizeof(give), fds, 2 + round % 7); // GIVE brings one
        assert_closed(peer);
        peer = peer_connect(&fixture);
        peer_send(peer, "x", 1, fds, 8);
        assert_closed(peer);
        peer = peer_connect(&fixture);
        peer_send(peer, &give, sizeof(give), NULL, 0); // one was promised
        assert_closed(peer);
    }
    cr_assert(bkv_session_alive(fixture.transports, &id));
    int peer = peer_connect(&fixture), fd;
    bkv_fd_message_t answer;
    for (size_t round = 0; round < 20; round++) { // in order, but shm has no use for it
        peer_send(peer, &give, sizeof(give), fds, 1);
        cr_assert(peer_receive(peer, &answer, &fd));
        cr_assert_eq(answer.status, BKV_INVALID_ARGUMENT);
        cr_assert_eq(answer.op, BKV_FD_GIVE);
    }
    peer_send(peer, &take, sizeof(take), NULL, 0); // out of turn
    assert_closed(peer);
    WAIT_UNTIL(fixture_metrics(&fixture).sessions == 0);
    WAIT_UNTIL(open_descriptors() == before - 1); // the session's memfd is gone too
    fixture_close(&fixture);
}

Test(fd_socket, silent_strangers_are_closed_and_holders_are_not) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    uint8_t *window;
    int holder = peer_take(&fixture, &id, WINDOW, &window), silent = peer_connect(&fixture);
    usleep(50000);
    fixture_advance(BKV_FD_STRANGER_MS);
    assert_closed(silent);
    bkv_transports_tick(fixture.transports, fixture_now());
    cr_assert(bkv_session_alive(fixture.transports, &id));
    close(holder);
    munmap(window, WINDOW);
    fixture_close(&fixture);
}

// A flood makes others wait, but each stranger has its time to speak, and then the next ones get in.
Test(fd_socket, a_flood_does_not_keep_others_out) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    int flood[BKV_FD_STRANGERS], fd;
    for (size_t i = 0; i < BKV_FD_STRANGERS; i++) {
        flood[i] = peer_connect(&fixture);
    }
    int peer = peer_connect(&fixture); // waits
    const bkv_fd_message_t request = peer_message(BKV_FD_HOLD, &id);
    bkv_fd_message_t answer;
    peer_send(peer, &request, sizeof(request), NULL, 0);
    usleep(3 * BKV_FD_GRACE_MS * 1000); // the daemon's own clock stands still
    cr_assert_eq(recv(peer, &answer, sizeof(answer), MSG_DONTWAIT), -1);
    cr_assert_eq(recv(flood[0], &answer, sizeof(answer), MSG_DONTWAIT), -1, "nobody is closed before its time");
    fixture_advance(BKV_FD_GRACE_MS);
    cr_assert(peer_receive(peer, &answer, &fd));
    cr_assert_eq(answer.status, BKV_OK, "%s", answer.message);
    for (size_t i = 0; i < BKV_FD_STRANGERS; i++) {
        assert_closed(flood[i]);
    }
    cr_assert(bkv_session_alive(fixture.transports, &id));
    close(peer);
    fixture_close(&fixture);
}

// Who never reads its answers loses its connection, not the daemon its time.
Test(fd_socket, answers_that_nobody_reads) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    bkv_session_id_t id = fixture_attach(&fixture, WINDOW);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC), peer = peer_connect(&fixture), fd;
    const bkv_fd_message_t give = peer_message(BKV_FD_GIVE, &id);
    for (int i = 0; i < 100000 && bkv_session_alive(fixture.transports, &id); i++) {
        struct iovec part = {.iov_base = (void *)(uintptr_t)&give, .iov_len = sizeof(give)};
        char control[CMSG_SPACE(sizeof(int))] = {0};
        struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        *first = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
        memcpy(CMSG_DATA(first), &null, sizeof(null));
        if (sendmsg(peer, &header, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno == EAGAIN) {
            usleep(1000);
        }
    }
    cr_assert_not(bkv_session_alive(fixture.transports, &id));
    bkv_session_id_t other = fixture_attach(&fixture, WINDOW);
    bkv_fd_message_t answer;
    close(ask(&fixture, BKV_FD_HOLD, &other, &answer, &fd));
    cr_assert_eq(answer.status, BKV_OK);
    close(peer);
    close(null);
    fixture_close(&fixture);
}

// Connections that come and go from several threads while sessions begin and end.
static void *come_and_go(void *argument) {
    fixture_t *fixture = argument;
    for (int i = 0; i < 60; i++) {
        bkv_attach_result_t result;
        const bkv_attach_args_t args = {.kind = BKV_TRANSPORT_SHM, .local = true, .bytes = WINDOW};
        if (bkv_session_attach(fixture->transports, &args, &result, NULL) != BKV_OK) {
            continue;
        }
        bkv_fd_message_t answer;
        int fd, peer = ask(fixture, i % 2 == 0 ? BKV_FD_TAKE : BKV_FD_HOLD, &result.id, &answer, &fd);
        if (fd >= 0) {
            close(fd);
        }
        if (i % 3 == 0) {
            bkv_session_detach(fixture->transports, &result.id, NULL, NULL, NULL);
        }
        close(peer);
    }
    return NULL;
}

Test(fd_socket, many_at_once) {
    fixture_t fixture;
    fixture_open(&fixture, 16);
    pthread_t threads[3];
    for (size_t i = 0; i < 3; i++) {
        cr_assert_eq(pthread_create(&threads[i], NULL, come_and_go, &fixture), 0);
    }
    for (size_t i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
    }
    WAIT_UNTIL(fixture_metrics(&fixture).sessions == 0);
    cr_assert_eq(fixture_metrics(&fixture).shm_window_bytes, 0);
    fixture_close(&fixture);
}
