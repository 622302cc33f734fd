// mover.c - (contract only so far)
#include "daemon/cluster/move/mover.h"

bkv_status_t bkv_mover_create(const bkv_mover_config_t *config, bkv_mover_t **mover, bkv_error_t *err) {
    (void)config, (void)err;
    *mover = NULL;
    return BKV_OK;
}
void bkv_mover_stop(bkv_mover_t *mover) {
    (void)mover;
}
void bkv_mover_destroy(bkv_mover_t *mover) {
    (void)mover;
}
void bkv_mover_view_changed(bkv_mover_t *mover) {
    (void)mover;
}
void bkv_mover_again(bkv_mover_t *mover, const bkv_name_t *name) {
    (void)mover, (void)name;
}
const bkv_view_t *bkv_mover_origin(bkv_mover_t *mover) {
    (void)mover;
    return NULL;
}
void bkv_mover_set_limits(bkv_mover_t *mover, uint64_t delay_ms, uint64_t rate) {
    (void)mover, (void)delay_ms, (void)rate;
}
void bkv_mover_get_progress(bkv_mover_t *mover, bkv_mover_progress_t *progress) {
    (void)mover;
    *progress = (bkv_mover_progress_t){0};
}
void bkv_mover_get_metrics(bkv_mover_t *mover, bkv_mover_metrics_t *metrics) {
    (void)mover;
    *metrics = (bkv_mover_metrics_t){0};
}
