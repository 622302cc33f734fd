// device.c - a GPU as the transport uses it: opened when the first client names it, the queues of its transfers and
// the threads that serve them, and what becomes of it after a fault.
//
// A fault in a kernel ends a process's whole context on a device: every call fails from then on, and all mappings, streams and
// events are void. Bounds are checked so that no client can bring that about; hardware can. The device is then reset: transfers
// fail, sessions are lost (their clients Attach again), and it is opened afresh. Where even that fails it stays closed, and
// only a new process could open it; everything else in the daemon goes on.
#include "daemon/transport/cuda_ipc/cuda_ipc.h"

#include "daemon/observe/log.h"

#include <assert.h>
#include <signal.h>
#include <stdlib.h>

// ---- use ----

bkv_status_t bkv_ipc_device_enter(bkv_ipc_device_t *device, int *before, bkv_error_t *err) {
    pthread_rwlock_rdlock(&device->use);
    bkv_status_t status = BKV_OK;
    if (atomic_load(&device->dead)) {
        status = bkv_fail(err, BKV_FAILED_PRECONDITION, "cuda-ipc: GPU %d has failed; only a restart of the daemon can help",
                          device->ordinal);
    } else if (atomic_load(&device->broken)) {
        status = bkv_fail(err, BKV_FAILED_PRECONDITION, "cuda-ipc: GPU %d has failed; Attach again", device->ordinal);
    } else {
        int error = bkv_gpu_enter(device->ordinal, before);
        status =
            error != 0 ? bkv_fail(err, BKV_INTERNAL, "cuda-ipc: GPU %d: %s", device->ordinal, bkv_gpu_error(error)) : BKV_OK;
    }
    if (status != BKV_OK) {
        pthread_rwlock_unlock(&device->use);
    }
    return status;
}

void bkv_ipc_device_leave(bkv_ipc_device_t *device, int before) {
    bkv_gpu_leave(before);
    pthread_rwlock_unlock(&device->use);
}

bkv_status_t bkv_ipc_device_fail(bkv_ipc_device_t *device, int error, const char *what, bkv_error_t *err) {
    if (!bkv_gpu_broken()) {
        return bkv_fail(err, BKV_INTERNAL, "%s: %s", what, bkv_gpu_error(error));
    }
    if (!atomic_exchange(&device->broken, true)) {
        bkv_log(BKV_LOG_ERROR, 0, "cuda-ipc: GPU %d has failed: %s", device->ordinal, bkv_gpu_error(error));
        pthread_mutex_lock(&device->lock);
        pthread_cond_signal(&device->gate_has);
        pthread_mutex_unlock(&device->lock);
    }
    return bkv_fail(err, BKV_FAILED_PRECONDITION, "place.session: the GPU has failed (%s); Attach again", bkv_gpu_error(error));
}

void bkv_ipc_device_reset(bkv_ipc_device_t *device) {
    pthread_rwlock_wrlock(&device->use);
    bkv_cuda_close(device->cuda);
    device->cuda = NULL;
    atomic_fetch_add(&device->generation, 1);
    bkv_ipc_pins_forget(&device->ipc->pins);
    if (device->ordinal == 0) { // where the pipeline's cache is
        bkv_pipeline_device_lost(device->ipc->config.pipeline);
    }
    int error = bkv_gpu_reset(device->ordinal);
    bkv_error_t cause;
    if (error != 0) {
        bkv_fail(&cause, BKV_INTERNAL, "%s", bkv_gpu_error(error));
    }
    if (error != 0 || bkv_cuda_open((uint32_t)device->ordinal, &device->cuda, &cause) != BKV_OK) {
        bkv_log(BKV_LOG_ERROR, 0, "cuda-ipc: GPU %d cannot be used any more, until the daemon is restarted: %s",
                device->ordinal, cause.message);
        atomic_store(&device->dead, true);
    } else {
        bkv_log(BKV_LOG_WARN, 0, "cuda-ipc: GPU %d has been reset; its clients have to attach again", device->ordinal);
    }
    atomic_store(&device->broken, false);
    pthread_rwlock_unlock(&device->use);
}

// ---- queues ----

void bkv_ipc_queue_put(bkv_ipc_queue_t *queue, bkv_ipc_transfer_t *transfer) {
    transfer->next = NULL;
    *queue->last = transfer;
    queue->last = &transfer->next;
    queue->count++;
}

bkv_ipc_transfer_t *bkv_ipc_queue_take(bkv_ipc_queue_t *queue) {
    bkv_ipc_transfer_t *transfer = queue->first;
    if (transfer != NULL) {
        queue->first = transfer->next;
        queue->last = queue->first == NULL ? &queue->first : queue->last;
        queue->count--;
    }
    return transfer;
}

bkv_status_t bkv_ipc_device_admit(bkv_ipc_device_t *device, bkv_error_t *err) {
    pthread_mutex_lock(&device->lock);
    bool full = device->under_way >= BKV_IPC_UNDER_WAY;
    device->under_way += full ? 0 : 1;
    pthread_mutex_unlock(&device->lock);
    return full ? bkv_fail(err, BKV_BUSY, "%d transfers of this GPU are under way", BKV_IPC_UNDER_WAY) : BKV_OK;
}

void bkv_ipc_device_queue(bkv_ipc_device_t *device, bkv_ipc_transfer_t *transfer) {
    pthread_mutex_lock(&device->lock);
    if (transfer->has_event) {
        bkv_ipc_queue_put(&device->gated, transfer);
        pthread_cond_signal(&device->gate_has);
    } else {
        bkv_ipc_queue_put(&device->ready, transfer);
        pthread_cond_signal(&device->lane_has);
    }
    pthread_mutex_unlock(&device->lock);
}

void bkv_ipc_device_done(bkv_ipc_device_t *device) {
    pthread_mutex_lock(&device->lock);
    assert(device->under_way > 0);
    device->under_way--;
    pthread_mutex_unlock(&device->lock);
}

// ---- open and close ----

// With all signals blocked: those are the event loop's.
static bkv_status_t start_thread(bkv_ipc_device_t *device, pthread_t *thread, void *(*main)(void *), void *argument,
                                 const char *name, bkv_error_t *err) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = pthread_create(thread, NULL, main, argument) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!started) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cuda-ipc: no thread for GPU %d", device->ordinal);
    }
    pthread_setname_np(*thread, name);
    device->threads++;
    return BKV_OK;
}

static bkv_status_t start_threads(bkv_ipc_device_t *device, bkv_error_t *err) {
    bkv_status_t status = BKV_OK;
    for (uint32_t i = 0; status == BKV_OK && i < BKV_IPC_LANES; i++) {
        device->lanes[i].device = device;
        status = start_thread(device, &device->lanes[i].thread, bkv_ipc_lane_main, &device->lanes[i], "bkv-gpu-lane", err);
    }
    return status == BKV_OK ? start_thread(device, &device->gate, bkv_ipc_gate_main, device, "bkv-gpu-gate", err) : status;
}

static void stop_threads(bkv_ipc_device_t *device) {
    pthread_mutex_lock(&device->lock);
    device->stopping = true;
    pthread_cond_broadcast(&device->gate_has);
    pthread_cond_broadcast(&device->lane_has);
    pthread_mutex_unlock(&device->lock);
    for (uint32_t i = 0; i < device->threads; i++) {
        pthread_join(i < BKV_IPC_LANES ? device->lanes[i].thread : device->gate, NULL);
    }
}

static void init(bkv_ipc_device_t *device, bkv_ipc_t *ipc, int ordinal) {
    *device = (bkv_ipc_device_t){.ipc = ipc, .ordinal = ordinal, .generation = 1};
    device->gated.last = &device->gated.first;
    device->ready.last = &device->ready.first;
    pthread_rwlock_init(&device->use, NULL);
    pthread_mutex_init(&device->mapping, NULL);
    pthread_mutex_init(&device->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&device->gate_has, &monotonic);
    pthread_cond_init(&device->lane_has, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

bkv_status_t bkv_ipc_device_open(bkv_ipc_t *ipc, int ordinal, bkv_ipc_device_t **device_out, bkv_error_t *err) {
    bkv_ipc_device_t *device = malloc(sizeof(*device));
    if (device == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cuda-ipc: no memory for GPU %d", ordinal);
    }
    init(device, ipc, ordinal);
    bkv_status_t status = bkv_cuda_open((uint32_t)ordinal, &device->cuda, err);
    if (status == BKV_OK) {
        status = start_threads(device, err);
    }
    if (status != BKV_OK) {
        bkv_ipc_device_close(device);
        return status;
    }
    bkv_log(BKV_LOG_INFO, 0, "cuda-ipc: GPU %d is in use", ordinal);
    *device_out = device;
    return BKV_OK;
}

void bkv_ipc_device_close(bkv_ipc_device_t *device) {
    if (device == NULL) {
        return;
    }
    stop_threads(device);
    assert(device->under_way == 0 && device->sessions == 0 && device->opened == NULL);
    bkv_cuda_close(device->cuda);
    pthread_cond_destroy(&device->gate_has);
    pthread_cond_destroy(&device->lane_has);
    pthread_mutex_destroy(&device->lock);
    pthread_mutex_destroy(&device->mapping);
    pthread_rwlock_destroy(&device->use);
    free(device);
}
