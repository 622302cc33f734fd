// confirm.c - asks the other members whether they, too, have nothing left to send under the view that this daemon is done with.
//
// In the order of the view, some at a time: as long as one of these is not done it is no use to ask the others. The memory of a
// round is counted by its references, the asker's and one for each question under way, as in carry.c.
#include "daemon/cluster/move/internal.h"

#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"

#include <inttypes.h>
#include <stdlib.h>
#include <time.h>
#include <xxhash.h>

#define AT_A_TIME 64u
#define ASK_MS    2000u
#define LOOK_MS   50u

typedef struct inquiry inquiry_t;

typedef struct question {
    inquiry_t *inquiry;
    bool done; // [lock] it says that it is
} question_t;

struct inquiry {
    pthread_mutex_t lock; // a leaf
    pthread_cond_t changed;
    uint32_t refs, waiting; // [lock]
    uint64_t hash;
    question_t questions[AT_A_TIME];
};

uint64_t bkv_confirm_hash(const bkv_view_t *view) {
    const struct { uint64_t seed, replicas; } common = {view->seed, bkv_placement_replicas(view->placement)};
    uint64_t hash = XXH3_64bits(&common, sizeof(common));
    for (uint32_t i = 0; i < view->count; i++) {
        const bkv_placement_member_t *place = &view->members[i].place;
        const uint64_t numbers[] = {place->epoch, place->weight, place->draining};
        hash = XXH3_64bits_withSeed(place->id, sizeof(place->id), hash);
        hash = XXH3_64bits_withSeed(place->domain, sizeof(place->domain), hash);
        hash = XXH3_64bits_withSeed(numbers, sizeof(numbers), hash);
    }
    return hash != 0 ? hash : 1;
}

// ---- a round ----

// [lock] Gives it back.
static void inquiry_unref(inquiry_t *inquiry) {
    bool last = --inquiry->refs == 0;
    pthread_mutex_unlock(&inquiry->lock);
    if (last) {
        pthread_cond_destroy(&inquiry->changed);
        pthread_mutex_destroy(&inquiry->lock);
        free(inquiry);
    }
}

static inquiry_t *inquiry_new(uint64_t hash) {
    inquiry_t *inquiry = calloc(1, sizeof(*inquiry));
    if (inquiry != NULL) {
        pthread_condattr_t attr;
        pthread_condattr_init(&attr);
        pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
        pthread_mutex_init(&inquiry->lock, NULL);
        pthread_cond_init(&inquiry->changed, &attr);
        pthread_condattr_destroy(&attr);
        inquiry->hash = hash;
        inquiry->refs = 1;
    }
    return inquiry;
}

static void on_progress(void *user, const bkv_error_t *error, const bkv_drain_progress_t *progress) {
    question_t *question = user;
    inquiry_t *inquiry = question->inquiry;
    pthread_mutex_lock(&inquiry->lock);
    question->done = error->status == BKV_OK && progress->settled == inquiry->hash;
    inquiry->waiting--;
    pthread_cond_signal(&inquiry->changed);
    inquiry_unref(inquiry);
}

static void ask(bkv_mover_t *mover, inquiry_t *inquiry, question_t *question, uint32_t member) {
    const bkv_view_t *view = mover->confirm.view;
    question->inquiry = inquiry;
    question->done = member == view->self;
    if (question->done) {
        return;
    }
    pthread_mutex_lock(&inquiry->lock);
    inquiry->refs++;
    inquiry->waiting++;
    pthread_mutex_unlock(&inquiry->lock);
    bkv_peer_t *peer = bkv_peers_get(mover->config.peers, &view->members[member]);
    if (peer == NULL || bkv_peer_drain(peer, BKV_DRAIN_ASK, bkv_now_ms() + ASK_MS, on_progress, question, NULL) != BKV_OK) {
        on_progress(question, &(bkv_error_t){.status = BKV_BUSY}, NULL);
    }
    bkv_peer_release(peer);
}

// Until all have answered, or this daemon has something else to do. [lock], and keeps it.
static void wait_for_answers(bkv_mover_t *mover, inquiry_t *inquiry) {
    while (inquiry->waiting > 0) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += (long)LOOK_MS * 1000000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&inquiry->changed, &inquiry->lock, &until);
        pthread_mutex_unlock(&inquiry->lock);
        bkv_carry_pace_t pace = bkv_mover_pace(mover, 0);
        pthread_mutex_lock(&inquiry->lock);
        if (pace != BKV_CARRY_ON) {
            return;
        }
    }
}

// Asks the next members; returns how many of them, from the first on, are done.
static uint32_t inquire(bkv_mover_t *mover, uint32_t count) {
    inquiry_t *inquiry = inquiry_new(bkv_confirm_hash(mover->confirm.view));
    if (inquiry == NULL) {
        return 0;
    }
    for (uint32_t i = 0; i < count; i++) {
        ask(mover, inquiry, &inquiry->questions[i], mover->confirm.next + i);
    }
    pthread_mutex_lock(&inquiry->lock);
    wait_for_answers(mover, inquiry);
    uint32_t done = 0;
    while (done < count && inquiry->questions[done].done) {
        done++;
    }
    inquiry_unref(inquiry);
    return done;
}

// ---- a view ----

void bkv_confirm_drop(bkv_mover_t *mover) {
    if (mover->confirm.view != NULL) {
        bkv_view_give(mover->confirm.view);
    }
    mover->confirm = (bkv_confirm_t){.view = NULL};
    pthread_mutex_lock(&mover->lock);
    mover->confirm_due_ms = BKV_MOVER_NEVER;
    mover->confirm_failures = 0;
    pthread_mutex_unlock(&mover->lock);
}

void bkv_confirm_begin(bkv_mover_t *mover, const bkv_view_t *view) {
    bkv_confirm_drop(mover);
    mover->confirm.view = bkv_view_hold(view);
    pthread_mutex_lock(&mover->lock);
    mover->confirm_due_ms = bkv_now_ms();
    pthread_mutex_unlock(&mover->lock);
}

// [lock] Every record is in its place.
static void settle(bkv_mover_t *mover) {
    bkv_history_settle(&mover->history, mover->confirm.view);
    atomic_store(&mover->unsettled, mover->confirm.view->version != mover->seen);
}

void bkv_confirm_step(bkv_mover_t *mover) {
    bkv_confirm_t *confirm = &mover->confirm;
    uint32_t left = confirm->view->count - confirm->next;
    uint32_t count = left < AT_A_TIME ? left : AT_A_TIME;
    uint32_t done = inquire(mover, count);
    confirm->next += done;
    bool all = confirm->next == confirm->view->count;
    pthread_mutex_lock(&mover->lock);
    mover->confirm_failures = done == count ? 0 : mover->confirm_failures + 1;
    if (mover->seen == confirm->view->version) {
        mover->confirm_due_ms = bkv_now_ms() + (done == count ? 0 : bkv_mover_pause_ms(mover, mover->confirm_failures));
    }
    if (all) {
        settle(mover);
    }
    pthread_mutex_unlock(&mover->lock);
    if (all) {
        bkv_log(BKV_LOG_DEBUG, 0, "cluster: repair: all %" PRIu32 " members are done", confirm->view->count);
        bkv_confirm_drop(mover);
    }
}
