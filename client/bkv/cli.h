// cli.h - what all of bkv's commands share: options, exit status, error reports, JSON on stdout.
//
// Every option of every command is declared once, in BKV_CLI_OPTIONS; a command names the groups of options it takes.
// main.c has the table of commands; each command lives in its own cmd_*.c.
#ifndef BKV_CLI_H
#define BKV_CLI_H

#include "client/balancekv.h"

#include <jansson.h>
#include <stdio.h>

// Groups of options.
#define BKV_CLI_ALL       0x0001u
#define BKV_CLI_CONNECT   0x0002u // which daemon, and how long to wait for it
#define BKV_CLI_NAME      0x0004u // whose cache
#define BKV_CLI_CODEC     0x0008u // how to compress
#define BKV_CLI_SHAPE     0x0010u // dimensions, where no file tells them
#define BKV_CLI_KEYS      0x0020u
#define BKV_CLI_OUT       0x0040u
#define BKV_CLI_RECORD    0x0080u
#define BKV_CLI_RANGE     0x0100u
#define BKV_CLI_BUDGET    0x0200u
#define BKV_CLI_TTL       0x0400u
#define BKV_CLI_WINDOW    0x0800u
#define BKV_CLI_LOCAL     0x1000u // computing without a daemon
#define BKV_CLI_PARALLEL  0x2000u
#define BKV_CLI_QUERIES   0x4000u
#define BKV_CLI_WATCH     0x8000u
#define BKV_CLI_COUNT     0x10000u
#define BKV_CLI_BENCH     0x20000u
#define BKV_CLI_CALIBRATE 0x40000u
#define BKV_CLI_PING      0x80000u
#define BKV_CLI_CLUSTER   0x100000u
#define BKV_CLI_ANY_GROUP 0x1fffffu

// Options of several groups.
#define BKV_CLI_COMPRESS (BKV_CLI_CODEC | BKV_CLI_CALIBRATE)
#define BKV_CLI_ASK      (BKV_CLI_QUERIES | BKV_CLI_CALIBRATE)

typedef struct bkv_cli_range {
    uint32_t first, count;
} bkv_cli_range_t;

// The C type of each kind of option.
#define BKV_CLI_C_FLAG   bool
#define BKV_CLI_C_STRING const char *
#define BKV_CLI_C_U32    uint32_t
#define BKV_CLI_C_U64    uint64_t
#define BKV_CLI_C_REAL   float
#define BKV_CLI_C_SIZE   uint64_t
#define BKV_CLI_C_MS     uint32_t
#define BKV_CLI_C_CODEC  bkv_codec_t
#define BKV_CLI_C_DTYPE  bkv_dtype_t
#define BKV_CLI_C_RANGE  bkv_cli_range_t

// X(field, flag, KIND, argument, group, help)
#define BKV_CLI_OPTIONS(X)                                                                                                     \
    X(json, "json", FLAG, NULL, ALL, "JSON on stdout, errors as JSON on stderr")                                               \
    X(help, "help", FLAG, NULL, ALL, "this text")                                                                              \
    X(endpoint, "endpoint", STRING, "ADDR", CONNECT,                                                                           \
      "daemon: unix:/PATH or HOST:PORT, or several, by commas (default $BKV_ENDPOINT, else " BKV_DEFAULT_ENDPOINT ")")         \
    X(timeout, "timeout", MS, "TIME", CONNECT, "deadline of each call: 500ms, 10s, 2m (default 10s)")                          \
    X(tls_ca, "tls-ca", STRING, "FILE", CONNECT, "PEM file of the CA that signed the daemon; turns TLS on")                    \
    X(tls_cert, "tls-cert", STRING, "FILE", CONNECT, "PEM certificate of this client (mTLS)")                                  \
    X(tls_key, "tls-key", STRING, "FILE", CONNECT, "PEM private key of this client")                                           \
    X(tls_name, "tls-name", STRING, "NAME", CONNECT, "name to expect in the daemon's certificate (default its host)")          \
    X(transport, "transport", STRING, "NAME", CONNECT,                                                                         \
      "how blocks move: auto, inline, shm or verbs (default $BKV_TRANSPORT, else auto: the best that both ends have)")         \
    X(verbs_device, "verbs-device", STRING, "DEVICE", CONNECT,                                                                 \
      "for verbs: NAME[:PORT[:GID INDEX]] (default the first with an active port)")                                            \
    X(window_bytes, "window-bytes", SIZE, "BYTES", CONNECT, "memory to share with the daemon for that (default 256M)")         \
    X(route, "route", FLAG, NULL, CONNECT, "in a cluster: ask the daemons that own the blocks themselves")                     \
    X(model, "model", STRING, "NAME", NAME, "model the cache belongs to (put: default from FILE)")                             \
    X(tenant, "tenant", STRING, "NAME", NAME, "tenant it belongs to (default the default tenant)")                             \
    X(codec, "codec", CODEC, "CODEC", CODEC, "raw, dense8, dense4 or balance (default balance; bench: raw)")                   \
    X(rate, "rate", U32, "N", COMPRESS, "balance: at least N times fewer bytes than bf16, 2..64 (default 16, calibrate 24)")   \
    X(block_tokens, "block-tokens", U32, "N", COMPRESS, "tokens in a block (default 256)")                                     \
    X(sink, "sink", U32, "N", COMPRESS, "balance: first tokens of a sequence that are always kept (default 32)")               \
    X(shares, "shares", STRING, "FILE", CODEC, "how heads share a record's bytes, as calibrate found (default equally)")       \
    X(seed, "seed", U64, "N", COMPRESS, "seed of balance's walk (default 0)")                                                  \
    X(layers, "layers", U32, "N", SHAPE, "layers of the cache")                                                                \
    X(kv_heads, "kv-heads", U32, "N", SHAPE, "KV heads of the cache")                                                          \
    X(key_dim, "key-dim", U32, "N", SHAPE, "dimension of a key")                                                               \
    X(value_dim, "value-dim", U32, "N", SHAPE, "dimension of a value (default that of a key)")                                 \
    X(dtype, "dtype", DTYPE, "TYPE", SHAPE, "bf16, fp16 or fp32 (default bf16)")                                               \
    X(keys, "keys", STRING, "FILE", KEYS, "keys file: put writes it, the others read spec and keys from it")                   \
    X(out, "out", STRING, "FILE", OUT, "write the result to this file: safetensors, calibrate JSON")                           \
    X(record, "record", STRING, "FILE", RECORD, "write the records themselves, one after another, to this file")               \
    X(layer_range, "layer-range", RANGE, "A[:B]", RANGE, "only layers A up to, not including, B (by order, from 0)")           \
    X(head_range, "head-range", RANGE, "A[:B]", RANGE, "only KV heads A up to, not including, B")                              \
    X(budget, "budget", SIZE, "BYTES", BUDGET, "fold everything into at most BYTES (64K, 2M)")                                 \
    X(profile, "profile", STRING, "P", BUDGET,                                                                                 \
      "fold by age: AGE:RATE,...,:RATE, newest first (512:4,2048:8,:32), or auto: the best known for --rate")                  \
    X(ttl, "ttl", MS, "TIME", TTL, "put: time to live (default the daemon's); pin: length of the lease (default 60s)")         \
    X(window, "window", U32, "N", WINDOW, "newest tokens to leave out (put, default 0) or pass exactly (summarize, 64)")       \
    X(backend, "backend", STRING, "NAME", LOCAL, "kernels to use: auto, ref, avx2, avx512, amx or cuda (default auto)")        \
    X(threads, "threads", U32, "N", LOCAL, "threads (default one per CPU)")                                                    \
    X(parallel, "parallel", U32, "N", PARALLEL, "calls in flight at once (default 4)")                                         \
    X(queries, "queries", STRING, "FILE", QUERIES, "safetensors file with q.N [query heads, tokens, dim]")                     \
    X(last, "last", U32, "N", ASK, "only the newest N queries (default 16, 0: all; calibrate 256)")                            \
    X(scale, "scale", REAL, "X", ASK, "factor on <q, k> (default 1 / sqrt(key dim))")                                          \
    X(transports, "transports", FLAG, NULL, PING, "which ways there are for blocks to move, tried out, and which is in use")   \
    X(watch, "watch", FLAG, NULL, WATCH, "keep showing them, with rates")                                                      \
    X(interval, "interval", MS, "TIME", WATCH, "between two looks (default 1s)")                                               \
    X(count, "count", U32, "N", COUNT, "how often (ping: default 1; stats --watch: default until interrupted)")                \
    X(blocks, "blocks", U32, "N", BENCH, "different blocks to put and get (default 32)")                                       \
    X(ops, "ops", STRING, "LIST", BENCH, "any of put,lookup,get, run in that order (default all)")                             \
    X(keep, "keep", FLAG, NULL, BENCH, "do not drop the blocks at the end")                                                    \
    X(undo, "undo", FLAG, NULL, CLUSTER, "drain: take it back")                                                                \
    X(no_wait, "no-wait", FLAG, NULL, CLUSTER, "drain: do not wait until it is done")

typedef enum bkv_cli_option {
#define X(field, flag, kind, argument, group, help) BKV_OPT_##field,
    BKV_CLI_OPTIONS(X)
#undef X
        BKV_OPT_COUNT
} bkv_cli_option_t;

// A parsed command line. Strings point into argv.
typedef struct bkv_cli {
#define X(field, flag, kind, argument, group, help) BKV_CLI_C_##kind field;
    BKV_CLI_OPTIONS(X)
#undef X
    uint64_t given; // bit i: option i was on the command line
    char **args;    // operands
    int arg_count;
    bool usage; // the failure being returned is the command line's own (exit status 2)
} bkv_cli_t;

_Static_assert(BKV_OPT_COUNT <= 64, "options must fit bkv_cli_t.given");

typedef struct bkv_command {
    const char *name, *operands, *summary;
    uint32_t groups;
    int min_args, max_args; // max -1: any number
    bkv_status_t (*run)(bkv_cli_t *cli, bkv_error_t *err);
    const char *details; // further lines of its --help; NULL: none
} bkv_command_t;

// X(exit status, meaning)
#define BKV_CLI_EXITS(X)                                                                                                       \
    X(0, "done")                                                                                                               \
    X(1, "failed: a bad file, a request that was refused as invalid, an internal error; cluster status: not all is well")      \
    X(2, "usage: the command line is wrong")                                                                                   \
    X(3, "not found: spec, block or lease (lookup: not all blocks are resident)")                                              \
    X(4, "the daemon cannot be reached, is busy or draining, or the deadline passed")                                          \
    X(5, "data loss: a record failed its checksum")                                                                            \
    X(6, "a configured bound of the daemon is reached: memory, quota, message or batch size")                                  \
    X(7, "permission denied or not authenticated")

bool bkv_cli_given(const bkv_cli_t *cli, bkv_cli_option_t option);

// Parses options of `groups` and operands from argv[1..]; argv may be reordered. With `stop` it ends at the first operand.
// May be called again to add to what an earlier call found. INVALID_ARGUMENT (and cli->usage) names the option.
bkv_status_t bkv_cli_parse(bkv_cli_t *cli, uint32_t groups, int argc, char **argv, bool stop, bkv_error_t *err);

// A complaint about the command line itself; returns BKV_INVALID_ARGUMENT.
bkv_status_t bkv_cli_usage(bkv_cli_t *cli, bkv_error_t *err, const char *format, ...) BKV_PRINTF(3, 4);

// Lists the options of `groups`.
void bkv_cli_help(uint32_t groups, FILE *out);

int bkv_cli_exit(bkv_status_t status, bool usage);

// One line (or JSON object) on stderr that says why `command` failed; command may be NULL.
void bkv_cli_report(const bkv_cli_t *cli, const char *command, const bkv_error_t *err);

// Prints and releases `value`; on one line if `line`.
void bkv_cli_print_json(json_t *value, bool line);

// Lower-case hex as a JSON string.
json_t *bkv_cli_json_hex(const uint8_t *bytes, size_t n);

// The codec parameters that the options ask for, defaults filled in.
bkv_codec_params_t bkv_cli_codec(const bkv_cli_t *cli);

// The profile that --profile names, count 0 where there is none; `rate` is what "auto" is for. A usage error.
bkv_status_t bkv_cli_profile(bkv_cli_t *cli, uint32_t rate, bkv_profile_t *profile, bkv_error_t *err);

// The commands (cmd_*.c).
bkv_status_t bkv_cmd_ping(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_stats(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_put(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_get(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_lookup(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_fold(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_attend(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_pin(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_unpin(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_drop(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_inspect(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_summarize(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_calibrate(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_bench(bkv_cli_t *cli, bkv_error_t *err);
bkv_status_t bkv_cmd_cluster(bkv_cli_t *cli, bkv_error_t *err);

// The rest of `bkv cluster`: cmd_drain.c.
bkv_status_t bkv_cluster_drain_command(bkv_cli_t *cli, bkv_error_t *err);

#endif
