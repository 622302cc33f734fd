// config.c - reads an INI file with inih, lays flags over it, reloads. What values are allowed is config_check.c's.
//
// inih gives its handler no line numbers, cuts long lines and section names silently, and takes an indented line for more of
// the one above. So it is fed by a reader of ours, which counts lines, refuses long ones, strips indentation and notes
// sections.
#include "daemon/config.h"

#include "daemon/config_check.h"
#include "daemon/observe/log.h"
#include "daemon/observe/text.h"
#include "daemon/pipeline/model.h"
#include "daemon/value.h"

#include <assert.h>
#include <errno.h>
#include <ini.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TENANTS    4096
#define TENANT_SECTION "tenant"
#define ORIGIN_FLAG    (-1)
#define SECTION_MAX    256
#define LINE_TEXT_MAX  4096

const bkv_option_t bkv_options[BKV_OPTION_COUNT] = {
#define X(section, name, TYPE, fallback, reloadable, help)                                                                     \
    {#section, #name, fallback, help, BKV_##TYPE, reloadable, offsetof(bkv_config_t, section##_##name)},
    BKV_OPTIONS(X)
#undef X
};

// ---- values ----

static void *value_of(bkv_config_t *config, size_t id) {
    return (char *)config + bkv_options[id].offset;
}

// Returns NULL or what was expected instead.
static const char *set_value(bkv_config_t *config, size_t id, const char *text) {
    void *value = value_of(config, id);
    switch (bkv_options[id].type) {
    case BKV_BOOL:
        return bkv_value_parse_bool(text, value);
    case BKV_U32:
        return bkv_value_parse_u32(text, value);
    case BKV_SIZE:
        return bkv_value_parse_size(text, value);
    case BKV_MS:
        return bkv_value_parse_ms(text, value);
    case BKV_STRING:
        break;
    }
    char *copy = strdup(text);
    if (copy == NULL) {
        return "no memory";
    }
    char **string = value;
    free(*string);
    *string = copy;
    return NULL;
}

// The value as it would stand in a file; points into `number` or into the configuration.
static const char *value_text(const bkv_config_t *config, size_t id, char number[BKV_VALUE_TEXT]) {
    const void *value = (const char *)config + bkv_options[id].offset;
    switch (bkv_options[id].type) {
    case BKV_BOOL:
        return *(const bool *)value ? "yes" : "no";
    case BKV_U32:
        snprintf(number, BKV_VALUE_TEXT, "%u", *(const uint32_t *)value);
        return number;
    case BKV_SIZE:
        bkv_value_format_size(*(const uint64_t *)value, number);
        return number;
    case BKV_MS:
        bkv_value_format_ms(*(const uint64_t *)value, number);
        return number;
    case BKV_STRING:
        break;
    }
    return *(char *const *)value;
}

static size_t value_bytes(size_t id) {
    switch (bkv_options[id].type) {
    case BKV_BOOL:
        return sizeof(bool);
    case BKV_U32:
        return sizeof(uint32_t);
    case BKV_SIZE:
    case BKV_MS:
        return sizeof(uint64_t);
    case BKV_STRING:
        break;
    }
    return sizeof(char *);
}

// ---- the file ----

typedef struct reading {
    bkv_config_t *config;
    FILE *stream;
    const char *path;
    int line;
    char section[SECTION_MAX]; // whole, where inih would cut it
    bkv_status_t status;       // of the first thing that was wrong
    bkv_error_t *err;
} reading_t;

static void refuse(reading_t *reading, const char *format, ...) BKV_PRINTF(2, 3);
static void refuse(reading_t *reading, const char *format, ...) {
    if (reading->status != BKV_OK) {
        return; // the first one is told
    }
    char reason[BKV_MESSAGE_MAX];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason, sizeof(reason), format, arguments);
    va_end(arguments);
    reading->status = bkv_fail(reading->err, BKV_INVALID_ARGUMENT, "%s:%d: %s", reading->path, reading->line, reason);
}

// The name in a [tenant NAME] section, "" for [tenant]; NULL when it is another section.
static const char *tenant_name(const char *section) {
    const size_t length = sizeof(TENANT_SECTION) - 1;
    if (strncmp(section, TENANT_SECTION, length) != 0 || (section[length] != '\0' && section[length] != ' ')) {
        return NULL;
    }
    return section + length + strspn(section + length, " ");
}

static void check_section(reading_t *reading) {
    const char *tenant = tenant_name(reading->section);
    if (tenant != NULL) {
        if (strlen(tenant) > BKV_TENANT_NAME_MAX || !bkv_utf8_check(tenant)) {
            refuse(reading, "[%.80s]: a tenant's name is at most %d bytes of UTF-8", reading->section, BKV_TENANT_NAME_MAX);
        }
        return;
    }
    for (size_t id = 0; id < BKV_OPTION_COUNT; id++) {
        if (strcmp(bkv_options[id].section, reading->section) == 0) {
            return;
        }
    }
    refuse(reading, "[%.80s]: no such section", reading->section);
}

static void note_section(reading_t *reading, const char *line) {
    size_t length = strcspn(line + 1, "]\n");
    if (length >= sizeof(reading->section)) {
        refuse(reading, "a section's name is too long");
        return;
    }
    memcpy(reading->section, line + 1, length);
    reading->section[length] = '\0';
    check_section(reading);
}

// inih's reader: one line per call, into `out` of `capacity` bytes.
static char *read_line(char *out, int capacity, void *user) {
    reading_t *reading = user;
    char text[LINE_TEXT_MAX];
    if (reading->status != BKV_OK || fgets(text, sizeof(text), reading->stream) == NULL) {
        return NULL;
    }
    reading->line++;
    const char *line = text + (reading->line == 1 && strncmp(text, "\xef\xbb\xbf", 3) == 0 ? 3 : 0); // a byte order mark
    line += strspn(line, " \t");
    size_t length = strlen(line);
    bool comment = line[0] == '#' || line[0] == ';';
    bool whole = length > 0 && (line[length - 1] == '\n' || feof(reading->stream));
    if (!whole || (!comment && length >= (size_t)capacity)) {
        refuse(reading, "the line is longer than %d bytes or has a NUL in it", capacity - 2);
        return NULL;
    }
    if (line[0] == '[') {
        note_section(reading, line);
    }
    snprintf(out, (size_t)capacity, "%s", comment ? "\n" : line);
    return out;
}

static void set_quota(reading_t *reading, const char *tenant, const char *key, const char *text) {
    bkv_config_t *config = reading->config;
    if (strcmp(key, "quota") != 0) {
        refuse(reading, "[%s] %s: no such key", reading->section, key);
        return;
    }
    for (uint32_t i = 0; i < config->tenant_count; i++) {
        if (strcmp(config->tenants[i].name, tenant) == 0) {
            refuse(reading, "[%s] quota: is set in line %d already", reading->section, config->tenants[i].line);
            return;
        }
    }
    uint64_t bytes;
    const char *expected = bkv_value_parse_size(text, &bytes);
    if (expected != NULL) {
        refuse(reading, "[%s] quota: \"%.80s\": %s", reading->section, text, expected);
        return;
    }
    bkv_tenant_quota_t *tenants = NULL;
    char *name = NULL;
    if (config->tenant_count < MAX_TENANTS) {
        tenants = realloc(config->tenants, (config->tenant_count + 1) * sizeof(tenants[0]));
        config->tenants = tenants != NULL ? tenants : config->tenants;
        name = tenants != NULL ? strdup(tenant) : NULL;
    }
    if (name == NULL) {
        refuse(reading, "[%s]: too many tenants", reading->section);
        return;
    }
    config->tenants[config->tenant_count++] = (bkv_tenant_quota_t){name, bytes, reading->line};
}

// inih's handler; its `section` may be cut, so ours is used.
static int take_pair(void *user, const char *section, const char *key, const char *text) {
    (void)section;
    reading_t *reading = user;
    bkv_config_t *config = reading->config;
    const char *tenant = reading->section[0] != '\0' ? tenant_name(reading->section) : NULL;
    if (reading->section[0] == '\0') {
        refuse(reading, "%s: stands before the first [section]", key);
    } else if (tenant != NULL) {
        set_quota(reading, tenant, key, text);
    }
    if (reading->status != BKV_OK || tenant != NULL) {
        return reading->status == BKV_OK;
    }
    for (size_t id = 0; id < BKV_OPTION_COUNT; id++) {
        if (strcmp(bkv_options[id].section, reading->section) != 0 || strcmp(bkv_options[id].name, key) != 0) {
            continue;
        }
        if (config->origin[id] > 0) {
            refuse(reading, "[%s] %s: is set in line %d already", reading->section, key, config->origin[id]);
            return 0;
        }
        const char *expected = set_value(config, id, text);
        if (expected != NULL) {
            refuse(reading, "[%s] %s: \"%.80s\": %s", reading->section, key, text, expected);
            return 0;
        }
        config->origin[id] = reading->line;
        return 1;
    }
    refuse(reading, "[%s] %s: no such key", reading->section, key);
    return 0;
}

static bkv_status_t read_file(bkv_config_t *config, const char *path, bkv_error_t *err) {
    reading_t reading = {.config = config, .path = path, .status = BKV_OK, .err = err};
    reading.stream = fopen(path, "re");
    if (reading.stream == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %s", path, strerror(errno));
    }
    int first_bad_line = ini_parse_stream(read_line, &reading, take_pair, &reading);
    if (reading.status == BKV_OK && ferror(reading.stream)) {
        reading.status = bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: cannot be read", path);
    }
    if (reading.status == BKV_OK && first_bad_line != 0) {
        reading.line = first_bad_line;
        refuse(&reading, "neither a [section], nor key = value, nor a comment");
    }
    fclose(reading.stream);
    return reading.status;
}

// ---- load ----

static bkv_status_t load_file(bkv_config_t *config, const char *path, bkv_error_t *err) {
    bool required = path != NULL;
    if (!required) {
        FILE *probe = fopen(BKV_CONFIG_DEFAULT_FILE, "re");
        if (probe == NULL && errno == ENOENT) {
            return BKV_OK;
        }
        if (probe != NULL) {
            fclose(probe);
        }
        path = BKV_CONFIG_DEFAULT_FILE;
    }
    config->file = strdup(path);
    return config->file == NULL ? bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory") : read_file(config, path, err);
}

static bkv_status_t lay_flags(bkv_config_t *config, const bkv_flags_t *flags, bkv_error_t *err) {
    for (size_t id = 0; id < BKV_OPTION_COUNT; id++) {
        if (flags->values[id] == NULL) {
            continue;
        }
        config->origin[id] = ORIGIN_FLAG;
        const char *expected = set_value(config, id, flags->values[id]);
        if (expected != NULL) {
            return bkv_config_refuse(config, id, err, "\"%.80s\": %s", flags->values[id], expected);
        }
    }
    return BKV_OK;
}

bkv_status_t bkv_config_load(const bkv_flags_t *flags, bkv_config_t **config_out, bkv_error_t *err) {
    bkv_config_t *config = calloc(1, sizeof(*config));
    if (config == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for the configuration");
    }
    for (size_t id = 0; id < BKV_OPTION_COUNT; id++) {
        const char *expected = set_value(config, id, bkv_options[id].fallback);
        assert(expected == NULL); // options.h is ours
        (void)expected;
    }
    bkv_status_t status = load_file(config, flags->file, err);
    if (status == BKV_OK) {
        status = lay_flags(config, flags, err);
    }
    if (status == BKV_OK) {
        status = bkv_config_check(config, err);
    }
    if (status != BKV_OK) {
        bkv_config_destroy(config);
        return status;
    }
    *config_out = config;
    return BKV_OK;
}

void bkv_config_destroy(bkv_config_t *config) {
    if (config == NULL) {
        return;
    }
    for (size_t id = 0; id < BKV_OPTION_COUNT; id++) {
        if (bkv_options[id].type == BKV_STRING) {
            free(*(char **)value_of(config, id));
        }
    }
    for (uint32_t i = 0; i < config->tenant_count; i++) {
        free(config->tenants[i].name);
    }
    free(config->tenants);
    free(config->file);
    free(config);
}

// ---- reload ----

static void swap_bytes(void *a, void *b, size_t bytes) {
    uint8_t spare[sizeof(uint64_t)];
    assert(bytes <= sizeof(spare));
    memcpy(spare, a, bytes);
    memcpy(a, b, bytes);
    memcpy(b, spare, bytes);
}

void bkv_config_adopt(bkv_config_t *current, bkv_config_t *next) {
    for (size_t id = 0; id < BKV_OPTION_COUNT; id++) {
        const bkv_option_t *option = &bkv_options[id];
        char number_before[BKV_VALUE_TEXT], number_after[BKV_VALUE_TEXT];
        const char *before = value_text(current, id, number_before), *after = value_text(next, id, number_after);
        if (strcmp(before, after) == 0) {
            continue;
        }
        if (option->reloadable) {
            bkv_log(BKV_LOG_INFO, 0, "reload: %s.%s: %s, was %s", option->section, option->name, after, before);
            swap_bytes(value_of(current, id), value_of(next, id), value_bytes(id));
            current->origin[id] = next->origin[id];
        } else {
            bkv_log(BKV_LOG_WARN, 0, "reload: %s.%s: stays %s; %s needs a restart", option->section, option->name, before,
                    after);
        }
    }
    bkv_tenant_quota_t *tenants = current->tenants;
    uint32_t count = current->tenant_count;
    current->tenants = next->tenants;
    current->tenant_count = next->tenant_count;
    next->tenants = tenants; // for the caller to compare with, and to destroy
    next->tenant_count = count;
}

// ---- print ----

static bool starts_section(size_t id) {
    return id == 0 || strcmp(bkv_options[id - 1].section, bkv_options[id].section) != 0;
}

static void print_option(size_t id, const char *prefix, const char *text, FILE *out) {
    const bkv_option_t *option = &bkv_options[id];
    if (starts_section(id)) {
        fprintf(out, "%s[%s]\n", id == 0 ? "" : "\n", option->section);
    }
    fprintf(out, "# %s%s\n%s%s =%s%s\n", option->help, option->reloadable ? " (reloadable)" : "", prefix, option->name,
            text[0] == '\0' ? "" : " ", text);
}

void bkv_config_print(const bkv_config_t *config, FILE *out) {
    for (size_t id = 0; id < BKV_OPTION_COUNT; id++) {
        char number[BKV_VALUE_TEXT];
        print_option(id, "", value_text(config, id, number), out);
    }
    for (uint32_t i = 0; i < config->tenant_count; i++) {
        char number[BKV_VALUE_TEXT];
        bkv_value_format_size(config->tenants[i].bytes, number);
        fprintf(out, "\n[%s%s%s]\nquota = %s\n", TENANT_SECTION, config->tenants[i].name[0] == '\0' ? "" : " ",
                config->tenants[i].name, number);
    }
}

void bkv_config_print_example(FILE *out) {
    fprintf(out,
            "# %s: configuration of balancekvd(8).\n"
            "#\n"
            "# Lines that start with # or ; are comments; what is commented out below is the default. Every option is also a\n"
            "# flag (max_jobs: --max-jobs), and flags win. Sizes take K, M, G, T; times ms, s, m, h. `systemctl reload` takes\n"
            "# over what is marked reloadable; `balancekvd --check-config` checks this file.\n\n",
            BKV_CONFIG_DEFAULT_FILE);
    for (size_t id = 0; id < BKV_OPTION_COUNT; id++) {
        print_option(id, "#", bkv_options[id].fallback, out);
    }
    fprintf(out, "\n# One section per tenant whose quota differs from memory.tenant_quota (reloadable); [tenant] alone is the\n"
                 "# default tenant.\n"
                 "#[tenant alice]\n"
                 "#quota = 4G\n");
}
