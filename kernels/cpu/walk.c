// walk.c - halving a set of weighted tokens by a self-balancing walk (BalanceKV, arXiv 2502.07861, SoftmaxBalance).
// balance.c says which tokens come here; what they keep is written there too.
//
// Token j stands for a vector u_j with <u_i, u_j> = exp(<k_i, k_j> / sqrt d) * (<v_i, v_j> + 0.025): the softmax numerator
// as a function of any query is an inner product with the sum of w_j u_j, so a subset whose weighted sum is near the whole's
// answers every query nearly as the whole does. The small constant keeps the denominator in balance as well.
#include "balance.h"

#include <assert.h>
#include <math.h>

// The walk flips a fair coin where the signed sum is 0 and is sure of itself from this share of the token's own kernel on. The
// paper's constant, 30 log(n / delta), never decides in practice; its authors' code uses a bare inner product. In float64 on
// clustered tokens the squared distance of one halving against that of a random half is 0.67 at 1, 0.62 at 0.5, 0.56 at 0.1 and
// 0.56 for a walk without coins (tests/unit/kernels/test_balance.c).
#define WALK_COIN 0.1f

#define VALUE_FLOOR 0.025f

// Exponents above this are moved down together. e^20 times squared value norms and weights stays well inside a float.
#define EXPONENT_TOP 20.0f

void bkv_walk_carve(bkv_scratch_t *scratch, const bkv_lanes_t *lanes, uint32_t tokens, uint32_t key_dim, uint32_t value_dim,
                    bkv_walk_t *walk) {
    uint32_t limit = bkv_tile_pad(tokens < BKV_WALK_TOKENS ? tokens : BKV_WALK_TOKENS);
    walk->limit = limit;
    walk->gram = bkv_scratch_take(scratch, (uint64_t)limit * limit * sizeof(float));
    walk->k = bkv_scratch_take(scratch, (uint64_t)limit * key_dim * sizeof(float));
    walk->v = bkv_scratch_take(scratch, (uint64_t)limit * value_dim * sizeof(float));
    walk->mean = bkv_scratch_take(scratch, key_dim * sizeof(float));
    size_t kernel = lanes->kernel_scratch(limit, key_dim, value_dim);
    size_t products = lanes->products_scratch(limit, BKV_KEY_GROUP_MAX, key_dim);
    size_t mix = lanes->products_scratch(BKV_KEY_GROUP_MAX, value_dim, limit);
    products = products > mix ? products : mix;
    walk->products = bkv_scratch_take(scratch, kernel > products ? kernel : products);
    walk->weight = bkv_scratch_take(scratch, limit * sizeof(float));
    walk->sum = bkv_scratch_take(scratch, limit * sizeof(float));
    walk->list = bkv_scratch_take(scratch, limit * sizeof(uint32_t));
    walk->sign = bkv_scratch_take(scratch, limit);
}

static void rows_mean(const bkv_lanes_t *lanes, const bkv_rows_t *rows, const float *weight, float *mean) {
    float total = 0;
    memset(mean, 0, rows->dim * sizeof(float));
    for (uint32_t t = 0; t < rows->n; t++) {
        total += weight[t];
    }
    lanes->weigh(rows, weight, mean);
    for (uint32_t i = 0; i < rows->dim; i++) {
        mean[i] /= total;
    }
}

// The listed tokens are picked where their rows lie, or read.
static void gram_build(const bkv_source_t *source, const uint32_t *tokens, uint32_t n, bkv_walk_t *walk) {
    bool held = source->k && source->v;
    if (!held) {
        bkv_source_gather(source, tokens, n, walk->k, walk->v);
    }
    bkv_rows_t keys = {.rows = held ? source->k : walk->k, .list = held ? tokens : NULL, .n = n, .dim = source->key_dim};
    bkv_rows_t values = {.rows = held ? source->v : walk->v, .list = held ? tokens : NULL, .n = n, .dim = source->value_dim};
    rows_mean(source->lanes, &keys, walk->weight, walk->mean);
    keys.centre = walk->mean; // leaves every softmax as it is and keeps the exponents small
    const bkv_kernel_t kernel = {.scale = 1.0f / sqrtf((float)source->key_dim), .top = EXPONENT_TOP, .lift = VALUE_FLOOR};
    source->lanes->kernel(&keys, &values, &kernel, walk->gram, walk->products);
}

static void shuffle(uint32_t *list, uint32_t n, bkv_random_t *random) {
    for (uint32_t i = n; i > 1; i--) {
        uint32_t j = bkv_random_below(random, i), other = list[i - 1];
        list[i - 1] = list[j];
        list[j] = other;
    }
}

// Gives list[0..n), n even, signs of which exactly half are 1, by the walk: each token takes the sign that pulls the signed
// sum back, at random where it does not matter. Once a sign has its half the rest take the other.
static void walk_signs(const bkv_lanes_t *lanes, const uint32_t *list, uint32_t n, uint32_t padded, bkv_random_t *random,
                       bkv_walk_t *walk) {
    uint32_t left[2] = {n / 2, n / 2};
    for (uint32_t i = 0; i < n; i++) {
        uint32_t token = list[i];
        const float *row = walk->gram + (size_t)token * padded;
        float own = walk->weight[token] * row[token];
        float scale = own > 0 ? 1.0f / (2.0f * WALK_COIN * own) : 0.0f; // known before the sum is
        float pull = walk->sum[token] * scale;
        uint32_t sign = bkv_random_unit(random) < 0.5f - pull ? 1 : 0;
        sign = left[sign] > 0 ? sign : !sign;
        left[sign]--;
        walk->sign[token] = (uint8_t)sign;
        // Arithmetic instead of a branch, which would be wrong half of the time.
        lanes->axpy((2.0f * (float)sign - 1.0f) * walk->weight[token], row, padded, walk->sum);
    }
}

// Drops `drop` of list[0..2 * drop), those of sign 0, and hands their weight to the others; list[0..n) closes up to
// n - drop. A token of sign s and weight w counts (1 + s) w from now on, so walk->sum, signed sums of all halvings so far,
// is the whole's distance from what is left of it: the next halving goes on where this one ends and mends what it left. For
// 36 of 192 tokens that takes the squared distance, against as many at random, from 0.80 to 0.51.
static void walk_halve(const bkv_lanes_t *lanes, uint32_t *list, uint32_t n, uint32_t drop, uint32_t padded,
                       bkv_random_t *random, bkv_walk_t *walk) {
    shuffle(list, n, random);
    walk_signs(lanes, list, 2 * drop, padded, random, walk);
    float total = 0, kept = 0;
    uint32_t left = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t token = list[i], stays = i < 2 * drop ? walk->sign[token] : 1;
        float counts = i < 2 * drop ? walk->weight[token] : 0.0f;
        total += counts;
        kept += counts * (float)stays;
        list[left] = token;
        left += stays;
    }
    assert(left == n - drop);
    float growth = total / kept; // 2 where all weights are equal
    for (uint32_t i = 0; i < drop; i++) {
        uint32_t token = list[i];
        if (growth != 2.0f) {
            lanes->axpy((growth - 2.0f) * walk->weight[token], walk->gram + (size_t)token * padded, padded, walk->sum);
        }
        walk->weight[token] *= growth;
    }
}

void bkv_walk_reduce(const bkv_source_t *source, uint32_t *tokens, uint32_t n, uint32_t target, float *weight,
                     bkv_random_t *random, bkv_walk_t *walk) {
    assert(target >= 1 && target <= n && n <= walk->limit);
    uint32_t padded = bkv_tile_pad(n);
    for (uint32_t t = 0; t < n; t++) {
        walk->weight[t] = weight[tokens[t]];
        walk->list[t] = t;
    }
    if (target < n) {
        gram_build(source, tokens, n, walk);
    }
    memset(walk->sum, 0, padded * sizeof(float));
    uint32_t left = n;
    while (left > target) {
        uint32_t drop = left - target < left / 2 ? left - target : left / 2;
        walk_halve(source->lanes, walk->list, left, drop, padded, random, walk);
        left -= drop;
    }
    memset(walk->sign, 0, n);
    for (uint32_t i = 0; i < target; i++) {
        walk->sign[walk->list[i]] = 1;
    }
    for (uint32_t t = 0, kept = 0; t < n; t++) {
        if (walk->sign[t]) {
            weight[tokens[t]] = walk->weight[t];
            tokens[kept++] = tokens[t];
        }
    }
}
