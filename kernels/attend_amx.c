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

typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config_t;

_Static_assert(sizeof(tile_config_t) == 64, "what ldtilecfg reads");

static const tile_config_t whole_tiles = {
    .palette = 1, .row_bytes = {LINE, LINE, LINE, LINE, LINE, LINE, LINE, LINE}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

static void tiles_begin(void) {
    _tile_loadconfig(&whole_tiles);
}

static void tiles_end(void) {
    _tile_release();
}

static void score_one_quad(const uint8_t *codes, const uint8_t *digits, uint32_t steps, int32_t *sums) {
    _tile_zero(0);
    for (uint32_t step = 0; step < steps; step++) {
        _tile_loadd(2, codes + (size_t)step * TILE, LINE);
        _tile_loadd(4, digits + (size_t)step * TILE, LINE);
        _tile_dpbusd(0, 2, 4);
    }
    _tile_stored(0, sums, LINE);
}

static void score_two_quads(const uint8_t *codes, const uint8_t *digits, uint32_t steps, int32_t *sums) {
    _tile_zero(0);
    _tile_zero(1);
    for (uint32_t step = 0; step < steps; step++) {
        _tile_loadd(2, codes + (size_t)step * TILE, LINE);
        _tile_loadd(4, digits + (size_t)(2 * step) * TILE, LINE);
        _tile_dpbusd(0, 2, 4);
        _tile_loadd(5, digits + (size_t)(2 * step + 1) * TILE, LINE);
        _tile_dpbusd(1, 2, 5);
    }
    _tile_stored(0, sums, LINE);
    _tile_stored(1, sums + 256, LINE);
}

static void tile_scores(const uint8_t *codes, const uint8_t *digits, uint32_t tiles, uint32_t steps, uint32_t quads,
                        int32_t *sums) {
    for (uint32_t tile = 0; tile < tiles; tile++) {
        const uint8_t *tokens = codes + (size_t)tile * steps * TILE;
        if (quads == 1) {
            score_one_quad(tokens, digits, steps, sums + (size_t)tile * 256);
        } else {
            score_two_quads(tokens, digits, steps, sums + (size_t)tile * 512);
        }
    }
}

static void tile_values(const uint8_t *digits, size_t stride, const uint8_t *codes, uint32_t chunks, uint32_t phases,
                        uint32_t rows, int32_t *sums) {
    (void)rows; // sixteen cost hardly more than eight
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (uint32_t chunk = 0; chunk < chunks; chunk++, codes += (size_t)phases * TILE) {
        _tile_loadd(4, digits + chunk * stride, LINE);
        _tile_loadd(5, codes, LINE);
        _tile_dpbsud(0, 4, 5);
        if (phases > 1) {
            _tile_loadd(6, codes + TILE, LINE);
            _tile_dpbsud(1, 4, 6);
        }
        if (phases > 2) {
            _tile_loadd(5, codes + (size_t)2 * TILE, LINE);
            _tile_dpbsud(2, 4, 5);
        }
        if (phases > 3) {
            _tile_loadd(6, codes + (size_t)3 * TILE, LINE);
            _tile_dpbsud(3, 4, 6);
        }
    }
    _tile_stored(0, sums, LINE);
    if (phases > 1) {
        _tile_stored(1, sums + 256, LINE);
    }
    if (phases > 2) {
        _tile_stored(2, sums + 512, LINE);
    }
    if (phases > 3) {
        _tile_stored(3, sums + 768, LINE);
    }
}

static const bkv_products_t tile_products = {
    .begin = tiles_begin, .end = tiles_end, .scores = tile_scores, .values = tile_values};

bkv_status_t bkv_amx_attend(const void *const *records, uint32_t count, const bkv_attend_args_t *args, void *workspace,
                            bkv_error_t *err) {
    return bkv_wide_attend(&tile_products, records, count, args, workspace, err);
}

size_t bkv_amx_attend_workspace(const void *const *records, uint32_t count, const bkv_attend_args_t *args) {
    return bkv_wide_attend_workspace(records, count, args);
}

#endif
