// verbs_link.h - what both ends of the verbs transport share: an RDMA device that has been opened, memory registered with it,
// and one end of a reliable connection. Plain verbs: what librdmacm would exchange goes through Attach (proto/balancekv.proto).
//
// What moves over a connection, and when, is left to the ends: daemon/verbs/ READs and WRITEs, client/verbs.c and
// daemon/cluster/peer/serve.c answer.
// Nothing that the other end says of itself is trusted: bkv_verbs_link_connect checks it.
//
// A device may be used by many threads at once, a link by one at a time.
#ifndef BKV_VERBS_LINK_H
#define BKV_VERBS_LINK_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stdint.h>

struct ibv_context;
struct ibv_cq;
struct ibv_mr;
struct ibv_pd;
struct ibv_qp;

// ---- devices ----

#define BKV_VERBS_NAME 64

typedef struct bkv_verbs_choice {
    char device[BKV_VERBS_NAME]; // "": the first that has an active port
    uint32_t port;               // 0: its first active one
    int32_t gid;                 // index in the port's table; -1: the best
} bkv_verbs_choice_t;

// Reads "auto" or "NAME[:PORT[:GID INDEX]]"; NULL and "" are "auto". INVALID_ARGUMENT says what is wrong, without a field's
// name.
bkv_status_t bkv_verbs_choose(const char *text, bkv_verbs_choice_t *choice, bkv_error_t *err);

// The same from its parts, as a daemon's configuration has them; device: "auto", or a name.
bkv_status_t bkv_verbs_choice_set(bkv_verbs_choice_t *choice, const char *device, uint32_t port, int32_t gid, bkv_error_t *err);

// A port and the GID that names it, as found; both may change while the device is open.
typedef struct bkv_verbs_port {
    uint8_t number, gid_index;
    bool ethernet; // RoCE; else InfiniBand
    uint8_t gid[16];
    uint16_t lid;           // 0 over Ethernet
    uint32_t mtu;           // bytes, as active
    uint32_t message_bytes; // most in one work request
} bkv_verbs_port_t;

// An open device. All fields may be read; the pointers are the device's.
typedef struct bkv_verbs_device {
    struct ibv_context *context;
    struct ibv_pd *domain;
    char name[BKV_VERBS_NAME];
    bkv_verbs_port_t port; // as found when it was opened
    int32_t gid;           // as chosen
    uint32_t reads;        // most outstanding RDMA READs that it can post on a connection
    uint32_t answers;      // and that it can answer
    uint32_t links;        // most connections
    uint32_t link_work;    // most work requests in one connection's queue
    uint32_t completions;  // most in one completion queue
} bkv_verbs_device_t;

// UNIMPLEMENTED: there is none, or none as chosen; the message says why of the last one that was looked at. Over Ethernet the
// best GID is RoCE v2's of an IPv4 address, then RoCE v2's of any, then RoCE v1's; over InfiniBand index 0.
bkv_status_t bkv_verbs_open(const bkv_verbs_choice_t *choice, bkv_verbs_device_t **device, bkv_error_t *err);

// Once its links and its memory are gone. NULL is allowed.
void bkv_verbs_close(bkv_verbs_device_t *device);

// The device's port as it is now, for a new link. UNIMPLEMENTED: it is not active, or has lost its GID.
bkv_status_t bkv_verbs_look(const bkv_verbs_device_t *device, bkv_verbs_port_t *port, bkv_error_t *err);

// What the other ends may do with memory, or by a link: nothing, so that only this end's own transfers use it; read; or write, too.
// An end needs the memory's rkey, and a link that allows as much.
typedef enum bkv_verbs_access { BKV_VERBS_OWN, BKV_VERBS_READ, BKV_VERBS_WRITE } bkv_verbs_access_t;

// Registers memory once for its whole life. FAILED_PRECONDITION: not to be had, for want of lockable memory for example.
bkv_status_t bkv_verbs_register(const bkv_verbs_device_t *device, void *memory, uint64_t bytes, bkv_verbs_access_t access,
                                struct ibv_mr **region, bkv_error_t *err);

// The same for a GPU's memory behind a dma-buf's descriptor (cuMemGetHandleForAddressRange), from `offset` on; address: what
// the other end is to call its first byte. The descriptor may be closed afterwards. UNIMPLEMENTED: the NIC cannot.
bkv_status_t bkv_verbs_register_gpu(const bkv_verbs_device_t *device, int dmabuf, uint64_t offset, uint64_t bytes,
                                    uint64_t address, bkv_verbs_access_t access, struct ibv_mr **region, bkv_error_t *err);

// NULL is allowed. Afterwards nobody reaches the memory by this registration.
void bkv_verbs_unregister(struct ibv_mr *region);

// ---- links ----

// One end of a connection, as in VerbsWindow.
typedef struct bkv_verbs_end {
    uint32_t queue_pair, packet, lid, mtu, reads, key;
    uint8_t gid[16];
    uint64_t address, bytes; // of the window; 0: it has none
} bkv_verbs_end_t;

typedef struct bkv_verbs_link {
    const bkv_verbs_device_t *device;
    bkv_verbs_port_t port;
    struct ibv_qp *pair;
    struct ibv_cq *own; // completions, unless they are the caller's
    uint32_t packet;    // first packet sequence number
    uint32_t work;      // most work requests in its queue
    uint32_t reads;     // most outstanding READs; as agreed once it is connected
    bkv_verbs_access_t access;
} bkv_verbs_link_t;

// Makes a queue pair, not connected yet, for at most `work` posted requests, whose completions go to `completions` (the
// caller's, and it must have room for them; NULL: one of its own, for an end that posts nothing). access: the most that
// the other end may do here. RESOURCE_EXHAUSTED: the device has no more. UNIMPLEMENTED: bkv_verbs_look.
bkv_status_t bkv_verbs_link_init(bkv_verbs_link_t *link, const bkv_verbs_device_t *device, struct ibv_cq *completions,
                                 uint32_t work, bkv_verbs_access_t access, bkv_error_t *err);

// This end, for the other one. window: memory that it may use, or NULL; end->address is then the caller's to set where the
// window is a GPU's.
void bkv_verbs_link_describe(const bkv_verbs_link_t *link, const struct ibv_mr *window, bkv_verbs_end_t *end);

// Checks what the other end says of itself; local: the port that is to connect to it. INVALID_ARGUMENT names the field:
// "verbs.gid: ...".
bkv_status_t bkv_verbs_end_check(const bkv_verbs_port_t *local, const bkv_verbs_end_t *end, bkv_error_t *err);

// Connects to the other end, which does the same: both may post once both have. Checks it first. May take a second, where an
// address has to be found out and nobody answers. FAILED_PRECONDITION: there is no way to it. After a failure the link can only
// be given up. A transfer that is not answered fails within about two seconds, whatever has become of the other end.
bkv_status_t bkv_verbs_link_connect(bkv_verbs_link_t *link, const bkv_verbs_end_t *other, bkv_error_t *err);

// All that is posted completes soon, in failure. Idempotent.
void bkv_verbs_link_stop(bkv_verbs_link_t *link);

// Afterwards nothing that was posted touches memory any more. An empty (zeroed) link is left alone.
void bkv_verbs_link_deinit(bkv_verbs_link_t *link);

#endif
