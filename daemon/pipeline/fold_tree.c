// fold_tree.c - one record for a run of resident ones, under a budget: merge-and-reduce over nodes that are kept in the store.
//
// Which aligned runs become nodes is planned by kernels/cool.c, and merging is bkv_fold. A node is a record like any other, under
// a key of its own, found again as long as it is resident: evictable, pinned while it is read, made anew when it is missing.
// What a node holds depends on its key alone, so a fold is the same whichever nodes were there.
#include "daemon/pipeline/internal.h"

#include "kernels/seal.h"

#include <assert.h>
#include <openssl/evp.h>
#include <stdlib.h>

#define FOLD_TAG "bkv-fold-1"
#define NODE_TAG "bkv-node-1"

_Static_assert(sizeof(bkv_key_t) == BKV_KEY_BYTES, "keys are hashed as one run of bytes");

// The fold that is being made, for all levels of the tree.
typedef struct tree {
    bkv_pipeline_t *pipeline;
    const bkv_fold_run_t *run;
    bkv_scratch_t *scratch;
    uint64_t node_bytes;
} tree_t;

// SHA-256(tag with its NUL | spec id | budget as uint64 LE | keys).
static bkv_status_t derive_key(const char *tag, size_t tag_bytes, const bkv_model_t *model, const bkv_key_t *keys,
                               uint32_t count, uint64_t budget, bkv_key_t *key, bkv_error_t *err) {
    uint8_t budget_bytes[8];
    for (int i = 0; i < 8; i++) {
        budget_bytes[i] = (uint8_t)(budget >> (8 * i));
    }
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    bool ok = context != NULL && EVP_DigestInit_ex(context, EVP_sha256(), NULL) == 1 &&
              EVP_DigestUpdate(context, tag, tag_bytes) == 1 &&
              EVP_DigestUpdate(context, model->id.bytes, sizeof(model->id.bytes)) == 1 &&
              EVP_DigestUpdate(context, budget_bytes, sizeof(budget_bytes)) == 1 &&
              EVP_DigestUpdate(context, keys, (size_t)count * sizeof(keys[0])) == 1 &&
              EVP_DigestFinal_ex(context, key->bytes, NULL) == 1;
    EVP_MD_CTX_free(context);
    return ok ? BKV_OK : bkv_fail(err, BKV_INTERNAL, "libcrypto has no SHA-256");
}

bkv_status_t bkv_fold_key(const bkv_model_t *model, const bkv_key_t *keys, uint32_t count, uint64_t budget, bkv_key_t *key,
                          bkv_error_t *err) {
    return derive_key(FOLD_TAG, sizeof(FOLD_TAG), model, keys, count, budget, key, err);
}

// More than any record of these tokens can have: every token native, an index and weights for each section. A budget beyond
// it is not worth reserving.
static uint64_t largest_fold(const bkv_shape_t *shape) {
    const bkv_codec_params_t raw = {.codec = BKV_CODEC_RAW};
    uint64_t sections = (uint64_t)shape->layers * shape->heads;
    uint64_t index_and_weights = (uint64_t)shape->tokens / 8 + shape->tokens + 64;
    return bkv_codec_bound(shape, &raw) + sections * index_and_weights;
}

// The shape of all the records together. tokens that no record can stand for are refused.
static bkv_status_t summed_shape(const bkv_model_t *model, const bkv_gather_t *gather, bkv_shape_t *sum, bkv_error_t *err) {
    *sum = model->shape;
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < gather->count; i++) {
        bkv_shape_t shape;
        bkv_record_shape(gather->records[i], &shape);
        tokens += shape.tokens;
    }
    if (tokens > BKV_MAX_TOKENS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "keys: %llu tokens are more than %u", (unsigned long long)tokens,
                        BKV_MAX_TOKENS);
    }
    sum->tokens = (uint32_t)tokens;
    return BKV_OK;
}

// Folds into a slot of the store, sealed. On failure the slot is given back.
static bkv_status_t fold_records(const tree_t *tree, const bkv_gather_t *gather, uint64_t budget, const bkv_key_t *key,
                                 bkv_slot_t *slot, bkv_error_t *err) {
    const bkv_pipeline_config_t *config = &tree->pipeline->config;
    const bkv_model_t *model = tree->run->model;
    void *workspace =
        bkv_scratch_get(tree->scratch, bkv_fold_workspace(config->backend, gather->records, gather->count, budget));
    if (workspace == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for the fold's workspace");
    }
    bkv_status_t status = bkv_store_reserve(config->store, model->tenant, budget, config->now_ms(), slot, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_record_id_t id = {.key = *key,
                          .spec_id = model->id,
                          .tenant = model->tenant,
                          .position = ((const bkv_record_header_t *)gather->records[0])->position};
    size_t length = 0;
    const bkv_fold_params_t params = {.budget = budget, .seed = model->params.seed, .shares = model->params.shares};
    status = bkv_fold(config->backend, gather->records, gather->count, &id, &params, slot->data, workspace, &length, err);
    if (status != BKV_OK) {
        bkv_store_abort(config->store, slot);
        return status;
    }
    assert(length <= budget);
    bkv_record_seal(slot->data);
    return BKV_OK;
}

// The same request ran twice at once: the older record has the same bytes, unless memory has decayed.
static bkv_status_t check_older(bkv_pipeline_t *pipeline, const bkv_pin_t *pin, bkv_error_t *err) {
    bkv_status_t status = bkv_record_verify(pin->data, pin->length, err);
    if (status != BKV_OK) {
        bkv_store_unpin(pipeline->config.store, pin);
    }
    return status;
}

// Publishes and pins the fold.
static bkv_status_t fold_gathered(const tree_t *tree, bkv_gather_t *gather, uint64_t budget, const bkv_key_t *key,
                                  bkv_pin_t *pin, bkv_error_t *err) {
    bkv_pipeline_t *pipeline = tree->pipeline;
    bkv_shape_t shape;
    bkv_slot_t slot;
    bkv_status_t status = summed_shape(tree->run->model, gather, &shape, err);
    if (status == BKV_OK) {
        uint64_t largest = largest_fold(&shape);
        status = fold_records(tree, gather, budget < largest ? budget : largest, key, &slot, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    for (uint32_t i = 0; i < gather->count; i++) {
        bkv_count(&pipeline->counters.fold_read_bytes_total, gather->pins[i].length);
    }
    status = bkv_store_publish_pinned(pipeline->config.store, &slot, bkv_pipeline_ttl(pipeline, tree->run->ttl_ms),
                                      bkv_shape_bytes(&shape), pipeline->config.now_ms(), pin, err);
    return status == BKV_ALREADY_EXISTS ? check_older(pipeline, pin, err) : status;
}

static bkv_status_t make_part(const tree_t *tree, uint32_t first, uint32_t count, uint64_t budget, const bkv_key_t *key,
                              bkv_pin_t *pin, bkv_error_t *err);

// Pins a node, which is made first where it is missing.
static bkv_status_t pin_node(const tree_t *tree, const bkv_cool_part_t *part, bkv_pin_t *pin, bkv_error_t *err) {
    bkv_pipeline_t *pipeline = tree->pipeline;
    const bkv_fold_run_t *run = tree->run;
    bkv_key_t key;
    bkv_status_t status =
        derive_key(NODE_TAG, sizeof(NODE_TAG), run->model, run->keys + part->first, part->count, tree->node_bytes, &key, err);
    if (status != BKV_OK) {
        return status;
    }
    if (bkv_store_contains(pipeline->config.store, &run->model->id, &key, pipeline->config.now_ms()) &&
        bkv_pin_checked(pipeline, &run->model->id, &key, pipeline->config.now_ms(), pin, NULL) == BKV_OK) {
        return BKV_OK;
    }
    status = make_part(tree, part->first, part->count, tree->node_bytes, &key, pin, err);
    if (status == BKV_OK) {
        bkv_count(&pipeline->counters.fold_nodes_total, 1);
    }
    return status;
}

static bkv_status_t pin_part(const tree_t *tree, const bkv_cool_part_t *part, bkv_pin_t *pin, bkv_error_t *err) {
    if (part->count > 1) {
        return pin_node(tree, part, pin, err);
    }
    const bkv_fold_run_t *run = tree->run;
    bkv_error_t cause;
    bkv_status_t status =
        bkv_pin_checked(tree->pipeline, &run->model->id, &run->keys[part->first], tree->pipeline->config.now_ms(), pin, &cause);
    return status == BKV_OK ? BKV_OK : bkv_fail(err, status, "keys[%u]: %.200s", run->number + part->first, cause.message);
}

// Makes, publishes and pins the fold of records [first, first + count) of the run under `key`. What it is made from stays pinned
// meanwhile, also while a node deeper in the tree is made: at most the node's bytes for each level.
static bkv_status_t make_part(const tree_t *tree, uint32_t first, uint32_t count, uint64_t budget, const bkv_key_t *key,
                              bkv_pin_t *pin, bkv_error_t *err) {
    bkv_cool_part_t *parts = malloc(count * sizeof(parts[0]));
    if (parts == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory for %u", count);
    }
    uint32_t part_count = bkv_cool_parts(tree->run->before, first, count, tree->node_bytes, parts);
    bkv_gather_t gather;
    bkv_status_t status = bkv_gather_init(&gather, part_count, err);
    for (uint32_t i = 0; i < part_count && status == BKV_OK; i++) {
        bkv_pin_t part;
        status = pin_part(tree, &parts[i], &part, err);
        if (status == BKV_OK) {
            bkv_gather_add(&gather, &part);
        }
    }
    free(parts);
    if (status == BKV_OK) {
        status = fold_gathered(tree, &gather, budget, key, pin, err);
    }
    bkv_gather_unpin(tree->pipeline, &gather);
    return status;
}

bkv_status_t bkv_fold_run(bkv_pipeline_t *pipeline, const bkv_fold_run_t *run, uint64_t budget, const bkv_key_t *key,
                          bkv_scratch_t *scratch, bkv_pin_t *pin, bkv_error_t *err) {
    tree_t tree = {.pipeline = pipeline, .run = run, .scratch = scratch, .node_bytes = bkv_cool_node_bytes(budget)};
    if (tree.node_bytes > bkv_store_max_record(pipeline->config.store)) {
        tree.node_bytes = UINT64_MAX; // no node would fit: all is read at once
    }
    const bkv_shape_t *shape = &run->model->shape;
    if (budget < bkv_cool_least_bytes(shape)) { // before nodes are made in vain
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "budget_bytes: %llu hold no record of %u layers and %u heads",
                        (unsigned long long)budget, shape->layers, shape->heads);
    }
    bkv_status_t status = make_part(&tree, 0, run->count, budget, key, pin, err);
    if (status == BKV_OK) {
        bkv_count(&pipeline->counters.folds_total, 1);
    }
    return status;
}
