// cool.c - profiles as text, and the plan of a fold: where its bands are cut, what each may weigh, what is merged first.
#include "cool.h"

#include "record.h"

#include <assert.h>
#include <stdio.h>

#define FAIL(...) bkv_fail(err, BKV_INVALID_ARGUMENT, __VA_ARGS__)

// ---- profiles ----

bkv_status_t bkv_profile_check(const bkv_profile_t *profile, bkv_error_t *err) {
    if (profile->count > BKV_MAX_BANDS) {
        return FAIL("profile: %u bands are more than %d", profile->count, BKV_MAX_BANDS);
    }
    for (uint32_t i = 0; i < profile->count; i++) {
        const bkv_band_t *band = &profile->bands[i];
        if (band->rate == 0 || band->rate > BKV_MAX_BAND_RATE) {
            return FAIL("profile[%u].rate: %u is not in 1..%d", i, band->rate, BKV_MAX_BAND_RATE);
        }
        if (i + 1 == profile->count) {
            if (band->age != 0) {
                return FAIL("profile[%u].age: %u, but the last band reaches to the start, which is written 0", i, band->age);
            }
        } else if (band->age == 0 || band->age > BKV_MAX_TOKENS) {
            return FAIL("profile[%u].age: %u is not in 1..%u", i, band->age, BKV_MAX_TOKENS);
        } else if (i > 0 && band->age <= profile->bands[i - 1].age) {
            return FAIL("profile[%u].age: %u is not above %u, where the band before it ends", i, band->age,
                        profile->bands[i - 1].age);
        }
    }
    return BKV_OK;
}

// Digits at *text, which moves past them. False: none, or a number of more than eight digits.
static bool parse_number(const char **text, uint32_t *number) {
    const char *at = *text;
    for (*number = 0; *at >= '0' && *at <= '9' && at - *text < 8; at++) {
        *number = *number * 10 + (uint32_t)(*at - '0');
    }
    bool ok = at != *text && !(*at >= '0' && *at <= '9');
    *text = at;
    return ok;
}

bkv_status_t bkv_profile_parse(const char *text, bkv_profile_t *profile, bkv_error_t *err) {
    *profile = (bkv_profile_t){.count = 0};
    for (const char *at = text; *at != '\0';) {
        if (profile->count == BKV_MAX_BANDS) {
            return FAIL("profile: \"%.80s\" has more than %d bands", text, BKV_MAX_BANDS);
        }
        bkv_band_t *band = &profile->bands[profile->count];
        bool ok = *at == ':' || (parse_number(&at, &band->age) && band->age > 0);
        ok = ok && *at++ == ':' && parse_number(&at, &band->rate);
        if (!ok || (*at != '\0' && (*at != ',' || at[1] == '\0'))) {
            return FAIL("profile: band %u of \"%.80s\" is not AGE:RATE (the last one :RATE)", profile->count, text);
        }
        at += *at == ',';
        profile->count++;
    }
    return bkv_profile_check(profile, err);
}

void bkv_profile_format(const bkv_profile_t *profile, char text[BKV_PROFILE_TEXT]) {
    int length = 0;
    text[0] = '\0';
    for (uint32_t i = 0; i < profile->count; i++) {
        const bkv_band_t *band = &profile->bands[i];
        char age[12] = "";
        if (band->age != 0) {
            snprintf(age, sizeof(age), "%u", band->age);
        }
        length += snprintf(text + length, (size_t)(BKV_PROFILE_TEXT - length), "%s%s:%u", i == 0 ? "" : ",", age, band->rate);
    }
    assert(length < BKV_PROFILE_TEXT);
}

// Measured on a real model, int4 blocks of 256. Attention error of 256 queries over 16,896 tokens, the newest 256 exact, against
// one record for all of it: rate 8 0.043 (0.104), 16 0.071 (0.141), 32 0.113 (0.189); NLL above exact of the 512 tokens after
// 16,640: 0.004 (0.003), 0.010 (0.023), 0.001 (0.054). Old bands that are much thinner still, as 32 and 64 at 16x and 32x, lower
// the error further but lose needles of short prefixes: of 32 in 2,816 tokens 30 and 26 were found, at 20 and 40 32 and 30.
void bkv_profile_for_rate(uint32_t rate, bkv_profile_t *profile) {
    static const struct {
        uint32_t rate;
        const char *profile;
    } best[] = {
        {8, "1024:4,:16"},
        {16, "512:4,:24"},
        {32, "512:4,:40"},
    };
    size_t last = sizeof(best) / sizeof(best[0]) - 1, i = 0;
    while (i < last && best[i].rate < rate) {
        i++;
    }
    bkv_status_t status = bkv_profile_parse(best[i].profile, profile, NULL);
    assert(status == BKV_OK);
    (void)status;
}

// ---- bands ----

// A number as its power of 2^(1/16): factor(16 * n + i) = 2^n * 2^(i / 16). Spelt out, so that every host gets the same shares.
#define FACTOR_STEPS 16
#define FACTOR_MAX   (16 * FACTOR_STEPS) // 2^16 more than the nominal share: beyond all caps

static double factor(int32_t power) {
    static const double fraction[FACTOR_STEPS] = {
        1.0,
        1.0442737824274138,
        1.0905077326652577,
        1.1387886347566916,
        1.1892071150027210,
        1.2418578120734840,
        1.2968395546510096,
        1.3542555469368927,
        1.4142135623730951,
        1.4768261459394993,
        1.5422108254079407,
        1.6104903319492543,
        1.6817928305074290,
        1.7562521603732995,
        1.8340080864093424,
        1.9152065613971474,
    };
    uint32_t shifted = (uint32_t)(power + FACTOR_MAX);
    return fraction[shifted % FACTOR_STEPS] * (double)(UINT64_C(1) << (shifted / FACTOR_STEPS)) / (double)(UINT64_C(1) << 16);
}

// Tokens of the oldest band that make one record, or two, four, eight... times as many. Attention
// error on 16,896 tokens with runs and with one record for all of the band: 0.0391 and 0.0395 at rate 8, 0.0603 and 0.0599 at
// 16, 0.0879 and 0.0835 at 32 (profiles of three bands).
#define OLD_RUN 4096

// Runs of the oldest band: one for each bit of their number, and what is left over.
_Static_assert(BKV_MAX_BANDS - 1 + 12 + 1 == BKV_FOLD_RECORDS && BKV_MAX_TOKENS / OLD_RUN == 1 << 12, "most records of a fold");

// What the share of a band depends on, all in bytes.
typedef struct share {
    double nominal;           // at its own rate
    double densest;           // at the densest band's
    uint64_t lowest, highest; // see share_of
} share_t;

// More than the nominal rates ask for is spread alike over all bands. Where there is less, the densest give way first: a band is
// no thinner than its own rate as long as another one is denser than that.
static uint64_t share_bytes(const share_t *share, int32_t power) {
    double bytes = power < 0 ? share->densest * factor(power) : share->nominal * factor(power);
    bytes = power < 0 && bytes > share->nominal ? share->nominal : bytes;
    if (bytes >= (double)share->highest) {
        return share->highest;
    }
    uint64_t whole = (uint64_t)bytes / BKV_RECORD_ALIGN * BKV_RECORD_ALIGN;
    return whole > share->lowest ? whole : share->lowest;
}

// A record that keeps m of the tokens of every section.
static uint64_t record_bytes(const bkv_shape_t *shape, uint32_t m, uint8_t bits, bool weights) {
    bkv_plane_layout_t layout;
    bkv_plane_layout(shape->tokens, m, shape->key_dim, shape->value_dim, bits, bits, bkv_index_choose(shape->tokens, m),
                     weights, shape->dtype, &layout);
    return bkv_record_preamble(shape->layers, shape->heads) +
           (layout.key_bytes + layout.value_bytes) * shape->layers * shape->heads;
}

uint64_t bkv_cool_least_bytes(const bkv_shape_t *shape) {
    return record_bytes(shape, 1, 2, true);
}

// held: bytes of the band's blocks. densest: the rate of the densest band.
static share_t share_of(const bkv_shape_t *shape, const bkv_cool_band_t *band, uint32_t rate, uint32_t densest, uint64_t held) {
    bkv_shape_t own = *shape;
    own.tokens = (uint32_t)band->tokens;
    uint64_t whole = record_bytes(&own, own.tokens, 8, false);
    double bf16 = 2.0 * shape->layers * shape->heads * (shape->key_dim + shape->value_dim) * (double)band->tokens;
    share_t share = {.nominal = bf16 / rate, .densest = bf16 / densest, .lowest = record_bytes(&own, 1, 4, true)};
    share.highest = held < whole ? held : whole;
    share.highest = share.highest > share.lowest ? share.highest : share.lowest;
    return share;
}

// Every band's bytes under a factor; returns their sum.
static uint64_t spread(const share_t *shares, uint32_t count, int32_t power, bkv_cool_band_t *bands) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < count; i++) {
        bands[i].budget = share_bytes(&shares[i], power);
        sum += bands[i].budget;
    }
    return sum;
}

static bkv_status_t spread_budget(const share_t *shares, uint32_t count, uint64_t budget, bkv_cool_band_t *bands,
                                  bkv_error_t *err) {
    if (budget == 0) {
        spread(shares, count, 0, bands);
        return BKV_OK;
    }
    int32_t low = -FACTOR_MAX, high = FACTOR_MAX; // the sum grows with the power
    uint64_t sum = spread(shares, count, low, bands);
    if (sum > budget) {
        return FAIL("budget_bytes: %llu hold no records of the profile's %u bands, which take %llu", (unsigned long long)budget,
                    count, (unsigned long long)sum);
    }
    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;
        if (spread(shares, count, middle, bands) <= budget) {
            low = middle;
        } else {
            high = middle;
        }
    }
    // What rounding leaves goes to the newest bands, which change with every block anyway, and not to the oldest, which must not.
    uint64_t left = budget - spread(shares, count, low, bands);
    for (uint32_t i = count; i-- > (count > 1 ? 1 : 0);) {
        uint64_t room = shares[i].highest - bands[i].budget, more = left < room ? left : room;
        bands[i].budget += more;
        left -= more;
    }
    return BKV_OK;
}

// The first token that is not older than `age`: the cut before it lies on a multiple of a power of two that is at most a
// quarter of the age.
static uint64_t cut_token(uint64_t tokens, uint32_t age) {
    uint64_t step = 1;
    while (step * 2 <= age / 4) {
        step *= 2;
    }
    return tokens <= age ? 0 : (tokens - age) / step * step;
}

// Where the run of the oldest band that ends at token `end` begins: the last multiple of OLD_RUN, then of ever larger powers of
// two of it, so that there are few runs, and those once made stay.
static uint64_t run_token(uint64_t end) {
    uint64_t runs = end / OLD_RUN;
    return end % OLD_RUN != 0 ? runs * OLD_RUN : (runs & (runs - 1)) * OLD_RUN;
}

// Blocks that are not yet in a band, and the bands so far, newest first.
typedef struct cutter {
    const bkv_cool_block_t *blocks;
    uint32_t end;   // blocks [0, end) are left
    uint64_t start; // tokens in them
    uint32_t count;
    bkv_cool_band_t bands[BKV_FOLD_RECORDS];
    uint32_t rates[BKV_FOLD_RECORDS];
    uint64_t held[BKV_FOLD_RECORDS]; // bytes of each band's blocks
} cutter_t;

// The blocks after token `cut`, with the one that it falls into, become a band, unless there are none.
static void cut_band(cutter_t *cutter, uint64_t cut, uint32_t rate) {
    bkv_cool_band_t band = {.first = cutter->end};
    uint64_t held = 0;
    while (band.first > 0 && cutter->start > cut) {
        band.first--;
        band.tokens += cutter->blocks[band.first].tokens;
        held += cutter->blocks[band.first].bytes;
        cutter->start -= cutter->blocks[band.first].tokens;
    }
    band.count = cutter->end - band.first;
    cutter->end = band.first;
    if (band.count > 0) {
        cutter->bands[cutter->count] = band;
        cutter->rates[cutter->count] = rate;
        cutter->held[cutter->count++] = held;
    }
}

static void cut_bands(cutter_t *cutter, const bkv_profile_t *profile) {
    uint64_t tokens = cutter->start, cut = tokens;
    for (uint32_t i = 0; i < profile->count; i++) {
        const bkv_band_t *band = &profile->bands[i];
        if (band->age != 0) {
            uint64_t next = cut_token(tokens, band->age);
            cut = next < cut ? next : cut;
            cut_band(cutter, cut, band->rate);
        }
        while (band->age == 0 && cut > 0) {
            cut = run_token(cut);
            cut_band(cutter, cut, band->rate);
        }
    }
}

bkv_status_t bkv_cool_plan(const bkv_shape_t *shape, const bkv_cool_block_t *blocks, uint32_t block_count,
                           const bkv_profile_t *profile, uint64_t budget, bkv_cool_band_t bands[BKV_FOLD_RECORDS],
                           uint32_t *count, bkv_error_t *err) {
    assert(profile->count > 0 && profile->count <= BKV_MAX_BANDS && profile->bands[profile->count - 1].age == 0);
    cutter_t cutter = {.blocks = blocks, .end = block_count};
    for (uint32_t i = 0; i < block_count; i++) {
        cutter.start += blocks[i].tokens;
    }
    if (cutter.start > BKV_MAX_TOKENS) {
        return FAIL("keys: %llu tokens are more than %u", (unsigned long long)cutter.start, BKV_MAX_TOKENS);
    }
    cut_bands(&cutter, profile);
    uint32_t n = cutter.count, densest = BKV_MAX_BAND_RATE;
    for (uint32_t i = 0; i < n; i++) {
        densest = cutter.rates[i] < densest ? cutter.rates[i] : densest;
    }
    share_t shares[BKV_FOLD_RECORDS];
    for (uint32_t i = 0; i < n; i++) {
        uint32_t from = n - 1 - i; // the cutter's are newest first
        bands[i] = cutter.bands[from];
        shares[i] = share_of(shape, &bands[i], cutter.rates[from], densest, cutter.held[from]);
    }
    *count = n;
    return n == 0 ? BKV_OK : spread_budget(shares, n, budget, bands, err);
}

// ---- the tree ----

uint64_t bkv_cool_node_bytes(uint64_t budget) {
    uint64_t bytes = 1;
    while (bytes / 2 < budget && bytes < UINT64_C(1) << 62) {
        bytes *= 2;
    }
    return bytes;
}

typedef struct cover {
    const uint64_t *before;
    uint32_t first, end;
    uint64_t node_bytes;
    bkv_cool_part_t *parts;
    uint32_t count;
} cover_t;

// What of the aligned run [low, low + size) lies in the cover's.
static void cover_run(cover_t *cover, uint64_t low, uint64_t size) {
    if (low >= cover->end || low + size <= cover->first) {
        return;
    }
    bool inside = low >= cover->first && low + size <= cover->end;
    bool whole = low == cover->first && low + size == cover->end;
    bool node = inside && !whole && (cover->before[low + size] - cover->before[low]) / 2 >= cover->node_bytes;
    if (size == 1 || node) {
        cover->parts[cover->count++] = (bkv_cool_part_t){.first = (uint32_t)low, .count = (uint32_t)size};
        return;
    }
    cover_run(cover, low, size / 2);
    cover_run(cover, low + size / 2, size / 2);
}

uint32_t bkv_cool_parts(const uint64_t *before, uint32_t first, uint32_t count, uint64_t node_bytes, bkv_cool_part_t *parts) {
    cover_t cover = {.before = before, .first = first, .end = first + count, .node_bytes = node_bytes, .parts = parts};
    uint64_t size = 1;
    while (size < cover.end) {
        size *= 2;
    }
    cover_run(&cover, 0, size);
    return cover.count;
}
