// cool.h - folds that cool with age: how a budget of bytes is spread over a prefix, and which of its records are merged first.
//
// The next token attends to recent ones far more than to old ones, so a prefix should be dense near its end and thin far back.
// A profile says how dense: bands by age, newest first, each with a nominal rate (bytes as bf16 / bytes of its summary). In
// text, "512:4,2048:8,8192:16,:32" is: the newest 512 tokens at rate 4, those of age up to 2,048 at 8, up to 8,192 at 16, and
// whatever is older at 32. Each band becomes a record of a fold, the oldest one several; a budget in bytes makes all of
// them denser, or the densest ones thinner.
//
// This is planning only, the same for the daemon and for off-line use: the folding is bkv_fold's (codec.h), and keeping the
// nodes of the tree is the caller's. Pure functions, thread-safe, no allocation.
#ifndef BKV_COOL_H
#define BKV_COOL_H

#include "summary.h"

#ifdef __cplusplus
extern "C" {
#endif

#define BKV_MAX_BANDS     8
#define BKV_MAX_BAND_RATE 1024
#define BKV_FOLD_RECORDS  20                   // most records of a fold
#define BKV_PROFILE_TEXT  (BKV_MAX_BANDS * 16) // bytes of the longest profile as text, with its NUL

typedef struct bkv_band {
    uint32_t age;  // tokens from the end of the prefix up to which the band reaches; 0: to the start, in the last band only
    uint32_t rate; // nominal, 1..BKV_MAX_BAND_RATE
} bkv_band_t;

// count 0: no profile, a fold is one record.
typedef struct bkv_profile {
    uint32_t count;
    bkv_band_t bands[BKV_MAX_BANDS]; // newest first: ages ascend, the last one is 0
} bkv_profile_t;

// Checks a profile from outside. INVALID_ARGUMENT names the field, as in "profile[1].rate: 0 is not in 1..1024".
BKV_API bkv_status_t bkv_profile_check(const bkv_profile_t *profile, bkv_error_t *err);

// From and to the text form; the parse checks too. A checked profile always fits BKV_PROFILE_TEXT; no profile is "".
BKV_API bkv_status_t bkv_profile_parse(const char *text, bkv_profile_t *profile, bkv_error_t *err);
BKV_API void bkv_profile_format(const bkv_profile_t *profile, char text[BKV_PROFILE_TEXT]);

// The profile that was found best for a total rate: what "auto" means. Of the measured rates the next larger one's.
BKV_API void bkv_profile_for_rate(uint32_t rate, bkv_profile_t *profile);

// A record to be folded.
typedef struct bkv_cool_block {
    uint32_t tokens; // source tokens that it stands for
    uint64_t bytes;  // its length
} bkv_cool_block_t;

// What becomes one record of the fold (of the oldest band, one of several): blocks [first, first + count), in at most `budget`
// bytes.
typedef struct bkv_cool_band {
    uint32_t first, count;
    uint64_t tokens, budget;
} bkv_cool_band_t;

// Cuts consecutive blocks, oldest first, into the bands of a checked profile (with count > 0) and gives each its bytes. Bands
// come oldest first; every block is in exactly one; bands without a block are left out.
//   shape   layers, heads and dims of the blocks; its tokens do not matter
//   budget  of all records together, never exceeded; 0: what the nominal rates come to
//
// A band ends where a block does, at its age or up to a quarter further back: the cut moves in steps of a power of two, so that
// an old band stays the same for many appended blocks. The oldest band, which grows for ever, becomes several: runs of 4,096
// tokens and of 2, 4, 8... times as many, and the rest, so that one more block costs O(log n) block reads on average.
//
// A budget of more than the nominal rates come to is spread in proportion to them. Where it is less, which it is for short
// prefixes, the densest bands give way first: no band is thinner than its own rate as long as another is denser than that, so
// what is old stays as good as the profile says. Shares move in steps of 2^(1/16) and keep still between them. None is more than
// the blocks hold (or int8 of all their tokens), nor less than a record of one token; what rounding leaves goes to the newest
// bands that can use it, but not to the oldest. INVALID_ARGUMENT: the budget does not hold a record for every band.
BKV_API bkv_status_t bkv_cool_plan(const bkv_shape_t *shape, const bkv_cool_block_t *blocks, uint32_t block_count,
                                   const bkv_profile_t *profile, uint64_t budget, bkv_cool_band_t bands[BKV_FOLD_RECORDS],
                                   uint32_t *count, bkv_error_t *err);

// Bytes below which no record of this shape fits, whatever it keeps.
BKV_API uint64_t bkv_cool_least_bytes(const bkv_shape_t *shape);

// Merge-and-reduce (arXiv 2502.07861, section 4): a fold of many records into a few bytes first folds aligned runs of 2^l of
// them into nodes of bounded size, so that one more record costs O(log n) such merges instead of n reads. A node has 2 to 4
// times the bytes of the result, and halves its records at least; a fold to a quarter of its records' bytes has none. Measured
// on 16,896 tokens of a real model in int4 blocks of 256, attention error against one piece compressed at once: +3 % at rate
// 16, +1 % at 32, -4 % at 64; with nodes that need not halve +11 %, +5 %, +3 %.
BKV_API uint64_t bkv_cool_node_bytes(uint64_t budget);

// count 1: a record itself; more: the node over that aligned run.
typedef struct bkv_cool_part {
    uint32_t first, count;
} bkv_cool_part_t;

// What the run [first, first + count) is folded from, oldest first: at most `count` parts, but never the run as one node. The
// same function tells what the result is made from and, for each node among its parts, what that is.
//   before      [number of records + 1]: bytes of the records before each; the tree is aligned to its first
//   node_bytes  of bkv_cool_node_bytes; a run of less than twice as many bytes is no node
BKV_API uint32_t bkv_cool_parts(const uint64_t *before, uint32_t first, uint32_t count, uint64_t node_bytes,
                                bkv_cool_part_t *parts);

#ifdef __cplusplus
}
#endif
#endif
