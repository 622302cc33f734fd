// gate.c - the thread that waits for clients' events, so that no stream of ours does.
//
// It asks each event whether it has come, again and again at growing intervals, as there is no way to sleep until any of
// several has. An event that does not come in time, or whose session ends, costs its own transfer and nobody else's. Besides,
// while it has nothing to ask for, it pins our memory piece by piece; and it resets the device after a fault.
#include "daemon/transport/cuda_ipc/cuda_ipc.h"

#include "daemon/observe/clock.h"

#include <string.h>
#include <time.h>

// Between two rounds of questions; each one answered in the negative doubles it.
#define PAUSE_FIRST_US 20
#define PAUSE_MOST_US  500

typedef struct gate {
    bkv_ipc_device_t *device;
    bkv_ipc_queue_t waiting; // the thread's own
    uint64_t pause_us;
} gate_t;

// ---- clients' events ----

static bkv_ipc_event_t *event_known(bkv_ipc_session_t *session, const uint8_t *handle) {
    for (size_t i = 0; i < BKV_IPC_EVENTS; i++) {
        bkv_ipc_event_t *event = &session->events[i];
        if (event->event != NULL && memcmp(event->handle, handle, sizeof(event->handle)) == 0) {
            return event;
        }
    }
    return NULL;
}

// A place for another event, made free if need be. NULL: all are being waited for.
static bkv_ipc_event_t *event_place(bkv_ipc_session_t *session) {
    for (size_t i = 0; i < BKV_IPC_EVENTS; i++) {
        bkv_ipc_event_t *event = &session->events[session->next_event];
        session->next_event = (session->next_event + 1) % BKV_IPC_EVENTS;
        if (event->waiting == 0) {
            bkv_gpu_event_destroy(event->event);
            event->event = NULL;
            return event;
        }
    }
    return NULL;
}

void bkv_ipc_events_close(bkv_ipc_session_t *session) {
    for (size_t i = 0; i < BKV_IPC_EVENTS; i++) {
        bkv_gpu_event_destroy(session->events[i].event);
        session->events[i].event = NULL;
    }
}

// Opens the event, unless it is open: opening is slow, and a client has a few that it uses again and again. BKV_OK with
// transfer->awaited NULL: later.
static bkv_status_t await(bkv_ipc_transfer_t *transfer, bkv_error_t *err) {
    bkv_ipc_session_t *session = transfer->session;
    bkv_ipc_event_t *event = event_known(session, transfer->event);
    if (event == NULL) {
        event = event_place(session);
        if (event == NULL) {
            return BKV_OK;
        }
        int error = bkv_gpu_event_import(transfer->event, &event->event);
        if (error != 0) {
            event->event = NULL;
            bkv_status_t status = bkv_ipc_device_fail(session->device, error, "place.event", err);
            return status == BKV_INTERNAL ? bkv_fail(err, BKV_INVALID_ARGUMENT, "place.event: %s", bkv_gpu_error(error))
                                          : status;
        }
        memcpy(event->handle, transfer->event, sizeof(event->handle));
    }
    event->waiting++;
    transfer->awaited = event;
    return BKV_OK;
}

// ---- rounds ----

typedef enum answer { ANSWER_COME, ANSWER_WAIT, ANSWER_FAILED } answer_t;

static answer_t ask(bkv_ipc_transfer_t *transfer, uint64_t now_ms, bkv_error_t *err) {
    bkv_ipc_device_t *device = transfer->session->device;
    if (bkv_ipc_session_check(transfer->session, err) != BKV_OK) {
        return ANSWER_FAILED;
    }
    if (transfer->awaited == NULL && await(transfer, err) != BKV_OK) {
        return ANSWER_FAILED;
    }
    int error = transfer->awaited != NULL ? bkv_gpu_event_query(transfer->awaited->event) : BKV_GPU_NOT_YET;
    if (error == 0) {
        return ANSWER_COME;
    }
    if (error != BKV_GPU_NOT_YET) {
        bkv_ipc_device_fail(device, error, "place.event", err);
        return ANSWER_FAILED;
    }
    if (now_ms >= transfer->due_ms) {
        bkv_fail(err, BKV_DEADLINE_EXCEEDED, "place.event: has not come within %d ms", BKV_IPC_EVENT_MS);
        return ANSWER_FAILED;
    }
    return ANSWER_WAIT;
}

static void settle(bkv_ipc_transfer_t *transfer) {
    if (transfer->awaited != NULL) {
        transfer->awaited->waiting--;
        transfer->awaited = NULL;
    }
}

// Asks for each event once: what has come goes on to the lanes, what has failed to `failed` with its error.
static void round_once(gate_t *gate, bkv_ipc_queue_t *failed) {
    bkv_ipc_device_t *device = gate->device;
    uint64_t now_ms = bkv_now_ms();
    for (uint32_t left = gate->waiting.count; left > 0; left--) {
        bkv_ipc_transfer_t *transfer = bkv_ipc_queue_take(&gate->waiting);
        switch (ask(transfer, now_ms, &transfer->copy)) {
        case ANSWER_COME:
            settle(transfer);
            transfer->has_event = false;
            bkv_ipc_device_queue(device, transfer);
            gate->pause_us = PAUSE_FIRST_US;
            break;
        case ANSWER_WAIT:
            bkv_ipc_queue_put(&gate->waiting, transfer);
            break;
        case ANSWER_FAILED:
            settle(transfer);
            bkv_ipc_queue_put(failed, transfer);
            break;
        }
    }
}

static void end_all(bkv_ipc_queue_t *failed) {
    bkv_ipc_transfer_t *transfer;
    while ((transfer = bkv_ipc_queue_take(failed)) != NULL) {
        const bkv_error_t error = transfer->copy;
        bkv_ipc_transfer_end(transfer, 0, &error);
    }
}

static void work(gate_t *gate) {
    bkv_ipc_device_t *device = gate->device;
    bkv_ipc_queue_t failed = {.last = &failed.first};
    int before;
    bkv_error_t error;
    if (bkv_ipc_device_enter(device, &before, &error) == BKV_OK) {
        round_once(gate, &failed);
        if (gate->waiting.count == 0) {
            (void)bkv_ipc_pins_advance(&device->ipc->pins);
        }
        bkv_ipc_device_leave(device, before);
    } else {
        bkv_ipc_transfer_t *transfer;
        while ((transfer = bkv_ipc_queue_take(&gate->waiting)) != NULL) {
            transfer->copy = error;
            bkv_ipc_queue_put(&failed, transfer);
        }
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL); // whatever it is, it will not be gone at once
    }
    end_all(&failed);
    if (atomic_load(&device->broken)) {
        bkv_ipc_device_reset(device);
    }
}

static struct timespec after_us(uint64_t us) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t ns = (uint64_t)now.tv_nsec + us * 1000;
    return (struct timespec){.tv_sec = now.tv_sec + (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
}

// Takes over what has been queued; waits where there is nothing to do. False: the device is being closed.
static bool next(gate_t *gate) {
    bkv_ipc_device_t *device = gate->device;
    bool pinned = atomic_load(&device->dead) || bkv_ipc_pins_complete(&device->ipc->pins);
    pthread_mutex_lock(&device->lock);
    if (device->gated.count == 0 && gate->waiting.count > 0) {
        struct timespec until = after_us(gate->pause_us);
        pthread_cond_timedwait(&device->gate_has, &device->lock, &until);
        gate->pause_us = 2 * gate->pause_us < PAUSE_MOST_US ? 2 * gate->pause_us : PAUSE_MOST_US;
    }
    while (pinned && gate->waiting.count == 0 && device->gated.count == 0 && !atomic_load(&device->broken) &&
           !device->stopping) {
        pthread_cond_wait(&device->gate_has, &device->lock);
    }
    bkv_ipc_transfer_t *transfer;
    while ((transfer = bkv_ipc_queue_take(&device->gated)) != NULL) {
        bkv_ipc_queue_put(&gate->waiting, transfer);
        gate->pause_us = PAUSE_FIRST_US;
    }
    bool goes_on = !device->stopping;
    pthread_mutex_unlock(&device->lock);
    return goes_on;
}

void *bkv_ipc_gate_main(void *argument) {
    gate_t gate = {.device = argument, .pause_us = PAUSE_FIRST_US};
    gate.waiting.last = &gate.waiting.first;
    while (next(&gate)) {
        work(&gate);
    }
    return NULL;
}
