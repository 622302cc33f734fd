// backend_ref.c - the reference backend's table.
#include "backend.h"

static bool ref_available(void) {
    return true; // portable C
}

static size_t ref_compress_workspace(const bkv_shape_t *shape, const bkv_codec_params_t *params) {
    return params->codec == BKV_CODEC_BALANCE ? bkv_ref_balance_workspace(shape, params) : bkv_dense_scratch(shape);
}

static bkv_status_t ref_compress(const bkv_block_t *block, const bkv_codec_params_t *params, const bkv_record_id_t *id,
                                 void *record, size_t capacity, void *workspace, size_t *length, bkv_error_t *err) {
    (void)capacity; // checked by bkv_compress
    bkv_status_t status = BKV_OK;
    if (params->codec == BKV_CODEC_BALANCE) {
        status = bkv_ref_compress_balance(block, params, id, record, workspace, err);
    } else {
        bkv_dense_compress(block, params, id, record, workspace);
    }
    *length = (size_t)((bkv_record_header_t *)record)->length;
    return status;
}

const bkv_backend_t bkv_backend_ref = {
    .name = "ref",
    .available = ref_available,
    .compress = ref_compress,
    .fold = bkv_ref_fold,
    .attend = bkv_ref_attend,
    .compress_workspace = ref_compress_workspace,
    .fold_workspace = bkv_ref_fold_workspace,
    .attend_workspace = bkv_ref_attend_workspace,
};
