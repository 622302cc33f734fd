// mover.c - what the mover is told and asked, and its thread: what is to be done when. pass.c does it.
#include "daemon/cluster/move/internal.h"

#include "daemon/observe/clock.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PAUSE_MS     1000u      // unless the configuration says otherwise
#define PAUSE_GROWTH 30u        // to which multiple pauses grow
#define BLOCKED_MS   1000u      // how often to look whether something may be moved again
#define NAP_NS       100000000u // the longest wait for bandwidth without a look at what else has come

// ---- views ----

static uint64_t soonest(uint64_t a_ms, uint64_t b_ms) {
    return a_ms < b_ms ? a_ms : b_ms;
}

static bool has_takers(const bkv_view_t *view) {
    uint16_t owners[BKV_REPLICAS_MAX];
    return bkv_placement_slot_owners(view->placement, 0, owners) > 0;
}

void bkv_mover_look(bkv_mover_t *mover) {
    const bkv_view_t *view = bkv_membership_view(mover->config.membership);
    if (view->version != mover->seen) {
        mover->seen = view->version;
        mover->member = view->self != BKV_NO_MEMBER;
        bool draining = mover->member && view->members[view->self].place.draining;
        if (draining && !mover->draining) {
            mover->moved_keys = mover->moved_bytes = 0;
        }
        mover->draining = draining;
        mover->takers = has_takers(view);
        mover->pass_due_ms = bkv_now_ms() + (draining ? 0 : mover->delay_ms);
        mover->pass_failures = mover->pass_refusals = 0;
        mover->confirm_due_ms = BKV_MOVER_NEVER;
        bkv_history_saw(&mover->history, view);
        mover->offer_all = mover->offer_all || mover->history.lost;
        mover->history.lost = false;
        atomic_store(&mover->unsettled, mover->history.views[0]->version != view->version);
    }
    bkv_view_give(view);
}

bool bkv_mover_may(bkv_mover_t *mover) {
    bkv_membership_status_t status;
    bkv_membership_get_status(mover->config.membership, &status);
    return mover->member && mover->takers && status.state == BKV_MEMBERSHIP_MEMBER;
}

// ---- the thread ----

// [lock]
static void wait_until(bkv_mover_t *mover, uint64_t due_ms, uint64_t due_ns) {
    if (due_ms == BKV_MOVER_NEVER) {
        pthread_cond_wait(&mover->changed, &mover->lock);
        return;
    }
    uint64_t now_ms = bkv_now_ms();
    uint64_t wait_ns = (due_ms > now_ms ? due_ms - now_ms : 0) * 1000000 + due_ns;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    wait_ns += (uint64_t)until.tv_nsec;
    until.tv_sec += (time_t)(wait_ns / 1000000000);
    until.tv_nsec = (long)(wait_ns % 1000000000);
    pthread_cond_timedwait(&mover->changed, &mover->lock, &until);
}

uint64_t bkv_mover_pause_ms(const bkv_mover_t *mover, uint32_t failures) {
    uint64_t first_ms = mover->config.pause_ms;
    return failures > 5 ? PAUSE_GROWTH * first_ms
                        : soonest(first_ms << (failures > 0 ? failures - 1 : 0), PAUSE_GROWTH * first_ms);
}

// A pass that aims at an older view is given up once the newer one is due.
bkv_carry_pace_t bkv_mover_pace(void *user, uint64_t bytes) {
    bkv_mover_t *mover = user;
    bkv_carry_pace_t pace = BKV_CARRY_ON;
    pthread_mutex_lock(&mover->lock);
    for (bool wait = true; wait;) {
        bkv_mover_look(mover);
        uint64_t now_ns = bkv_now_us() * 1000;
        uint64_t wait_ns = bytes > 0 ? bkv_bandwidth_wait_ns(&mover->bandwidth, now_ns) : 0;
        if (mover->ending) {
            pace = BKV_CARRY_LEAVE;
        } else if (!bkv_mover_may(mover) || (mover->passing && mover->pass_due_ms <= bkv_now_ms())) {
            pace = BKV_CARRY_HALT;
        } else if (wait_ns == 0) {
            bkv_bandwidth_take(&mover->bandwidth, bytes, now_ns);
        }
        wait = pace == BKV_CARRY_ON && wait_ns > 0;
        if (wait) {
            wait_until(mover, 0, wait_ns < NAP_NS ? wait_ns : NAP_NS);
        }
    }
    pthread_mutex_unlock(&mover->lock);
    return pace;
}

typedef void (*work_t)(bkv_mover_t *mover);

// [lock] What is to be done now; NULL: nothing before *due_ms.
static work_t next_work(bkv_mover_t *mover, uint64_t *due_ms) {
    uint64_t now_ms = bkv_now_ms();
    bool owes = mover->owed.count > 0;
    *due_ms = soonest(soonest(mover->pass_due_ms, mover->confirm_due_ms), owes ? mover->owed_due_ms : BKV_MOVER_NEVER);
    if (!mover->passing && *due_ms > now_ms) {
        return NULL;
    }
    if (!bkv_mover_may(mover)) {
        *due_ms = now_ms + BLOCKED_MS;
        return NULL;
    }
    if (mover->pass_due_ms <= now_ms) {
        return bkv_pass_begin;
    }
    if (owes && mover->owed_due_ms <= now_ms) {
        return bkv_pass_owed;
    }
    return mover->passing ? bkv_pass_step : bkv_confirm_step;
}

static void *run(void *user) {
    bkv_mover_t *mover = user;
    pthread_mutex_lock(&mover->lock);
    while (!mover->ending) {
        uint64_t due_ms = 0;
        bkv_mover_look(mover);
        work_t work = next_work(mover, &due_ms);
        if (work == NULL) {
            wait_until(mover, due_ms, 0);
            continue;
        }
        pthread_mutex_unlock(&mover->lock);
        work(mover);
        pthread_mutex_lock(&mover->lock);
    }
    pthread_mutex_unlock(&mover->lock);
    bkv_pass_drop(mover);
    bkv_confirm_drop(mover);
    return NULL;
}

// ---- create, destroy ----

static void init_sync(bkv_mover_t *mover) {
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&mover->lock, NULL);
    pthread_cond_init(&mover->changed, &attr);
    pthread_condattr_destroy(&attr);
}

static bkv_status_t start(bkv_mover_t *mover, bkv_error_t *err) {
    bkv_status_t status = bkv_placement_create(&(bkv_placement_config_t){.replicas = 1}, NULL, &mover->nobody, err);
    if (status != BKV_OK) {
        return status;
    }
    mover->sends = calloc(BKV_MOVER_GROUP, sizeof(mover->sends[0]));
    mover->outcomes = calloc(BKV_MOVER_GROUP, sizeof(mover->outcomes[0]));
    mover->names = calloc(BKV_MOVER_GROUP, sizeof(mover->names[0]));
    if (mover->sends == NULL || mover->outcomes == NULL || mover->names == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "mover: no memory");
    }
    const bkv_view_t *view = bkv_membership_view(mover->config.membership);
    bkv_history_init(&mover->history, view);
    bkv_view_give(view);
    int failed = pthread_create(&mover->thread, NULL, run, mover);
    mover->running = failed == 0;
    return failed == 0 ? BKV_OK : bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "mover: no thread: %s", strerror(failed));
}

bkv_status_t bkv_mover_create(const bkv_mover_config_t *config, bkv_mover_t **mover_out, bkv_error_t *err) {
    bkv_mover_t *mover = calloc(1, sizeof(*mover));
    if (mover == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "mover: no memory");
    }
    mover->config = *config;
    mover->config.pause_ms = config->pause_ms != 0 ? config->pause_ms : PAUSE_MS;
    mover->delay_ms = config->delay_ms;
    mover->pass_due_ms = mover->confirm_due_ms = BKV_MOVER_NEVER;
    bkv_bandwidth_init(&mover->bandwidth, config->rate, 0, bkv_now_us() * 1000);
    init_sync(mover);
    bkv_status_t status = start(mover, err);
    if (status != BKV_OK) {
        bkv_mover_destroy(mover);
        return status;
    }
    *mover_out = mover;
    return BKV_OK;
}

void bkv_mover_stop(bkv_mover_t *mover) {
    if (mover == NULL) {
        return;
    }
    pthread_mutex_lock(&mover->lock);
    mover->ending = true;
    pthread_cond_signal(&mover->changed);
    pthread_mutex_unlock(&mover->lock);
    if (mover->running) {
        pthread_join(mover->thread, NULL);
        mover->running = false;
    }
    pthread_mutex_lock(&mover->lock);
    bkv_history_deinit(&mover->history);
    pthread_mutex_unlock(&mover->lock);
}

void bkv_mover_destroy(bkv_mover_t *mover) {
    if (mover == NULL) {
        return;
    }
    bkv_mover_stop(mover);
    bkv_owed_deinit(&mover->owed);
    bkv_placement_destroy(mover->nobody);
    free(mover->sends);
    free(mover->outcomes);
    free(mover->names);
    pthread_cond_destroy(&mover->changed);
    pthread_mutex_destroy(&mover->lock);
    free(mover);
}

// ---- what it is told ----

void bkv_mover_view_changed(bkv_mover_t *mover) {
    pthread_mutex_lock(&mover->lock);
    if (!mover->ending) {
        bkv_mover_look(mover); // here, lest the thread misses one of two
        pthread_cond_signal(&mover->changed);
    }
    pthread_mutex_unlock(&mover->lock);
}

void bkv_mover_again(bkv_mover_t *mover, const bkv_name_t *name) {
    pthread_mutex_lock(&mover->lock);
    if (mover->owed.count == 0 && mover->owed_failures == 0) {
        mover->owed_due_ms = bkv_now_ms() + mover->config.pause_ms;
        pthread_cond_signal(&mover->changed);
    }
    bkv_owed_add(&mover->owed, name);
    mover->offer_all = mover->offer_all || mover->owed.overflow;
    mover->owed.overflow = false;
    if (mover->offer_all && mover->pass_due_ms == BKV_MOVER_NEVER && !mover->passing) {
        mover->pass_due_ms = bkv_now_ms() + mover->config.pause_ms;
        pthread_cond_signal(&mover->changed);
    }
    pthread_mutex_unlock(&mover->lock);
}

void bkv_mover_set_limits(bkv_mover_t *mover, uint64_t delay_ms, uint64_t rate) {
    pthread_mutex_lock(&mover->lock);
    mover->delay_ms = delay_ms;
    if (mover->pass_due_ms != BKV_MOVER_NEVER) {
        mover->pass_due_ms = soonest(mover->pass_due_ms, bkv_now_ms() + delay_ms);
    }
    bkv_bandwidth_set_rate(&mover->bandwidth, rate, bkv_now_us() * 1000);
    pthread_cond_signal(&mover->changed);
    pthread_mutex_unlock(&mover->lock);
}

// ---- what it is asked ----

const bkv_view_t *bkv_mover_origin(bkv_mover_t *mover) {
    if (!atomic_load(&mover->unsettled)) {
        return NULL;
    }
    pthread_mutex_lock(&mover->lock);
    bool any = mover->history.count > 0 && mover->history.views[0]->count > 0;
    const bkv_view_t *origin = any ? bkv_view_hold(mover->history.views[0]) : NULL;
    pthread_mutex_unlock(&mover->lock);
    return origin;
}

// Of a member that drains and has not begun: all that is no copy.
static void get_left(bkv_mover_t *mover, bkv_mover_progress_t *progress) {
    bkv_store_metrics_t store;
    bkv_store_metrics(mover->config.store, &store);
    uint64_t own = store.entries > store.copies ? store.entries - store.copies : 0;
    progress->left_keys = own;
    progress->left_bytes = own == 0 ? 0 : (uint64_t)((double)store.resident_bytes * (double)own / (double)store.entries);
}

void bkv_mover_get_progress(bkv_mover_t *mover, bkv_mover_progress_t *progress) {
    pthread_mutex_lock(&mover->lock);
    bool due = mover->pass_due_ms != BKV_MOVER_NEVER || mover->owed.count > 0;
    bool waits = due || mover->confirm_due_ms != BKV_MOVER_NEVER; // for the others
    bool clean = mover->clean == mover->seen;
    *progress = (bkv_mover_progress_t){
        .state = mover->passing || mover->owing ? BKV_MOVER_MOVING
                 : waits                        ? BKV_MOVER_WAITING
                                                : BKV_MOVER_IDLE,
        .left_keys = mover->left_keys + mover->owed.count,
        .left_bytes = mover->left_bytes,
        .moved_keys = mover->moved_keys,
        .moved_bytes = mover->moved_bytes,
        .handed_over = mover->draining && clean && !due && !mover->owing,
        .view = mover->seen,
        .settled = clean ? mover->settled_hash : 0,
    };
    bool waits_to_drain = mover->draining && !progress->handed_over && !mover->passing && progress->left_keys == 0;
    pthread_mutex_unlock(&mover->lock);
    if (waits_to_drain) {
        get_left(mover, progress);
    }
}

void bkv_mover_get_metrics(bkv_mover_t *mover, bkv_mover_metrics_t *metrics) {
    pthread_mutex_lock(&mover->lock);
    *metrics = mover->metrics;
    metrics->repair_moving = mover->passing || mover->owing;
    metrics->repair_left_bytes = mover->left_bytes;
    pthread_mutex_unlock(&mover->lock);
}
