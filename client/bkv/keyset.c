// keyset.c - see keyset.h. A keys file may come from anywhere, so it is checked like any input.
#include "keyset.h"

#include "memory.h"
#include "shares.h"
#include "text.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define KEYS_MAX (1u << 24)

bkv_status_t bkv_keyset_spec(bkv_cli_t *cli, const bkv_trace_t *trace, bkv_spec_t *spec, bkv_error_t *err) {
    bkv_codec_params_t params = bkv_cli_codec(cli);
    *spec = (bkv_spec_t){
        .model = cli->model,
        .layers = cli->layers,
        .kv_heads = cli->kv_heads,
        .key_dim = cli->key_dim,
        .value_dim = cli->value_dim > 0 ? cli->value_dim : cli->key_dim,
        .dtype = bkv_cli_given(cli, BKV_OPT_dtype) ? cli->dtype : BKV_BF16,
        .block_tokens = cli->block_tokens > 0 ? cli->block_tokens : 256,
        .tenant = cli->tenant,
        .codec = params.codec,
        .rate = params.rate,
        .sink_tokens = params.sink,
        .no_sink = params.sink == 0,
        .seed = params.seed,
    };
    if (trace != NULL) {
        spec->model = spec->model != NULL ? spec->model : trace->name;
        spec->layers = trace->shape.layers;
        spec->kv_heads = trace->shape.heads;
        spec->key_dim = trace->shape.key_dim;
        spec->value_dim = trace->shape.value_dim;
        spec->dtype = trace->shape.dtype;
        return BKV_OK;
    }
    const char *missing = spec->model == NULL   ? "model"
                          : spec->layers == 0   ? "layers"
                          : spec->kv_heads == 0 ? "kv-heads"
                          : spec->key_dim == 0  ? "key-dim"
                                                : NULL;
    if (missing != NULL) {
        return bkv_cli_usage(cli, err, "--%s: missing (or give --keys FILE, which has the whole spec)", missing);
    }
    if (spec->layers > BKV_MAX_LAYERS) {
        return bkv_cli_usage(cli, err, "--layers: %u is not in 1..%d", spec->layers, BKV_MAX_LAYERS);
    }
    return BKV_OK;
}

json_t *bkv_keyset_to_json(const bkv_spec_t *spec, const uint32_t *layer_numbers) {
    char seed[BKV_TEXT_MAX];
    snprintf(seed, sizeof seed, "%" PRIu64, spec->seed);
    json_t *numbers = json_array();
    for (uint32_t i = 0; i < spec->layers; i++) {
        json_array_append_new(numbers, json_integer(layer_numbers[i]));
    }
    json_t *json = json_pack(
        "{s:s, s:I, s:I, s:I, s:I, s:s, s:I, s:s, s:s, s:I, s:I, s:b, s:s}", "model", spec->model, "layers",
        (json_int_t)spec->layers, "kv_heads", (json_int_t)spec->kv_heads, "key_dim", (json_int_t)spec->key_dim, "value_dim",
        (json_int_t)spec->value_dim, "dtype", bkv_dtype_name(spec->dtype), "block_tokens", (json_int_t)spec->block_tokens,
        "tenant", spec->tenant ? spec->tenant : "", "codec", bkv_codec_name(spec->codec), "rate", (json_int_t)spec->rate,
        "sink_tokens", (json_int_t)spec->sink_tokens, "no_sink", spec->no_sink, "seed", seed);
    if (spec->share_count > 0) {
        json_t *shares = json_array();
        for (size_t i = 0; i < spec->share_count; i++) {
            json_array_append_new(shares, json_integer(spec->shares[i]));
        }
        json_object_set_new(json, "shares", shares);
    }
    return json_pack("{s:o, s:o}", "spec", json, "layer_numbers", numbers);
}

// A number of a spec. Absent is 0, which means "the default" to the daemon.
static bkv_status_t read_u32(const json_t *spec, const char *name, uint32_t *out, bkv_error_t *err) {
    const json_t *value = json_object_get(spec, name);
    json_int_t number = json_integer_value(value);
    if (value != NULL && (!json_is_integer(value) || number < 0 || number > UINT32_MAX)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.%s: not a number in 0..%u", name, UINT32_MAX);
    }
    *out = (uint32_t)number;
    return BKV_OK;
}

static bkv_status_t read_numbers(const json_t *json, bkv_spec_t *spec, bkv_error_t *err) {
    const struct {
        const char *name;
        uint32_t *out;
    } fields[] = {
        {"layers", &spec->layers},           {"kv_heads", &spec->kv_heads},         {"key_dim", &spec->key_dim},
        {"value_dim", &spec->value_dim},     {"block_tokens", &spec->block_tokens}, {"rate", &spec->rate},
        {"sink_tokens", &spec->sink_tokens}, {"tp_rank", &spec->tp_rank},           {"tp_size", &spec->tp_size},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        bkv_status_t status = read_u32(json, fields[i].name, fields[i].out, err);
        if (status != BKV_OK) {
            return status;
        }
    }
    if (spec->layers == 0 || spec->layers > BKV_MAX_LAYERS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.layers: %u is not in 1..%d", spec->layers, BKV_MAX_LAYERS);
    }
    spec->value_dim = spec->value_dim > 0 ? spec->value_dim : spec->key_dim;
    return BKV_OK;
}

static bkv_status_t read_shares(bkv_keyset_t *keyset, const json_t *list, bkv_error_t *err) {
    bkv_spec_t *spec = &keyset->spec;
    size_t count = json_array_size(list);
    if (list == NULL) {
        return BKV_OK;
    }
    if (count == 0 || count != (uint64_t)spec->layers * spec->kv_heads) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.shares: not an array of %u * %u numbers", spec->layers,
                        spec->kv_heads);
    }
    spec->shares = keyset->shares = bkv_xcalloc(count, 1);
    spec->share_count = count;
    for (size_t i = 0; i < count; i++) {
        json_int_t share = json_integer_value(json_array_get(list, i));
        if (share < 1 || share > UINT8_MAX) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.shares[%zu]: not a number in 1..255", i);
        }
        keyset->shares[i] = (uint8_t)share;
    }
    return BKV_OK;
}

static bkv_status_t read_spec(bkv_keyset_t *keyset, const json_t *json, bkv_error_t *err) {
    bkv_spec_t *spec = &keyset->spec;
    const char *model = json_string_value(json_object_get(json, "model"));
    const char *tenant = json_string_value(json_object_get(json, "tenant"));
    const char *dtype = json_string_value(json_object_get(json, "dtype"));
    const char *codec = json_string_value(json_object_get(json, "codec"));
    const json_t *seed = json_object_get(json, "seed");
    if (model == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.model: missing or not a string");
    }
    if (dtype == NULL || !bkv_dtype_parse(dtype, &spec->dtype)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.dtype: not bf16, fp16 or fp32");
    }
    if (codec != NULL && !bkv_codec_parse(codec, &spec->codec)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.codec: not raw, dense8, dense4 or balance");
    }
    if (json_is_integer(seed) && json_integer_value(seed) >= 0) {
        spec->seed = (uint64_t)json_integer_value(seed);
    } else if (seed != NULL && !(json_is_string(seed) && bkv_text_u64(json_string_value(seed), UINT64_MAX, &spec->seed))) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.seed: not a whole number of 64 bits");
    }
    spec->model = keyset->model = bkv_xstrdup(model);
    spec->tenant = keyset->tenant = tenant != NULL && tenant[0] != '\0' ? bkv_xstrdup(tenant) : NULL;
    spec->no_sink = json_is_true(json_object_get(json, "no_sink"));
    bkv_status_t status = read_numbers(json, spec, err);
    return status == BKV_OK ? read_shares(keyset, json_object_get(json, "shares"), err) : status;
}

// The tensors' numbers; 0, 1, 2, ... where there are none.
static bkv_status_t read_layer_numbers(bkv_keyset_t *keyset, const json_t *numbers, bkv_error_t *err) {
    uint32_t layers = keyset->spec.layers;
    keyset->layer_numbers = bkv_xcalloc(layers, sizeof *keyset->layer_numbers);
    if (numbers != NULL && json_array_size(numbers) != layers) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "layer_numbers: not an array of %u numbers", layers);
    }
    for (uint32_t i = 0; i < layers; i++) {
        const json_t *number = json_array_get(numbers, i);
        json_int_t value = number != NULL ? json_integer_value(number) : (json_int_t)i;
        if ((number != NULL && !json_is_integer(number)) || value < 0 || value > 999999 ||
            (i > 0 && (uint32_t)value <= keyset->layer_numbers[i - 1])) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "layer_numbers[%u]: not ascending numbers of at most six digits", i);
        }
        keyset->layer_numbers[i] = (uint32_t)value;
    }
    return BKV_OK;
}

bkv_status_t bkv_keyset_from_json(bkv_keyset_t *keyset, const json_t *root, bkv_error_t *err) {
    *keyset = (bkv_keyset_t){.count = 0};
    const json_t *blocks = json_object_get(root, "blocks");
    bkv_status_t status = read_spec(keyset, json_object_get(root, "spec"), err);
    if (status != BKV_OK || (status = read_layer_numbers(keyset, json_object_get(root, "layer_numbers"), err)) != BKV_OK) {
        return status;
    }
    size_t count = json_array_size(blocks);
    if (count > KEYS_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "blocks: %zu are too many", count);
    }
    keyset->keys = bkv_xcalloc(count, sizeof *keyset->keys);
    for (size_t i = 0; i < count; i++) {
        const char *hex = json_string_value(json_object_get(json_array_get(blocks, i), "key"));
        if (hex == NULL || !bkv_hex_parse(hex, keyset->keys[i].bytes, BKV_KEY_BYTES)) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "blocks[%zu].key: not 64 hex digits", i);
        }
    }
    keyset->count = count;
    return BKV_OK;
}

static bkv_status_t load_file(bkv_keyset_t *keyset, const char *path, bkv_error_t *err) {
    json_error_t why;
    bkv_error_t cause = {.status = BKV_OK};
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &why);
    if (root == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %s", path, why.text);
    }
    bkv_status_t status = bkv_keyset_from_json(keyset, root, &cause);
    json_decref(root);
    return status == BKV_OK ? BKV_OK : bkv_fail(err, status, "%s: %s", path, cause.message);
}

static bkv_status_t from_options(bkv_keyset_t *keyset, bkv_cli_t *cli, bkv_error_t *err) {
    bkv_status_t status = bkv_keyset_spec(cli, NULL, &keyset->spec, err);
    if (status != BKV_OK) {
        return status;
    }
    keyset->spec.model = keyset->model = bkv_xstrdup(keyset->spec.model);
    keyset->spec.tenant = keyset->tenant = cli->tenant != NULL ? bkv_xstrdup(cli->tenant) : NULL;
    status = bkv_shares_load_spec(cli, &keyset->spec, &keyset->shares, err);
    return status != BKV_OK ? status : read_layer_numbers(keyset, NULL, err);
}

bkv_status_t bkv_keyset_init(bkv_keyset_t *keyset, bkv_cli_t *cli, char **args, int arg_count, bkv_error_t *err) {
    *keyset = (bkv_keyset_t){.count = 0};
    if (cli->keys != NULL && cli->shares != NULL) {
        return bkv_cli_usage(cli, err, "--shares: they are in the keys file, as put was given them");
    }
    bkv_status_t status = cli->keys != NULL ? load_file(keyset, cli->keys, err) : from_options(keyset, cli, err);
    if (status != BKV_OK) {
        return status;
    }
    if (arg_count > 0) {
        keyset->keys = bkv_xrealloc(keyset->keys, (size_t)arg_count, sizeof *keyset->keys);
        keyset->count = (size_t)arg_count;
    }
    for (int i = 0; i < arg_count; i++) {
        if (!bkv_hex_parse(args[i], keyset->keys[i].bytes, BKV_KEY_BYTES)) {
            return bkv_cli_usage(cli, err, "%.80s: not a key (64 hex digits)", args[i]);
        }
    }
    if (keyset->count == 0) {
        return bkv_cli_usage(cli, err, "no keys: give --keys FILE or keys as arguments");
    }
    return BKV_OK;
}

void bkv_keyset_deinit(bkv_keyset_t *keyset) {
    free(keyset->model);
    free(keyset->tenant);
    free(keyset->shares);
    free(keyset->layer_numbers);
    free(keyset->keys);
    *keyset = (bkv_keyset_t){.count = 0};
}
