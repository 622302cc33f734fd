// asker.c - see asker.h.
#include "asker.h"

#include "daemon/observe/clock.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define WAIT_S 20

typedef struct pending {
    bkv_etcd_t *etcd;
    question_t question;
    answer_t *answer;
    uint64_t started_ms;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool done;
} pending_t;

static bkv_etcd_text_t text_of(const char *text) {
    return (bkv_etcd_text_t){.bytes = text != NULL ? text : "", .length = text != NULL ? strlen(text) : 0};
}

static void copy_kv(asker_kv_t *to, const bkv_etcd_kv_t *kv) {
    snprintf(to->key, sizeof(to->key), "%.*s", (int)kv->key.length, (const char *)kv->key.bytes);
    snprintf(to->value, sizeof(to->value), "%.*s", (int)kv->value.length, (const char *)kv->value.bytes);
    to->mod_revision = kv->mod_revision;
    to->lease = kv->lease;
}

static void on_done(void *user, const bkv_error_t *error, const bkv_etcd_reply_t *reply) {
    pending_t *pending = user;
    answer_t *answer = pending->answer;
    pthread_mutex_lock(&pending->lock);
    cr_assert_eq(reply == NULL, error->status != BKV_OK);
    answer->error = *error;
    answer->took_ms = bkv_now_ms() - pending->started_ms;
    if (reply != NULL) {
        answer->reply = *reply;
        cr_assert_leq(reply->count, ASKER_KVS);
        for (size_t i = 0; i < reply->count; i++) {
            copy_kv(&answer->kvs[i], &reply->kvs[i]);
        }
    }
    pending->done = true;
    pthread_cond_signal(&pending->changed);
    pthread_mutex_unlock(&pending->lock);
}

static void on_post(void *user) {
    pending_t *pending = user;
    const question_t *q = &pending->question;
    uint32_t ms = q->timeout_ms != 0 ? q->timeout_ms : 10000;
    bkv_etcd_t *etcd = pending->etcd;
    bkv_error_t error = {.status = BKV_INTERNAL};
    bkv_status_t status = BKV_INTERNAL;
    switch (q->kind) {
    case ASK_GRANT:
        status = bkv_etcd_grant(etcd, q->lease, q->ttl_s, ms, on_done, user, &error);
        break;
    case ASK_KEEP:
        status = bkv_etcd_keep(etcd, q->lease, ms, on_done, user, &error);
        break;
    case ASK_REVOKE:
        status = bkv_etcd_revoke(etcd, q->lease, ms, on_done, user, &error);
        break;
    case ASK_PUT:
        status = bkv_etcd_put(etcd, text_of(q->key), text_of(q->value), q->lease, ms, on_done, user, &error);
        break;
    case ASK_SWAP:
        status = bkv_etcd_swap(etcd, text_of(q->key), q->expected, text_of(q->value), q->lease, ms, on_done, user, &error);
        break;
    case ASK_REMOVE:
        status = bkv_etcd_remove(etcd, text_of(q->key), ms, on_done, user, &error);
        break;
    case ASK_LIST:
        status = bkv_etcd_list(etcd, text_of(q->key), text_of(q->value), q->expected, q->limit, ms, on_done, user, &error);
        break;
    }
    if (status != BKV_OK) {
        cr_assert_eq(status, error.status);
        on_done(user, &error, NULL);
    }
}

const answer_t *ask(bkv_etcd_t *etcd, question_t question) {
    static answer_t answer;
    pending_t pending = {.etcd = etcd, .question = question, .answer = &answer, .started_ms = bkv_now_ms()};
    memset(&answer, 0, sizeof(answer));
    pthread_mutex_init(&pending.lock, NULL);
    pthread_cond_init(&pending.changed, NULL);
    cr_assert_eq(bkv_etcd_post(etcd, on_post, &pending), BKV_OK);
    pthread_mutex_lock(&pending.lock);
    while (!pending.done) {
        pthread_cond_wait(&pending.changed, &pending.lock);
    }
    pthread_mutex_unlock(&pending.lock);
    return &answer;
}

void ask_fill(bkv_etcd_t *etcd) {
    static char value[60000];
    memset(value, 'x', sizeof(value) - 1);
    uint64_t start_ms = bkv_now_ms();
    for (bkv_status_t status = BKV_OK; status != BKV_RESOURCE_EXHAUSTED;) {
        status = ask(etcd, (question_t){.kind = ASK_PUT, .key = "/fill", .value = value})->error.status;
        cr_assert(status == BKV_OK || status == BKV_RESOURCE_EXHAUSTED, "%s", bkv_status_name(status));
        cr_assert_lt(bkv_now_ms() - start_ms, WAIT_S * 1000);
    }
}

bkv_etcd_t *asker_create(const etcd_server_t *server) {
    const char *endpoints[] = {server->endpoint};
    const bkv_etcd_options_t options = {.endpoints = endpoints, .endpoint_count = 1, .attempt_ms = 500};
    bkv_etcd_t *etcd = NULL;
    bkv_error_t err;
    cr_assert_eq(bkv_etcd_create(&options, &etcd, &err), BKV_OK, "%s", err.message);
    return etcd;
}

// ---- a watcher ----

static void on_reset(void *user) {
    seen_t *seen = user;
    pthread_mutex_lock(&seen->lock);
    seen->resets++;
    seen->count = 0;
    seen->listing = true;
    seen->whole = false;
    pthread_mutex_unlock(&seen->lock);
}

static uint32_t find(const seen_t *seen, const char *key) {
    uint32_t i = 0;
    while (i < seen->count && strcmp(seen->kvs[i].key, key) != 0) {
        i++;
    }
    return i;
}

static void note_revision(seen_t *seen, int64_t revision) {
    if (!seen->listing) {
        seen->went_back = seen->went_back || revision < seen->revision;
        seen->revision = revision;
    }
}

static void on_put(void *user, const bkv_etcd_kv_t *kv) {
    seen_t *seen = user;
    asker_kv_t copy;
    copy_kv(&copy, kv);
    pthread_mutex_lock(&seen->lock);
    uint32_t i = find(seen, copy.key);
    cr_assert_lt(i, ASKER_KVS);
    seen->kvs[i] = copy;
    seen->count += i == seen->count;
    seen->puts++;
    seen->whole = false;
    note_revision(seen, kv->mod_revision);
    pthread_mutex_unlock(&seen->lock);
}

static void on_removed(void *user, bkv_etcd_text_t key, int64_t revision) {
    seen_t *seen = user;
    const bkv_etcd_kv_t kv = {.key = key, .value = text_of("")};
    asker_kv_t copy;
    copy_kv(&copy, &kv);
    pthread_mutex_lock(&seen->lock);
    uint32_t i = find(seen, copy.key);
    if (i < seen->count) {
        seen->kvs[i] = seen->kvs[--seen->count];
    }
    seen->removals++;
    seen->whole = false;
    note_revision(seen, revision);
    pthread_mutex_unlock(&seen->lock);
}

static void on_synced(void *user, int64_t revision) {
    seen_t *seen = user;
    pthread_mutex_lock(&seen->lock);
    seen->listing = false;
    seen->revision = revision;
    seen->whole = true;
    seen->syncs++;
    pthread_cond_broadcast(&seen->changed);
    pthread_mutex_unlock(&seen->lock);
}

static void on_lost(void *user, const bkv_error_t *error) {
    seen_t *seen = user;
    cr_assert_neq(error->status, BKV_OK);
    pthread_mutex_lock(&seen->lock);
    seen->losses++;
    seen->whole = false;
    pthread_cond_broadcast(&seen->changed);
    pthread_mutex_unlock(&seen->lock);
}

static const bkv_etcd_watcher_t watcher = {on_reset, on_put, on_removed, on_synced, on_lost};

typedef struct start {
    seen_t *seen;
    bkv_etcd_t *etcd;
    const char *prefix; // NULL: stop
    bool done;
} start_t;

static void on_start(void *user) {
    start_t *start = user;
    seen_t *seen = start->seen;
    if (start->prefix != NULL) {
        bkv_etcd_watch_t *watch = NULL;
        cr_assert_eq(bkv_etcd_watch_create(start->etcd, text_of(start->prefix), &watcher, seen, &watch, NULL), BKV_OK);
        seen->watch = watch;
    } else {
        bkv_etcd_watch_destroy(seen->watch);
    }
    pthread_mutex_lock(&seen->lock);
    start->done = true;
    pthread_cond_broadcast(&seen->changed);
    pthread_mutex_unlock(&seen->lock);
}

static void do_start(seen_t *seen, bkv_etcd_t *etcd, const char *prefix) {
    start_t start = {.seen = seen, .etcd = etcd, .prefix = prefix};
    cr_assert_eq(bkv_etcd_post(etcd, on_start, &start), BKV_OK);
    pthread_mutex_lock(&seen->lock);
    while (!start.done) {
        pthread_cond_wait(&seen->changed, &seen->lock);
    }
    pthread_mutex_unlock(&seen->lock);
}

void seen_start(seen_t *seen, bkv_etcd_t *etcd, const char *prefix) {
    memset(seen, 0, sizeof(*seen));
    pthread_mutex_init(&seen->lock, NULL);
    pthread_cond_init(&seen->changed, NULL);
    do_start(seen, etcd, prefix);
}

void seen_stop(seen_t *seen, bkv_etcd_t *etcd) {
    do_start(seen, etcd, NULL);
}

static bool holds(const seen_t *seen, uint32_t count, const char *key, const char *value) {
    if (!seen->whole || seen->count != count) {
        return false;
    }
    uint32_t i = key != NULL ? find(seen, key) : 0;
    return key == NULL || (value == NULL ? i == seen->count : i < seen->count && strcmp(seen->kvs[i].value, value) == 0);
}

bool seen_wait(seen_t *seen, uint32_t count, const char *key, const char *value) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += WAIT_S;
    pthread_mutex_lock(&seen->lock);
    int error = 0;
    while (!holds(seen, count, key, value) && error != ETIMEDOUT) {
        error = pthread_cond_timedwait(&seen->changed, &seen->lock, &until);
    }
    bool found = holds(seen, count, key, value);
    pthread_mutex_unlock(&seen->lock);
    return found;
}

bool seen_wait_lost(seen_t *seen) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += WAIT_S;
    pthread_mutex_lock(&seen->lock);
    int error = 0;
    while ((seen->losses == 0 || seen->whole) && error != ETIMEDOUT) {
        error = pthread_cond_timedwait(&seen->changed, &seen->lock, &until);
    }
    bool lost = !seen->whole;
    pthread_mutex_unlock(&seen->lock);
    return lost;
}
