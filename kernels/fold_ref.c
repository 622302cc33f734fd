// fold_ref.c - one summary of several records.
#include "backend.h"

size_t bkv_ref_fold_workspace(const void *const *records, uint32_t count, uint64_t budget) {
    (void)records, (void)count, (void)budget;
    return 1;
}

bkv_status_t bkv_ref_fold(const void *const *records, uint32_t count, const bkv_record_id_t *id, uint64_t budget, uint64_t seed,
                          void *record, void *workspace, size_t *length, bkv_error_t *err) {
    (void)records, (void)count, (void)id, (void)budget, (void)seed, (void)record, (void)workspace, (void)length;
    return bkv_fail(err, BKV_UNIMPLEMENTED, "fold: not in this build yet");
}
