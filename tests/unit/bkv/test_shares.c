// test_shares.c - client/bkv/shares.c: shares files, good ones and spoiled ones.
#include "client/bkv/shares.h"
#include "synthetic.h"

static bkv_status_t parse(const char *text, uint8_t **shares, bkv_error_t *err) {
    json_t *root = json_loads(text, 0, NULL);
    cr_assert_not_null(root);
    bkv_status_t status = bkv_shares_from_json(root, 2, 3, shares, err);
    json_decref(root);
    return status;
}

Test(bkv_shares, the_largest_is_255_and_none_is_0) {
    const double numbers[] = {0.5, 1e-9, 0.25, 0.1, 0, 0.125};
    const uint8_t expected[] = {255, 1, 128, 51, 1, 64};
    uint8_t shares[6];
    bkv_shares_scale(numbers, 6, shares);
    cr_expect_arr_eq(shares, expected, 6);
    const double none[] = {0, 0, 0};
    bkv_shares_scale(none, 3, shares);
    cr_expect(shares[0] == 255 && shares[1] == 255 && shares[2] == 255);
}

Test(bkv_shares, only_the_proportion_counts) {
    const char *texts[] = {"{\"layers\": 2, \"heads\": 3, \"shares\": [510, 2, 4, 100, 255, 6]}",
                           "{\"layers\": 2, \"heads\": 3, \"shares\": [5.1e-7, 2e-9, 4e-9, 1e-7, 2.55e-7, 6e-9], \"more\": 1}"};
    const uint8_t expected[] = {255, 1, 2, 50, 128, 3};
    for (size_t i = 0; i < 2; i++) {
        uint8_t *shares;
        bkv_error_t err = {.status = BKV_OK};
        cr_assert_eq(parse(texts[i], &shares, &err), BKV_OK, "%s", err.message);
        cr_expect_arr_eq(shares, expected, 6, "file %zu", i);
        free(shares);
    }
}

Test(bkv_shares, what_is_wrong_is_named) {
    const char *cases[][2] = {
        {"{\"heads\": 3, \"shares\": [1, 1, 1, 1, 1, 1]}", "layers: missing"},
        {"{\"layers\": 3, \"heads\": 2, \"shares\": [1, 1, 1, 1, 1, 1]}", "layers: 3, but the cache has 2"},
        {"{\"layers\": 2, \"heads\": 3.0, \"shares\": [1, 1, 1, 1, 1, 1]}", "heads: missing"},
        {"{\"layers\": 2, \"heads\": 4294967299, \"shares\": [1, 1, 1, 1, 1, 1]}", "heads: 4294967299"},
        {"{\"layers\": 2, \"heads\": 3}", "shares: not an array"},
        {"{\"layers\": 2, \"heads\": 3, \"shares\": [1, 1, 1, 1, 1]}", "shares: not an array of 2 * 3"},
        {"{\"layers\": 2, \"heads\": 3, \"shares\": [1, 1, 0, 1, 1, 1]}", "shares[2]: "},
        {"{\"layers\": 2, \"heads\": 3, \"shares\": [1, 1, 1, -1, 1, 1]}", "shares[3]: "},
        {"{\"layers\": 2, \"heads\": 3, \"shares\": [1, 1, 1, 1, 1, \"1\"]}", "shares[5]: "},
        {"[]", "layers: missing"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t *shares;
        bkv_error_t err = {.status = BKV_OK};
        cr_expect_eq(parse(cases[i][0], &shares, &err), BKV_INVALID_ARGUMENT, "%s", cases[i][0]);
        cr_expect_eq(strncmp(err.message, cases[i][1], strlen(cases[i][1])), 0, "\"%s\" for %s", err.message, cases[i][0]);
        cr_expect_null(shares);
    }
}

Test(bkv_shares, a_file_is_named_too) {
    char path[64];
    FILE *file = fopen(scratch_path(path), "w");
    fputs("{\"layers\": 1, \"heads\": 2, \"shares\": [4, 1]}", file);
    fclose(file);
    bkv_cli_t cli = {.shares = path};
    bkv_spec_t spec = {.layers = 1, .kv_heads = 2};
    uint8_t *shares;
    bkv_error_t err = {.status = BKV_OK};
    cr_assert_eq(bkv_shares_load_spec(&cli, &spec, &shares, &err), BKV_OK, "%s", err.message);
    cr_expect(spec.shares == shares && spec.share_count == 2 && shares[0] == 255 && shares[1] == 64);
    free(shares);
    cr_expect_eq(bkv_shares_load(&cli, 2, 2, &shares, &err), BKV_INVALID_ARGUMENT);
    cr_expect(strncmp(err.message, path, strlen(path)) == 0 && strstr(err.message, ": layers: 1") != NULL, "%s", err.message);
    unlink(path);
    cr_expect_eq(bkv_shares_load(&cli, 1, 2, &shares, &err), BKV_INVALID_ARGUMENT);
    cli.shares = NULL;
    cr_expect_eq(bkv_shares_load(&cli, 1, 2, &shares, &err), BKV_OK);
    cr_expect_null(shares);
}
