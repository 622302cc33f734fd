// history.c - see history.h.
#include "daemon/cluster/move/history.h"

void bkv_history_init(bkv_history_t *history, const bkv_view_t *present) {
    *history = (bkv_history_t){.views = {bkv_view_hold(present)}, .count = 1, .present = bkv_view_hold(present)};
}

void bkv_history_deinit(bkv_history_t *history) {
    for (uint32_t i = 0; i < history->count; i++) {
        bkv_view_give(history->views[i]);
    }
    if (history->present != NULL) {
        bkv_view_give(history->present);
    }
    *history = (bkv_history_t){.count = 0};
}

static void replace(const bkv_view_t **held, const bkv_view_t *view) {
    const bkv_view_t *was = *held;
    *held = bkv_view_hold(view);
    bkv_view_give(was);
}

void bkv_history_saw(bkv_history_t *history, const bkv_view_t *view) {
    const bkv_view_t *last = history->views[history->count - 1];
    bool stranger = last->self == BKV_NO_MEMBER && history->count == 1 && view->self == BKV_NO_MEMBER;
    if (stranger && view->count > 0) {
        replace(&history->views[0], view);
    } else if (history->present != last && !stranger) {
        if (history->count < BKV_HISTORY_MAX) {
            history->views[history->count++] = bkv_view_hold(history->present);
        } else {
            history->lost = true;
        }
    }
    replace(&history->present, view);
}

void bkv_history_settle(bkv_history_t *history, const bkv_view_t *view) {
    uint32_t kept = 1;
    replace(&history->views[0], view);
    for (uint32_t i = 1; i < history->count; i++) {
        if (history->views[i]->version > view->version) {
            history->views[kept++] = history->views[i];
        } else {
            bkv_view_give(history->views[i]);
        }
    }
    history->count = kept;
}
