// repair.c - see repair.h.
#include "daemon/cluster/move/repair.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define PIECE 256 // keys listed at a time

struct bkv_repair {
    bkv_succession_t succession;
    uint16_t self; // in succession.now
    bkv_repair_list_t list;
    void *store;
    uint64_t cursor;
    bool listed; // all of the store
    bkv_repair_item_t piece[PIECE];
    size_t piece_count, piece_at;
    bkv_repair_progress_t progress;
};

// ---- one key ----

bkv_status_t bkv_succession_init(bkv_succession_t *succession, const bkv_placement_t *was, const bkv_placement_t *now,
                                 bkv_error_t *err) {
    uint32_t count = bkv_placement_count(was);
    uint16_t *heir = calloc(count + 1u, sizeof(*heir));
    if (heir == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "repair: no memory for %u members", count);
    }
    for (uint32_t i = 0; i < count; i++) {
        const bkv_placement_member_t *member = bkv_placement_member(was, i);
        heir[i] = bkv_placement_find(now, member->id);
        if (heir[i] != BKV_NO_MEMBER && bkv_placement_member(now, heir[i])->epoch != member->epoch) {
            heir[i] = BKV_NO_MEMBER; // started again: what it held is lost, as far as anybody knows
        }
    }
    *succession = (bkv_succession_t){.was = was, .now = now, .heir = heir};
    return BKV_OK;
}

void bkv_succession_deinit(bkv_succession_t *succession) {
    free(succession->heir);
    *succession = (bkv_succession_t){0};
}

typedef struct group {
    uint16_t at[BKV_REPLICAS_MAX];
    uint32_t count;
} group_t;

static bool is_in(const group_t *group, uint16_t member) {
    bool found = false;
    for (uint32_t i = 0; i < group->count; i++) {
        found = found || group->at[i] == member;
    }
    return found;
}

static group_t without(const group_t *group, const group_t *others) {
    group_t rest = {.count = 0};
    for (uint32_t i = 0; i < group->count; i++) {
        if (!is_in(others, group->at[i])) {
            rest.at[rest.count++] = group->at[i];
        }
    }
    return rest;
}

// Even among the holders, and from target to target. Bytes that placement does not use as such: it hashes the key.
static uint32_t turn_of(const bkv_key_t *key, uint32_t target, uint32_t holders) {
    uint32_t number;
    memcpy(&number, key->bytes, sizeof(number));
    return (uint32_t)(((uint64_t)number + target) % holders);
}

void bkv_repair_plan(const bkv_succession_t *succession, uint16_t self, const bkv_key_t *key, bkv_repair_step_t *step) {
    group_t were, owners, holders = {.count = 0};
    *step = (bkv_repair_step_t){.count = 0};
    if (self == BKV_NO_MEMBER) {
        return;
    }
    were.count = bkv_placement_owners(succession->was, key, were.at);
    owners.count = bkv_placement_owners(succession->now, key, owners.at);
    for (uint32_t i = 0; i < were.count; i++) {
        uint16_t heir = succession->heir[were.at[i]];
        if (heir != BKV_NO_MEMBER) {
            holders.at[holders.count++] = heir;
        }
    }
    if (!is_in(&holders, self)) {
        step->stray = true;
        for (uint32_t i = 0; i < owners.count; i++) {
            if (owners.at[i] != self) {
                step->targets[step->count++] = owners.at[i];
            }
        }
        step->forget = step->count > 0 && !is_in(&owners, self);
        return;
    }
    group_t targets = without(&owners, &holders), leaving = without(&holders, &owners);
    const group_t *senders = leaving.count > 0 ? &leaving : &holders;
    for (uint32_t i = 0; i < targets.count; i++) {
        if (senders->at[turn_of(key, i, senders->count)] == self) {
            step->targets[step->count++] = targets.at[i];
        }
    }
    step->forget = step->count > 0 && leaving.count > 0;
}

// ---- all keys ----

static void begin_pass(bkv_repair_t *repair) {
    repair->cursor = 0;
    repair->listed = false;
    repair->piece_count = repair->piece_at = 0;
    repair->progress = (bkv_repair_progress_t){.passes = repair->progress.passes + 1};
}

bkv_status_t bkv_repair_create(const bkv_placement_t *was, const bkv_placement_t *now, const char *self, bkv_repair_list_t list,
                               void *store, bkv_repair_t **repair, bkv_error_t *err) {
    bkv_repair_t *made = calloc(1, sizeof(*made));
    if (made == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "repair: out of memory");
    }
    bkv_status_t status = bkv_succession_init(&made->succession, was, now, err);
    if (status != BKV_OK) {
        free(made);
        return status;
    }
    made->self = bkv_placement_find(now, self);
    made->list = list;
    made->store = store;
    begin_pass(made);
    *repair = made;
    return BKV_OK;
}

void bkv_repair_destroy(bkv_repair_t *repair) {
    if (repair != NULL) {
        bkv_succession_deinit(&repair->succession);
        free(repair);
    }
}

// The next key of the store; NULL: there is none.
static const bkv_repair_item_t *item_next(bkv_repair_t *repair) {
    if (repair->piece_at == repair->piece_count && !repair->listed) {
        repair->piece_at = 0;
        repair->piece_count = repair->list(repair->store, &repair->cursor, repair->piece, PIECE);
        assert(repair->piece_count <= PIECE);
        repair->listed = repair->piece_count == 0;
    }
    return repair->listed ? NULL : &repair->piece[repair->piece_at++];
}

size_t bkv_repair_next(bkv_repair_t *repair, bkv_repair_send_t *sends, size_t capacity, size_t most, bool *more) {
    const bkv_repair_item_t *item = NULL;
    size_t count = 0;
    for (size_t looked = 0; count < capacity && looked < most && (item = item_next(repair)) != NULL; looked++) {
        bkv_repair_send_t *send = &sends[count];
        bkv_repair_plan(&repair->succession, repair->self, &item->key, &send->step);
        repair->progress.seen++;
        if (send->step.count > 0) {
            send->item = *item;
            repair->progress.planned += send->step.count;
            repair->progress.planned_bytes += send->step.count * item->bytes;
            count++;
        }
    }
    *more = !repair->listed;
    return count;
}

void bkv_repair_failed(bkv_repair_t *repair) {
    repair->progress.failed++;
}

bool bkv_repair_done(const bkv_repair_t *repair) {
    return repair->listed && repair->progress.failed == 0;
}

void bkv_repair_again(bkv_repair_t *repair) {
    begin_pass(repair);
}

void bkv_repair_progress(const bkv_repair_t *repair, bkv_repair_progress_t *progress) {
    *progress = repair->progress;
}
