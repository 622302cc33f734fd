// sharing.h - transports as the server sees them, over ordinary memory of this process, that are late, busy, failing or gone at a
// test's command. It stands in for daemon/transport/ in this room's binary: the real ones are tested in their own room and by
// the integration tests.
#ifndef BKV_TEST_RPC_SHARING_H
#define BKV_TEST_RPC_SHARING_H

#include "daemon/transport/transport.h"

// What a test commands.
typedef struct sharing_orders {
    bool late;          // transfers wait for sharing_let_go, and so does Attach
    bool on_device;     // payloads are said to lie in GPU memory
    uint32_t busy;      // so many starts are answered with BUSY
    bkv_status_t start; // what other starts of transfers are answered with
    bkv_status_t end;   // what transfers end with
} sharing_orders_t;

// What the server has asked for.
typedef struct sharing_seen {
    uint32_t attached;      // ever
    uint32_t waiting;       // transfers
    uint32_t busy;          // of the orders: BUSYs still to be given
    bkv_attach_args_t args; // of the last Attach; what it refers to is gone, but for the first allocation's handle:
    uint8_t handle[BKV_CUDA_HANDLE_BYTES];
    bkv_device_layout_t layout; // of the last fetch that had one; of its arrays only:
    uint64_t first_key, first_page;
    bool event; // the last transfer had one
} sharing_seen_t;

bkv_transports_t *sharing_create(bkv_pipeline_t *pipeline);
void sharing_destroy(bkv_transports_t *sharing); // asserts that nobody refers to a session and nothing waits

void sharing_order(bkv_transports_t *sharing, sharing_orders_t orders);
sharing_seen_t sharing_look(bkv_transports_t *sharing);

// Waits until `count` transfers wait; false: not within five seconds.
bool sharing_waits_for(bkv_transports_t *sharing, uint32_t count);

// Runs the transfers that wait, last first, and what comes from now on at once.
void sharing_let_go(bkv_transports_t *sharing);

uint8_t *sharing_memory(bkv_transports_t *sharing, const uint8_t id[BKV_SESSION_BYTES]);
uint32_t sharing_sessions(bkv_transports_t *sharing); // that have not ended

#endif
