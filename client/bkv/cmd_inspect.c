// cmd_inspect.c - `bkv inspect`: what is in a record, from a file or from the daemon, in words.
#include "cli.h"

#include "memory.h"
#include "records.h"
#include "session.h"
#include "table.h"
#include "text.h"
#include "unpack.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define PARTS 7

// Where a record's bytes go, in the order of part_names.
typedef struct parts {
    uint64_t bytes[PARTS];
} parts_t;

static const char *const part_names[PARTS] = {"header and directory", "index", "weights", "key params", "keys",
                                              "value params",         "values"};

static void add_section(const bkv_section_view_t *view, parts_t *parts) {
    const bkv_plane_layout_t *layout = &view->layout;
    parts->bytes[1] += layout->index_bytes;
    parts->bytes[2] += view->has_weights ? layout->key_params - layout->weights : 0;
    parts->bytes[3] += layout->key_codes - layout->key_params;
    parts->bytes[4] += (uint64_t)view->tokens * layout->key_row;
    parts->bytes[5] += layout->value_codes;
    parts->bytes[6] += (uint64_t)view->tokens * layout->value_row;
}

// One layer in a line: what its heads keep.
typedef struct layer_facts {
    uint32_t least, most;
    double mean, logw_least, logw_most; // log weights; least > most: none
    uint8_t key_bits, value_bits;       // of the first head; 0: heads differ
} layer_facts_t;

static layer_facts_t look_at_layer(const void *record, uint32_t layer, parts_t *parts) {
    const bkv_record_header_t *header = record;
    layer_facts_t facts = {.least = UINT32_MAX, .logw_least = INFINITY, .logw_most = -INFINITY};
    for (uint32_t head = 0; head < header->heads; head++) {
        bkv_section_view_t view;
        bkv_record_section(record, layer, head, &view);
        float *logw = bkv_xcalloc(view.tokens, sizeof *logw);
        bkv_section_read(&view, NULL, NULL, logw, NULL);
        for (uint32_t t = 0; t < view.tokens; t++) {
            facts.logw_least = logw[t] < facts.logw_least ? logw[t] : facts.logw_least;
            facts.logw_most = logw[t] > facts.logw_most ? logw[t] : facts.logw_most;
        }
        free(logw);
        facts.least = view.tokens < facts.least ? view.tokens : facts.least;
        facts.most = view.tokens > facts.most ? view.tokens : facts.most;
        facts.mean += (double)view.tokens / header->heads;
        facts.key_bits = head == 0 || facts.key_bits == view.key_bits ? view.key_bits : 0;
        facts.value_bits = head == 0 || facts.value_bits == view.value_bits ? view.value_bits : 0;
        add_section(&view, parts);
    }
    return facts;
}

static const char *bits_text(uint8_t bits, char *out) {
    if (bits == 0 || bits == BKV_BITS_NATIVE) {
        return bits == 0 ? "mixed" : "native";
    }
    snprintf(out, BKV_TEXT_MAX, "%u", bits);
    return out;
}

static json_t *head_json(const void *record, uint32_t layer, uint32_t head) {
    bkv_section_view_t view;
    bkv_record_section(record, layer, head, &view);
    return json_pack("{s:i, s:i, s:i}", "tokens", (int)view.tokens, "key_bits",
                     view.key_bits == BKV_BITS_NATIVE ? 0 : (int)view.key_bits, "value_bits",
                     view.value_bits == BKV_BITS_NATIVE ? 0 : (int)view.value_bits);
}

static json_t *flags_json(uint8_t flags) {
    json_t *list = json_array();
    if (flags & BKV_RECORD_WEIGHTS) {
        json_array_append_new(list, json_string("weights"));
    }
    if (flags & BKV_RECORD_FOLD) {
        json_array_append_new(list, json_string("fold"));
    }
    if (flags & BKV_RECORD_SLICE) {
        json_array_append_new(list, json_string("slice"));
    }
    return list;
}

static json_t *header_json(const bkv_record_header_t *header) {
    char seed[BKV_TEXT_MAX], tenant[BKV_TEXT_MAX], checksum[BKV_TEXT_MAX];
    snprintf(seed, sizeof seed, "%" PRIu64, header->seed);
    snprintf(tenant, sizeof tenant, "%016" PRIx64, header->tenant);
    snprintf(checksum, sizeof checksum, "%016" PRIx64, header->checksum);
    return json_pack("{s:s, s:i, s:I, s:s, s:o, s:o, s:s, s:s, s:I, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:i, s:o}", "codec",
                     bkv_codec_name((bkv_codec_t)header->codec), "version", (int)header->version, "length",
                     (json_int_t)header->length, "checksum", checksum, "key", bkv_cli_json_hex(header->key, BKV_KEY_BYTES),
                     "spec_id", bkv_cli_json_hex(header->spec_id, BKV_SPEC_ID_BYTES), "tenant", tenant, "seed", seed,
                     "position", (json_int_t)header->position, "tokens", (int)header->tokens, "layers", (int)header->layers,
                     "heads", (int)header->heads, "first_layer", (int)header->first_layer, "first_head",
                     (int)header->first_head, "key_dim", (int)header->key_dim, "value_dim", (int)header->value_dim, "dtype",
                     bkv_dtype_name((bkv_dtype_t)header->dtype), "rate", (int)header->rate, "flags", flags_json(header->flags));
}

static json_t *record_json(const void *record) {
    const bkv_record_header_t *header = record;
    parts_t parts = {{sizeof *header + (uint64_t)header->layers * header->heads * sizeof(bkv_section_t)}};
    json_t *layers = json_array(), *sizes = json_object();
    for (uint32_t layer = 0; layer < header->layers; layer++) {
        layer_facts_t facts = look_at_layer(record, layer, &parts);
        json_t *heads = json_array();
        for (uint32_t head = 0; head < header->heads; head++) {
            json_array_append_new(heads, head_json(record, layer, head));
        }
        bool any = facts.logw_least <= facts.logw_most;
        json_array_append_new(layers, json_pack("{s:i, s:o, s:o, s:o}", "layer", (int)(header->first_layer + layer), "logw_min",
                                                any ? json_real(facts.logw_least) : json_null(), "logw_max",
                                                any ? json_real(facts.logw_most) : json_null(), "heads", heads));
    }
    uint64_t padding = header->length;
    for (size_t i = 0; i < PARTS; i++) {
        json_object_set_new(sizes, part_names[i], json_integer((json_int_t)parts.bytes[i]));
        padding -= parts.bytes[i];
    }
    json_object_set_new(sizes, "padding", json_integer((json_int_t)padding));
    return json_pack("{s:o, s:o, s:o}", "header", header_json(header), "bytes", sizes, "sections", layers);
}

static void show_header(const bkv_record_header_t *header) {
    char key[2 * BKV_KEY_BYTES + 1], spec[2 * BKV_SPEC_ID_BYTES + 1], length[BKV_TEXT_MAX];
    const void *record = header;
    bkv_hex(header->key, BKV_KEY_BYTES, key);
    bkv_hex(header->spec_id, BKV_SPEC_ID_BYTES, spec);
    printf("key        %s\nspec       %s, tenant %016" PRIx64 "\n", key, spec, header->tenant);
    printf("codec      %s", bkv_codec_name((bkv_codec_t)header->codec));
    if (header->rate > 0) {
        printf(" at rate %u", header->rate);
    }
    printf("%s%s%s, seed %" PRIu64 ", format version %u\n", header->flags & BKV_RECORD_FOLD ? ", fold" : "",
           header->flags & BKV_RECORD_SLICE ? ", slice" : "", header->flags & BKV_RECORD_WEIGHTS ? ", weighted" : "",
           header->seed, header->version);
    printf("tokens     %u from position %" PRIu64 "\n", header->tokens, header->position);
    printf("shape      %u layers from %u, %u heads from %u, key dim %u, value dim %u, %s\n", header->layers,
           header->first_layer, header->heads, header->first_head, header->key_dim, header->value_dim,
           bkv_dtype_name((bkv_dtype_t)header->dtype));
    printf("length     %s (%" PRIu64 " bytes), %.2fx less than bf16, checksum %016" PRIx64 "\n\n",
           bkv_text_of_bytes((double)header->length, length), header->length,
           (double)bkv_unpack_raw_bytes(&record, 1) / (double)header->length, header->checksum);
}

static void show_parts(const bkv_record_header_t *header, const parts_t *parts) {
    bkv_table_t *table = bkv_table_create("part|>bytes|>share");
    uint64_t padding = header->length;
    for (size_t i = 0; i <= PARTS; i++) {
        uint64_t bytes = i < PARTS ? parts->bytes[i] : padding;
        bkv_table_cell(table, "%s", i < PARTS ? part_names[i] : "padding");
        bkv_table_cell(table, "%" PRIu64, bytes);
        bkv_table_cell(table, "%.1f %%", 100.0 * (double)bytes / (double)header->length);
        padding -= bytes;
    }
    printf("\n");
    bkv_table_print(table, stdout, bkv_table_color(stdout));
    bkv_table_destroy(table);
}

static void show_record(const void *record) {
    const bkv_record_header_t *header = record;
    parts_t parts = {{sizeof *header + (uint64_t)header->layers * header->heads * sizeof(bkv_section_t)}};
    show_header(header);
    bkv_table_t *table = bkv_table_create(">layer|>kept, mean|>least|>most|>key bits|>value bits|>weight, min|>max");
    for (uint32_t layer = 0; layer < header->layers; layer++) {
        layer_facts_t facts = look_at_layer(record, layer, &parts);
        char bits[BKV_TEXT_MAX];
        bool any = facts.logw_least <= facts.logw_most;
        bkv_table_cell(table, "%u", header->first_layer + layer);
        bkv_table_cell(table, "%.1f", facts.mean);
        bkv_table_cell(table, "%u", facts.least);
        bkv_table_cell(table, "%u", facts.most);
        bkv_table_cell(table, "%s", bits_text(facts.key_bits, bits));
        bkv_table_cell(table, "%s", bits_text(facts.value_bits, bits));
        bkv_table_cell(table, "%.3f", any ? exp(facts.logw_least) : 0);
        bkv_table_cell(table, "%.3f", any ? exp(facts.logw_most) : 0);
    }
    bkv_table_print(table, stdout, bkv_table_color(stdout));
    bkv_table_destroy(table);
    show_parts(header, &parts);
}

// Everything of a regular file, aligned as records must be. The caller frees it. NULL: it could not be read.
static uint8_t *read_file(const char *path, size_t *length, bkv_error_t *err) {
    struct stat info;
    uint8_t *bytes = NULL;
    FILE *in = fopen(path, "rbe");
    errno = in == NULL ? errno : EINVAL; // what a file that is not a regular one is called
    if (in != NULL && fstat(fileno(in), &info) == 0 && S_ISREG(info.st_mode)) {
        bytes = bkv_xaligned((size_t)info.st_size);
        *length = fread(bytes, 1, (size_t)info.st_size, in);
    }
    if (bytes == NULL || *length != (size_t)info.st_size) {
        bkv_fail(err, BKV_FAILED_PRECONDITION, "%s: %s", path, strerror(errno));
        free(bytes);
        bytes = NULL;
    }
    if (in != NULL) {
        fclose(in);
    }
    return bytes;
}

// The record at the start of `left` bytes: its length once it proves sound. Checksum first: for damage, DATA_LOSS is the
// better answer than whatever field the damage hit.
static bkv_status_t check_record(const uint8_t *at, size_t left, size_t *length, bkv_error_t *err) {
    if (left < sizeof(bkv_record_header_t)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%zu bytes are no record", left);
    }
    bkv_status_t status = bkv_record_check_header(at, left, err);
    if (status != BKV_OK) {
        return status;
    }
    *length = ((const bkv_record_header_t *)(const void *)at)->length;
    if ((status = bkv_record_verify(at, *length, err)) != BKV_OK) {
        return status;
    }
    return bkv_record_check(at, *length, err);
}

static bkv_status_t inspect_file(const bkv_cli_t *cli, const char *path, json_t *list, bkv_error_t *err) {
    size_t length, at = 0;
    bkv_status_t status;
    uint8_t *bytes = read_file(path, &length, err);
    if (bytes == NULL) {
        return BKV_FAILED_PRECONDITION;
    }
    do {
        size_t step = 0;
        bkv_error_t why = {.status = BKV_OK};
        status = check_record(bytes + at, length - at, &step, &why);
        if (status != BKV_OK) {
            bkv_fail(err, status, "%s at byte %zu: %s", path, at, why.message);
        } else if (step % BKV_RECORD_ALIGN != 0) {
            status = bkv_fail(err, BKV_INVALID_ARGUMENT, "%s at byte %zu: length %zu is not a multiple of %d", path, at, step,
                              BKV_RECORD_ALIGN);
        } else if (cli->json) {
            json_array_append_new(list, record_json(bytes + at));
        } else {
            printf("%s", at > 0 ? "\n" : "");
            show_record(bytes + at);
        }
        at += step;
    } while (status == BKV_OK && at < length);
    free(bytes);
    return status;
}

static bkv_status_t inspect_keys(bkv_cli_t *cli, json_t *list, bkv_error_t *err) {
    bkv_session_t session;
    bkv_status_t status = bkv_session_start(&session, cli, err);
    for (size_t i = 0; status == BKV_OK && i < session.keyset.count; i++) {
        bkv_record_t record = {.data = NULL};
        status = bkv_get(session.client, &session.id, &session.keyset.keys[i], 1, NULL, 0, &record, err);
        if (status == BKV_OK && cli->json) {
            json_array_append_new(list, record_json(record.data));
        } else if (status == BKV_OK) {
            printf("%s", i > 0 ? "\n" : "");
            show_record(record.data);
        }
        bkv_record_free(&record);
    }
    bkv_session_end(&session);
    return status;
}

// An operand is a key if it is 64 hex digits, else a file; without operands, --keys says which.
bkv_status_t bkv_cmd_inspect(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_key_t key;
    json_t *list = json_array();
    bkv_status_t status = BKV_OK;
    if (cli->arg_count == 0 && cli->keys == NULL) {
        status = bkv_cli_usage(cli, err, "which record? Give a file, a key or --keys FILE");
    } else if (cli->arg_count == 0 || bkv_hex_parse(cli->args[0], key.bytes, BKV_KEY_BYTES)) {
        status = inspect_keys(cli, list, err);
    } else {
        for (int i = 0; i < cli->arg_count && status == BKV_OK; i++) {
            status = inspect_file(cli, cli->args[i], list, err);
        }
    }
    if (status == BKV_OK && cli->json) {
        bkv_cli_print_json(json_incref(list), false);
    }
    json_decref(list);
    return status;
}
