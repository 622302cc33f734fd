// alarm.c - see alarm.h: a list in order of time, and a thread that sleeps until the first.
//
// Those who set alarms look ahead by much the same time, so that an alarm's place is mostly at the list's end: it is searched for
// from there. Nearly all alarms are cancelled, since answers come in time. Therefore the thread is woken only for an alarm that
// is earlier than what it sleeps for, and not when that one is cancelled: it then wakes for nothing, once for many.
#include "daemon/cluster/alarm.h"

#include "daemon/observe/clock.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

struct bkv_alarms {
    pthread_t thread;
    pthread_mutex_t lock; // a leaf; guards the following
    pthread_cond_t changed;
    bkv_alarm_t *first, *last;
    uint64_t sleeps_until_us; // UINT64_MAX: until it is woken
    bool ending;
};

// [lock]
static void unlink_alarm(bkv_alarms_t *alarms, bkv_alarm_t *alarm) {
    *(alarm->earlier != NULL ? &alarm->earlier->later : &alarms->first) = alarm->later;
    *(alarm->later != NULL ? &alarm->later->earlier : &alarms->last) = alarm->earlier;
    alarm->set = false;
}

// [lock]
static void link_alarm(bkv_alarms_t *alarms, bkv_alarm_t *alarm) {
    bkv_alarm_t *before = alarms->last;
    while (before != NULL && before->at_us > alarm->at_us) {
        before = before->earlier;
    }
    alarm->earlier = before;
    alarm->later = before != NULL ? before->later : alarms->first;
    *(alarm->earlier != NULL ? &alarm->earlier->later : &alarms->first) = alarm;
    *(alarm->later != NULL ? &alarm->later->earlier : &alarms->last) = alarm;
    alarm->set = true;
}

// [lock] Sleeps until the first alarm, or for ever.
static void sleep_for_first(bkv_alarms_t *alarms) {
    if (alarms->first == NULL) {
        alarms->sleeps_until_us = UINT64_MAX;
        pthread_cond_wait(&alarms->changed, &alarms->lock);
        return;
    }
    uint64_t at_us = alarms->first->at_us;
    const struct timespec at = {.tv_sec = (time_t)(at_us / 1000000), .tv_nsec = (long)(at_us % 1000000) * 1000};
    alarms->sleeps_until_us = at_us;
    pthread_cond_timedwait(&alarms->changed, &alarms->lock, &at);
}

static void *run(void *user) {
    bkv_alarms_t *alarms = user;
    pthread_mutex_lock(&alarms->lock);
    while (!alarms->ending) {
        bkv_alarm_t *alarm = alarms->first;
        if (alarm == NULL || alarm->at_us > bkv_now_us()) {
            sleep_for_first(alarms);
            continue;
        }
        unlink_alarm(alarms, alarm);
        alarms->sleeps_until_us = 0; // it looks again before it sleeps
        pthread_mutex_unlock(&alarms->lock);
        alarm->ring(alarm->user);
        pthread_mutex_lock(&alarms->lock);
    }
    pthread_mutex_unlock(&alarms->lock);
    return NULL;
}

bkv_status_t bkv_alarms_create(bkv_alarms_t **alarms_out, bkv_error_t *err) {
    bkv_alarms_t *alarms = calloc(1, sizeof(*alarms));
    if (alarms == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: no memory");
    }
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&alarms->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&alarms->lock, NULL);
    if (pthread_create(&alarms->thread, NULL, run, alarms) != 0) {
        pthread_cond_destroy(&alarms->changed);
        pthread_mutex_destroy(&alarms->lock);
        free(alarms);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: no thread to be had");
    }
    *alarms_out = alarms;
    return BKV_OK;
}

void bkv_alarms_destroy(bkv_alarms_t *alarms) {
    if (alarms == NULL) {
        return;
    }
    pthread_mutex_lock(&alarms->lock);
    assert(alarms->first == NULL);
    alarms->ending = true;
    pthread_cond_signal(&alarms->changed);
    pthread_mutex_unlock(&alarms->lock);
    pthread_join(alarms->thread, NULL);
    pthread_cond_destroy(&alarms->changed);
    pthread_mutex_destroy(&alarms->lock);
    free(alarms);
}

void bkv_alarm_set(bkv_alarms_t *alarms, bkv_alarm_t *alarm, uint64_t at_us) {
    pthread_mutex_lock(&alarms->lock);
    assert(!alarm->set);
    alarm->at_us = at_us;
    link_alarm(alarms, alarm);
    if (at_us < alarms->sleeps_until_us) {
        pthread_cond_signal(&alarms->changed);
    }
    pthread_mutex_unlock(&alarms->lock);
}

bool bkv_alarm_cancel(bkv_alarms_t *alarms, bkv_alarm_t *alarm) {
    pthread_mutex_lock(&alarms->lock);
    bool was_set = alarm->set;
    if (was_set) {
        unlink_alarm(alarms, alarm);
    }
    pthread_mutex_unlock(&alarms->lock);
    return was_set;
}
