// carry.c - see carry.h.
//
// An errand is one record for one target; those of one target lie together and are its lane. The group's memory is counted by
// its references, the caller's and one for each call under way: who leaves in the middle leaves it to the callbacks.
#include "daemon/cluster/move/carry.h"

#include "daemon/observe/clock.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define HAVE_MS     5000u // for an answer; who is silent is suspected long before (peers.h)
#define STORE_MS    15000u
#define STORE_BYTES (4u << 20) // in a call, or one record
#define STORE_NAMES 256u
#define LOOK_MS     50u // how often pace is asked while there is nothing but waiting

typedef struct group group_t;

typedef enum errand_state { TO_ASK, LACKS, HAS, GONE, REFUSED, FAILED } errand_state_t;

typedef struct errand {
    uint32_t send;
    uint16_t target;
    uint8_t state; // of the callback's while the lane is busy
} errand_t;

typedef struct lane {
    group_t *group;
    bkv_peer_t *peer;
    uint32_t from, to;   // its errands
    uint32_t next, most; // those still to be sent; most: how many lacking ones there are, from `from` on
    uint32_t count;      // of the call under way, from `next` on; of the question: all
    bool busy;           // [lock] a call is under way
    bool asked, sorted;
    bool over; // nothing more is to be begun; the callback's while busy
} lane_t;

struct group {
    pthread_mutex_t lock; // a leaf
    pthread_cond_t changed;
    uint32_t refs, busy;            // [lock] busy: lanes
    const bkv_repair_send_t *sends; // the caller's
    uint64_t *bytes;                // [errands]
    bkv_name_t *names;              // [errands]
    errand_t *errands;
    lane_t *lanes;
    uint32_t errand_count, lane_count;
    bkv_carry_result_t result; // [lock]
};

static void group_free(group_t *group) {
    pthread_cond_destroy(&group->changed);
    pthread_mutex_destroy(&group->lock);
    free(group->bytes);
    free(group->names);
    free(group->errands);
    free(group->lanes);
    free(group);
}

// [lock] Gives it back.
static void group_unref(group_t *group) {
    bool last = --group->refs == 0;
    pthread_mutex_unlock(&group->lock);
    if (last) {
        group_free(group);
    }
}

// ---- answers, on threads of the peers' ----

static void begin_call(lane_t *lane, uint32_t count) {
    pthread_mutex_lock(&lane->group->lock);
    lane->busy = true;
    lane->count = count;
    lane->group->busy++;
    lane->group->refs++;
    pthread_mutex_unlock(&lane->group->lock);
}

// [lock] Gives it back.
static void end_call(lane_t *lane) {
    lane->busy = false;
    lane->group->busy--;
    pthread_cond_signal(&lane->group->changed);
    group_unref(lane->group);
}

// [lock] Of the whole call: the target gets no further one.
static void fail_call(lane_t *lane, uint32_t from, const bkv_error_t *error) {
    for (uint32_t i = from; i < from + lane->count; i++) {
        lane->group->errands[i].state = FAILED;
    }
    lane->over = true;
    lane->group->result.failed++;
    lane->group->result.error = *error;
}

static void on_have(void *user, const bkv_error_t *error, const uint64_t *bytes) {
    lane_t *lane = user;
    group_t *group = lane->group;
    pthread_mutex_lock(&group->lock);
    if (error->status != BKV_OK) {
        fail_call(lane, lane->from, error);
    } else {
        for (uint32_t i = 0; i < lane->count; i++) {
            group->errands[lane->from + i].state = bytes[i] != 0 ? HAS : LACKS;
        }
    }
    end_call(lane);
}

static errand_state_t state_of(bkv_status_t result) {
    switch (result) {
    case BKV_OK:
    case BKV_ALREADY_EXISTS:
        return HAS;
    case BKV_NOT_FOUND:
        return GONE;
    case BKV_BUSY:
    case BKV_DEADLINE_EXCEEDED:
    case BKV_CANCELLED:
        return FAILED;
    default:
        return REFUSED;
    }
}

// [lock]
static void take_result(group_t *group, uint32_t errand, bkv_status_t result) {
    errand_state_t state = state_of(result);
    group->errands[errand].state = (uint8_t)state;
    if (result == BKV_OK) {
        group->result.sent++;
        group->result.sent_bytes += group->bytes[errand];
    } else if (state == FAILED || state == REFUSED) {
        group->result.failed++;
        bkv_fail(&group->result.error, result, "a record was refused");
    }
}

static void on_store(void *user, const bkv_error_t *error, const bkv_status_t *results) {
    lane_t *lane = user;
    group_t *group = lane->group;
    pthread_mutex_lock(&group->lock);
    if (error->status != BKV_OK) {
        fail_call(lane, lane->next, error);
    } else {
        for (uint32_t i = 0; i < lane->count; i++) {
            take_result(group, lane->next + i, results[i]);
        }
    }
    lane->next += lane->count;
    end_call(lane);
}

// ---- calls ----

static void refuse_call(lane_t *lane, uint32_t from, const bkv_error_t *error) {
    pthread_mutex_lock(&lane->group->lock);
    fail_call(lane, from, error);
    end_call(lane);
}

static void ask(lane_t *lane) {
    bkv_error_t error;
    lane->asked = true;
    begin_call(lane, lane->to - lane->from);
    if (lane->peer == NULL) {
        bkv_fail(&error, BKV_BUSY, "a member without an address");
        refuse_call(lane, lane->from, &error);
    } else if (bkv_peer_have(lane->peer, &lane->group->names[lane->from], lane->count, bkv_now_ms() + HAVE_MS, on_have, lane,
                             &error) != BKV_OK) {
        refuse_call(lane, lane->from, &error);
    }
}

static void swap(group_t *group, uint32_t a, uint32_t b) {
    errand_t errand = group->errands[a];
    bkv_name_t name = group->names[a];
    uint64_t bytes = group->bytes[a];
    group->errands[a] = group->errands[b], group->errands[b] = errand;
    group->names[a] = group->names[b], group->names[b] = name;
    group->bytes[a] = group->bytes[b], group->bytes[b] = bytes;
}

// Brings those that the target lacks to the front.
static void sort_lane(lane_t *lane) {
    lane->sorted = true;
    lane->next = lane->most = lane->from;
    for (uint32_t i = lane->from; i < lane->to; i++) {
        if (lane->group->errands[i].state == LACKS) {
            swap(lane->group, lane->most++, i);
        }
    }
}

static bkv_carry_pace_t send_next(lane_t *lane, const bkv_carry_config_t *config) {
    group_t *group = lane->group;
    uint64_t bytes = group->bytes[lane->next];
    uint32_t count = 1;
    while (count < STORE_NAMES && lane->next + count < lane->most && bytes + group->bytes[lane->next + count] <= STORE_BYTES) {
        bytes += group->bytes[lane->next + count++];
    }
    bkv_carry_pace_t pace = config->pace(config->user, bytes);
    if (pace != BKV_CARRY_ON) {
        return pace;
    }
    bkv_error_t error;
    begin_call(lane, count);
    if (bkv_peer_store(lane->peer, &group->names[lane->next], count, bkv_now_ms() + STORE_MS, on_store, lane, &error) !=
        BKV_OK) {
        refuse_call(lane, lane->next, &error);
    }
    return BKV_CARRY_ON;
}

// ---- the group ----

static int by_target(const void *a, const void *b) {
    const errand_t *x = a, *y = b;
    return x->target != y->target ? (x->target < y->target ? -1 : 1) : (x->send < y->send ? -1 : x->send > y->send);
}

static void fill(group_t *group, const bkv_carry_config_t *config, size_t count) {
    for (uint32_t send = 0; send < count; send++) {
        const bkv_repair_step_t *step = &group->sends[send].step;
        for (uint32_t i = 0; i < step->count; i++) {
            group->errands[group->errand_count++] = (errand_t){.send = send, .target = step->targets[i], .state = TO_ASK};
        }
    }
    qsort(group->errands, group->errand_count, sizeof(group->errands[0]), by_target);
    for (uint32_t i = 0; i < group->errand_count; i++) {
        const bkv_repair_item_t *item = &group->sends[group->errands[i].send].item;
        uint16_t target = group->errands[i].target;
        group->names[i] = (bkv_name_t){.spec_id = item->spec_id, .key = item->key};
        group->bytes[i] = item->bytes;
        if (i == 0 || target != group->errands[i - 1].target) {
            bkv_peer_t *peer = bkv_peers_get(config->peers, &config->view->members[target]);
            group->lanes[group->lane_count++] = (lane_t){.group = group, .peer = peer, .from = i};
        }
        group->lanes[group->lane_count - 1].to = i + 1;
    }
}

static group_t *group_new(const bkv_carry_config_t *config, const bkv_repair_send_t *sends, size_t count) {
    size_t errands = 1; // one more than there are: none is no lack of memory
    for (size_t i = 0; i < count; i++) {
        assert(sends[i].step.count > 0);
        errands += sends[i].step.count;
    }
    group_t *group = calloc(1, sizeof(*group));
    if (group == NULL) {
        return NULL;
    }
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&group->lock, NULL);
    pthread_cond_init(&group->changed, &attr);
    pthread_condattr_destroy(&attr);
    group->refs = 1;
    group->sends = sends;
    group->bytes = calloc(errands, sizeof(group->bytes[0]));
    group->names = calloc(errands, sizeof(group->names[0]));
    group->errands = calloc(errands, sizeof(group->errands[0]));
    group->lanes = calloc(errands, sizeof(group->lanes[0]));
    if (group->bytes == NULL || group->names == NULL || group->errands == NULL || group->lanes == NULL) {
        group_free(group);
        return NULL;
    }
    fill(group, config, count);
    return group;
}

// [lock] Waits for an answer, for a while.
static void wait_a_while(group_t *group) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)LOOK_MS * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_cond_timedwait(&group->changed, &group->lock, &until);
}

// What a lane can do now that no call of it is under way.
static bkv_carry_pace_t lane_go_on(lane_t *lane, const bkv_carry_config_t *config) {
    if (!lane->asked) {
        ask(lane);
        return BKV_CARRY_ON;
    }
    if (!lane->sorted) {
        sort_lane(lane);
    }
    if (lane->next < lane->most) {
        return send_next(lane, config);
    }
    lane->over = true;
    return BKV_CARRY_ON;
}

// Runs all lanes until they are over, or as pace says.
static void run(group_t *group, const bkv_carry_config_t *config) {
    bkv_carry_pace_t pace = BKV_CARRY_ON;
    uint32_t left = group->lane_count; // lanes that are not over
    while (pace != BKV_CARRY_LEAVE && left > 0) {
        uint32_t begun = 0;
        pace = config->pace(config->user, 0);
        left = 0;
        for (uint32_t i = 0; i < group->lane_count; i++) {
            lane_t *lane = &group->lanes[i];
            pthread_mutex_lock(&group->lock);
            bool busy = lane->busy, idle = !busy && !lane->over;
            pthread_mutex_unlock(&group->lock);
            if (idle && pace == BKV_CARRY_ON) {
                pace = lane_go_on(lane, config);
                begun++;
            }
            left += busy || (idle && pace == BKV_CARRY_ON);
        }
        pthread_mutex_lock(&group->lock);
        if (begun == 0 && group->busy == left && left > 0) { // all are waiting
            wait_a_while(group);
        }
        pthread_mutex_unlock(&group->lock);
    }
}

// Whatever has not come to an end counts as short.
static void tell(group_t *group, size_t count, bkv_carried_t *outcomes) {
    memset(outcomes, 0, count * sizeof(outcomes[0])); // BKV_CARRIED
    for (uint32_t i = 0; i < group->errand_count; i++) {
        bkv_carried_t *outcome = &outcomes[group->errands[i].send];
        errand_state_t state = group->errands[i].state;
        bkv_carried_t what = state == HAS || state == GONE ? BKV_CARRIED
                             : state == REFUSED            ? BKV_CARRIED_REFUSED
                                                           : BKV_CARRIED_SHORT;
        *outcome = what > *outcome ? what : *outcome;
    }
}

void bkv_carry(const bkv_carry_config_t *config, const bkv_repair_send_t *sends, size_t count, bkv_carried_t *outcomes,
               bkv_carry_result_t *result) {
    *result = (bkv_carry_result_t){.failed = 0};
    group_t *group = group_new(config, sends, count);
    if (group == NULL) {
        for (size_t i = 0; i < count; i++) {
            outcomes[i] = BKV_CARRIED_SHORT;
        }
        result->failed = 1;
        bkv_fail(&result->error, BKV_RESOURCE_EXHAUSTED, "no memory for a group of records");
        return;
    }
    run(group, config);
    for (uint32_t i = 0; i < group->lane_count; i++) {
        bkv_peer_release(group->lanes[i].peer);
    }
    pthread_mutex_lock(&group->lock);
    tell(group, count, outcomes);
    *result = group->result;
    group->sends = NULL;
    group_unref(group);
}
