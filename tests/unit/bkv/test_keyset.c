// test_keyset.c - client/bkv/keyset.c: keys files there and back, and those that somebody spoiled.
#include "client/bkv/keyset.h"
#include "synthetic.h"

#define KEY_A "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
#define KEY_B "ff112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

static json_t *good(void) {
    const uint32_t numbers[] = {1, 5};
    static const uint8_t shares[] = {255, 1, 2, 3, 4, 5};
    const bkv_spec_t spec = {.model = "m",
                             .shares = shares,
                             .share_count = sizeof shares,
                             .layers = 2,
                             .kv_heads = 3,
                             .key_dim = 64,
                             .value_dim = 32,
                             .dtype = BKV_FP16,
                             .block_tokens = 128,
                             .tenant = "t",
                             .codec = BKV_CODEC_BALANCE,
                             .rate = 8,
                             .sink_tokens = 0,
                             .no_sink = true,
                             .seed = UINT64_MAX};
    json_t *root = bkv_keyset_to_json(&spec, numbers);
    json_object_set_new(root, "blocks", json_pack("[{s:s}, {s:s}]", "key", KEY_A, "key", KEY_B));
    return root;
}

Test(bkv_keyset, round_trip) {
    json_t *root = good();
    bkv_keyset_t keyset;
    cr_assert_eq(bkv_keyset_from_json(&keyset, root, NULL), BKV_OK);
    const bkv_spec_t *spec = &keyset.spec;
    cr_expect_str_eq(spec->model, "m");
    cr_expect_str_eq(spec->tenant, "t");
    cr_expect(spec->layers == 2 && spec->kv_heads == 3 && spec->key_dim == 64 && spec->value_dim == 32);
    cr_expect(spec->dtype == BKV_FP16 && spec->block_tokens == 128 && spec->codec == BKV_CODEC_BALANCE && spec->rate == 8);
    cr_expect(spec->sink_tokens == 0 && spec->no_sink && spec->seed == UINT64_MAX, "64 bits survive JSON");
    cr_expect(spec->share_count == 6 && spec->shares[0] == 255 && spec->shares[5] == 5);
    cr_expect(keyset.layer_numbers[0] == 1 && keyset.layer_numbers[1] == 5);
    cr_assert_eq(keyset.count, 2);
    cr_expect(keyset.keys[0].bytes[1] == 0x11 && keyset.keys[1].bytes[0] == 0xff);
    bkv_keyset_deinit(&keyset);
    json_decref(root);
}

static void expect_refused(const char *where, const char *field, json_t *value) {
    json_t *root = good();
    json_t *at = where[0] == '\0' ? root : json_object_get(root, where);
    bkv_keyset_t keyset;
    bkv_error_t err = {.status = BKV_OK};
    json_object_set_new(at, field, value);
    cr_expect_eq(bkv_keyset_from_json(&keyset, root, &err), BKV_INVALID_ARGUMENT, "%s", field);
    cr_expect_not_null(strstr(err.message, field), "\"%s\" does not name %s", err.message, field);
    bkv_keyset_deinit(&keyset);
    json_decref(root);
}

Test(bkv_keyset, refuses_what_is_wrong) {
    expect_refused("spec", "model", json_integer(1));
    expect_refused("spec", "dtype", json_string("fp64"));
    expect_refused("spec", "codec", json_string("zip"));
    expect_refused("spec", "shares", json_string("255"));
    expect_refused("spec", "shares", json_pack("[i, i, i, i, i]", 1, 1, 1, 1, 1));
    expect_refused("spec", "shares", json_pack("[i, i, i, i, i, i]", 1, 1, 1, 0, 1, 1));
    expect_refused("spec", "shares", json_pack("[i, i, i, i, i, i]", 1, 1, 1, 1, 1, 256));
    expect_refused("spec", "seed", json_string("x"));
    expect_refused("spec", "seed", json_integer(-1));
    expect_refused("spec", "layers", json_integer(0));
    expect_refused("spec", "layers", json_integer(1000000000));
    expect_refused("spec", "key_dim", json_integer(-1));
    expect_refused("spec", "rate", json_string("8"));
    expect_refused("", "layer_numbers", json_pack("[i]", 1));
    expect_refused("", "layer_numbers", json_pack("[i, i]", 5, 5));
    expect_refused("", "layer_numbers", json_pack("[i, s]", 1, "x"));
    expect_refused("", "blocks", json_pack("[{s:s}]", "key", "00"));
    bkv_keyset_t keyset;
    json_t *wrong = json_pack("[i]", 1);
    cr_expect_neq(bkv_keyset_from_json(&keyset, wrong, NULL), BKV_OK);
    bkv_keyset_deinit(&keyset);
    json_decref(wrong);
}

Test(bkv_keyset, from_the_command_line) {
    bkv_cli_t cli = {.layers = 4, .kv_heads = 2, .key_dim = 64, .model = "m", .tenant = "t"};
    char *keys[] = {KEY_A, KEY_B};
    bkv_keyset_t keyset;
    bkv_error_t err;
    cr_assert_eq(bkv_keyset_init(&keyset, &cli, keys, 2, NULL), BKV_OK);
    cr_expect(keyset.count == 2 && keyset.spec.value_dim == 64 && keyset.spec.dtype == BKV_BF16 &&
              keyset.layer_numbers[3] == 3);
    bkv_keyset_deinit(&keyset);
    char *bad[] = {"0011"};
    cr_expect_eq(bkv_keyset_init(&keyset, &cli, bad, 1, &err), BKV_INVALID_ARGUMENT);
    cr_expect(cli.usage);
    bkv_keyset_deinit(&keyset);
    cr_expect_eq(bkv_keyset_init(&keyset, &cli, NULL, 0, &err), BKV_INVALID_ARGUMENT, "no keys at all");
    bkv_keyset_deinit(&keyset);
    cli.key_dim = 0;
    cr_expect_eq(bkv_keyset_init(&keyset, &cli, keys, 2, &err), BKV_INVALID_ARGUMENT);
    cr_expect_not_null(strstr(err.message, "--key-dim"));
    bkv_keyset_deinit(&keyset);
}
