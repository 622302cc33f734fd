// sharing.h - transports as the server sees them, over ordinary memory of this process, that are late, busy, failing or gone at a
// test's command. It stands in for daemon/transport/ in this room's binary: the real ones are tested in their own room and by
// the integration tests.
#ifndef BKV_TEST_RPC_SHARING_H
#define BKV_TEST_RPC_SHARING_H

#include "daemon/transport/transport.h"

#include <pthread.h>

#define SHARING_SESSIONS 16
#define SHARING_TASKS    64

typedef struct sharing_task {
    bkv_session_t *session;
    bkv_ingest_t *ingest; // of a fetch
    const bkv_delivery_t *delivery;
    uint64_t offset;
    bkv_ingest_done_t fetched;
    bkv_delivered_t delivered;
    void *user;
} sharing_task_t;

struct bkv_session {
    bkv_transports_t *transports;
    bkv_session_id_t id;
    uint8_t *memory; // NULL: the slot is free
    uint64_t bytes;
    uint32_t references;
    bool ended;
};

struct bkv_transports {
    bkv_pipeline_t *pipeline;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct bkv_session sessions[SHARING_SESSIONS];
    sharing_task_t tasks[SHARING_TASKS]; // waiting for sharing_let_go
    uint32_t task_count;
    uint32_t attached;      // ever
    bkv_attach_args_t args; // of the last Attach; what it refers to is gone, but for the first allocation's handle:
    uint8_t handle[BKV_CUDA_HANDLE_BYTES];

    // what a test commands
    bool late;                  // transfers wait for sharing_let_go, and so does Attach
    bool on_device;             // payloads are said to lie in GPU memory
    uint32_t busy;              // so many starts are answered with BUSY
    bkv_status_t start;         // what starts of transfers are answered with
    bkv_status_t end;           // what transfers end with
    bkv_device_layout_t layout; // of the last fetch; pages and keys are its first
    uint64_t first_key, first_page;
    bool event; // the last transfer had one
};

bkv_transports_t *sharing_create(bkv_pipeline_t *pipeline);
void sharing_destroy(bkv_transports_t *sharing); // asserts that nobody refers to a session and nothing waits

// Waits until `count` tasks wait; false: not within five seconds.
bool sharing_waits_for(bkv_transports_t *sharing, uint32_t count);

// Runs the tasks that wait, last first, and what comes from now on at once.
void sharing_let_go(bkv_transports_t *sharing);

uint8_t *sharing_memory(bkv_transports_t *sharing, const uint8_t id[BKV_SESSION_BYTES]);
uint32_t sharing_sessions(bkv_transports_t *sharing); // that have not ended

#endif
