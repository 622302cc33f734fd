// where.c - (contract only so far)
#include "daemon/cluster/internal.h"

void bkv_cluster_where(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, bool ask, uint64_t deadline_ms,
                       bkv_whereabouts_t *where, bkv_cluster_done_t done, void *user) {
    (void)cluster, (void)names, (void)count, (void)ask, (void)deadline_ms, (void)where;
    done(user);
}
