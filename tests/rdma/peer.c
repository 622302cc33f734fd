// peer.c - a client of the daemon's verbs that does only what it is told, wrong things included: the tests' own end of a queue
// pair, written against libibverbs and nothing of ours. The tests speak gRPC themselves and give it one command a line:
//
//   connect QUEUE_PAIR PACKET GID MTU   to the daemon's end
//   deregister                          the window, whatever is under way
//   reregister                          it, under another key
//   deaf                                the queue pair answers nothing any more, and does not say so
//
// peer DEVICE GID_INDEX FILE: the window is FILE, mapped, so that the test sees and fills it. After the start and after each
// command it prints "QUEUE_PAIR PACKET GID MTU ADDRESS KEY BYTES" of its own, or "error: reason".
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PACKET 0x00abcdu
#define ACCESS (IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE)

typedef struct peer {
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_cq *cq;
    struct ibv_qp *qp;
    struct ibv_mr *mr;
    union ibv_gid gid;
    uint8_t gid_index;
    void *window;
    size_t bytes;
} peer_t;

static bool failed(const char *what, int error) {
    printf("error: %s: %s\n", what, strerror(error));
    return false;
}

static bool open_device(peer_t *peer, const char *name) {
    struct ibv_device **devices = ibv_get_device_list(NULL);
    for (size_t i = 0; devices != NULL && devices[i] != NULL; i++) {
        if (strcmp(ibv_get_device_name(devices[i]), name) == 0) {
            peer->context = ibv_open_device(devices[i]);
        }
    }
    if (devices != NULL) {
        ibv_free_device_list(devices);
    }
    return peer->context != NULL || failed(name, ENODEV);
}

static bool map_window(peer_t *peer, const char *file) {
    struct stat status;
    int fd = open(file, O_RDWR | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) != 0) {
        return failed(file, errno);
    }
    peer->bytes = (size_t)status.st_size;
    peer->window = mmap(NULL, peer->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return peer->window != MAP_FAILED || failed("mmap", errno);
}

static bool make_pair(peer_t *peer) {
    if (ibv_query_gid(peer->context, 1, peer->gid_index, &peer->gid) != 0 || (peer->pd = ibv_alloc_pd(peer->context)) == NULL ||
        (peer->cq = ibv_create_cq(peer->context, 16, NULL, NULL, 0)) == NULL ||
        (peer->mr = ibv_reg_mr(peer->pd, peer->window, peer->bytes, ACCESS)) == NULL) {
        return failed("gid, pd, cq or mr", errno);
    }
    struct ibv_qp_init_attr init = {.send_cq = peer->cq,
                                    .recv_cq = peer->cq,
                                    .qp_type = IBV_QPT_RC,
                                    .cap = {.max_send_wr = 1, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1}};
    peer->qp = ibv_create_qp(peer->pd, &init);
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE};
    int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
    return (peer->qp != NULL && ibv_modify_qp(peer->qp, &attr, mask) == 0) || failed("queue pair", errno);
}

static bool parse_gid(const char *text, union ibv_gid *gid) {
    for (size_t i = 0; i < sizeof gid->raw; i++) {
        if (sscanf(text + 2 * i, "%2hhx", &gid->raw[i]) != 1) {
            return false;
        }
    }
    return true;
}

static enum ibv_mtu mtu_of(unsigned bytes) {
    return bytes >= 4096 ? IBV_MTU_4096 : bytes >= 2048 ? IBV_MTU_2048 : bytes >= 1024 ? IBV_MTU_1024 : IBV_MTU_512;
}

static bool connect_pair(peer_t *peer, uint32_t queue_pair, uint32_t packet, const union ibv_gid *gid, unsigned mtu) {
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = mtu_of(mtu),
        .dest_qp_num = queue_pair,
        .rq_psn = packet,
        .max_dest_rd_atomic = 16,
        .min_rnr_timer = 12,
        .ah_attr = {.is_global = 1, .port_num = 1, .grh = {.dgid = *gid, .sgid_index = peer->gid_index, .hop_limit = 64}}};
    int error = ibv_modify_qp(peer->qp, &attr,
                              IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                  IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
    if (error != 0) {
        return failed("connect", error);
    }
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTS, .sq_psn = PACKET, .timeout = 14, .retry_cnt = 6, .rnr_retry = 6, .max_rd_atomic = 1};
    error = ibv_modify_qp(peer->qp, &attr,
                          IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                              IBV_QP_MAX_QP_RD_ATOMIC);
    return error == 0 || failed("connect", error);
}

static bool deregister(peer_t *peer) {
    int error = peer->mr == NULL ? 0 : ibv_dereg_mr(peer->mr);
    peer->mr = NULL;
    return error == 0 || failed("deregister", error);
}

static bool obey(peer_t *peer, const char *line) {
    char word[16] = "", gid_text[40] = "";
    uint32_t queue_pair = 0, packet = 0;
    unsigned mtu = 0;
    int words = sscanf(line, "%15s %" SCNu32 " %" SCNu32 " %32s %u", word, &queue_pair, &packet, gid_text, &mtu);
    if (strcmp(word, "connect") == 0) {
        union ibv_gid gid;
        return (words == 5 && parse_gid(gid_text, &gid)) ? connect_pair(peer, queue_pair, packet, &gid, mtu)
                                                         : failed(line, EINVAL);
    }
    if (strcmp(word, "deregister") == 0) {
        return deregister(peer);
    }
    if (strcmp(word, "reregister") == 0) {
        if (!deregister(peer)) {
            return false;
        }
        peer->mr = ibv_reg_mr(peer->pd, peer->window, peer->bytes, ACCESS);
        return peer->mr != NULL || failed("reregister", errno);
    }
    if (strcmp(word, "deaf") == 0) {
        struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RESET};
        return ibv_modify_qp(peer->qp, &attr, IBV_QP_STATE) == 0 || failed("deaf", errno);
    }
    return failed(line, EINVAL);
}

static void describe(const peer_t *peer) {
    struct ibv_port_attr port;
    bool known = ibv_query_port(peer->context, 1, &port) == 0;
    printf("%" PRIu32 " %u ", peer->qp->qp_num, PACKET);
    for (size_t i = 0; i < sizeof peer->gid.raw; i++) {
        printf("%02x", peer->gid.raw[i]);
    }
    printf(" %u %" PRIuPTR " %" PRIu32 " %zu\n", known ? 128u << port.active_mtu : 0u, (uintptr_t)peer->window,
           peer->mr == NULL ? 0 : peer->mr->rkey, peer->bytes);
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: peer DEVICE GID_INDEX FILE\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    peer_t peer = {.gid_index = (uint8_t)atoi(argv[2])};
    if (!open_device(&peer, argv[1]) || !map_window(&peer, argv[3]) || !make_pair(&peer)) {
        return 1;
    }
    describe(&peer);
    for (char line[256]; fgets(line, sizeof line, stdin) != NULL;) {
        line[strcspn(line, "\n")] = '\0';
        if (obey(&peer, line)) {
            describe(&peer);
        }
    }
    return 0; // the kernel takes back what is still there, as it does from a client that was killed
}
