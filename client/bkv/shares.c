// shares.c - see shares.h. A shares file may come from anywhere, so it is checked like any input.
#include "shares.h"

#include "memory.h"

#include <math.h>
#include <stdlib.h>

#define SHARE_MAX 255

void bkv_shares_scale(const double *numbers, size_t count, uint8_t *shares) {
    double largest = 0;
    for (size_t i = 0; i < count; i++) {
        largest = numbers[i] > largest ? numbers[i] : largest;
    }
    for (size_t i = 0; i < count; i++) {
        long share = largest > 0 ? lround(numbers[i] / largest * SHARE_MAX) : SHARE_MAX;
        shares[i] = (uint8_t)(share < 1 ? 1 : share);
    }
}

static bkv_status_t check_dim(const json_t *root, const char *field, uint32_t expected, bkv_error_t *err) {
    const json_t *value = json_object_get(root, field);
    if (!json_is_integer(value)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: missing or not a whole number", field);
    }
    if (json_integer_value(value) != (json_int_t)expected) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %lld, but the cache has %u", field,
                        (long long)json_integer_value(value), expected);
    }
    return BKV_OK;
}

bkv_status_t bkv_shares_from_json(const json_t *root, uint32_t layers, uint32_t heads, uint8_t **shares, bkv_error_t *err) {
    const json_t *list = json_object_get(root, "shares");
    size_t count = (size_t)layers * heads;
    *shares = NULL;
    bkv_status_t status = check_dim(root, "layers", layers, err);
    if (status == BKV_OK) {
        status = check_dim(root, "heads", heads, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    if (!json_is_array(list) || json_array_size(list) != count) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "shares: not an array of %u * %u numbers", layers, heads);
    }
    double *numbers = bkv_xcalloc(count, sizeof *numbers);
    for (size_t i = 0; i < count && status == BKV_OK; i++) {
        numbers[i] = json_number_value(json_array_get(list, i)); // 0 for what is no number
        if (!(numbers[i] > 0)) {
            status = bkv_fail(err, BKV_INVALID_ARGUMENT, "shares[%zu]: not a number above 0", i);
        }
    }
    if (status == BKV_OK) {
        *shares = bkv_xcalloc(count, 1);
        bkv_shares_scale(numbers, count, *shares);
    }
    free(numbers);
    return status;
}

bkv_status_t bkv_shares_load(const bkv_cli_t *cli, uint32_t layers, uint32_t heads, uint8_t **shares, bkv_error_t *err) {
    *shares = NULL;
    if (cli->shares == NULL) {
        return BKV_OK;
    }
    json_error_t why;
    bkv_error_t cause = {.status = BKV_OK};
    json_t *root = json_load_file(cli->shares, JSON_REJECT_DUPLICATES, &why);
    if (root == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %s", cli->shares, why.text);
    }
    bkv_status_t status = bkv_shares_from_json(root, layers, heads, shares, &cause);
    json_decref(root);
    return status == BKV_OK ? BKV_OK : bkv_fail(err, status, "%s: %s", cli->shares, cause.message);
}

bkv_status_t bkv_shares_load_spec(const bkv_cli_t *cli, bkv_spec_t *spec, uint8_t **shares, bkv_error_t *err) {
    bkv_status_t status = bkv_shares_load(cli, spec->layers, spec->kv_heads, shares, err);
    if (status == BKV_OK && *shares != NULL) {
        spec->shares = *shares;
        spec->share_count = (size_t)spec->layers * spec->kv_heads;
    }
    return status;
}
