// model.h - the specs that workers opened: a bounded table from spec id to what it stands for.
//
// Canonical encoding, of which the spec id is the first 16 bytes of SHA-256; all integers little-endian uint32 unless said
// otherwise: "bkv-spec-1\0" | len, model | layers | kv_heads | key_dim | value_dim | dtype | block_tokens | len, tenant |
// tp_rank | tp_size | codec | rate | sink_tokens | seed (uint64) | shares, where there are any (layers * kv_heads bytes). Defaults
// are filled in first, so that a spec that leaves a field at 0 and one that spells its default out are the same; so are shares
// that are all alike and none. Without shares the encoding is what it was before there were any, and ids stay as they were.
#ifndef BKV_MODEL_H
#define BKV_MODEL_H

#include "kernels/codec.h"

#define BKV_MODEL_NAME_MAX  256
#define BKV_TENANT_NAME_MAX 64

typedef struct bkv_model {
    bkv_spec_id_t id;
    char name[BKV_MODEL_NAME_MAX + 1];
    char tenant_name[BKV_TENANT_NAME_MAX + 1];
    uint64_t tenant;   // first 8 bytes (little-endian) of SHA-256(tenant_name), as in record headers
    bkv_shape_t shape; // tokens = block_tokens
    uint32_t tp_rank, tp_size;
    bkv_codec_params_t params; // shares: see share_count
    size_t share_count;        // bytes at params.shares: layers * kv_heads, or 0 and params.shares NULL
} bkv_model_t;

typedef struct bkv_model_table bkv_model_table_t;

// Room for `capacity` specs, never more.
bkv_model_table_t *bkv_model_table_create(uint32_t capacity);
void bkv_model_table_destroy(bkv_model_table_t *table);

// Fills defaults in (value_dim, block_tokens, tp_size, codec, rate; not params.sink, where 0 means none: whoever reads a wire
// format resolves its own "unset"), checks every field (INVALID_ARGUMENT names it as "spec.<field>: ...") and computes tenant and
// id. params.shares stays the caller's memory and may become NULL.
bkv_status_t bkv_model_complete(bkv_model_t *model, bkv_error_t *err);

// Remembers a completed model, its shares copied; the same again is success. RESOURCE_EXHAUSTED when the table is full.
bkv_status_t bkv_model_table_add(bkv_model_table_t *table, const bkv_model_t *model, bkv_error_t *err);

// The model of an id; lives as long as the table. NULL: never opened here. Thread-safe, wait-free for readers.
const bkv_model_t *bkv_model_table_find(const bkv_model_table_t *table, const bkv_spec_id_t *id);

// The same for a request that cannot go on without: NOT_FOUND says what to do. model may be NULL.
bkv_status_t bkv_model_table_require(const bkv_model_table_t *table, const bkv_spec_id_t *id, const bkv_model_t **model,
                                     bkv_error_t *err);

uint32_t bkv_model_table_count(const bkv_model_table_t *table);

// The tenant tag of a name.
uint64_t bkv_tenant_tag(const char *name);

#endif
