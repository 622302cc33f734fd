// place.c - (contract only so far)
#include "daemon/cluster/internal.h"

void bkv_cluster_place(bkv_cluster_t *cluster, const bkv_name_t *name, uint64_t deadline_ms, bkv_placed_t done, void *user) {
    (void)cluster, (void)name, (void)deadline_ms;
    done(user, 0);
}
