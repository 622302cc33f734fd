// queue.c - the completion queue of the asynchronous calls: what is done waits here until it is polled, an eventfd says so.
//
// The queue is bounded by counting: a call is admitted only if fewer than `depth` are in flight or waiting to be polled.
#include "client/client.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define DEPTH_MAX 65536

struct bkv_queue {
    bkv_client_t *client;
    uint32_t depth;
    int event; // eventfd: readable while `first` is set

    pthread_mutex_t lock; // a leaf
    pthread_cond_t delivered;
    uint32_t running, waiting; // not yet delivered; delivered and not yet polled
    bkv_call_t *first, **last;
};

bkv_status_t bkv_queue_create(bkv_client_t *client, uint32_t depth, bkv_queue_t **queue, bkv_error_t *err) {
    assert(client != NULL && queue != NULL);
    if (depth < 1 || depth > DEPTH_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "depth: %u is not between 1 and %d", depth, DEPTH_MAX);
    }
    bkv_queue_t *made = calloc(1, sizeof *made);
    int event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (made == NULL || event < 0) {
        if (event >= 0) {
            close(event);
        }
        free(made);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "queue: out of memory or file descriptors");
    }
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&made->delivered, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&made->lock, NULL);
    made->client = client;
    made->depth = depth;
    made->event = event;
    made->last = &made->first;
    *queue = made;
    return BKV_OK;
}

bkv_client_t *bkv_queue_client(const bkv_queue_t *queue) {
    return queue->client;
}

int bkv_queue_fd(const bkv_queue_t *queue) {
    return queue->event;
}

bkv_status_t bkv_queue_admit(bkv_queue_t *queue) {
    pthread_mutex_lock(&queue->lock);
    bool room = queue->running + queue->waiting < queue->depth;
    if (room) {
        queue->running++;
    }
    pthread_mutex_unlock(&queue->lock);
    return room ? BKV_OK : BKV_BUSY;
}

void bkv_queue_deliver(bkv_queue_t *queue, bkv_call_t *call) {
    pthread_mutex_lock(&queue->lock);
    if (queue->first == NULL) {
        eventfd_write(queue->event, 1);
    }
    call->done_next = NULL;
    *queue->last = call;
    queue->last = &call->done_next;
    queue->running--;
    queue->waiting++;
    pthread_cond_broadcast(&queue->delivered);
    pthread_mutex_unlock(&queue->lock);
}

// Takes one; the lock must be held.
static bkv_call_t *pop(bkv_queue_t *queue) {
    bkv_call_t *call = queue->first;
    if (call == NULL) {
        return NULL;
    }
    queue->first = call->done_next;
    queue->waiting--;
    if (queue->first == NULL) {
        queue->last = &queue->first;
        eventfd_t value;
        eventfd_read(queue->event, &value);
    }
    return call;
}

// Waits for something to be there, at most wait_ms; the lock must be held.
static void wait_for_first(bkv_queue_t *queue, uint32_t wait_ms) {
    gpr_timespec due = bkv_client_timespec(bkv_client_now_ns() + wait_ms * 1000000ull);
    struct timespec until = {.tv_sec = due.tv_sec, .tv_nsec = due.tv_nsec};
    while (queue->first == NULL && pthread_cond_timedwait(&queue->delivered, &queue->lock, &until) != ETIMEDOUT) {
    }
}

size_t bkv_queue_poll(bkv_queue_t *queue, bkv_completion_t *completions, size_t max, uint32_t wait_ms) {
    size_t count = 0;
    bkv_call_t *call;
    do {
        pthread_mutex_lock(&queue->lock);
        if (count == 0 && max > 0 && wait_ms > 0 && queue->first == NULL) {
            wait_for_first(queue, wait_ms);
        }
        call = count < max ? pop(queue) : NULL;
        pthread_mutex_unlock(&queue->lock);
        if (call != NULL) {
            if (call->kind->finish != NULL) {
                call->kind->finish(call);
            }
            completions[count++] = (bkv_completion_t){.tag = call->user_tag, .error = call->error};
            bkv_call_free(call);
        }
    } while (call != NULL);
    return count;
}

void bkv_queue_destroy(bkv_queue_t *queue) {
    if (queue == NULL) {
        return;
    }
    bkv_client_cancel(queue->client, queue);
    pthread_mutex_lock(&queue->lock);
    while (queue->running > 0) {
        pthread_cond_wait(&queue->delivered, &queue->lock);
    }
    bkv_call_t *call;
    while ((call = pop(queue)) != NULL) {
        if (call->kind->finish != NULL) {
            call->kind->finish(call);
        }
        bkv_call_free(call);
    }
    pthread_mutex_unlock(&queue->lock);
    close(queue->event);
    pthread_cond_destroy(&queue->delivered);
    pthread_mutex_destroy(&queue->lock);
    free(queue);
}
