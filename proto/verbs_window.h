// verbs_window.h - one end of an RDMA connection, as messages have it: VerbsWindow of proto/balancekv.proto.
#ifndef BKV_VERBS_WINDOW_H
#define BKV_VERBS_WINDOW_H

#include "proto/verbs_link.h"

#include "balancekv.pb-c.h"

// The message refers to *end.
void bkv_verbs_window_set(const bkv_verbs_end_t *end, Balancekv__V1__VerbsWindow *window);

// INVALID_ARGUMENT: "verbs.gid: ...". What the numbers say, bkv_verbs_end_check checks.
bkv_status_t bkv_verbs_window_get(const Balancekv__V1__VerbsWindow *window, bkv_verbs_end_t *end, bkv_error_t *err);

#endif
