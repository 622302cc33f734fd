// verbs_link.c - one end of a reliable connection: a queue pair made, described, connected, stopped and destroyed. Devices and
// memory are verbs_device.c's.
#include "proto/verbs_link.h"

#include <assert.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <string.h>
#include <sys/random.h>

// Finite, so that an end that is gone is noticed: 4.096 us * 2^14 = 67 ms, and up to four times that, for each try. With
// RETRIES 7, which is not special by the standard, some devices never give up.
#define TIMEOUT     14
#define RETRIES     6
#define RNR_TIMER   12 // 0.64 ms; nobody sends what would need a receive
#define RNR_RETRIES 6
#define HOPS        64
#define BITS_24     0xffffffu

// ---- making ----

static bkv_status_t make_pair(bkv_verbs_link_t *link, struct ibv_cq *completions, bkv_error_t *err) {
    struct ibv_qp_init_attr attr = {
        .qp_type = IBV_QPT_RC,
        .send_cq = completions,
        .recv_cq = completions,
        .cap = {.max_send_wr = link->work, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1},
    };
    link->pair = ibv_create_qp(link->device->domain, &attr);
    if (link->pair == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%s has no more queue pairs: %s", link->device->name, strerror(errno));
    }
    static const unsigned access[] = {
        [BKV_VERBS_READ] = IBV_ACCESS_REMOTE_READ,
        [BKV_VERBS_WRITE] = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE,
    };
    struct ibv_qp_attr init = {
        .qp_state = IBV_QPS_INIT,
        .port_num = link->port.number,
        .qp_access_flags = access[link->access],
    };
    int cause = ibv_modify_qp(link->pair, &init, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
    if (cause != 0) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "%s: a queue pair cannot be set up: %s", link->device->name,
                        strerror(cause));
    }
    return BKV_OK;
}

bkv_status_t bkv_verbs_link_init(bkv_verbs_link_t *link, const bkv_verbs_device_t *device, struct ibv_cq *completions,
                                 uint32_t work, bkv_verbs_access_t access, bkv_error_t *err) {
    assert(work > 0);
    *link = (bkv_verbs_link_t){.device = device, .work = work, .access = access};
    bkv_status_t status = bkv_verbs_look(device, &link->port, err);
    if (status != BKV_OK) {
        return status;
    }
    if (getrandom(&link->packet, sizeof(link->packet), 0) != sizeof(link->packet)) {
        return bkv_fail(err, BKV_INTERNAL, "no random bytes: %s", strerror(errno));
    }
    link->packet &= BITS_24;
    if (completions == NULL) {
        link->own = ibv_create_cq(device->context, (int)work + 1, NULL, NULL, 0);
        completions = link->own;
    }
    status = completions != NULL
                 ? make_pair(link, completions, err)
                 : bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%s has no more completion queues: %s", device->name, strerror(errno));
    if (status != BKV_OK) {
        bkv_verbs_link_deinit(link);
    }
    return status;
}

void bkv_verbs_link_deinit(bkv_verbs_link_t *link) {
    if (link->pair != NULL) {
        ibv_destroy_qp(link->pair);
    }
    if (link->own != NULL) {
        ibv_destroy_cq(link->own);
    }
    *link = (bkv_verbs_link_t){0};
}

void bkv_verbs_link_describe(const bkv_verbs_link_t *link, const struct ibv_mr *window, bkv_verbs_end_t *end) {
    *end = (bkv_verbs_end_t){
        .queue_pair = link->pair->qp_num,
        .packet = link->packet,
        .lid = link->port.lid,
        .mtu = link->port.mtu,
        .reads = link->access != BKV_VERBS_OWN ? link->device->answers : 0,
    };
    memcpy(end->gid, link->port.gid, sizeof(end->gid));
    if (window != NULL) {
        end->key = window->rkey;
        end->address = (uintptr_t)window->addr;
        end->bytes = window->length;
    }
}

// ---- the other end ----

static bkv_status_t check_address(const bkv_verbs_port_t *local, const bkv_verbs_end_t *end, bkv_error_t *err) {
    static const uint8_t nobody[16];
    if (!local->ethernet) {
        if (end->lid == 0 || end->lid >= 0xc000) { // from there on: groups
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs.lid: %u, but over InfiniBand it is one of 1..49151", end->lid);
        }
        return BKV_OK;
    }
    if (end->lid != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs.lid: %u, but over Ethernet there is none", end->lid);
    }
    if (memcmp(end->gid, nobody, sizeof(nobody)) == 0 || end->gid[0] == 0xff) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs.gid: not the address of one end");
    }
    return BKV_OK;
}

bkv_status_t bkv_verbs_end_check(const bkv_verbs_port_t *local, const bkv_verbs_end_t *end, bkv_error_t *err) {
    if (end->queue_pair < 2 || end->queue_pair > BITS_24) { // 0 and 1 are the fabric's own
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs.queue_pair: %u is not within 2..%u", end->queue_pair, BITS_24);
    }
    if (end->packet > BITS_24) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs.packet: %u has more than 24 bits", end->packet);
    }
    if (end->mtu < 256 || end->mtu > 4096 || (end->mtu & (end->mtu - 1)) != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs.mtu: %u is not 256, 512, 1024, 2048 or 4096", end->mtu);
    }
    if (end->reads > UINT8_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs.reads: %u is more than 255", end->reads);
    }
    if (end->bytes > UINT64_MAX - end->address) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs.bytes: %llu from %#llx on is past the end of memory",
                        (unsigned long long)end->bytes, (unsigned long long)end->address);
    }
    return check_address(local, end, err);
}

// ---- connecting ----

static enum ibv_mtu mtu_code(uint32_t bytes) {
    enum ibv_mtu code = IBV_MTU_256;
    while (code < IBV_MTU_4096 && (128u << (code + 1)) <= bytes) {
        code++;
    }
    return code;
}

static int ready_to_receive(const bkv_verbs_link_t *link, const bkv_verbs_end_t *other) {
    const bkv_verbs_port_t *port = &link->port;
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = mtu_code(other->mtu < port->mtu ? other->mtu : port->mtu),
        .dest_qp_num = other->queue_pair,
        .rq_psn = other->packet,
        .max_dest_rd_atomic = (uint8_t)(link->access != BKV_VERBS_OWN ? link->device->answers : 0),
        .min_rnr_timer = RNR_TIMER,
        .ah_attr = {.dlid = (uint16_t)other->lid, .port_num = port->number, .is_global = port->ethernet},
    };
    if (port->ethernet) {
        attr.ah_attr.grh = (struct ibv_global_route){.sgid_index = port->gid_index, .hop_limit = HOPS};
        memcpy(attr.ah_attr.grh.dgid.raw, other->gid, sizeof(other->gid));
    }
    return ibv_modify_qp(link->pair, &attr,
                         IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                             IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
}

static int ready_to_send(const bkv_verbs_link_t *link) {
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTS,
        .sq_psn = link->packet,
        .max_rd_atomic = (uint8_t)link->reads,
        .timeout = TIMEOUT,
        .retry_cnt = RETRIES,
        .rnr_retry = RNR_RETRIES,
    };
    return ibv_modify_qp(link->pair, &attr,
                         IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                             IBV_QP_RNR_RETRY);
}

bkv_status_t bkv_verbs_link_connect(bkv_verbs_link_t *link, const bkv_verbs_end_t *other, bkv_error_t *err) {
    bkv_status_t status = bkv_verbs_end_check(&link->port, other, err);
    if (status != BKV_OK) {
        return status;
    }
    link->reads = other->reads < link->device->reads ? other->reads : link->device->reads;
    int cause = ready_to_receive(link, other);
    if (cause != 0) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "verbs.gid: there is no way to it from %s: %s", link->device->name,
                        strerror(cause));
    }
    cause = ready_to_send(link);
    if (cause != 0) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "%s: the connection cannot be set up: %s", link->device->name,
                        strerror(cause));
    }
    return BKV_OK;
}

void bkv_verbs_link_stop(bkv_verbs_link_t *link) {
    if (link->pair != NULL) {
        struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
        ibv_modify_qp(link->pair, &attr, IBV_QP_STATE); // a device that is gone cannot, and completes nothing any more
    }
}
