// view.c - see view.h.
#include "daemon/cluster/members/view.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static void view_clear(bkv_view_t *view) {
    free((void *)view->members);
    bkv_placement_destroy((bkv_placement_t *)view->placement);
    view->members = NULL;
    view->placement = NULL;
    atomic_store(&view->used, false);
}

const bkv_view_t *bkv_view_take(bkv_views_t *views) {
    for (;;) {
        bkv_view_t *view = atomic_load(&views->current);
        unsigned refs = atomic_load(&view->refs);
        while (refs > 0 && !atomic_compare_exchange_weak(&view->refs, &refs, refs + 1)) {
        }
        if (refs > 0) {
            if (atomic_load(&views->current) == view) {
                return view;
            }
            bkv_view_give(view);
        }
    }
}

const bkv_view_t *bkv_view_hold(const bkv_view_t *held) {
    atomic_fetch_add(&((bkv_view_t *)held)->refs, 1);
    return held;
}

void bkv_view_give(const bkv_view_t *given) {
    bkv_view_t *view = (bkv_view_t *)given;
    if (atomic_fetch_sub(&view->refs, 1) == 1) {
        view_clear(view);
    }
}

static bkv_view_t *view_find_free(bkv_views_t *views) {
    for (uint32_t i = 0; i < BKV_VIEWS_MAX; i++) {
        if (!atomic_load(&views->pool[i].used)) {
            return &views->pool[i];
        }
    }
    return NULL;
}

static bkv_status_t make_placement(const bkv_view_config_t *config, const bkv_placement_t *previous,
                                   const bkv_placement_t **placement, bkv_error_t *err) {
    bkv_placement_member_t *members = calloc(config->count + 1u, sizeof(*members));
    if (members == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "view: no memory for %u members", config->count);
    }
    for (uint32_t i = 0; i < config->count; i++) {
        members[i] = config->members[i].place;
    }
    const bkv_placement_config_t of = {.members = members,
                                       .count = config->count,
                                       .replicas = config->cluster.replicas,
                                       .seed = config->cluster.seed,
                                       .table = config->count > 0};
    bkv_placement_t *made = NULL;
    bkv_status_t status = bkv_placement_create(&of, previous, &made, err);
    *placement = made;
    free(members);
    return status;
}

// Only the publisher changes `current`, so that it may read what is there without taking it.
bkv_status_t bkv_views_publish(bkv_views_t *views, const bkv_view_config_t *config, bkv_error_t *err) {
    bkv_view_t *was = atomic_load(&views->current), *view = view_find_free(views);
    if (view == NULL) {
        return bkv_fail(err, BKV_BUSY, "view: %d views are in use", BKV_VIEWS_MAX);
    }
    bkv_member_t *members = calloc(config->count + 1u, sizeof(*members));
    const bkv_placement_t *placement = NULL;
    bkv_status_t status = members != NULL ? make_placement(config, was != NULL ? was->placement : NULL, &placement, err)
                                          : bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "view: out of memory");
    if (status != BKV_OK) {
        free(members);
        return status;
    }
    if (config->count > 0) {
        memcpy(members, config->members, config->count * sizeof(*members));
    }
    view->version = was != NULL ? was->version + 1 : 1;
    view->revision = config->revision;
    view->members = members;
    view->count = config->count;
    view->placement = placement;
    view->self = bkv_placement_find(placement, config->self);
    view->seed = config->cluster.seed;
    atomic_store(&view->used, true);
    atomic_store(&view->refs, 1); // the pool's own, until the next one is published
    atomic_store(&views->current, view);
    if (was != NULL) {
        bkv_view_give(was);
    }
    return BKV_OK;
}

bkv_status_t bkv_views_init(bkv_views_t *views, bkv_error_t *err) {
    memset(views, 0, sizeof(*views));
    return bkv_views_publish(views, &(bkv_view_config_t){.self = "", .cluster = {.replicas = 1}}, err);
}

void bkv_views_deinit(bkv_views_t *views) {
    bkv_view_t *view = atomic_load(&views->current);
    if (view != NULL) {
        bkv_view_give(view);
    }
    for (uint32_t i = 0; i < BKV_VIEWS_MAX; i++) {
        assert(!atomic_load(&views->pool[i].used));
    }
}
