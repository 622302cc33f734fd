// poll.c - see poll.h.
//
// The lock guards all that changes. The peers' calls are started under it, as heard has to come after all of them.
#include "daemon/cluster/poll.h"

#include "daemon/observe/clock.h"

#include <stdlib.h>

#define LEAST_WAIT 4 // of the peer timeout, that is waited for everybody

typedef struct poll poll_t;

// What one owner is asked.
typedef struct question {
    poll_t *poll;
    const uint32_t *keys; // [count], of the poll's names
    uint32_t count;
    bool running;
    uint64_t usually_us; // by when it should have answered
} question_t;

struct poll {
    bkv_cluster_t *cluster;
    pthread_mutex_t lock;
    _Atomic uint32_t refs; // questions that run, an alarm that is set, the starter, and one until done
    const bkv_poll_kind_t *kind;
    void *user;
    bkv_owners_t owners;
    question_t *questions; // [owners]
    uint32_t *keys;        // of all of them
    uint8_t *left;         // [names]: owners that have not been heard
    uint32_t running;
    bkv_verdict_t verdict;
    bool told, let_go;
    bkv_alarm_t alarm;
};

static void poll_free(poll_t *poll) {
    bkv_owners_deinit(&poll->owners);
    pthread_mutex_destroy(&poll->lock);
    free(poll->questions);
    free(poll->keys);
    free(poll->left);
    free(poll);
}

// ---- waiting ----

// [lock] When the last of those that have not answered should have.
static uint64_t usually_over_us(const poll_t *poll) {
    uint64_t at_us = 0;
    for (uint32_t i = 0; i < poll->owners.count; i++) {
        const question_t *question = &poll->questions[i];
        at_us = question->running && question->usually_us > at_us ? question->usually_us : at_us;
    }
    return at_us;
}

// [lock]
static void cancel_alarm(poll_t *poll) {
    if (bkv_alarm_cancel(poll->cluster->alarms, &poll->alarm)) {
        atomic_fetch_sub(&poll->refs, 1); // not the last one: who comes here has one
    }
}

// [lock] Whether to go on waiting; if it is for no longer than usual, an alarm sees to that.
static bool is_over(poll_t *poll) {
    if (poll->running == 0 || poll->verdict == BKV_ENOUGH) {
        return true;
    }
    if (poll->verdict == BKV_WAIT) {
        return false;
    }
    uint64_t at_us = usually_over_us(poll);
    if (bkv_now_us() >= at_us) {
        return true;
    }
    cancel_alarm(poll);
    atomic_fetch_add(&poll->refs, 1);
    bkv_alarm_set(poll->cluster->alarms, &poll->alarm, at_us);
    return false;
}

// [lock] Takes the lock off, does what has become due, and gives the caller's reference back.
static void poll_leave(poll_t *poll) {
    bool tell = !poll->told && is_over(poll);
    if (tell) {
        poll->told = true;
        cancel_alarm(poll);
    }
    bool let_go = poll->told && poll->running == 0 && !poll->let_go;
    poll->let_go |= let_go;
    pthread_mutex_unlock(&poll->lock);
    if (let_go) {
        bkv_owners_let_go(&poll->owners);
    }
    if (tell) {
        poll->kind->done(poll->user);
        bkv_cluster_release(poll->cluster);
    }
    uint32_t refs = tell ? 2 : 1; // and the one until done
    if (atomic_fetch_sub(&poll->refs, refs) == refs) {
        poll_free(poll);
    }
}

static void on_alarm(void *user) {
    poll_t *poll = user;
    pthread_mutex_lock(&poll->lock);
    poll_leave(poll);
}

// ---- asking ----

// [lock]
static void hear(question_t *question, const uint64_t *bytes) {
    poll_t *poll = question->poll;
    const bkv_owner_t *owner = &poll->owners.owners[question - poll->questions];
    for (uint32_t i = 0; i < question->count; i++) {
        poll->left[question->keys[i]]--;
    }
    if (!poll->told) {
        poll->verdict = poll->kind->heard(poll->user, owner, question->keys, question->count, bytes, poll->left);
    }
}

static void on_have(void *user, const bkv_error_t *error, const uint64_t *bytes) {
    question_t *question = user;
    poll_t *poll = question->poll;
    pthread_mutex_lock(&poll->lock);
    question->running = false;
    poll->running--;
    hear(question, error->status == BKV_OK ? bytes : NULL);
    poll_leave(poll);
}

// An owner that has a block after all is worth more than a moment: one in twenty answers takes longer than the peer's patience, and
// a block that is taken for absent is computed anew. Who stands still is soon not asked at all.
static uint64_t patience_us(const bkv_cluster_t *cluster, const bkv_owner_t *owner) {
    uint64_t least_us = (uint64_t)cluster->peer_timeout_ms * 1000 / LEAST_WAIT;
    return owner->health.patience_us > least_us ? owner->health.patience_us : least_us;
}

// [lock]
static void ask(question_t *question, const bkv_owner_t *owner, const bkv_name_t *names, uint64_t deadline_ms) {
    poll_t *poll = question->poll;
    bkv_name_t *about = malloc(question->count * sizeof(about[0]));
    if (about == NULL || owner->peer == NULL) {
        free(about);
        return;
    }
    for (uint32_t i = 0; i < question->count; i++) {
        about[i] = names[question->keys[i]];
    }
    question->usually_us = bkv_now_us() + patience_us(poll->cluster, owner);
    atomic_fetch_add(&poll->refs, 1);
    question->running = bkv_peer_have(owner->peer, about, question->count, deadline_ms, on_have, question, NULL) == BKV_OK;
    poll->running += question->running;
    if (!question->running) {
        atomic_fetch_sub(&poll->refs, 1); // not the last one: the starter has one
    }
    free(about);
}

// Sorts the names by whom to ask.
static bkv_status_t make_questions(poll_t *poll, uint32_t count) {
    const bkv_owners_t *owners = &poll->owners;
    size_t total = 0;
    for (uint32_t i = 0; i < count; i++) {
        total += owners->of[i].count;
    }
    poll->questions = calloc(owners->count + (size_t)1, sizeof(poll->questions[0]));
    poll->keys = malloc((total + 1) * sizeof(poll->keys[0]));
    poll->left = malloc(count + (size_t)1);
    if (poll->questions == NULL || poll->keys == NULL || poll->left == NULL) {
        return BKV_RESOURCE_EXHAUSTED;
    }
    for (uint32_t i = 0; i < count; i++) {
        poll->left[i] = owners->of[i].count;
        for (uint32_t o = 0; o < owners->of[i].count; o++) {
            poll->questions[owners->of[i].owners[o]].count++;
        }
    }
    uint32_t *keys = poll->keys;
    for (uint32_t o = 0; o < owners->count; o++) {
        poll->questions[o].poll = poll;
        poll->questions[o].keys = keys;
        keys += poll->questions[o].count;
        poll->questions[o].count = 0;
    }
    for (uint32_t i = 0; i < count; i++) {
        for (uint32_t o = 0; o < owners->of[i].count; o++) {
            question_t *question = &poll->questions[owners->of[i].owners[o]];
            ((uint32_t *)(uintptr_t)question->keys)[question->count++] = i;
        }
    }
    return BKV_OK;
}

static poll_t *poll_new(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count) {
    poll_t *poll = calloc(1, sizeof(*poll));
    if (poll == NULL) {
        return NULL;
    }
    poll->cluster = cluster;
    poll->alarm = (bkv_alarm_t){.ring = on_alarm, .user = poll};
    pthread_mutex_init(&poll->lock, NULL);
    atomic_init(&poll->refs, 1);
    if (bkv_owners_init(&poll->owners, cluster, names, count, NULL) != BKV_OK || make_questions(poll, count) != BKV_OK) {
        poll_free(poll);
        return NULL;
    }
    return poll;
}

void bkv_poll_start(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                    const bkv_poll_kind_t *kind, void *user) {
    poll_t *poll = poll_new(cluster, names, count);
    if (poll == NULL) {
        kind->done(user);
        return;
    }
    poll->kind = kind;
    poll->user = user;
    poll->verdict = kind->known != NULL ? kind->known(user, poll->owners.of) : BKV_WAIT;
    uint64_t timeout_ms = bkv_now_ms() + cluster->peer_timeout_ms;
    bkv_cluster_hold(cluster);
    atomic_fetch_add(&poll->refs, 1); // the starter's
    pthread_mutex_lock(&poll->lock);
    for (uint32_t o = 0; o < poll->owners.count; o++) {
        ask(&poll->questions[o], &poll->owners.owners[o], names, deadline_ms < timeout_ms ? deadline_ms : timeout_ms);
    }
    for (uint32_t o = 0; o < poll->owners.count; o++) { // now that all is under way
        if (!poll->questions[o].running) {
            hear(&poll->questions[o], NULL);
        }
    }
    poll_leave(poll);
}
