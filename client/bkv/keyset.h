// keyset.h - which blocks a command is about: a spec and keys, from a keys file or from the command line.
//
// A keys file is what `put --keys` writes, JSON:
//   {"spec": {model, layers, kv_heads, key_dim, value_dim, dtype, block_tokens, tenant, codec, rate, sink_tokens, no_sink,
//             seed (a string: 64 bits), shares (numbers 1..255, [layers][kv_heads]; none where they are equal)},
//    "layer_numbers": [N of k.N ...],
//    "blocks": [{"key": hex, "position", "tokens", "stored_bytes", "duplicate"} ...]}
#ifndef BKV_CLI_KEYSET_H
#define BKV_CLI_KEYSET_H

#include "cli.h"
#include "trace.h"

typedef struct bkv_keyset {
    bkv_spec_t spec; // its strings and shares are the next three
    char *model, *tenant;
    uint8_t *shares;
    uint32_t *layer_numbers; // [spec.layers]: names of the tensors
    size_t count;
    bkv_key_t *keys;
} bkv_keyset_t;

// The spec that options and a trace (NULL: options alone) describe; a missing dimension is a usage error. Its strings
// belong to cli and trace; shares are not read.
bkv_status_t bkv_keyset_spec(bkv_cli_t *cli, const bkv_trace_t *trace, bkv_spec_t *spec, bkv_error_t *err);

// Spec from --keys, or from the options where there is none; keys from `args`, or where those are none from the keys file.
// Deinit also after failure.
bkv_status_t bkv_keyset_init(bkv_keyset_t *keyset, bkv_cli_t *cli, char **args, int arg_count, bkv_error_t *err);
void bkv_keyset_deinit(bkv_keyset_t *keyset);

// A keys file's content without "blocks", to be completed by put; and the reverse of all of it.
json_t *bkv_keyset_to_json(const bkv_spec_t *spec, const uint32_t *layer_numbers);
bkv_status_t bkv_keyset_from_json(bkv_keyset_t *keyset, const json_t *root, bkv_error_t *err);

#endif
