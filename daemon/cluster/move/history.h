// history.h - the views that there have been since every record was last in its place: what plans start from.
//
// The first is origin, under which all was in its place. What was put since then went to the owners by the view of that moment, and
// under origin's plan a member may wait for another one to send what that one never had. So there is a plan from each of these
// views; what has arrived already costs a question. Not thread-safe: its owner has a lock.
#ifndef BKV_HISTORY_H
#define BKV_HISTORY_H

#include "daemon/cluster/members/view.h"

#define BKV_HISTORY_MAX 8

typedef struct bkv_history {
    const bkv_view_t *views[BKV_HISTORY_MAX]; // [count], held; the first is origin
    uint32_t count;
    const bkv_view_t *present; // held
    bool lost;                 // there were more of them; whoever has noted it takes it back
} bkv_history_t;

void bkv_history_init(bkv_history_t *history, const bkv_view_t *present); // which is origin as well
void bkv_history_deinit(bkv_history_t *history);

// There is a new view. As long as this daemon was in none, origin is the last one without it.
void bkv_history_saw(bkv_history_t *history, const bkv_view_t *view);

// Every record is in its place by a view that was or is the present one.
void bkv_history_settle(bkv_history_t *history, const bkv_view_t *view);

#endif
