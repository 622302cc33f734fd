// registration.c - this daemon's record in etcd: gets a lease, writes the record under it, keeps both alive, begins again when
// they are lost. All of it runs on the etcd client's thread, one question at a time:
//
//     config? -> grant -> write -> keep, keep, keep...       what the answer was decides what is asked next, and when
//                  ^        |        |
//                  +--------+--------+   the lease is gone, or the id is another's
#include "daemon/cluster/members/internal.h"

#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/random.h>

#define PAUSE_FIRST_MS   100
#define PAUSE_LONGEST_MS 2000

static void ask_next(void *user);

static bkv_etcd_text_t text_of(const char *text) {
    return (bkv_etcd_text_t){.bytes = text, .length = strlen(text)};
}

static uint64_t draw(void) {
    uint64_t number = 0;
    while (getrandom(&number, sizeof(number), 0) != (ssize_t)sizeof(number)) {
        assert(errno == EINTR);
    }
    return number;
}

static int64_t draw_lease(void) {
    return (int64_t)(draw() >> 1 | 1);
}

static void next_in(bkv_membership_t *membership, uint64_t ms) {
    bkv_registration_t *registration = &membership->registration;
    bkv_etcd_timer_start(membership->etcd, &registration->timer, registration->kicked ? 0 : ms, ask_next, membership);
    registration->kicked = false;
}

// ---- what the answers mean ----

// A third of the lease's time: two keeps may fail before it is over.
static uint64_t keep_every_ms(const bkv_registration_t *registration) {
    return registration->ttl_s * 1000ull / 3;
}

static void confirmed(bkv_registration_t *registration) {
    registration->lease_until_ms = registration->asked_ms + registration->ttl_s * 1000ull;
    registration->failures = 0;
}

// The lease is gone, and with it the record; or shall be.
static void lease_drop(bkv_membership_t *membership, const char *why) {
    bkv_registration_t *registration = &membership->registration;
    bkv_membership_state_t state = membership->status.state; // which only this thread changes
    if (state == BKV_MEMBERSHIP_MEMBER || state == BKV_MEMBERSHIP_CUT_OFF) {
        bkv_log(BKV_LOG_WARN, 0, "cluster: this daemon's registration is lost (%s); it registers anew", why);
        pthread_mutex_lock(&membership->lock);
        membership->metrics.rejoins_total++;
        pthread_mutex_unlock(&membership->lock);
    }
    registration->lease = 0;
    registration->registered = false;
    registration->revision = 0;
    registration->last_epoch = registration->epoch;
    registration->epoch = draw() | 1;
}

// No answer, or no as the answer. A lease that has not been confirmed for all its time may be over.
static void failed(bkv_membership_t *membership, const bkv_error_t *error) {
    bkv_registration_t *registration = &membership->registration;
    uint64_t pause_ms = PAUSE_LONGEST_MS;
    if (registration->failures < 5) {
        pause_ms = PAUSE_FIRST_MS << registration->failures;
    }
    registration->failures++;
    pthread_mutex_lock(&membership->lock);
    membership->metrics.failures_total++;
    pthread_mutex_unlock(&membership->lock);
    bkv_roster_hold(membership);
    bool over = !registration->registered || bkv_now_ms() >= registration->lease_until_ms;
    if (over) {
        bkv_membership_set_state(membership, registration->registered ? BKV_MEMBERSHIP_CUT_OFF : BKV_MEMBERSHIP_JOINING, error);
    }
    next_in(membership, pause_ms);
}

static void take_config(bkv_membership_t *membership, const bkv_cluster_config_t *config) {
    bkv_registration_t *registration = &membership->registration;
    pthread_mutex_lock(&membership->lock);
    bool other = config->seed != membership->cluster.seed || config->replicas != membership->cluster.replicas;
    uint32_t wanted = membership->cluster.replicas;
    membership->cluster = *config;
    pthread_mutex_unlock(&membership->lock);
    if (!registration->configured && wanted != config->replicas) {
        bkv_log(BKV_LOG_WARN, 0, "cluster: %u replicas is what the cluster has, not %u", config->replicas, wanted);
    }
    membership->roster.changed = membership->roster.changed || other || !registration->configured;
    registration->configured = true;
}

void bkv_registration_saw_config(bkv_membership_t *membership, const void *record, size_t length) {
    bkv_cluster_config_t config;
    bkv_error_t err;
    if (bkv_cluster_config_parse(record, length, &config, &err) == BKV_OK) {
        take_config(membership, &config);
    } else {
        bkv_log(BKV_LOG_WARN, 0, "cluster: %s in etcd is not taken: %s", membership->config_key, err.message);
    }
}

static void config_done(bkv_membership_t *membership, const bkv_etcd_reply_t *reply) {
    bkv_cluster_config_t config = {0};
    bkv_error_t err;
    bkv_status_t status = BKV_OK;
    if (reply->succeeded) {
        pthread_mutex_lock(&membership->lock);
        config = membership->cluster;
        pthread_mutex_unlock(&membership->lock);
    } else if (reply->count == 1) {
        status = bkv_cluster_config_parse(reply->kvs[0].value.bytes, reply->kvs[0].value.length, &config, &err);
    } else {
        status = bkv_fail(&err, BKV_BUSY, "it was there, and is gone");
    }
    if (status != BKV_OK) {
        bkv_error_t error;
        bkv_fail(&error, status, "%s in etcd cannot be used: %.150s", membership->config_key, err.message);
        failed(membership, &error);
        return;
    }
    membership->registration.failures = 0;
    take_config(membership, &config);
    next_in(membership, 0);
}

static void grant_done(bkv_membership_t *membership, const bkv_etcd_reply_t *reply) {
    bkv_registration_t *registration = &membership->registration;
    registration->lease = reply->lease;
    registration->ttl_s = reply->ttl_s;
    confirmed(registration);
    next_in(membership, 0);
}

// The id is another's. The next try is made when its lease may have run out, as ours will; or when its record is seen to go.
static void blocked(bkv_membership_t *membership, const bkv_member_t *other) {
    bkv_registration_t *registration = &membership->registration;
    bkv_error_t error;
    bkv_fail(&error, BKV_ALREADY_EXISTS, "the id %s is held by another daemon, at %s", membership->id,
             other->address_count > 0 ? other->addresses[0] : "an unknown address");
    bkv_membership_set_state(membership, BKV_MEMBERSHIP_BLOCKED, &error);
    registration->registered = false;
    registration->revision = 0;
    next_in(membership, registration->ttl_s * 1000ull);
}

// What a daemon that was killed has left here, and its lease would keep for a while: it had the very addresses on which this one
// listens, and nobody can share them. Only a daemon that has not been a member yet believes that: two whose hosts have the same
// addresses by mistake would put each other out for ever.
static bool left_behind(bkv_membership_t *membership, const bkv_member_t *there) {
    pthread_mutex_lock(&membership->lock);
    const bkv_member_t *self = &membership->self;
    bool same = self->address_count > 0 && self->address_count == there->address_count &&
                memcmp(self->addresses, there->addresses, sizeof(self->addresses)) == 0;
    pthread_mutex_unlock(&membership->lock);
    return same && !membership->registration.admitted;
}

// Something is there that was not expected: of this daemon, perhaps by a first attempt of this very question or from before it was
// killed, or of another.
static void write_refused(bkv_membership_t *membership, const bkv_etcd_reply_t *reply) {
    bkv_registration_t *registration = &membership->registration;
    bkv_member_t there;
    bkv_error_t err;
    if (reply->count == 0) {
        registration->revision = 0;
        next_in(membership, 0);
        return;
    }
    registration->revision = reply->kvs[0].mod_revision;
    bool is_record =
        bkv_member_parse(reply->kvs[0].value.bytes, reply->kvs[0].value.length, membership->id, &there, &err) == BKV_OK;
    uint64_t epoch = is_record ? there.place.epoch : 0;
    if (!is_record || epoch == registration->epoch || epoch == registration->last_epoch) {
        next_in(membership, 0); // nonsense and what is our own is written over
    } else if (left_behind(membership, &there)) {
        bkv_log(BKV_LOG_INFO, 0, "cluster: takes the place of the daemon that was killed here");
        next_in(membership, 0);
    } else {
        blocked(membership, &there);
    }
}

static void write_done(bkv_membership_t *membership, const bkv_etcd_reply_t *reply) {
    bkv_registration_t *registration = &membership->registration;
    if (!reply->succeeded) {
        write_refused(membership, reply);
        return;
    }
    registration->revision = reply->revision;
    registration->written = registration->sent;
    registration->registered = registration->admitted = true;
    registration->failures = 0;
    bkv_membership_set_state(membership, BKV_MEMBERSHIP_MEMBER, NULL);
    next_in(membership, registration->written != registration->wanted ? 0 : keep_every_ms(registration));
}

static void keep_done(bkv_membership_t *membership, const bkv_etcd_reply_t *reply) {
    bkv_registration_t *registration = &membership->registration;
    registration->ttl_s = reply->ttl_s;
    confirmed(registration);
    if (registration->registered) {
        bkv_membership_set_state(membership, BKV_MEMBERSHIP_MEMBER, NULL);
    }
    next_in(membership, registration->registered ? keep_every_ms(registration) : 0);
}

// ---- the questions ----

typedef enum question { ASK_CONFIG, ASK_GRANT, ASK_WRITE, ASK_KEEP, ASK_REVOKE } question_t;

// The next step: what is lacking first.
static question_t question_next(const bkv_registration_t *registration) {
    if (registration->leaving) {
        return ASK_REVOKE;
    }
    if (!registration->configured) {
        return ASK_CONFIG;
    }
    if (registration->lease == 0) {
        return ASK_GRANT;
    }
    return registration->registered && registration->written == registration->wanted ? ASK_KEEP : ASK_WRITE;
}

static void leave_done(bkv_membership_t *membership) {
    bkv_registration_t *registration = &membership->registration;
    registration->left = true;
    registration->registered = false;
    registration->lease = 0;
    bkv_membership_set_state(membership, BKV_MEMBERSHIP_LEFT, NULL);
}

// Common to all answers. False: the membership has ended, or the answer was an error, which has been dealt with.
static bool answered(bkv_membership_t *membership, question_t question, const bkv_error_t *error) {
    bkv_registration_t *registration = &membership->registration;
    registration->asking = false;
    if (membership->dead || registration->left) {
        return false;
    }
    if (registration->leaving && question != ASK_REVOKE) {
        // A lease that came meanwhile is known and will be revoked; what was written goes with it.
        next_in(membership, 0);
        return error->status == BKV_OK && question == ASK_GRANT;
    }
    if (error->status == BKV_OK) {
        return true;
    }
    if (question == ASK_REVOKE && error->status == BKV_NOT_FOUND) {
        return true;
    }
    if (error->status == BKV_NOT_FOUND && (question == ASK_KEEP || question == ASK_WRITE)) {
        lease_drop(membership, "its lease has expired");
        bkv_membership_set_state(membership, BKV_MEMBERSHIP_JOINING, error);
        next_in(membership, 0);
        return false;
    }
    failed(membership, error);
    return false;
}

// X(question, handler)
#define QUESTIONS(X)                                                                                                           \
    X(ASK_CONFIG, config_done)                                                                                                 \
    X(ASK_GRANT, grant_done)                                                                                                   \
    X(ASK_WRITE, write_done)                                                                                                   \
    X(ASK_KEEP, keep_done)

#define X(question, handler)                                                                                                   \
    static void on_##handler(void *user, const bkv_error_t *error, const bkv_etcd_reply_t *reply) {                            \
        bkv_membership_t *membership = user;                                                                                   \
        if (answered(membership, question, error)) {                                                                           \
            handler(membership, reply);                                                                                        \
        }                                                                                                                      \
        bkv_membership_unref(membership);                                                                                      \
    }
QUESTIONS(X)
#undef X

static void on_revoke_done(void *user, const bkv_error_t *error, const bkv_etcd_reply_t *reply) {
    (void)reply;
    bkv_membership_t *membership = user;
    if (answered(membership, ASK_REVOKE, error)) {
        leave_done(membership);
    }
    bkv_membership_unref(membership);
}

// A copy of the record as it shall be now.
static size_t pack_self(bkv_membership_t *membership, uint8_t record[BKV_MEMBER_RECORD_MAX]) {
    bkv_registration_t *registration = &membership->registration;
    pthread_mutex_lock(&membership->lock);
    bkv_member_t self = membership->self;
    pthread_mutex_unlock(&membership->lock);
    self.place.epoch = registration->epoch;
    registration->sent = registration->wanted;
    return bkv_member_pack(&self, record);
}

static bkv_status_t ask(bkv_membership_t *membership, question_t question, uint32_t timeout_ms, bkv_error_t *err) {
    bkv_registration_t *registration = &membership->registration;
    bkv_etcd_t *etcd = membership->etcd;
    uint8_t record[BKV_MEMBER_RECORD_MAX];
    bkv_etcd_text_t value = {.bytes = record};
    switch (question) {
    case ASK_CONFIG:
        pthread_mutex_lock(&membership->lock);
        value.length = bkv_cluster_config_pack(&membership->cluster, record);
        pthread_mutex_unlock(&membership->lock);
        return bkv_etcd_swap(etcd, text_of(membership->config_key), 0, value, 0, timeout_ms, on_config_done, membership, err);
    case ASK_GRANT:
        return bkv_etcd_grant(etcd, draw_lease(), membership->ttl_s, timeout_ms, on_grant_done, membership, err);
    case ASK_WRITE:
        value.length = pack_self(membership, record);
        return bkv_etcd_swap(etcd, text_of(membership->own_key), registration->revision, value, registration->lease, timeout_ms,
                             on_write_done, membership, err);
    case ASK_KEEP:
        return bkv_etcd_keep(etcd, registration->lease, timeout_ms, on_keep_done, membership, err);
    case ASK_REVOKE:
        break;
    }
    return bkv_etcd_revoke(etcd, registration->lease, timeout_ms, on_revoke_done, membership, err);
}

// Asks the next question, unless one is on its way: its answer leads here again.
static void ask_next(void *user) {
    bkv_membership_t *membership = user;
    bkv_registration_t *registration = &membership->registration;
    if (registration->asking || registration->left || registration->held || membership->dead) {
        return;
    }
    question_t question = question_next(registration);
    bkv_error_t error;
    registration->asking = true;
    registration->asked_ms = bkv_now_ms();
    atomic_fetch_add(&membership->refs, 1);
    if (ask(membership, question, (uint32_t)keep_every_ms(registration), &error) != BKV_OK) {
        registration->asking = false;
        failed(membership, &error);
        bkv_membership_unref(membership);
    }
}

// ---- from outside ----

void bkv_registration_start(bkv_membership_t *membership) {
    bkv_registration_t *registration = &membership->registration;
    registration->ttl_s = membership->ttl_s;
    registration->epoch = draw() | 1;
    pthread_mutex_lock(&membership->lock);
    membership->cluster.seed = draw();
    pthread_mutex_unlock(&membership->lock);
    if (membership->id[0] != '\0') {
        next_in(membership, 0);
    }
}

void bkv_registration_stop(bkv_membership_t *membership) {
    bkv_etcd_timer_stop(membership->etcd, &membership->registration.timer);
}

// Without a lease there is nothing to end: one that is being granted will have no record under it.
void bkv_registration_leave(bkv_membership_t *membership) {
    membership->registration.leaving = true;
    if (membership->registration.lease == 0) {
        leave_done(membership);
    } else {
        bkv_registration_kick(membership);
    }
}

void bkv_registration_kick(bkv_membership_t *membership) {
    if (membership->registration.asking) {
        membership->registration.kicked = true; // what is asked may be older than what has happened
    } else if (membership->id[0] != '\0') {
        next_in(membership, 0);
    }
}

// A question may be on its way meanwhile: its answer finds what is noted here, or notes what is newer.
void bkv_registration_saw(bkv_membership_t *membership, const bkv_member_t *record, int64_t revision) {
    bkv_registration_t *registration = &membership->registration;
    if (revision < registration->revision) {
        return; // of before the record that we know of
    }
    if (record == NULL) {
        // Gone, with its lease or by hand. The next write finds out which.
        registration->registered = false;
        registration->revision = 0;
        bkv_registration_kick(membership);
    } else if (registration->registered && record->place.epoch != registration->epoch) {
        registration->registered = false; // the next write says whose it is
        bkv_registration_kick(membership);
    }
}

void bkv_registration_lost_config(bkv_membership_t *membership) {
    membership->registration.configured = false;
    bkv_registration_kick(membership);
}
