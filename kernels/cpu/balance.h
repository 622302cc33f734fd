// balance.h - internal: choosing a few weighted tokens of one head, for blocks (balance.c) and folds (fold.c) alike.
#ifndef BKV_BALANCE_H
#define BKV_BALANCE_H

#include "backend.h"
#include "lanes.h"
#include "random.h"

// The most tokens that one walk looks at: a leaf, or two merged halves, of the merge-and-reduce tree. Its cost per token grows
// with this; 512 was no better on a real model (fold of 4096 tokens at 16x: attention error 0.160, with 256 0.158).
#define BKV_WALK_TOKENS 256

// The tokens of one (layer, head), wherever they lie.
typedef struct bkv_source {
    const bkv_lanes_t *lanes;
    uint32_t tokens, key_dim, value_dim;
    // Rows [first, first + count) as floats; k or v may be NULL.
    void (*read)(const struct bkv_source *source, uint32_t first, uint32_t count, float *k, float *v);
    const void *from;
    uint32_t layer, head;
    const float *k, *v; // every row, where bkv_source_hold has read them; else NULL
} bkv_source_t;

// Keys or values of tokens [first, first + count): those held, or read into `rows`.
const float *bkv_source_keys(const bkv_source_t *source, uint32_t first, uint32_t count, float *rows);
const float *bkv_source_values(const bkv_source_t *source, uint32_t first, uint32_t count, float *rows);

// Copies the keys, the values or both (NULL: not these) of the listed tokens, ascending, into rows that follow one another.
void bkv_source_gather(const bkv_source_t *source, const uint32_t *tokens, uint32_t n, float *k, float *v);

// What becomes of a token.
typedef enum bkv_fate { BKV_DROPPED = 0, BKV_WALKED = 1, BKV_PROTECTED = 2 } bkv_fate_t;

// Scratch of one walk over at most BKV_WALK_TOKENS tokens.
typedef struct bkv_walk {
    float *gram;    // [limit][limit]: the kernel
    float *k, *v;   // [limit][dim]: rows of the source: all of them where bkv_source_hold was called, else those at hand
    float *mean;    // [key_dim]
    void *products; // scratch of matrix products over at most `limit` tokens
    float *weight;  // [limit]
    float *sum;     // [limit]: signed kernel sum at each token
    uint32_t *list; // [limit]: those still there
    uint8_t *sign;  // [limit]
    uint32_t limit; // BKV_WALK_TOKENS, or fewer where there are fewer tokens; a multiple of BKV_TILE
} bkv_walk_t;

void bkv_walk_carve(bkv_scratch_t *scratch, const bkv_lanes_t *lanes, uint32_t tokens, uint32_t key_dim, uint32_t value_dim,
                    bkv_walk_t *walk);

// Reduces tokens[0..n) to exactly `target` of them, 1 <= target <= n <= limit, moved to the front in their old order.
// weight[token] of those kept grows so that the sum over the n tokens stays.
void bkv_walk_reduce(const bkv_source_t *source, uint32_t *tokens, uint32_t n, uint32_t target, float *weight,
                     bkv_random_t *random, bkv_walk_t *walk);

// Scratch of a selection, and its result.
typedef struct bkv_selection {
    float *source_weight; // [tokens]: how many source tokens each stands for before the selection
    float *weight;        // [tokens]: after it, of those kept; the sums are the same
    uint8_t *fate;        // [tokens]: bkv_fate_t
    float *score;         // [tokens]
    uint32_t *list;       // [tokens]: candidates, then those walked, then (write.c) all those kept
    float *mean;          // [key_dim]
    bkv_walk_t walk;
    // One key group of kept tokens on its way into the record:
    float *k, *v;     // [BKV_KEY_GROUP_MAX][dim]
    uint32_t *walked; // [BKV_KEY_GROUP_MAX]: which rows are walked ones
    float *anchors;   // [BKV_KEY_GROUP_MAX][key_dim]: centred keys of walked rows
    float *half;      // [BKV_KEY_GROUP_MAX]: |k|^2 / 2 of a walked row
    float *parts;     // [limit of the walk][BKV_KEY_GROUP_MAX]: of each token, what each walked row stands for
    float *share;     // [limit of the walk]: weight of each token in the mean, then of those that the walked rows stand for
    float *mass;      // [BKV_KEY_GROUP_MAX]: sum of parts of a walked row
    float *fit;       // [BKV_KEY_GROUP_MAX][value_dim]: new values of walked rows
    float *ranges;    // [4][key_dim]
} bkv_selection_t;

void bkv_selection_carve(bkv_scratch_t *scratch, const bkv_lanes_t *lanes, uint32_t tokens, uint32_t key_dim,
                         uint32_t value_dim, bkv_selection_t *selection);

// Reads all of a source that is small enough into the walk's rows, so that nothing is converted twice.
void bkv_source_hold(bkv_source_t *source, const bkv_selection_t *selection);

// Chooses exactly m of the source's tokens: protects the first `sink` and the outliers, walks the rest.
// selection->source_weight must be filled. All tokens are kept as they are when m is all of them.
void bkv_select(const bkv_source_t *source, uint32_t sink, uint32_t m, bkv_random_t *random, bkv_selection_t *selection);

// Writes the planes of one section of `record`, whose directory is placed: index, weights, keys and values of the kept
// tokens. position[t], or t itself where position is NULL, is token t's place among the record's source tokens.
void bkv_selection_write(const bkv_source_t *source, const uint32_t *position, const bkv_selection_t *selection, void *record);

#endif
