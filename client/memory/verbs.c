// verbs.c - the window kind "verbs": memory of our own that a daemon on another host reads payloads from and writes records to,
// by RDMA. Devices, registration and queue pairs are proto/verbs_*.c's; when a window is made and left is attach.c's.
//
// This end never posts anything: it registers the window, connects a queue pair and answers. What the daemon gets to reach is
// the window alone, and only over this queue pair: the window has a protection domain of its own. That the daemon is gone shows
// in gRPC; then, as in any other end, `leave` destroys the queue pair and the registration before the memory is used again.
#include "client/memory/window.h"

#include "proto/verbs_window.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct verbs_state {
    uint8_t *memory; // NULL: not mapped yet
    uint64_t bytes;
    bkv_verbs_device_t *device;
    struct ibv_mr *region;
    bkv_verbs_link_t link;
    bkv_verbs_end_t end;                // ours, as the daemon is told
    Balancekv__V1__VerbsWindow message; // the same
} verbs_state_t;

// Huge pages where the system has them: fewer entries in the NIC's page table. A child of fork() does not get the window:
// otherwise its copy and ours would part, and the NIC stay with one of them.
static bkv_status_t map_memory(verbs_state_t *state, uint64_t wanted, bkv_error_t *err) {
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    if (wanted > SIZE_MAX - page) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "window_bytes: %llu is too much", (unsigned long long)wanted);
    }
    state->bytes = (wanted + page - 1) / page * page;
    void *memory = mmap(NULL, state->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a window of %llu bytes: %s",
                        (unsigned long long)state->bytes, strerror(errno));
    }
    state->memory = memory;
    (void)madvise(memory, state->bytes, MADV_HUGEPAGE);
    (void)madvise(memory, state->bytes, MADV_DONTFORK);
    return BKV_OK;
}

static bkv_status_t open_device(verbs_state_t *state, const char *text, bkv_error_t *err) {
    bkv_error_t cause;
    bkv_verbs_choice_t choice;
    bkv_status_t status = bkv_verbs_choose(text, &choice, &cause);
    if (status != BKV_OK) {
        return bkv_fail(err, status, "verbs_device: %.200s", cause.message);
    }
    return bkv_verbs_open(&choice, &state->device, err);
}

static void describe(verbs_state_t *state) {
    bkv_verbs_link_describe(&state->link, state->region, &state->end);
    bkv_verbs_window_set(&state->end, &state->message);
}

static void verbs_leave(void *opaque) {
    verbs_state_t *state = opaque;
    bkv_verbs_link_deinit(&state->link);
    bkv_verbs_unregister(state->region);
    state->region = NULL;
    bkv_verbs_close(state->device);
    state->device = NULL;
}

static void verbs_close(void *opaque) {
    verbs_state_t *state = opaque;
    verbs_leave(state);
    if (state->memory != NULL) {
        munmap(state->memory, state->bytes);
    }
    free(state);
}

static bkv_status_t verbs_offer(const bkv_window_args_t *args, Balancekv__V1__AttachRequest *request, void **opaque,
                                bkv_error_t *err) {
    verbs_state_t *state = calloc(1, sizeof(*state));
    if (state == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a window");
    }
    bkv_status_t status = open_device(state, args->device, err);
    if (status == BKV_OK) {
        status = map_memory(state, args->bytes, err);
    }
    if (status == BKV_OK) {
        status = bkv_verbs_register(state->device, state->memory, state->bytes, BKV_VERBS_WRITE, &state->region, err);
    }
    if (status == BKV_OK) {
        status = bkv_verbs_link_init(&state->link, state->device, NULL, 1, BKV_VERBS_WRITE, err);
    }
    if (status != BKV_OK) {
        verbs_close(state);
        return status;
    }
    describe(state);
    request->verbs = &state->message;
    *opaque = state;
    return BKV_OK;
}

static bkv_status_t verbs_take(void *opaque, const bkv_window_args_t *args, const Balancekv__V1__AttachResponse *response,
                               uint8_t **memory, uint64_t *bytes, bkv_error_t *err) {
    (void)args; // connecting asks nobody but, at times, for a neighbour's address: a second at most
    verbs_state_t *state = opaque;
    const Balancekv__V1__VerbsWindow *verbs = response->verbs;
    bkv_verbs_end_t daemon;
    if (verbs == NULL || bkv_verbs_window_get(verbs, &daemon, NULL) != BKV_OK) {
        return bkv_fail(err, BKV_INTERNAL, "the daemon's answer to Attach lacks its end of the connection");
    }
    if (response->bytes < BKV_WINDOW_LEAST || response->bytes > state->bytes) {
        return bkv_fail(err, BKV_INTERNAL, "the daemon takes a window of %llu bytes for one of %llu",
                        (unsigned long long)state->bytes, (unsigned long long)response->bytes);
    }
    bkv_error_t cause;
    bkv_status_t status = bkv_verbs_link_connect(&state->link, &daemon, &cause);
    if (status != BKV_OK) {
        bool garbage = status == BKV_INVALID_ARGUMENT; // of the daemon's, not of our caller's
        return bkv_fail(err, garbage ? BKV_INTERNAL : status, "the daemon's end of the connection: %.200s", cause.message);
    }
    *memory = state->memory;
    *bytes = response->bytes;
    return BKV_OK;
}

const bkv_window_kind_t bkv_window_verbs = {
    .name = "verbs",
    .offer = verbs_offer,
    .take = verbs_take,
    .leave = verbs_leave,
    .close = verbs_close,
};
