// changes.c - tells the log what is different between two views: a line a member.
#include "daemon/cluster/members/internal.h"

#include "daemon/observe/log.h"

#include <inttypes.h>
#include <string.h>

#define LINES_MAX 32 // for one view: a cluster that starts is not worth 1,000

typedef struct changes {
    const bkv_view_t *now;
    uint32_t lines, more;
} changes_t;

static bool has_line(changes_t *changes) {
    bool has = changes->lines < LINES_MAX;
    changes->lines += has;
    changes->more += !has;
    return has;
}

static const char *address(const bkv_member_t *member) {
    return member->address_count > 0 ? member->addresses[0] : "no address";
}

static void joined(changes_t *changes, const bkv_member_t *member) {
    if (has_line(changes)) {
        bkv_log(BKV_LOG_INFO, 0, "cluster: %s has joined: %s, weight %u%s%s%s; %u members", member->place.id, address(member),
                member->place.weight, member->place.domain[0] != '\0' ? ", domain " : "", member->place.domain,
                member->place.draining ? ", draining" : "", changes->now->count);
    }
}

static void left(changes_t *changes, const bkv_member_t *member) {
    if (has_line(changes)) {
        bkv_log(BKV_LOG_INFO, 0, "cluster: %s is gone%s; %u members", member->place.id,
                member->place.draining ? ", it had been draining" : "", changes->now->count);
    }
}

static void changed(changes_t *changes, const bkv_member_t *was, const bkv_member_t *now) {
    if (bkv_member_equal(was, now) || !has_line(changes)) {
        return;
    }
    const char *what = "has changed its record";
    if (was->place.epoch != now->place.epoch) {
        what = "has been started again, or was cut off";
    } else if (was->place.draining != now->place.draining) {
        what = now->place.draining ? "drains" : "drains no longer";
    } else if (was->place.weight != now->place.weight) {
        what = "has changed its weight";
    }
    bkv_log(BKV_LOG_INFO, 0, "cluster: %s %s: %s, weight %u, epoch %016" PRIx64, now->place.id, what, address(now),
            now->place.weight, now->place.epoch);
}

// Both lists are in order of ids.
void bkv_changes_log(const bkv_view_t *was, const bkv_view_t *now) {
    changes_t changes = {.now = now};
    for (uint32_t i = 0, j = 0; i < was->count || j < now->count;) {
        int order = i == was->count ? 1 : j == now->count ? -1 : strcmp(was->members[i].place.id, now->members[j].place.id);
        if (order < 0) {
            left(&changes, &was->members[i++]);
        } else if (order > 0) {
            joined(&changes, &now->members[j++]);
        } else {
            changed(&changes, &was->members[i++], &now->members[j++]);
        }
    }
    if (changes.more > 0) {
        bkv_log(BKV_LOG_INFO, 0, "cluster: and %u more changes; %u members", changes.more, now->count);
    }
}
