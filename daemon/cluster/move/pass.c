// pass.c - the mover's work, a group of records at a time: passes through the store by repair.c's plans, and what Puts owe.
#include "daemon/cluster/move/internal.h"

#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"

#include <inttypes.h>

#define LOOK_AT      4096u // keys in one call to the plan
#define REFUSALS_MAX 5u    // passes, after which a record that its owners do not take is left where it is

// ---- the store, as repair.h lists it ----

typedef size_t (*lister_t)(bkv_store_t *store, uint64_t *cursor, bkv_store_item_t *items, size_t capacity, uint64_t now_ms,
                           bool *more);

static size_t list_some(bkv_store_t *store, lister_t lister, uint64_t *cursor, bkv_repair_item_t *items, size_t capacity) {
    bkv_store_item_t some[256];
    size_t room = capacity < sizeof(some) / sizeof(some[0]) ? capacity : sizeof(some) / sizeof(some[0]);
    size_t count = 0;
    for (bool more = true; more && count == 0;) {
        count = lister(store, cursor, some, room, bkv_now_ms(), &more);
    }
    for (size_t i = 0; i < count; i++) {
        items[i] = (bkv_repair_item_t){.key = some[i].name.key, .spec_id = some[i].name.spec_id, .bytes = some[i].bytes};
    }
    return count;
}

static size_t list_store(void *store, uint64_t *cursor, bkv_repair_item_t *items, size_t capacity) {
    return list_some(store, bkv_store_list, cursor, items, capacity);
}

static bool owns(const bkv_view_t *view, const bkv_key_t *key) {
    uint16_t owners[BKV_REPLICAS_MAX];
    uint32_t count = bkv_placement_owners(view->placement, key, owners);
    bool found = false;
    for (uint32_t i = 0; i < count && view->self != BKV_NO_MEMBER; i++) {
        found = found || owners[i] == view->self;
    }
    return found;
}

// Copies that are this daemon's own now, or were under a view that a plan starts from: others count on it to have them, and in the
// latter case to send them.
static void claim(bkv_mover_t *mover) {
    const bkv_pass_t *pass = &mover->pass;
    bkv_repair_item_t items[64];
    uint64_t cursor = 0;
    size_t count;
    while ((count = list_some(mover->config.store, bkv_store_list_copies, &cursor, items, 64)) > 0) {
        for (size_t i = 0; i < count; i++) {
            bool own = owns(pass->view, &items[i].key);
            for (uint32_t k = 0; k < pass->from_count; k++) {
                own = own || owns(pass->from[k], &items[i].key);
            }
            if (own) {
                const bkv_name_t name = {.spec_id = items[i].spec_id, .key = items[i].key};
                bkv_store_set_copy(mover->config.store, &name, false, bkv_now_ms());
            }
        }
        if (bkv_mover_pace(mover, 0) == BKV_CARRY_LEAVE) {
            return;
        }
    }
}

// ---- a group ----

// Takes the first `count` of mover->sends to their targets. forget: these are all owners, so that what they have and is not ours
// is a copy from now on.
static void carry(bkv_mover_t *mover, const bkv_view_t *view, size_t count, bool forget, bkv_carry_result_t *result) {
    const bkv_carry_config_t config = {.peers = mover->config.peers, .view = view, .pace = bkv_mover_pace, .user = mover};
    bkv_carry(&config, mover->sends, count, mover->outcomes, result);
    for (size_t i = 0; i < count; i++) {
        const bkv_repair_send_t *send = &mover->sends[i];
        if (forget && mover->outcomes[i] == BKV_CARRIED && send->step.forget) {
            const bkv_name_t name = {.spec_id = send->item.spec_id, .key = send->item.key};
            bkv_store_set_copy(mover->config.store, &name, true, bkv_now_ms());
        }
    }
    pthread_mutex_lock(&mover->lock);
    mover->moved_keys += result->sent;
    mover->moved_bytes += result->sent_bytes;
    mover->metrics.repair_sent_total += result->sent;
    mover->metrics.repair_sent_bytes_total += result->sent_bytes;
    mover->metrics.repair_failed_total += result->failed;
    pthread_mutex_unlock(&mover->lock);
}

// ---- passes ----

void bkv_pass_drop(bkv_mover_t *mover) {
    bkv_pass_t *pass = &mover->pass;
    pthread_mutex_lock(&mover->lock);
    mover->passing = false;
    mover->offer_all = mover->offer_all || (pass->all && mover->clean != pass->view->version);
    pthread_mutex_unlock(&mover->lock);
    bkv_repair_destroy(pass->repair);
    if (pass->view != NULL) {
        bkv_view_give(pass->view);
    }
    for (uint32_t i = 0; i < pass->from_count; i++) {
        bkv_view_give(pass->from[i]);
    }
    *pass = (bkv_pass_t){.view = NULL};
}

// Whether this is the round that offers what no plan may have cared for, and whose targets are all owners.
static bool is_last_round(const bkv_pass_t *pass) {
    return pass->round == pass->from_count;
}

static bkv_status_t begin_round(bkv_mover_t *mover, bkv_error_t *err) {
    bkv_pass_t *pass = &mover->pass;
    const bkv_placement_t *was = is_last_round(pass) ? mover->nobody : pass->from[pass->round]->placement;
    const char *self = pass->view->members[pass->view->self].place.id;
    bkv_repair_destroy(pass->repair);
    pass->repair = NULL;
    pass->handled = pass->handled_bytes = 0;
    return bkv_repair_create(was, pass->view->placement, self, list_store, mover->config.store, &pass->repair, err);
}

static void log_clean(const bkv_mover_t *mover) {
    const bkv_pass_t *pass = &mover->pass;
    bkv_log(pass->sent > 0 ? BKV_LOG_INFO : BKV_LOG_DEBUG, 0,
            "cluster: repair: all records are with their owners; %" PRIu64 " sent, %" PRIu64 " bytes, in %" PRIu64 " ms%s",
            pass->sent, pass->sent_bytes, bkv_now_ms() - pass->started_ms,
            pass->refused > 0 ? "; some are refused for good" : "");
    if (pass->view->members[pass->view->self].place.draining) {
        bkv_log(BKV_LOG_INFO, 0, "cluster: this daemon drains, and all that it held is with its owners");
    }
}

// The pass is over. A newer view, if there is one, has its own time.
static void end_pass(bkv_mover_t *mover, bool clean) {
    const bkv_pass_t *pass = &mover->pass;
    pthread_mutex_lock(&mover->lock);
    if (clean) {
        mover->clean = pass->view->version;
        mover->left_keys = mover->left_bytes = 0;
        mover->settled_hash = bkv_confirm_hash(pass->view);
        mover->pass_failures = mover->pass_refusals = 0;
    } else {
        mover->left_keys = pass->failed + pass->refused;
        mover->left_bytes = pass->left_bytes;
        mover->pass_failures++;
        mover->pass_refusals += pass->failed == 0 && pass->refused > 0;
    }
    uint64_t pause_ms = bkv_mover_pause_ms(mover, mover->pass_failures);
    bool more = !clean || mover->offer_all;
    if (more && mover->pass_due_ms == BKV_MOVER_NEVER) {
        mover->pass_due_ms = bkv_now_ms() + pause_ms;
    }
    bool present = pass->view->version == mover->seen;
    pthread_mutex_unlock(&mover->lock);
    if (clean && present) {
        bkv_confirm_begin(mover, pass->view);
    }
    if (clean) {
        log_clean(mover);
    } else {
        bkv_log(BKV_LOG_WARN, 0,
                "cluster: repair: %" PRIu64 " records could not be given to their owners, %" PRIu64
                " were refused; again in %" PRIu64 " ms: %s",
                pass->failed, pass->refused, pause_ms, pass->error.message);
    }
    bkv_pass_drop(mover);
}

static void fail_pass(bkv_mover_t *mover, const bkv_error_t *error) {
    mover->pass.failed++;
    mover->pass.error = *error;
    end_pass(mover, false);
}

void bkv_pass_begin(bkv_mover_t *mover) {
    bkv_pass_t *pass = &mover->pass;
    bkv_pass_drop(mover);
    bkv_confirm_drop(mover);
    bkv_store_metrics_t store;
    bkv_store_metrics(mover->config.store, &store);
    pthread_mutex_lock(&mover->lock);
    bkv_mover_look(mover);
    *pass = (bkv_pass_t){
        .view = bkv_membership_view(mover->config.membership),
        .all = mover->offer_all,
        .started_ms = bkv_now_ms(),
        .total = store.entries > store.copies ? store.entries - store.copies : 0,
    };
    for (uint32_t i = 0; i < mover->history.count && !pass->all; i++) {
        pass->from[pass->from_count++] = bkv_view_hold(mover->history.views[i]);
    }
    bool member = pass->view->self != BKV_NO_MEMBER; // it may have gone just now
    mover->offer_all = false;
    mover->pass_due_ms = BKV_MOVER_NEVER;
    mover->passing = true;
    mover->left_keys = mover->draining ? pass->total : 0;
    mover->left_bytes = mover->draining ? store.resident_bytes : 0;
    mover->metrics.repair_passes_total++;
    pthread_mutex_unlock(&mover->lock);
    if (!member) {
        bkv_pass_drop(mover);
        return;
    }
    claim(mover);
    bkv_error_t error;
    if (begin_round(mover, &error) != BKV_OK) {
        fail_pass(mover, &error);
    }
}

// Fills mover->sends from the plan. In the last round only what is not ours counts.
static size_t gather(bkv_mover_t *mover, bool *more) {
    bkv_pass_t *pass = &mover->pass;
    size_t count = 0;
    *more = true;
    while (*more && count < BKV_MOVER_GROUP && bkv_mover_pace(mover, 0) == BKV_CARRY_ON) {
        bkv_repair_send_t *sends = &mover->sends[count];
        size_t found = bkv_repair_next(pass->repair, sends, BKV_MOVER_GROUP - count, LOOK_AT, more);
        for (size_t i = 0, kept = 0; i < found; i++) {
            if (!is_last_round(pass) || pass->all || sends[i].step.forget) {
                sends[kept++] = sends[i];
                count++;
            }
        }
    }
    return count;
}

static void account(bkv_mover_t *mover, size_t count, const bkv_carry_result_t *result) {
    bkv_pass_t *pass = &mover->pass;
    pass->sent += result->sent;
    pass->sent_bytes += result->sent_bytes;
    pass->error = result->failed > 0 ? result->error : pass->error;
    pthread_mutex_lock(&mover->lock);
    bool bear = mover->pass_refusals >= REFUSALS_MAX && !mover->draining;
    pthread_mutex_unlock(&mover->lock);
    for (size_t i = 0; i < count; i++) {
        bool refused = mover->outcomes[i] == BKV_CARRIED_REFUSED, failed = mover->outcomes[i] == BKV_CARRIED_SHORT;
        pass->handled += mover->sends[i].step.count;
        pass->handled_bytes += mover->sends[i].step.count * mover->sends[i].item.bytes;
        pass->refused += refused;
        pass->failed += failed;
        pass->left_bytes += failed || refused ? mover->sends[i].item.bytes : 0;
        if (failed || (refused && !bear)) {
            bkv_repair_failed(pass->repair);
        }
    }
}

// What is left of the round, if the rest of the store is like what has been seen of it.
static void estimate(bkv_mover_t *mover) {
    const bkv_pass_t *pass = &mover->pass;
    bkv_repair_progress_t progress;
    bkv_repair_progress(pass->repair, &progress);
    double whole = progress.seen > 0 && pass->total > progress.seen ? (double)pass->total / (double)progress.seen : 1;
    double keys = (double)progress.planned * whole - (double)pass->handled;
    double bytes = (double)progress.planned_bytes * whole - (double)pass->handled_bytes;
    bool last = is_last_round(pass) && !pass->all; // it mostly asks
    pthread_mutex_lock(&mover->lock);
    mover->left_keys = last || keys < 0 ? 0 : (uint64_t)keys;
    mover->left_bytes = last || bytes < 0 ? 0 : (uint64_t)bytes;
    pthread_mutex_unlock(&mover->lock);
}

static void end_round(bkv_mover_t *mover) {
    bkv_error_t error;
    bool clean = bkv_repair_done(mover->pass.repair);
    if (!clean || is_last_round(&mover->pass)) {
        end_pass(mover, clean);
        return;
    }
    mover->pass.round++;
    if (begin_round(mover, &error) != BKV_OK) {
        fail_pass(mover, &error);
    }
}

void bkv_pass_step(bkv_mover_t *mover) {
    bool more;
    size_t count = gather(mover, &more);
    if (count > 0) {
        bkv_carry_result_t result;
        estimate(mover);
        carry(mover, mover->pass.view, count, is_last_round(&mover->pass), &result);
        account(mover, count, &result);
        estimate(mover);
    }
    if (!more && bkv_mover_pace(mover, 0) == BKV_CARRY_ON) {
        end_round(mover);
    }
}

// ---- what Puts owe ----

// Plans for mover->names; returns how many of them there is something to do for.
static size_t plan_owed(bkv_mover_t *mover, const bkv_succession_t *succession, const bkv_view_t *view, size_t count) {
    size_t planned = 0;
    for (size_t i = 0; i < count; i++) {
        const bkv_name_t *name = &mover->names[i];
        bkv_repair_send_t *send = &mover->sends[planned];
        bkv_record_header_t header;
        uint64_t bytes;
        bkv_repair_plan(succession, view->self, &name->key, &send->step);
        if (send->step.count > 0 &&
            bkv_store_peek(mover->config.store, &name->spec_id, &name->key, bkv_now_ms(), &header, &bytes)) {
            send->item = (bkv_repair_item_t){.key = name->key, .spec_id = name->spec_id, .bytes = bytes};
            planned++;
        }
    }
    return planned;
}

// [lock] What has still not arrived is owed again; what is refused, not for ever.
static void owe_again(bkv_mover_t *mover, size_t count, bool *failed) {
    for (size_t i = 0; i < count; i++) {
        bool refused = mover->outcomes[i] == BKV_CARRIED_REFUSED && mover->owed_failures < REFUSALS_MAX;
        if (refused || mover->outcomes[i] == BKV_CARRIED_SHORT) {
            const bkv_repair_item_t *item = &mover->sends[i].item;
            bkv_owed_add(&mover->owed, &(bkv_name_t){.spec_id = item->spec_id, .key = item->key});
            *failed = true;
        }
    }
}

void bkv_pass_owed(bkv_mover_t *mover) {
    pthread_mutex_lock(&mover->lock);
    size_t named = bkv_owed_take(&mover->owed, mover->names, BKV_MOVER_GROUP);
    mover->owing = true;
    pthread_mutex_unlock(&mover->lock);
    const bkv_view_t *view = bkv_membership_view(mover->config.membership);
    bkv_succession_t succession = {0};
    bool planned = bkv_succession_init(&succession, mover->nobody, view->placement, NULL) == BKV_OK;
    size_t count = planned ? plan_owed(mover, &succession, view, named) : 0;
    bkv_carry_result_t result;
    bool failed = !planned;
    if (count > 0) {
        carry(mover, view, count, true, &result);
    }
    bkv_succession_deinit(&succession);
    bkv_view_give(view);
    pthread_mutex_lock(&mover->lock);
    mover->offer_all = mover->offer_all || !planned || mover->owed.overflow;
    mover->owed.overflow = false;
    owe_again(mover, count, &failed);
    mover->owed_failures = failed ? mover->owed_failures + 1 : 0;
    mover->owed_due_ms = bkv_now_ms() + (failed ? bkv_mover_pause_ms(mover, mover->owed_failures) : 0);
    mover->owing = false;
    pthread_mutex_unlock(&mover->lock);
}
