// config.h - the daemon's configuration: defaults, overridden by a file, overridden by flags.
//
// options.h declares the options; this reads, checks, prints and reloads them. The command line itself is args.h's.
#ifndef BKV_CONFIG_H
#define BKV_CONFIG_H

#include "daemon/options.h"
#include "kernels/status.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#define BKV_CONFIG_DEFAULT_FILE "/etc/balancekv/balancekvd.conf"

typedef char *bkv_option_STRING_t;
typedef bool bkv_option_BOOL_t;
typedef uint32_t bkv_option_U32_t;
typedef uint64_t bkv_option_SIZE_t, bkv_option_MS_t;

typedef enum bkv_option_type { BKV_STRING, BKV_BOOL, BKV_U32, BKV_SIZE, BKV_MS } bkv_option_type_t;

// BKV_OPT_listen_socket, ...: an option's place in every array below.
typedef enum bkv_option_id {
#define X(section, name, TYPE, fallback, reloadable, help) BKV_OPT_##section##_##name,
    BKV_OPTIONS(X)
#undef X
        BKV_OPTION_COUNT
} bkv_option_id_t;

typedef struct bkv_option {
    const char *section, *name, *fallback, *help;
    bkv_option_type_t type;
    bool reloadable;
    size_t offset; // of its value in bkv_config_t
} bkv_option_t;

extern const bkv_option_t bkv_options[BKV_OPTION_COUNT];

// What the command line said. Strings are borrowed.
typedef struct bkv_flags {
    const char *file;                     // NULL: BKV_CONFIG_DEFAULT_FILE if it is there
    const char *values[BKV_OPTION_COUNT]; // NULL: not given
} bkv_flags_t;

typedef struct bkv_tenant_quota {
    char *name; // "": the default tenant
    uint64_t bytes;
    int line; // of the file
} bkv_tenant_quota_t;

// An option's value is config->section_name. Strings are never NULL.
typedef struct bkv_config {
#define X(section, name, TYPE, fallback, reloadable, help) bkv_option_##TYPE##_t section##_##name;
    BKV_OPTIONS(X)
#undef X
    bkv_tenant_quota_t *tenants;
    char *file; // that was read; NULL: none
    uint32_t tenant_count;
    int origin[BKV_OPTION_COUNT]; // line of the file; 0: default; -1: flag
} bkv_config_t;

// INVALID_ARGUMENT: "file:line: [section] key: reason" or "--flag: reason".
bkv_status_t bkv_config_load(const bkv_flags_t *flags, bkv_config_t **config, bkv_error_t *err);
void bkv_config_destroy(bkv_config_t *config);

// Takes over from `next` what may change while running, and logs what did, and what changed but needs a restart.
void bkv_config_adopt(bkv_config_t *current, bkv_config_t *next);

// listen.socket_mode as a number.
unsigned bkv_config_socket_mode(const bkv_config_t *config);

// transport.verbs_gid as a number; -1: auto.
int bkv_config_verbs_gid(const bkv_config_t *config);

// The effective configuration, as a file that loads to the same.
void bkv_config_print(const bkv_config_t *config, FILE *out);

// Every option with its help and, commented out, its default: deploy/balancekvd.conf.example.
void bkv_config_print_example(FILE *out);

#endif
