// shares.h - shares files: in which proportion the sections, (layer, head)s, of a model's records share the bytes (codec.h).
//
// JSON: {"layers": L, "heads": H, "shares": [L * H numbers, layer by layer]}, whatever else it holds. The numbers are above 0 and
// may be of any size, as only their proportion counts. `bkv calibrate` writes such a file.
#ifndef BKV_CLI_SHARES_H
#define BKV_CLI_SHARES_H

#include "cli.h"

// The proportion of `count` numbers as bytes: the largest becomes 255, none less than 1. All 0: all 255. Numbers are finite and
// not negative.
void bkv_shares_scale(const double *numbers, size_t count, uint8_t *shares);

// A file's content as bytes, [layers][heads], the caller's to free(); NULL on failure. INVALID_ARGUMENT names the field.
bkv_status_t bkv_shares_from_json(const json_t *root, uint32_t layers, uint32_t heads, uint8_t **shares, bkv_error_t *err);

// What the file says that --shares names; without it *shares is NULL. INVALID_ARGUMENT names file and field.
bkv_status_t bkv_shares_load(const bkv_cli_t *cli, uint32_t layers, uint32_t heads, uint8_t **shares, bkv_error_t *err);

// The same for a spec, which is set to them.
bkv_status_t bkv_shares_load_spec(const bkv_cli_t *cli, bkv_spec_t *spec, uint8_t **shares, bkv_error_t *err);

#endif
