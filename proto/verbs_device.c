// verbs_device.c - finds and opens an RDMA device, picks its port and GID, and registers memory with it; links are
// verbs_link.c's.
#include "proto/verbs_link.h"

#include <errno.h>
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>

// ---- the choice ----

static const char *parse_number(const char *text, uint32_t max, uint32_t *number) {
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (end == text || text[0] < '0' || text[0] > '9' || errno != 0 || value > max) {
        return NULL;
    }
    *number = (uint32_t)value;
    return end;
}

bkv_status_t bkv_verbs_choose(const char *text, bkv_verbs_choice_t *choice, bkv_error_t *err) {
    bkv_verbs_choice_t chosen = {.gid = -1};
    if (text == NULL || text[0] == '\0' || strcmp(text, "auto") == 0) {
        *choice = chosen;
        return BKV_OK;
    }
    size_t length = strcspn(text, ":");
    if (length == 0 || length >= sizeof(chosen.device)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "\"%s\" has no device name of 1..%d characters", text, BKV_VERBS_NAME - 1);
    }
    memcpy(chosen.device, text, length);
    const char *rest = text + length;
    uint32_t number = 0;
    if (*rest == ':') {
        rest = parse_number(rest + 1, UINT8_MAX, &number);
        if (rest == NULL || number == 0) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "\"%s\": a port is a number of 1..255", text);
        }
        chosen.port = number;
    }
    if (*rest == ':') {
        rest = parse_number(rest + 1, UINT8_MAX, &number);
        if (rest == NULL) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "\"%s\": a GID index is a number of 0..255", text);
        }
        chosen.gid = (int32_t)number;
    }
    if (*rest != '\0') {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "\"%s\" is not NAME[:PORT[:GID INDEX]]", text);
    }
    *choice = chosen;
    return BKV_OK;
}

bkv_status_t bkv_verbs_choice_set(bkv_verbs_choice_t *choice, const char *device, uint32_t port, int32_t gid,
                                  bkv_error_t *err) {
    *choice = (bkv_verbs_choice_t){.port = port, .gid = gid};
    if (strcmp(device, "auto") == 0) {
        return BKV_OK;
    }
    if (strlen(device) >= sizeof(choice->device)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "a device's name has at most %d characters", BKV_VERBS_NAME - 1);
    }
    memcpy(choice->device, device, strlen(device));
    return BKV_OK;
}

// ---- port and GID ----

static uint32_t least(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}

static uint32_t positive(int value) {
    return value > 0 ? (uint32_t)value : 0;
}

static bool mapped_ipv4(const union ibv_gid *gid) {
    static const uint8_t prefix[12] = {[10] = 0xff, [11] = 0xff};
    return memcmp(gid->raw, prefix, sizeof(prefix)) == 0;
}

static int gid_rank(const struct ibv_gid_entry *entry) {
    if (entry->gid_type == IBV_GID_TYPE_ROCE_V2) {
        return mapped_ipv4(&entry->gid) ? 3 : 2;
    }
    return entry->gid_type == IBV_GID_TYPE_ROCE_V1 ? 1 : 0;
}

// The chosen GID, or the best one: the first of the highest rank.
static bkv_status_t pick_gid(struct ibv_context *context, int32_t wanted, int table, bkv_verbs_port_t *port, bkv_error_t *err) {
    int best = -1;
    for (int i = 0; i < table && i <= UINT8_MAX; i++) {
        struct ibv_gid_entry entry = {0};
        bool allowed = wanted >= 0 ? i == wanted : port->ethernet || i == 0;
        if (!allowed || ibv_query_gid_ex(context, port->number, (uint32_t)i, &entry, 0) != 0) {
            continue; // an empty place in the table
        }
        int rank = port->ethernet ? gid_rank(&entry) : 0;
        if (rank > best) {
            best = rank;
            port->gid_index = (uint8_t)i;
            memcpy(port->gid, entry.gid.raw, sizeof(port->gid));
        }
    }
    if (best >= 0) {
        return BKV_OK;
    }
    if (wanted >= 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "port %u has no GID with index %d", port->number, wanted);
    }
    return bkv_fail(err, BKV_UNIMPLEMENTED, "port %u has no GID: has its network interface no address?", port->number);
}

static bkv_status_t find_port(struct ibv_context *context, uint8_t number, int32_t gid, bkv_verbs_port_t *port,
                              bkv_error_t *err) {
    struct ibv_port_attr attr;
    if (ibv_query_port(context, number, &attr) != 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "port %u is not there: %s", number, strerror(errno));
    }
    if (attr.state != IBV_PORT_ACTIVE) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "port %u is not active (%s)", number, ibv_port_state_str(attr.state));
    }
    *port = (bkv_verbs_port_t){
        .number = number,
        .ethernet = attr.link_layer == IBV_LINK_LAYER_ETHERNET,
        .mtu = 128u << attr.active_mtu, // IBV_MTU_256 is 1
        .message_bytes = attr.max_msg_sz,
    };
    port->lid = port->ethernet ? 0 : attr.lid;
    return pick_gid(context, gid, attr.gid_tbl_len, port, err);
}

static bkv_status_t choose_port(bkv_verbs_device_t *device, uint8_t ports, uint32_t wanted, bkv_error_t *err) {
    if (wanted != 0) {
        return find_port(device->context, (uint8_t)wanted, device->gid, &device->port, err);
    }
    bkv_status_t status = bkv_fail(err, BKV_UNIMPLEMENTED, "it has no port");
    for (unsigned number = 1; number <= ports && status != BKV_OK; number++) {
        status = find_port(device->context, (uint8_t)number, device->gid, &device->port, err);
    }
    return status;
}

bkv_status_t bkv_verbs_look(const bkv_verbs_device_t *device, bkv_verbs_port_t *port, bkv_error_t *err) {
    bkv_error_t cause;
    bkv_status_t status = find_port(device->context, device->port.number, device->gid, port, &cause);
    return status == BKV_OK ? BKV_OK : bkv_fail(err, status, "%s: %s", device->name, cause.message);
}

// ---- the device ----

void bkv_verbs_close(bkv_verbs_device_t *device) {
    if (device == NULL) {
        return;
    }
    if (device->domain != NULL) {
        ibv_dealloc_pd(device->domain);
    }
    if (device->context != NULL) {
        ibv_close_device(device->context);
    }
    free(device);
}

static bkv_status_t prepare(bkv_verbs_device_t *device, const bkv_verbs_choice_t *choice, bkv_error_t *err) {
    struct ibv_device_attr attr;
    if (ibv_query_device(device->context, &attr) != 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "it does not answer: %s", strerror(errno));
    }
    device->reads = least(positive(attr.max_qp_init_rd_atom), UINT8_MAX);
    device->answers = least(positive(attr.max_qp_rd_atom), UINT8_MAX);
    device->links = positive(attr.max_qp);
    device->link_work = positive(attr.max_qp_wr);
    device->completions = positive(attr.max_cqe);
    device->gid = choice->gid;
    bkv_status_t status = choose_port(device, attr.phys_port_cnt, choice->port, err);
    if (status != BKV_OK) {
        return status;
    }
    device->domain = ibv_alloc_pd(device->context);
    return device->domain != NULL ? BKV_OK : bkv_fail(err, BKV_UNIMPLEMENTED, "no protection domain: %s", strerror(errno));
}

static bkv_status_t open_one(struct ibv_device *found, const bkv_verbs_choice_t *choice, bkv_verbs_device_t **opened,
                             bkv_error_t *err) {
    if (found->node_type != IBV_NODE_CA || found->transport_type != IBV_TRANSPORT_IB) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "neither RoCE nor InfiniBand");
    }
    bkv_verbs_device_t *device = calloc(1, sizeof(*device));
    if (device == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a device");
    }
    strncpy(device->name, ibv_get_device_name(found), sizeof(device->name) - 1);
    device->context = ibv_open_device(found);
    bkv_status_t status = device->context != NULL
                              ? prepare(device, choice, err)
                              : bkv_fail(err, BKV_UNIMPLEMENTED, "it cannot be opened: %s", strerror(errno));
    if (status != BKV_OK) {
        bkv_verbs_close(device);
        return status;
    }
    *opened = device;
    return BKV_OK;
}

bkv_status_t bkv_verbs_open(const bkv_verbs_choice_t *choice, bkv_verbs_device_t **device, bkv_error_t *err) {
    bkv_error_t cause = {.message = ""};
    int count = 0;
    struct ibv_device **list = ibv_get_device_list(&count);
    if (list == NULL) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "no RDMA device is to be had: the kernel has no RDMA stack (%s)",
                        strerror(errno));
    }
    const char *last = NULL; // the device that `cause` is about
    bkv_status_t status = BKV_UNIMPLEMENTED;
    for (int i = 0; i < count && status != BKV_OK; i++) {
        const char *name = ibv_get_device_name(list[i]);
        if (choice->device[0] == '\0' || strcmp(choice->device, name) == 0) {
            last = name;
            status = open_one(list[i], choice, device, &cause);
        }
    }
    if (status != BKV_OK && last != NULL) {
        bkv_fail(err, status, "no RDMA device is to be had: %s: %s", last, cause.message);
    } else if (status != BKV_OK && choice->device[0] != '\0') {
        bkv_fail(err, status, "no RDMA device is to be had: there is none named %s", choice->device);
    } else if (status != BKV_OK) {
        bkv_fail(err, status, "no RDMA device is to be had: this machine has none");
    }
    ibv_free_device_list(list);
    return status;
}

// ---- memory ----

static unsigned access_flags(bkv_verbs_access_t access) {
    static const unsigned remote[] = {
        [BKV_VERBS_READ] = IBV_ACCESS_REMOTE_READ,
        [BKV_VERBS_WRITE] = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE,
    };
    return IBV_ACCESS_LOCAL_WRITE | remote[access];
}

bkv_status_t bkv_verbs_register(const bkv_verbs_device_t *device, void *memory, uint64_t bytes, bkv_verbs_access_t access,
                                struct ibv_mr **region, bkv_error_t *err) {
    struct ibv_mr *made = ibv_reg_mr(device->domain, memory, (size_t)bytes, access_flags(access));
    if (made == NULL) {
        int cause = errno;
        const char *hint = cause == ENOMEM ? ": it has to be locked (ulimit -l, LimitMEMLOCK)" : "";
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "%s cannot register %llu bytes: %s%s", device->name,
                        (unsigned long long)bytes, strerror(cause), hint);
    }
    *region = made;
    return BKV_OK;
}

bkv_status_t bkv_verbs_register_gpu(const bkv_verbs_device_t *device, int dmabuf, uint64_t offset, uint64_t bytes,
                                    uint64_t address, bkv_verbs_access_t access, struct ibv_mr **region, bkv_error_t *err) {
    struct ibv_mr *made = ibv_reg_dmabuf_mr(device->domain, offset, (size_t)bytes, address, dmabuf, (int)access_flags(access));
    if (made != NULL) {
        *region = made;
        return BKV_OK;
    }
    int cause = errno;
    bool cannot = cause == EOPNOTSUPP || cause == ENOSYS || cause == EPROTONOSUPPORT;
    return bkv_fail(err, cannot ? BKV_UNIMPLEMENTED : BKV_FAILED_PRECONDITION,
                    "%s cannot register GPU memory through dma-buf: %s", device->name, strerror(cause));
}

void bkv_verbs_unregister(struct ibv_mr *region) {
    if (region != NULL) {
        ibv_dereg_mr(region);
    }
}
