// balance_ref.c - BalanceKV over one block.
#include "backend.h"

size_t bkv_ref_balance_workspace(const bkv_shape_t *shape, const bkv_codec_params_t *params) {
    (void)shape;
    (void)params;
    return 1;
}

bkv_status_t bkv_ref_compress_balance(const bkv_block_t *block, const bkv_codec_params_t *params, const bkv_record_id_t *id,
                                      void *record, void *workspace, bkv_error_t *err) {
    (void)block, (void)params, (void)id, (void)workspace;
    ((bkv_record_header_t *)record)->length = 0;
    return bkv_fail(err, BKV_UNIMPLEMENTED, "codec: balance is not in this build yet");
}
