// hot.c - (contract only so far)
#include "daemon/cluster/hot.h"

void bkv_hot_init(bkv_hot_t *hot, uint32_t wanted, uint64_t secret) {
    atomic_init(&hot->wanted, wanted);
    hot->secret = secret;
}
void bkv_hot_set_wanted(bkv_hot_t *hot, uint32_t wanted) {
    atomic_store(&hot->wanted, wanted);
}
bool bkv_hot_read(bkv_hot_t *hot, const bkv_name_t *name) {
    (void)hot, (void)name;
    return false;
}
