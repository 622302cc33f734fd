// lookup.c - (contract only so far)
#include "daemon/cluster/internal.h"

void bkv_cluster_lookup(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms, bool *have,
                        bkv_cluster_done_t done, void *user) {
    (void)cluster, (void)names, (void)count, (void)deadline_ms, (void)have;
    done(user);
}
