// selection.c - which tokens of one head are kept: protect the outliers, walk the rest down to what is left of m.
#include "balance.h"

#include <assert.h>
#include <math.h>

const float *bkv_source_keys(const bkv_source_t *source, uint32_t first, uint32_t count, float *rows) {
    if (source->k) {
        return source->k + (size_t)first * source->key_dim;
    }
    source->read(source, first, count, rows, NULL);
    return rows;
}

const float *bkv_source_values(const bkv_source_t *source, uint32_t first, uint32_t count, float *rows) {
    if (source->v) {
        return source->v + (size_t)first * source->value_dim;
    }
    source->read(source, first, count, NULL, rows);
    return rows;
}

static void rows_copy(const bkv_source_t *source, uint32_t first, uint32_t count, float *k, float *v) {
    if (!source->k || !source->v) {
        source->read(source, first, count, k, v);
        return;
    }
    if (k) {
        memcpy(k, source->k + (size_t)first * source->key_dim, (size_t)count * source->key_dim * sizeof(float));
    }
    if (v) {
        memcpy(v, source->v + (size_t)first * source->value_dim, (size_t)count * source->value_dim * sizeof(float));
    }
}

void bkv_source_gather(const bkv_source_t *source, const uint32_t *tokens, uint32_t n, float *k, float *v) {
    for (uint32_t i = 0, run; i < n; i += run) {
        run = 1;
        while (i + run < n && tokens[i + run] == tokens[i] + run) {
            run++;
        }
        rows_copy(source, tokens[i], run, k ? k + (size_t)i * source->key_dim : NULL,
                  v ? v + (size_t)i * source->value_dim : NULL);
    }
}

void bkv_source_hold(bkv_source_t *source, const bkv_selection_t *selection) {
    if (source->tokens <= selection->walk.limit) {
        source->read(source, 0, source->tokens, selection->walk.k, selection->walk.v);
        source->k = selection->walk.k;
        source->v = selection->walk.v;
    }
}

void bkv_selection_carve(bkv_scratch_t *scratch, const bkv_lanes_t *lanes, uint32_t tokens, uint32_t key_dim,
                         uint32_t value_dim, bkv_selection_t *selection) {
    selection->source_weight = bkv_scratch_take(scratch, (uint64_t)tokens * sizeof(float));
    selection->weight = bkv_scratch_take(scratch, (uint64_t)tokens * sizeof(float));
    selection->fate = bkv_scratch_take(scratch, tokens);
    selection->score = bkv_scratch_take(scratch, (uint64_t)tokens * sizeof(float));
    selection->list = bkv_scratch_take(scratch, (uint64_t)tokens * sizeof(uint32_t));
    selection->mean = bkv_scratch_take(scratch, key_dim * sizeof(float));
    bkv_walk_carve(scratch, lanes, tokens, key_dim, value_dim, &selection->walk);
    uint64_t limit = selection->walk.limit;
    selection->k = bkv_scratch_take(scratch, (uint64_t)BKV_KEY_GROUP_MAX * key_dim * sizeof(float));
    selection->v = bkv_scratch_take(scratch, (uint64_t)BKV_KEY_GROUP_MAX * value_dim * sizeof(float));
    selection->walked = bkv_scratch_take(scratch, BKV_KEY_GROUP_MAX * sizeof(uint32_t));
    selection->anchors = bkv_scratch_take(scratch, (uint64_t)BKV_KEY_GROUP_MAX * key_dim * sizeof(float));
    selection->half = bkv_scratch_take(scratch, BKV_KEY_GROUP_MAX * sizeof(float));
    selection->parts = bkv_scratch_take(scratch, limit * BKV_KEY_GROUP_MAX * sizeof(float));
    selection->share = bkv_scratch_take(scratch, limit * sizeof(float));
    selection->mass = bkv_scratch_take(scratch, BKV_KEY_GROUP_MAX * sizeof(float));
    selection->fit = bkv_scratch_take(scratch, (uint64_t)BKV_KEY_GROUP_MAX * value_dim * sizeof(float));
    selection->ranges = bkv_scratch_take(scratch, 4ull * key_dim * sizeof(float));
}

// 1 / |row|, or 0 for a row of zeros, which has no direction.
static float inverse_norm(const bkv_lanes_t *lanes, const float *row, uint32_t dim) {
    float square = lanes->dot(row, row, dim);
    return square > 0 ? 1.0f / sqrtf(square) : 0.0f;
}

// KeyDiff (arXiv 2504.15364): the cosine of each key with the mean direction of all. The smallest are the outliers, which
// some query may single out; the others can stand for one another.
static void score_keys(const bkv_source_t *source, bkv_selection_t *selection) {
    const bkv_lanes_t *lanes = source->lanes;
    uint32_t dim = source->key_dim, step = selection->walk.limit;
    float *inverse = selection->score; // first 1 / |key|, then the score
    memset(selection->mean, 0, dim * sizeof(float));
    for (uint32_t first = 0, count; first < source->tokens; first += count) {
        count = source->tokens - first < step ? source->tokens - first : step;
        const bkv_rows_t keys = {.rows = bkv_source_keys(source, first, count, selection->walk.k), .n = count, .dim = dim};
        for (uint32_t t = 0; t < count; t++) {
            inverse[first + t] = inverse_norm(lanes, bkv_rows_at(&keys, t), dim);
            selection->share[t] = selection->source_weight[first + t] * inverse[first + t];
        }
        lanes->weigh(&keys, selection->share, selection->mean);
    }
    for (uint32_t first = 0, count; first < source->tokens; first += count) {
        count = source->tokens - first < step ? source->tokens - first : step;
        const float *row = bkv_source_keys(source, first, count, selection->walk.k);
        for (uint32_t t = first; t < first + count; t++, row += dim) {
            selection->score[t] = lanes->dot(row, selection->mean, dim) * inverse[t];
        }
    }
}

// Token a stays an outlier for longer than token b.
static bool rarer(const float *score, uint32_t a, uint32_t b) {
    return score[a] < score[b] || (score[a] == score[b] && a < b);
}

// heap[0] is the least rare of heap[0..n); mends the order below `at`.
static void heap_sink(const float *score, uint32_t *heap, uint32_t n, uint32_t at) {
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= n) {
            return;
        }
        if (child + 1 < n && rarer(score, heap[child], heap[child + 1])) {
            child++;
        }
        if (!rarer(score, heap[at], heap[child])) {
            return;
        }
        uint32_t other = heap[at];
        heap[at] = heap[child];
        heap[child] = other;
        at = child;
    }
}

// Marks the `count` rarest tokens from `first` on.
static void protect_outliers(uint32_t first, uint32_t tokens, uint32_t count, bkv_selection_t *selection) {
    if (count == 0) {
        return;
    }
    uint32_t *heap = selection->list;
    for (uint32_t i = 0; i < count; i++) {
        heap[i] = first + i;
    }
    for (uint32_t i = count / 2; i-- > 0;) {
        heap_sink(selection->score, heap, count, i);
    }
    for (uint32_t t = first + count; t < tokens; t++) {
        if (rarer(selection->score, t, heap[0])) {
            heap[0] = t;
            heap_sink(selection->score, heap, count, 0);
        }
    }
    for (uint32_t i = 0; i < count; i++) {
        selection->fate[heap[i]] = BKV_PROTECTED;
    }
}

// Merge-and-reduce over list[0..n) down to `target`: neighbouring batches are halved and their halves merged into the
// batches of the next level, until one batch is left or less than a halving is needed, which then is spread over all.
static void reduce(const bkv_source_t *source, uint32_t n, uint32_t target, bkv_random_t *random, bkv_selection_t *selection) {
    uint32_t *list = selection->list;
    while (n > target) {
        uint32_t batches = (n + BKV_WALK_TOKENS - 1) / BKV_WALK_TOKENS;
        bool last = batches == 1 || n <= 2 * (uint64_t)target;
        uint32_t goal = last ? target : (n + 1) / 2;
        uint32_t kept = 0, done = 0, placed = 0;
        for (uint32_t batch = 0; batch < batches; batch++) {
            uint32_t end = (uint32_t)((uint64_t)n * (batch + 1) / batches);
            uint32_t share = (uint32_t)((uint64_t)goal * end / n) - placed;
            bkv_walk_reduce(source, list + done, end - done, share, selection->weight, random, &selection->walk);
            memmove(list + kept, list + done, share * sizeof(uint32_t));
            kept += share;
            placed += share;
            done = end;
        }
        n = goal;
    }
}

void bkv_select(const bkv_source_t *source, uint32_t sink, uint32_t m, bkv_random_t *random, bkv_selection_t *selection) {
    uint32_t n = source->tokens;
    assert(m >= 1 && m <= n);
    memcpy(selection->weight, selection->source_weight, n * sizeof(float));
    if (m == n) {
        memset(selection->fate, BKV_PROTECTED, n);
        return;
    }
    memset(selection->fate, BKV_DROPPED, n);
    uint32_t protect = bkv_protect_count(n, m), first = sink < m / 2 ? sink : m / 2;
    assert(first <= protect);
    memset(selection->fate, BKV_PROTECTED, first);
    score_keys(source, selection);
    protect_outliers(first, n, protect - first, selection);

    uint32_t rest = 0;
    for (uint32_t t = 0; t < n; t++) {
        selection->list[rest] = t;
        rest += selection->fate[t] == BKV_DROPPED;
    }
    reduce(source, rest, m - protect, random, selection);
    for (uint32_t i = 0; i < m - protect; i++) {
        selection->fate[selection->list[i]] = BKV_WALKED;
    }
}
