// etcd.c - creates and destroys the client, and runs its thread: completions of gRPC, posts, timers. What calls and watches do
// with them is call.c's and watch.c's.
#include "daemon/cluster/etcd/internal.h"

#include "daemon/observe/clock.h"
#include "proto/handover.h"

#include <assert.h>
#include <errno.h>
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <openssl/crypto.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ATTEMPT_MS       1000
#define PAUSE_FIRST_MS   50
#define PAUSE_LONGEST_MS 1000

// How long destroy waits for gRPC to give back what was cancelled. Only a socket that blocks takes longer.
#define LINGER_MS 500

// gRPC is started once and never stopped: grpc_shutdown may block for 10 s.
static pthread_once_t grpc_started = PTHREAD_ONCE_INIT;

// ---- what the files share ----

gpr_timespec bkv_etcd_timespec(uint64_t ms) {
    return (gpr_timespec){
        .tv_sec = (int64_t)(ms / 1000), .tv_nsec = (int32_t)(ms % 1000) * 1000000, .clock_type = GPR_CLOCK_MONOTONIC};
}

uint64_t bkv_etcd_pause_ms(bkv_etcd_t *etcd, uint32_t attempt) {
    uint64_t *x = &etcd->jitter, ms = PAUSE_LONGEST_MS;
    *x ^= *x << 13, *x ^= *x >> 7, *x ^= *x << 17;
    if (attempt < 6) {
        ms = PAUSE_FIRST_MS << (attempt > 0 ? attempt - 1 : 0);
    }
    ms = ms < PAUSE_LONGEST_MS ? ms : PAUSE_LONGEST_MS;
    return ms / 2 + *x % (ms / 2);
}

// An endpoint without a leader shall say so instead of waiting for one.
size_t bkv_etcd_metadata(const bkv_etcd_t *etcd, grpc_metadata metadata[BKV_ETCD_METADATA]) {
    size_t count = 0;
    memset(metadata, 0, BKV_ETCD_METADATA * sizeof(*metadata));
    metadata[count].key = grpc_slice_from_static_string("hasleader");
    metadata[count++].value = grpc_slice_from_static_string("true");
    if (etcd->token != NULL && etcd->token[0] != '\0') {
        metadata[count].key = grpc_slice_from_static_string("token");
        metadata[count++].value = grpc_slice_from_copied_string(etcd->token);
    }
    return count;
}

void bkv_etcd_metadata_free(grpc_metadata *metadata, size_t count) {
    for (size_t i = 0; i < count; i++) {
        grpc_slice_unref(metadata[i].key);
        grpc_slice_unref(metadata[i].value);
    }
}

grpc_byte_buffer *bkv_etcd_pack(const ProtobufCMessage *message) {
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(message));
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

ProtobufCMessage *bkv_etcd_unpack(const ProtobufCMessageDescriptor *type, grpc_byte_buffer *message) {
    grpc_byte_buffer_reader reader;
    if (message == NULL || !grpc_byte_buffer_reader_init(&reader, message)) {
        return NULL;
    }
    grpc_slice bytes = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    ProtobufCMessage *unpacked = protobuf_c_message_unpack(type, NULL, GRPC_SLICE_LENGTH(bytes), GRPC_SLICE_START_PTR(bytes));
    grpc_slice_unref(bytes);
    return unpacked;
}

void bkv_etcd_endpoint_failed(bkv_etcd_t *etcd, uint32_t endpoint) {
    if (endpoint == etcd->current && etcd->endpoint_count > 1) {
        etcd->current = (endpoint + 1) % etcd->endpoint_count;
        bkv_etcd_watches_move(etcd, endpoint);
    }
}

// ---- timers ----

void bkv_etcd_timer_start(bkv_etcd_t *etcd, bkv_etcd_timer_t *timer, uint64_t delay_ms, bkv_etcd_run_t run, void *user) {
    assert(bkv_etcd_is_own_thread(etcd));
    timer->run = run;
    timer->user = user;
    timer->due_ms = bkv_now_ms() + delay_ms;
    if (!timer->armed) {
        timer->armed = true;
        timer->next = etcd->timers;
        etcd->timers = timer;
    }
}

void bkv_etcd_timer_stop(bkv_etcd_t *etcd, bkv_etcd_timer_t *timer) {
    assert(bkv_etcd_is_own_thread(etcd));
    if (timer->armed) {
        bkv_etcd_timer_t **at = &etcd->timers;
        while (*at != timer) {
            at = &(*at)->next;
        }
        *at = timer->next;
        timer->armed = false;
    }
}

// Runs what is due; returns when there will be more. A timer that runs may stop any other, so that each time the search begins
// anew.
static uint64_t timers_run(bkv_etcd_t *etcd) {
    for (;;) {
        uint64_t now_ms = bkv_now_ms(), next_ms = UINT64_MAX;
        bkv_etcd_timer_t *due = NULL;
        for (bkv_etcd_timer_t *timer = etcd->timers; timer != NULL; timer = timer->next) {
            if (timer->due_ms < next_ms) {
                next_ms = timer->due_ms;
                due = timer;
            }
        }
        if (due == NULL || next_ms > now_ms) {
            return next_ms;
        }
        bkv_etcd_timer_stop(etcd, due);
        due->run(due->user);
    }
}

// ---- posts ----

// gRPC has no public way to wake a completion queue's thread, but a question about a channel is answered there, and this one at
// once because its time is over. The thread does not end before that (is_waking), so that no lock need be held.
static void wake(bkv_etcd_t *etcd) {
    BKV_HAND_OVER(&etcd->wake_tag);
    grpc_channel_watch_connectivity_state(etcd->channels[0], grpc_channel_check_connectivity_state(etcd->channels[0], 0),
                                          bkv_etcd_timespec(0), etcd->completions, &etcd->wake_tag);
}

// [lock] Whether it is the caller who has to wake the thread, once the lock is free.
static bool claim_wake(bkv_etcd_t *etcd) {
    bool claimed = !etcd->waking;
    etcd->waking = true;
    return claimed;
}

bkv_status_t bkv_etcd_post(bkv_etcd_t *etcd, bkv_etcd_run_t run, void *user) {
    bkv_etcd_posted_t *posted = malloc(sizeof(*posted));
    if (posted == NULL) {
        return BKV_RESOURCE_EXHAUSTED;
    }
    *posted = (bkv_etcd_posted_t){.run = run, .user = user};
    pthread_mutex_lock(&etcd->lock);
    bool room = etcd->post_count < BKV_ETCD_POSTS_MAX && !etcd->closing, asleep = false;
    if (room) {
        *etcd->posts_end = posted;
        etcd->posts_end = &posted->next;
        etcd->post_count++;
        asleep = claim_wake(etcd);
    }
    pthread_mutex_unlock(&etcd->lock);
    if (asleep) {
        wake(etcd);
    }
    if (!room) {
        free(posted);
    }
    return room ? BKV_OK : BKV_BUSY;
}

// Runs all posts there are; returns whether the client is to end.
static bool posts_run(bkv_etcd_t *etcd) {
    pthread_mutex_lock(&etcd->lock);
    bkv_etcd_posted_t *posts = etcd->posts;
    bool closing = etcd->closing;
    etcd->posts = NULL;
    etcd->posts_end = &etcd->posts;
    etcd->post_count = 0;
    pthread_mutex_unlock(&etcd->lock);
    while (posts != NULL) {
        bkv_etcd_posted_t *posted = posts;
        posts = posted->next;
        posted->run(posted->user);
        free(posted);
    }
    return closing;
}

static void on_wake(void *self, bool ok) {
    (void)ok;
    bkv_etcd_t *etcd = self;
    pthread_mutex_lock(&etcd->lock);
    etcd->waking = false;
    pthread_mutex_unlock(&etcd->lock);
}

// ---- the thread ----

bool bkv_etcd_is_own_thread(const bkv_etcd_t *etcd) {
    return pthread_equal(pthread_self(), etcd->thread) != 0;
}

static void etcd_free(bkv_etcd_t *etcd) {
    for (uint32_t i = 0; i < etcd->endpoint_count; i++) {
        grpc_channel_destroy(etcd->channels[i]);
        free(etcd->endpoints[i]);
    }
    if (etcd->completions != NULL) {
        grpc_completion_queue_destroy(etcd->completions);
    }
    if (etcd->password != NULL) {
        OPENSSL_cleanse(etcd->password, strlen(etcd->password));
    }
    free(etcd->user);
    free(etcd->password);
    free(etcd->token);
    pthread_cond_destroy(&etcd->changed);
    pthread_mutex_destroy(&etcd->lock);
    free(etcd);
}

static bool is_waking(bkv_etcd_t *etcd) {
    pthread_mutex_lock(&etcd->lock);
    bool waking = etcd->waking;
    pthread_mutex_unlock(&etcd->lock);
    return waking;
}

// Takes one completion, until a time (UINT64_MAX: for ever). False: the queue has shut down.
static bool completion_take(bkv_etcd_t *etcd, uint64_t until_ms) {
    gpr_timespec until = until_ms == UINT64_MAX ? gpr_inf_future(GPR_CLOCK_MONOTONIC) : bkv_etcd_timespec(until_ms);
    grpc_event event = grpc_completion_queue_next(etcd->completions, until, NULL);
    if (event.type == GRPC_OP_COMPLETE) {
        bkv_batch_back(&event);
    }
    return event.type != GRPC_QUEUE_SHUTDOWN;
}

static void *etcd_run(void *argument) {
    bkv_etcd_t *etcd = argument;
    pthread_mutex_lock(&etcd->lock); // etcd->thread is there
    pthread_mutex_unlock(&etcd->lock);
    while (!posts_run(etcd)) {
        completion_take(etcd, timers_run(etcd));
    }
    etcd->shutting = true;
    bkv_etcd_watches_end(etcd);
    bkv_etcd_calls_cancel(etcd);
    assert(etcd->call_count == 0);
    pthread_mutex_lock(&etcd->lock);
    etcd->quiet = true;
    pthread_cond_broadcast(&etcd->changed);
    pthread_mutex_unlock(&etcd->lock);
    while (etcd->attempt_count > 0 || is_waking(etcd)) {
        completion_take(etcd, UINT64_MAX);
    }
    grpc_completion_queue_shutdown(etcd->completions);
    while (completion_take(etcd, UINT64_MAX)) {
    }
    pthread_mutex_lock(&etcd->lock);
    etcd->ended = true;
    bool abandoned = etcd->abandoned;
    pthread_cond_broadcast(&etcd->changed);
    pthread_mutex_unlock(&etcd->lock);
    if (abandoned) {
        etcd_free(etcd);
    }
    return NULL;
}

// ---- create, destroy ----

static void locks_init(bkv_etcd_t *etcd) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&etcd->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&etcd->lock, NULL);
}

// Signals are the main loop's business. The new thread waits for the lock, until it can know itself.
static int thread_start(bkv_etcd_t *etcd) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_mutex_lock(&etcd->lock);
    int error = pthread_create(&etcd->thread, NULL, etcd_run, etcd);
    pthread_mutex_unlock(&etcd->lock);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

bkv_status_t bkv_etcd_create(const bkv_etcd_options_t *options, bkv_etcd_t **etcd, bkv_error_t *err) {
    pthread_once(&grpc_started, grpc_init);
    bkv_etcd_t *made = calloc(1, sizeof(*made));
    if (made == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "etcd: out of memory");
    }
    locks_init(made);
    made->attempt_ms = options->attempt_ms != 0 ? options->attempt_ms : ATTEMPT_MS;
    made->posts_end = &made->posts;
    made->wake_tag = (bkv_batch_tag_t){.run = on_wake, .owner = made};
    made->jitter = (bkv_now_us() ^ (uint64_t)(uintptr_t)made) | 1;
    bkv_status_t status = bkv_etcd_connect(made, options, err);
    if (status == BKV_OK) {
        made->completions = grpc_completion_queue_create_for_next(NULL);
        status = thread_start(made) == 0 ? BKV_OK : bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "etcd: no thread could be started");
    }
    if (status != BKV_OK) {
        if (made->completions != NULL) {
            grpc_completion_queue_shutdown(made->completions);
        }
        etcd_free(made);
        return status;
    }
    *etcd = made;
    return BKV_OK;
}

// Waits for the last callback, and a while for the thread to end; false: it waits for gRPC, and frees the client after that.
static bool thread_end(bkv_etcd_t *etcd) {
    struct timespec until;
    pthread_mutex_lock(&etcd->lock);
    while (!etcd->quiet) {
        pthread_cond_wait(&etcd->changed, &etcd->lock);
    }
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += LINGER_MS * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    while (!etcd->ended && pthread_cond_timedwait(&etcd->changed, &etcd->lock, &until) != ETIMEDOUT) {
    }
    bool ended = etcd->ended;
    etcd->abandoned = !ended;
    pthread_t thread = etcd->thread; // the client may be gone after the unlock
    pthread_mutex_unlock(&etcd->lock);
    if (ended) {
        pthread_join(thread, NULL);
    } else {
        pthread_detach(thread);
    }
    return ended;
}

void bkv_etcd_destroy(bkv_etcd_t *etcd) {
    if (etcd == NULL) {
        return;
    }
    assert(!bkv_etcd_is_own_thread(etcd));
    pthread_mutex_lock(&etcd->lock);
    etcd->closing = true;
    bool asleep = claim_wake(etcd);
    pthread_mutex_unlock(&etcd->lock);
    if (asleep) {
        wake(etcd);
    }
    if (thread_end(etcd)) {
        etcd_free(etcd);
    }
}
