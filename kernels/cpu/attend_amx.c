// attend_amx.c - attention with AMX: the course of attend_avx512.c, its products on tiles.
//
// A tile is sixteen rows of 64 bytes. For keys the codes are the left factor, a token a row, and the digits of four queries the
// right one; for values the digits are the left factor, two rows a query, and the codes of four tokens by sixteen slots a row of
// the right one.
#include "attend_avx512.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define LINE 64
#define TILE 1024
#define SUMS 256 // int32 of a tile

typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config_t;

_Static_assert(sizeof(tile_config_t) == 64, "what ldtilecfg reads");

// For values, registers 0 to 5 are the sums of two sets and 6 their digits: eight rows for one quad of queries. 7 is codes.
#define WHOLE                                                                                                                  \
    { LINE, LINE, LINE, LINE, LINE, LINE, LINE, LINE }
static const tile_config_t eight = {.palette = 1, .row_bytes = WHOLE, .rows = {8, 8, 8, 8, 8, 8, 8, 16}};
static const tile_config_t sixteen = {.palette = 1, .row_bytes = WHOLE, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

static void tile_scores_begin(void) {
    _tile_loadconfig(&sixteen);
}

static void tile_clear(uint32_t sets, uint32_t phases, int32_t *sums) {
    (void)sets, (void)phases, (void)sums; // which stay in registers
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
}

// Sums of tile t and quad q in register 2 t + q: up to four at once, as one product has to wait for the one before into its sums.
static void tile_scores(const uint8_t *codes, const uint8_t *digits, uint32_t tiles, uint32_t steps, uint32_t quads,
                        int32_t *sums) {
    tile_clear(0, 0, NULL);
    const uint8_t *second = codes + (size_t)steps * TILE;
    for (uint32_t step = 0; step < steps; step++, codes += TILE, second += TILE, digits += (size_t)quads * TILE) {
        _tile_loadd(4, codes, LINE);
        _tile_loadd(6, digits, LINE);
        _tile_dpbusd(0, 4, 6);
        if (tiles > 1) {
            _tile_loadd(5, second, LINE);
            _tile_dpbusd(2, 5, 6);
        }
        if (quads > 1) {
            _tile_loadd(7, digits + TILE, LINE);
            _tile_dpbusd(1, 4, 7);
            if (tiles > 1) {
                _tile_dpbusd(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, LINE);
    if (quads > 1) {
        _tile_stored(1, sums + SUMS, LINE);
    }
    if (tiles > 1) {
        _tile_stored(2, sums + quads * SUMS, LINE);
        if (quads > 1) {
            _tile_stored(3, sums + 3 * SUMS, LINE);
        }
    }
}

static void tile_values_begin(uint32_t quads) {
    _tile_loadconfig(quads == 1 ? &eight : &sixteen);
}

// Phase i of set 0 is register i; there are two sets only where there are three phases.
static void take_first(const uint8_t *codes, uint32_t phases) {
    _tile_loadd(7, codes, LINE);
    _tile_dpbsud(0, 6, 7);
    if (phases > 1) {
        _tile_loadd(7, codes + TILE, LINE);
        _tile_dpbsud(1, 6, 7);
    }
    if (phases > 2) {
        _tile_loadd(7, codes + (size_t)2 * TILE, LINE);
        _tile_dpbsud(2, 6, 7);
    }
    if (phases > 3) {
        _tile_loadd(7, codes + (size_t)3 * TILE, LINE);
        _tile_dpbsud(3, 6, 7);
    }
}

static void tile_take(uint32_t set, const uint8_t *digits, const uint8_t *codes, uint32_t phases, uint32_t quads,
                      int32_t *sums) {
    (void)quads, (void)sums;
    _tile_loadd(6, digits, LINE);
    if (set == 0) {
        take_first(codes, phases);
        return;
    }
    _tile_loadd(7, codes, LINE);
    _tile_dpbsud(3, 6, 7);
    _tile_loadd(7, codes + TILE, LINE);
    _tile_dpbsud(4, 6, 7);
    _tile_loadd(7, codes + (size_t)2 * TILE, LINE);
    _tile_dpbsud(5, 6, 7);
}

static void tile_give(uint32_t sets, uint32_t phases, int32_t *sums) {
    _tile_stored(0, sums, LINE);
    if (phases > 1) {
        _tile_stored(1, sums + SUMS, LINE);
    }
    if (phases > 2) {
        _tile_stored(2, sums + 2 * SUMS, LINE);
    }
    if (sets * phases > 3) {
        _tile_stored(3, sums + 3 * SUMS, LINE);
    }
    if (sets > 1) {
        _tile_stored(4, sums + 4 * SUMS, LINE);
        _tile_stored(5, sums + 5 * SUMS, LINE);
    }
}

static void tile_end(void) {
    _tile_release();
}

static const bkv_products_t tile_products = {.scores_begin = tile_scores_begin,
                                             .scores = tile_scores,
                                             .values_begin = tile_values_begin,
                                             .clear = tile_clear,
                                             .take = tile_take,
                                             .give = tile_give,
                                             .end = tile_end};

bkv_status_t bkv_amx_attend(const void *const *records, uint32_t count, const bkv_attend_args_t *args, void *workspace,
                            bkv_error_t *err) {
    return bkv_wide_attend(&tile_products, records, count, args, workspace, err);
}

size_t bkv_amx_attend_workspace(const void *const *records, uint32_t count, const bkv_attend_args_t *args) {
    return bkv_wide_attend_workspace(records, count, args);
}

#endif
