// view.h - the members at one moment: an immutable snapshot, counted by its readers.
//
// Readers take the present view without a lock, use it for one request, and give it back; a view lives as long as somebody has
// it. How a count can be raised without a lock on something that may be freed meanwhile: headers of views come from a fixed
// pool and are never freed as long as the pool is, so that looking at a count is always safe. Who finds it 0, or finds after
// raising it that the view is no longer the present one, has come too late and tries again.
#ifndef BKV_VIEW_H
#define BKV_VIEW_H

#include "daemon/cluster/members/member.h"

#include <stdatomic.h>

#define BKV_VIEWS_MAX 64 // alive at once: the present one, and old ones that requests still use

typedef struct bkv_view {
    uint64_t version;            // counts from 1, in this process
    int64_t revision;            // etcd's, up to which changes are in it: comparable between members. 0: none yet
    const bkv_member_t *members; // [count], ascending by id; the order of placement's members
    uint32_t count;
    uint16_t self;                    // this daemon; BKV_NO_MEMBER: not in it
    uint64_t seed;                    // of the placement
    const bkv_placement_t *placement; // of these members

    // The pool's.
    atomic_uint refs;
    atomic_bool used;
} bkv_view_t;

typedef struct bkv_views {
    _Atomic(bkv_view_t *) current;
    bkv_view_t pool[BKV_VIEWS_MAX];
} bkv_views_t;

// Starts with version 1, which has no members.
bkv_status_t bkv_views_init(bkv_views_t *views, bkv_error_t *err);
// All views must have been given back.
void bkv_views_deinit(bkv_views_t *views);

// Thread-safe, no lock, no allocation: the present view, to be given back soon.
const bkv_view_t *bkv_view_take(bkv_views_t *views);
const bkv_view_t *bkv_view_hold(const bkv_view_t *view); // once more, by who has it already
void bkv_view_give(const bkv_view_t *view);              // frees its contents where it was the last

typedef struct bkv_view_config {
    const bkv_member_t *members; // ascending by id; copied
    uint32_t count;
    int64_t revision;
    const char *self; // id
    bkv_cluster_config_t cluster;
} bkv_view_config_t;

// Makes a view the present one; one thread at a time. Takes as long as bkv_placement_create. BUSY: all of the pool is in use.
bkv_status_t bkv_views_publish(bkv_views_t *views, const bkv_view_config_t *config, bkv_error_t *err);

#endif
