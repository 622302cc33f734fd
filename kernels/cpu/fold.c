// fold.c - one summary of consecutive records under a byte budget.
//
// The children's tokens, with the weights they have, are one long list of weighted tokens; from it the same selection as for
// a block keeps what the budget holds: outliers over the whole prefix, and a merge-and-reduce tree over the rest
// (selection.c). Of every token only index, weights, score and fate are held, 21 bytes; keys and values are dequantised
// when a walk needs them, at most BKV_WALK_TOKENS at a time and once a level, so the cost is linear in the tokens.
#include "balance.h"

#include "convert.h"

#include <assert.h>
#include <math.h>

// Log weights beyond this are not made by us (tokens are at most 2^24); it keeps sums of them finite.
#define LOG_WEIGHT_MAX 20.0f

// One (layer, head) of all children.
typedef struct fold_source {
    uint32_t count;
    bkv_section_view_t *views; // [count]
    uint32_t *starts;          // [count + 1]: number of each child's first token
} fold_source_t;

typedef struct fold_scratch {
    fold_source_t source;
    uint32_t *position; // [tokens]
    bkv_selection_t selection;
} fold_scratch_t;

// The child that holds a token.
static uint32_t child_of(const fold_source_t *from, uint32_t token) {
    uint32_t low = 0, high = from->count;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (from->starts[middle] <= token) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

static void fold_source_read(const bkv_source_t *source, uint32_t first, uint32_t count, float *k, float *v) {
    const fold_source_t *from = source->from;
    uint32_t child = child_of(from, first);
    while (count > 0) {
        uint32_t at = first - from->starts[child], left = from->views[child].tokens - at;
        uint32_t part = count < left ? count : left;
        if (k) {
            source->lanes->read_keys(&from->views[child], at, part, k);
            k += (size_t)part * source->key_dim;
        }
        if (v) {
            source->lanes->read_values(&from->views[child], at, part, v);
            v += (size_t)part * source->value_dim;
        }
        first += part;
        count -= part;
        child++;
    }
}

// Tokens that a section of all children holds, at most.
static uint32_t tokens_available(const void *const *records, uint32_t count) {
    const bkv_record_header_t *header = records[0];
    uint32_t most = 0;
    for (uint32_t section = 0; section < (uint32_t)header->layers * header->heads; section++) {
        uint32_t sum = 0; // at most BKV_MAX_TOKENS, as the children's source tokens are
        for (uint32_t i = 0; i < count; i++) {
            sum += bkv_record_directory_const(records[i])[section].tokens;
        }
        most = sum > most ? sum : most;
    }
    return most;
}

static size_t scratch_carve(const bkv_lanes_t *lanes, const void *const *records, uint32_t count, void *base,
                            fold_scratch_t *fold) {
    const bkv_record_header_t *header = records[0];
    uint32_t tokens = tokens_available(records, count);
    bkv_scratch_t scratch = {.base = base};
    fold->source.count = count;
    fold->source.views = bkv_scratch_take(&scratch, (uint64_t)count * sizeof(bkv_section_view_t));
    fold->source.starts = bkv_scratch_take(&scratch, ((uint64_t)count + 1) * sizeof(uint32_t));
    fold->position = bkv_scratch_take(&scratch, (uint64_t)tokens * sizeof(uint32_t));
    bkv_selection_carve(&scratch, lanes, tokens, header->key_dim, header->value_dim, &fold->selection);
    return scratch.used;
}

size_t bkv_fold_scratch(const bkv_lanes_t *lanes, const void *const *records, uint32_t count) {
    fold_scratch_t fold;
    return scratch_carve(lanes, records, count, NULL, &fold);
}

// Refuses what the float16 scales of the result cannot hold. Only unquantised children can have it.
static bkv_status_t check_native(const bkv_section_view_t *view, uint32_t child, uint32_t layer, uint32_t head,
                                 bkv_error_t *err) {
    const bkv_plane_layout_t *layout = &view->layout;
    if (view->key_bits == BKV_BITS_NATIVE &&
        bkv_row_exceeds(view->dtype, view->key_plane + layout->key_codes, (size_t)view->tokens * view->key_dim, true)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "records: %u has a key beyond 65504 at layer %u, head %u", child, layer,
                        head);
    }
    if (view->value_bits == BKV_BITS_NATIVE &&
        bkv_row_exceeds(view->dtype, view->value_plane + layout->value_codes, (size_t)view->tokens * view->value_dim, true)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "records: %u has a value beyond 65504 at layer %u, head %u", child, layer,
                        head);
    }
    return BKV_OK;
}

// Makes one (layer, head) of all children readable, with weights and positions. *tokens is how many there are.
static bkv_status_t source_load(const void *const *records, uint32_t layer, uint32_t head, fold_scratch_t *fold,
                                uint32_t *tokens, bkv_error_t *err) {
    fold_source_t *from = &fold->source;
    uint32_t start = 0, offset = 0;
    for (uint32_t i = 0; i < from->count; i++) {
        bkv_section_view_t *view = &from->views[i];
        bkv_record_section(records[i], layer, head, view);
        bkv_status_t status = check_native(view, i, layer, head, err);
        if (status != BKV_OK) {
            return status;
        }
        float *weight = fold->selection.source_weight + start;
        uint32_t *position = fold->position + start;
        bkv_section_read(view, NULL, NULL, weight, position);
        for (uint32_t t = 0; t < view->tokens; t++) {
            float logw = weight[t] > LOG_WEIGHT_MAX ? LOG_WEIGHT_MAX : weight[t];
            weight[t] = expf(logw < -LOG_WEIGHT_MAX ? -LOG_WEIGHT_MAX : logw);
            position[t] += offset;
        }
        from->starts[i] = start;
        start += view->tokens;
        offset += view->source_tokens;
    }
    from->starts[from->count] = start;
    *tokens = start;
    return BKV_OK;
}

// Header and directory. False when the budget holds no such record.
static bool record_plan(const void *const *records, uint32_t count, const bkv_record_id_t *id, const bkv_fold_params_t *params,
                        void *record) {
    const bkv_record_header_t *first = records[0];
    bkv_shape_t shape;
    bkv_record_shape(first, &shape);
    uint8_t flags = BKV_RECORD_FOLD | (first->flags & BKV_RECORD_SLICE);
    bool weighted = first->flags & BKV_RECORD_WEIGHTS;
    for (uint32_t i = 1; i < count; i++) {
        const bkv_record_header_t *header = records[i];
        shape.tokens += header->tokens;
        weighted = weighted || header->flags & BKV_RECORD_WEIGHTS;
    }
    if (!bkv_balance_fits(&shape, params->budget)) {
        return false; // before anything is written: there may be no room even for a header
    }
    bkv_record_init(record, &shape, id, BKV_CODEC_BALANCE, flags);
    bkv_record_header_t *header = record;
    header->first_layer = first->first_layer;
    header->first_head = first->first_head;
    header->position = first->position;
    header->seed = params->seed;
    bkv_section_t *sections = bkv_record_directory(record);
    for (uint32_t i = 0; i < shape.layers * shape.heads; i++) {
        for (uint32_t r = 0; r < count; r++) {
            sections[i].tokens += bkv_record_directory_const(records[r])[i].tokens;
        }
    }
    bool weights;
    bkv_balance_plan(&shape, weighted, params->budget, params->shares, sections, &weights);
    header->flags = (uint8_t)(flags | (weights ? BKV_RECORD_WEIGHTS : 0));
    return true;
}

// Tokens kept by the children that lie below the sequence's sink positions.
static uint32_t sink_tokens(const fold_scratch_t *fold, uint32_t tokens, uint64_t position) {
    uint32_t sink = 0;
    while (sink < tokens && position + fold->position[sink] < BKV_DEFAULT_SINK) {
        sink++;
    }
    return sink;
}

bkv_status_t bkv_fold_records(const bkv_lanes_t *lanes, const void *const *records, uint32_t count, const bkv_record_id_t *id,
                              const bkv_fold_params_t *params, void *record, void *workspace, size_t *length,
                              bkv_error_t *err) {
    const bkv_record_header_t *first = records[0];
    if (!record_plan(records, count, id, params, record)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "budget: %llu bytes hold no record of %u layers and %u heads",
                        (unsigned long long)params->budget, first->layers, first->heads);
    }
    *length = (size_t)bkv_record_place(record);
    assert(*length <= params->budget);
    fold_scratch_t fold;
    scratch_carve(lanes, records, count, workspace, &fold);
    for (uint32_t i = 0; i < (uint32_t)first->layers * first->heads; i++) {
        bkv_source_t source = {.lanes = lanes,
                               .key_dim = first->key_dim,
                               .value_dim = first->value_dim,
                               .read = fold_source_read,
                               .from = &fold.source,
                               .layer = i / first->heads,
                               .head = i % first->heads};
        bkv_status_t status = source_load(records, source.layer, source.head, &fold, &source.tokens, err);
        if (status != BKV_OK) {
            return status;
        }
        bkv_random_t random = {.state = params->seed};
        bkv_random_mix(&random, first->position);
        bkv_random_mix(&random, i);
        uint32_t m = bkv_record_directory(record)[i].tokens;
        bkv_source_hold(&source, &fold.selection);
        bkv_select(&source, sink_tokens(&fold, source.tokens, first->position), m, &random, &fold.selection);
        bkv_selection_write(&source, fold.position, &fold.selection, record);
    }
    return BKV_OK;
}
