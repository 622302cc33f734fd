// membership.c - creates and destroys the membership, runs the thread that makes views, and answers questions about it.
#include "daemon/cluster/members/internal.h"

#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"

#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TTL_MAX_S        3600
#define PUBLISH_AGAIN_MS 200 // after a view could not be made

const char *bkv_membership_state_name(bkv_membership_state_t state) {
    static const char *const names[] = {"joining", "member", "cut off", "blocked", "left"};
    return names[state];
}

// ---- state ----

static void log_state(const bkv_membership_t *membership, bkv_membership_state_t state, const bkv_error_t *trouble) {
    const char *why = trouble != NULL ? trouble->message : "";
    switch (state) {
    case BKV_MEMBERSHIP_JOINING:
        bkv_log(BKV_LOG_WARN, 0, "cluster: not a member yet: %s", why);
        break;
    case BKV_MEMBERSHIP_MEMBER:
        bkv_log(BKV_LOG_INFO, 0, "cluster: this daemon is a member, as %s", membership->id);
        break;
    case BKV_MEMBERSHIP_CUT_OFF:
        bkv_log(BKV_LOG_WARN, 0, "cluster: cut off from etcd, going on with the members last seen: %s", why);
        break;
    case BKV_MEMBERSHIP_BLOCKED:
        bkv_log(BKV_LOG_ERROR, 0, "cluster: not a member: %s", why);
        break;
    case BKV_MEMBERSHIP_LEFT:
        bkv_log(BKV_LOG_INFO, 0, "cluster: this daemon has left");
        break;
    }
}

void bkv_membership_set_state(bkv_membership_t *membership, bkv_membership_state_t state, const bkv_error_t *trouble) {
    bkv_status_t status = trouble != NULL ? trouble->status : BKV_OK;
    pthread_mutex_lock(&membership->lock);
    bool news = membership->status.state != state || membership->status.trouble.status != status;
    if (membership->status.state != state) {
        membership->status.since_ms = bkv_now_ms();
    }
    membership->status.state = state;
    membership->status.epoch = membership->registration.epoch;
    membership->status.trouble = trouble != NULL ? *trouble : (bkv_error_t){.status = BKV_OK};
    pthread_cond_broadcast(&membership->changed);
    pthread_mutex_unlock(&membership->lock);
    if (news) {
        log_state(membership, state, trouble);
    }
}

void bkv_membership_get_status(bkv_membership_t *membership, bkv_membership_status_t *status) {
    pthread_mutex_lock(&membership->lock);
    *status = membership->status;
    pthread_mutex_unlock(&membership->lock);
}

void bkv_membership_get_metrics(bkv_membership_t *membership, bkv_membership_metrics_t *metrics) {
    pthread_mutex_lock(&membership->lock);
    *metrics = membership->metrics;
    metrics->connected = membership->status.state == BKV_MEMBERSHIP_MEMBER;
    pthread_mutex_unlock(&membership->lock);
    const bkv_view_t *view = bkv_membership_view(membership);
    metrics->view_version = view->version;
    metrics->members = view->count;
    for (uint32_t i = 0; i < view->count; i++) {
        metrics->draining += view->members[i].place.draining;
    }
    bkv_view_give(view);
}

const bkv_view_t *bkv_membership_view(bkv_membership_t *membership) {
    return bkv_view_take(&membership->views);
}

// ---- the thread that makes views ----

// Makes the next view of what is pending; false: that could not be done now.
static bool publish(bkv_membership_t *membership, const bkv_view_config_t *config) {
    bkv_error_t err;
    const bkv_view_t *was = bkv_membership_view(membership);
    bool made = bkv_views_publish(&membership->views, config, &err) == BKV_OK;
    if (made) {
        const bkv_view_t *now = bkv_membership_view(membership);
        bkv_changes_log(was, now);
        if (membership->on_change != NULL) {
            membership->on_change(membership->user, was, now);
        }
        bkv_view_give(now);
    } else {
        bkv_log(BKV_LOG_WARN, 0, "cluster: no new view: %s", err.message);
    }
    bkv_view_give(was);
    return made;
}

static struct timespec in_ms(uint32_t ms) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)(ms % 1000) * 1000000;
    until.tv_sec += ms / 1000 + until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    return until;
}

static void wait_ms(bkv_membership_t *membership, uint32_t ms) {
    struct timespec until = in_ms(ms);
    while (!membership->ending && pthread_cond_timedwait(&membership->changed, &membership->lock, &until) != ETIMEDOUT) {
    }
}

static void *publisher_run(void *argument) {
    bkv_membership_t *membership = argument;
    pthread_mutex_lock(&membership->lock);
    while (!membership->ending) {
        if (membership->pending == NULL) {
            pthread_cond_wait(&membership->changed, &membership->lock);
            continue;
        }
        bkv_member_t *members = membership->pending;
        const bkv_view_config_t config = {
            .members = members,
            .count = membership->pending_count,
            .revision = membership->pending_revision,
            .self = membership->id,
            .cluster = membership->cluster,
        };
        membership->pending = NULL;
        membership->publishing = true;
        pthread_mutex_unlock(&membership->lock);
        bool made = publish(membership, &config);
        pthread_mutex_lock(&membership->lock);
        membership->publishing = false;
        pthread_cond_broadcast(&membership->changed);
        if (!made && membership->pending == NULL) {
            membership->pending = members; // until then somebody gives a view back
            wait_ms(membership, PUBLISH_AGAIN_MS);
        } else {
            free(members);
        }
    }
    pthread_mutex_unlock(&membership->lock);
    return NULL;
}

bool bkv_membership_await(bkv_membership_t *membership, uint32_t timeout_ms) {
    struct timespec until = in_ms(timeout_ms);
    pthread_mutex_lock(&membership->lock);
    bool known = false, late = false;
    while (!known && !late) {
        known = membership->metrics.watching && membership->pending == NULL && !membership->publishing;
        late = !known && pthread_cond_timedwait(&membership->changed, &membership->lock, &until) == ETIMEDOUT;
    }
    pthread_mutex_unlock(&membership->lock);
    return known;
}

// ---- create ----

static bkv_status_t check(const bkv_membership_config_t *config, bkv_error_t *err) {
    if (!bkv_member_id_valid(config->cluster)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "cluster: its name must be 1 to %d letters, digits, '.', '_' or '-'",
                        BKV_MEMBER_NAME_MAX - 1);
    }
    if (config->ttl_s < 1 || config->ttl_s > TTL_MAX_S) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "ttl: %u s, must be 1 to %d", config->ttl_s, TTL_MAX_S);
    }
    if (config->replicas < 1 || config->replicas > BKV_REPLICAS_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "replicas: %u, must be 1 to %d", config->replicas, BKV_REPLICAS_MAX);
    }
    return config->self.place.id[0] == '\0' ? BKV_OK : bkv_member_check(&config->self, err);
}

static void make_keys(bkv_membership_t *membership, const char *cluster) {
    snprintf(membership->prefix, sizeof(membership->prefix), "/balancekv/%s/", cluster);
    snprintf(membership->config_key, sizeof(membership->config_key), "/balancekv/%s/config", cluster);
    snprintf(membership->member_prefix, sizeof(membership->member_prefix), "/balancekv/%s/members/", cluster);
    snprintf(membership->own_key, sizeof(membership->own_key), "/balancekv/%s/members/%s", cluster, membership->id);
}

static void locks_init(bkv_membership_t *membership) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&membership->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&membership->lock, NULL);
}

void bkv_membership_unref(bkv_membership_t *membership) {
    if (atomic_fetch_sub(&membership->refs, 1) == 1) {
        bkv_roster_deinit(&membership->roster);
        bkv_views_deinit(&membership->views);
        free(membership->pending);
        pthread_cond_destroy(&membership->changed);
        pthread_mutex_destroy(&membership->lock);
        free(membership);
    }
}

// Has something done on the etcd client's thread, which holds a reference for it.
static bkv_status_t post(bkv_membership_t *membership, bkv_etcd_run_t run) {
    atomic_fetch_add(&membership->refs, 1);
    bkv_status_t status = bkv_etcd_post(membership->etcd, run, membership);
    if (status != BKV_OK) {
        atomic_fetch_sub(&membership->refs, 1); // not the last: the caller's is there
    }
    return status;
}

static void on_start(void *user) {
    bkv_membership_t *membership = user;
    bkv_error_t err;
    const bkv_etcd_text_t prefix = {.bytes = membership->prefix, .length = strlen(membership->prefix)};
    if (!membership->dead) {
        if (bkv_etcd_watch_create(membership->etcd, prefix, &bkv_roster_watcher, membership, &membership->watch, &err) !=
            BKV_OK) {
            bkv_log(BKV_LOG_ERROR, 0, "cluster: other members cannot be watched: %s", err.message);
        }
        bkv_registration_start(membership);
    }
    bkv_membership_unref(membership);
}

static int publisher_start(bkv_membership_t *membership) {
    sigset_t all, before; // signals are the main loop's business
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&membership->publisher, NULL, publisher_run, membership);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

static bkv_status_t start(bkv_membership_t *membership, bkv_error_t *err) {
    bkv_status_t status = bkv_roster_init(&membership->roster, err);
    if (status == BKV_OK) {
        status = bkv_views_init(&membership->views, err);
    }
    if (status == BKV_OK && publisher_start(membership) != 0) {
        status = bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: no thread could be started");
    }
    if (status != BKV_OK) {
        bkv_membership_unref(membership);
        return status;
    }
    status = post(membership, on_start);
    if (status != BKV_OK) {
        bkv_membership_destroy(membership);
        return bkv_fail(err, status, "cluster: the etcd client takes no more");
    }
    return BKV_OK;
}

bkv_status_t bkv_membership_create(const bkv_membership_config_t *config, bkv_membership_t **membership, bkv_error_t *err) {
    bkv_status_t status = check(config, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_membership_t *made = calloc(1, sizeof(*made));
    if (made == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: out of memory");
    }
    locks_init(made);
    atomic_init(&made->refs, 1);
    made->etcd = config->etcd;
    made->self = config->self;
    made->registration.held = config->later;
    memcpy(made->id, config->self.place.id, sizeof(made->id));
    make_keys(made, config->cluster);
    made->ttl_s = config->ttl_s;
    made->cluster.replicas = config->replicas;
    made->on_change = config->on_change;
    made->user = config->user;
    made->status.since_ms = bkv_now_ms();
    status = start(made, err);
    if (status == BKV_OK) {
        *membership = made;
    }
    return status;
}

// ---- leave, destroy ----

static void on_leave(void *user) {
    bkv_membership_t *membership = user;
    bkv_registration_leave(membership);
    bkv_membership_unref(membership);
}

bkv_status_t bkv_membership_leave(bkv_membership_t *membership, uint32_t timeout_ms, bkv_error_t *err) {
    if (membership->id[0] == '\0') {
        return BKV_OK;
    }
    struct timespec until = in_ms(timeout_ms);
    bkv_status_t status = post(membership, on_leave);
    if (status != BKV_OK) {
        return bkv_fail(err, status, "cluster: the etcd client takes no more");
    }
    pthread_mutex_lock(&membership->lock);
    while (membership->status.state != BKV_MEMBERSHIP_LEFT &&
           pthread_cond_timedwait(&membership->changed, &membership->lock, &until) != ETIMEDOUT) {
    }
    bool left = membership->status.state == BKV_MEMBERSHIP_LEFT;
    pthread_mutex_unlock(&membership->lock);
    return left ? BKV_OK
                : bkv_fail(err, BKV_DEADLINE_EXCEEDED, "cluster: etcd has not confirmed the leave within %u ms", timeout_ms);
}

static void on_destroy(void *user) {
    bkv_membership_t *membership = user;
    membership->dead = true;
    bkv_registration_stop(membership);
    bkv_etcd_timer_stop(membership->etcd, &membership->roster.timer);
    bkv_etcd_watch_destroy(membership->watch);
    pthread_mutex_lock(&membership->lock);
    membership->detached = true;
    pthread_cond_broadcast(&membership->changed);
    pthread_mutex_unlock(&membership->lock);
    bkv_membership_unref(membership);
}

void bkv_membership_destroy(bkv_membership_t *membership) {
    if (membership == NULL) {
        return;
    }
    while (post(membership, on_destroy) != BKV_OK) { // the queue of posts is full: it will not be for long
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    pthread_mutex_lock(&membership->lock);
    while (!membership->detached) {
        pthread_cond_wait(&membership->changed, &membership->lock);
    }
    membership->ending = true;
    pthread_cond_broadcast(&membership->changed);
    pthread_mutex_unlock(&membership->lock);
    pthread_join(membership->publisher, NULL);
    bkv_membership_unref(membership);
}

// ---- changes of the own record ----

static void on_update(void *user) {
    bkv_membership_t *membership = user;
    membership->registration.wanted++;
    bkv_registration_kick(membership);
    bkv_membership_unref(membership);
}

static void on_announce(void *user) {
    bkv_membership_t *membership = user;
    membership->registration.held = false;
    on_update(membership);
}

bkv_status_t bkv_membership_announce(bkv_membership_t *membership, const bkv_member_t *self, bkv_error_t *err) {
    pthread_mutex_lock(&membership->lock);
    bkv_member_t next = membership->self;
    next.address_count = self->address_count;
    next.transport_count = self->transport_count;
    memcpy(next.addresses, self->addresses, sizeof(next.addresses));
    memcpy(next.transports, self->transports, sizeof(next.transports));
    bkv_status_t status = bkv_member_check(&next, err);
    if (status == BKV_OK) {
        membership->self = next;
    }
    pthread_mutex_unlock(&membership->lock);
    if (status != BKV_OK) {
        return status;
    }
    status = post(membership, on_announce);
    return status == BKV_OK ? BKV_OK : bkv_fail(err, status, "cluster: the etcd client takes no more");
}

bkv_status_t bkv_membership_set_draining(bkv_membership_t *membership, bool draining) {
    pthread_mutex_lock(&membership->lock);
    membership->self.place.draining = draining;
    pthread_mutex_unlock(&membership->lock);
    return post(membership, on_update);
}

bkv_status_t bkv_membership_set_weight(bkv_membership_t *membership, uint32_t weight) {
    assert(weight <= BKV_WEIGHT_MAX);
    pthread_mutex_lock(&membership->lock);
    membership->self.place.weight = weight;
    pthread_mutex_unlock(&membership->lock);
    return post(membership, on_update);
}
