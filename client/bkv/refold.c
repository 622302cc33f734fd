// refold.c - see refold.h.
#include "refold.h"

#include "memory.h"
#include "unpack.h"

#include <stdlib.h>
#include <string.h>

// One band on its way to its record.
typedef struct tree {
    const bkv_refold_t *refold;
    const void *const *records; // of the band
    const uint64_t *before;     // bytes of the records before each
    uint64_t node_bytes;
} tree_t;

// A record that no reader would take is a fault of the kernels, and better found here than in front of a model.
bkv_status_t bkv_record_keep(const void *record, size_t length, void **kept, bkv_error_t *err) {
    bkv_error_t why = {.status = BKV_OK};
    void *copy = bkv_xaligned(length);
    memcpy(copy, record, length);
    if (bkv_record_check(copy, length, &why) != BKV_OK) {
        free(copy);
        return bkv_fail(err, BKV_INTERNAL, "record: %s", why.message);
    }
    bkv_record_seal(copy);
    *kept = copy;
    return BKV_OK;
}

static bkv_status_t fold_list(const bkv_refold_t *refold, const void *const *list, uint32_t count, uint64_t budget,
                              void **result, bkv_error_t *err) {
    // A fold is hardly larger than its children (weights and indices may come in), so room for more would only be waste.
    uint64_t ample = 2 * bkv_unpack_stored_bytes(list, count) + 65536;
    uint64_t room = budget < ample ? budget : ample;
    bkv_record_id_t id = {.position = ((const bkv_record_header_t *)list[0])->position};
    void *record = bkv_xaligned(room), *workspace = bkv_xaligned(bkv_fold_workspace(refold->backend, list, count, room));
    size_t length = 0;
    const bkv_fold_params_t params = {.budget = room, .seed = refold->seed, .shares = refold->shares};
    bkv_status_t status = bkv_fold(refold->backend, list, count, &id, &params, record, workspace, &length, err);
    if (status == BKV_OK) {
        status = bkv_record_keep(record, length, result, err);
    }
    free(record);
    free(workspace);
    return status;
}

// Folds records [first, first + count) of the band, nodes first.
static bkv_status_t fold_part(const tree_t *tree, uint32_t first, uint32_t count, uint64_t budget, void **result,
                              bkv_error_t *err) {
    bkv_cool_part_t *parts = bkv_xcalloc(count, sizeof *parts);
    uint32_t part_count = bkv_cool_parts(tree->before, first, count, tree->node_bytes, parts);
    void **nodes = bkv_xcalloc(part_count, sizeof *nodes);
    const void **list = bkv_xcalloc(part_count, sizeof *list);
    bkv_status_t status = BKV_OK;
    for (uint32_t i = 0; i < part_count && status == BKV_OK; i++) {
        if (parts[i].count > 1) {
            status = fold_part(tree, parts[i].first, parts[i].count, tree->node_bytes, &nodes[i], err);
        }
        list[i] = nodes[i] != NULL ? nodes[i] : tree->records[parts[i].first];
    }
    if (status == BKV_OK) {
        status = fold_list(tree->refold, list, part_count, budget, result, err);
    }
    for (uint32_t i = 0; i < part_count; i++) {
        free(nodes[i]);
    }
    free(nodes);
    free((void *)list);
    free(parts);
    return status;
}

static bkv_status_t plan(const bkv_refold_t *refold, bkv_cool_band_t bands[BKV_FOLD_RECORDS], uint32_t *count,
                         bkv_error_t *err) {
    if (refold->profile->count == 0) {
        bands[0] = (bkv_cool_band_t){.count = refold->count, .budget = refold->budget};
        *count = 1;
        return BKV_OK;
    }
    bkv_cool_block_t *blocks = bkv_xcalloc(refold->count, sizeof *blocks);
    for (uint32_t i = 0; i < refold->count; i++) {
        const bkv_record_header_t *header = refold->records[i];
        blocks[i] = (bkv_cool_block_t){.tokens = header->tokens, .bytes = header->length};
    }
    bkv_shape_t shape;
    bkv_record_shape(refold->records[0], &shape);
    bkv_status_t status = bkv_cool_plan(&shape, blocks, refold->count, refold->profile, refold->budget, bands, count, err);
    free(blocks);
    return status;
}

bkv_status_t bkv_refold(const bkv_refold_t *refold, void **results, size_t *count, bkv_error_t *err) {
    bkv_cool_band_t bands[BKV_FOLD_RECORDS];
    uint32_t band_count;
    *count = 0;
    bkv_status_t status = plan(refold, bands, &band_count, err);
    if (status != BKV_OK) {
        return status;
    }
    uint64_t *before = bkv_xcalloc((size_t)refold->count + 1, sizeof *before);
    for (uint32_t i = 0; i < refold->count; i++) {
        before[i + 1] = before[i] + ((const bkv_record_header_t *)refold->records[i])->length;
    }
    for (uint32_t i = 0; i < band_count && status == BKV_OK; i++) {
        tree_t tree = {.refold = refold,
                       .records = refold->records + bands[i].first,
                       .before = before + bands[i].first,
                       .node_bytes = bkv_cool_node_bytes(bands[i].budget)};
        status = fold_part(&tree, 0, bands[i].count, bands[i].budget, &results[i], err);
        *count += status == BKV_OK;
    }
    free(before);
    for (size_t i = 0; i < *count && status != BKV_OK; i++) {
        free(results[i]);
    }
    *count = status == BKV_OK ? *count : 0;
    return status;
}
