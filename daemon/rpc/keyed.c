// keyed.c - see keyed.h; the fields themselves are wire.c's.
#include "daemon/rpc/keyed.h"

bkv_status_t bkv_keyed_get(const bkv_call_t *call, bkv_bump_t *bump, const ProtobufCBinaryData *spec_id, size_t count,
                           const ProtobufCBinaryData *keys, bkv_keyed_t *keyed, bkv_error_t *err) {
    const bkv_server_config_t *config = &call->server->config;
    bkv_status_t status = bkv_wire_get_spec_id(spec_id, &keyed->spec_id, err);
    if (status == BKV_OK) {
        status = bkv_wire_check_keys(count, keys, config->max_batch, err);
    }
    if (status == BKV_OK) {
        status = bkv_model_table_require(bkv_pipeline_models(config->pipeline), &keyed->spec_id, &keyed->model, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    bkv_key_t *copy = bkv_bump_alloc(bump, count * sizeof(copy[0]));
    if (copy == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory for them");
    }
    bkv_wire_get_keys(count, keys, copy);
    keyed->keys = copy;
    keyed->count = (uint32_t)count;
    return BKV_OK;
}

bkv_status_t bkv_keyed_need(const bkv_keyed_t *keyed, bkv_error_t *err) {
    return keyed->count > 0 ? BKV_OK : bkv_fail(err, BKV_INVALID_ARGUMENT, "keys: none given");
}
