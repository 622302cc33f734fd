// records.c - see records.h. The tensors are unpack.c's business.
#include "records.h"

#include "memory.h"
#include "table.h"
#include "text.h"
#include "unpack.h"

#include <inttypes.h>
#include <stdlib.h>

bkv_kept_t bkv_record_kept(const void *record) {
    const bkv_record_header_t *header = record;
    bkv_kept_t kept = {.least = UINT32_MAX};
    uint64_t sum = 0;
    for (uint32_t layer = 0; layer < header->layers; layer++) {
        for (uint32_t head = 0; head < header->heads; head++) {
            bkv_section_view_t view;
            bkv_record_section(record, layer, head, &view);
            kept.least = view.tokens < kept.least ? view.tokens : kept.least;
            kept.most = view.tokens > kept.most ? view.tokens : kept.most;
            sum += view.tokens;
        }
    }
    kept.mean = (double)sum / ((double)header->layers * header->heads);
    return kept;
}

static void list_table(const bkv_record_t *records, size_t count) {
    bkv_table_t *table = bkv_table_create(">#|>position|>tokens|>kept|>bytes|>rate|codec|key");
    for (size_t i = 0; i < count; i++) {
        const void *data = records[i].data;
        const bkv_record_header_t *header = data;
        bkv_kept_t kept = bkv_record_kept(data);
        char bytes[BKV_TEXT_MAX], key[2 * BKV_KEY_BYTES + 1];
        bkv_hex(records[i].key.bytes, BKV_KEY_BYTES, key);
        bkv_table_cell(table, "%zu", i);
        bkv_table_cell(table, "%" PRIu64, header->position);
        bkv_table_cell(table, "%u", header->tokens);
        bkv_table_cell(table, "%.1f", kept.mean);
        bkv_table_cell(table, "%s", bkv_text_of_bytes((double)header->length, bytes));
        bkv_table_cell(table, "%.2fx", (double)bkv_unpack_raw_bytes(&data, 1) / (double)header->length);
        bkv_table_cell(table, "%s", bkv_codec_name((bkv_codec_t)header->codec));
        bkv_table_cell(table, "%s", key);
    }
    bkv_table_print(table, stdout, bkv_table_color(stdout));
    bkv_table_destroy(table);
}

static void list_json(const bkv_record_t *records, size_t count, uint64_t raw, uint64_t stored) {
    json_t *list = json_array();
    for (size_t i = 0; i < count; i++) {
        const bkv_record_header_t *header = records[i].data;
        bkv_kept_t kept = bkv_record_kept(header);
        json_array_append_new(list,
                              json_pack("{s:o, s:I, s:I, s:I, s:s, s:{s:I, s:I, s:f}}", "key",
                                        bkv_cli_json_hex(records[i].key.bytes, BKV_KEY_BYTES), "position",
                                        (json_int_t)header->position, "tokens", (json_int_t)header->tokens, "bytes",
                                        (json_int_t)header->length, "codec", bkv_codec_name((bkv_codec_t)header->codec), "kept",
                                        "least", (json_int_t)kept.least, "most", (json_int_t)kept.most, "mean", kept.mean));
    }
    bkv_cli_print_json(
        json_pack("{s:o, s:I, s:I}", "records", list, "raw_bytes", (json_int_t)raw, "stored_bytes", (json_int_t)stored), false);
}

static bkv_status_t write_tensors(const bkv_cli_t *cli, const bkv_keyset_t *keyset, const void *const *data, size_t count,
                                  uint64_t raw, uint64_t stored, bkv_error_t *err) {
    const bkv_record_header_t *first = data[0];
    char raw_text[BKV_TEXT_MAX], stored_text[BKV_TEXT_MAX];
    snprintf(raw_text, sizeof raw_text, "%" PRIu64, raw);
    snprintf(stored_text, sizeof stored_text, "%" PRIu64, stored);
    const char *const metadata[][2] = {{"stored_bytes", stored_text},
                                       {"raw_bytes", raw_text},
                                       {"codec", bkv_codec_name((bkv_codec_t)first->codec)},
                                       {"version", bkv_version()}};
    if ((uint32_t)first->first_layer + first->layers > keyset->spec.layers) {
        return bkv_fail(err, BKV_INTERNAL, "record.first_layer: layers beyond the spec's %u", keyset->spec.layers);
    }
    bkv_unpack_t unpack = {
        .records = data,
        .count = count,
        .layer_numbers = keyset->layer_numbers + first->first_layer,
        .metadata = metadata,
        .metadata_count = sizeof metadata / sizeof *metadata,
    };
    bkv_status_t status = bkv_unpack_write(&unpack, cli->out, err);
    if (status == BKV_OK && unpack.saturated > 0) {
        fprintf(stderr, "bkv: warning: %" PRIu64 " values beyond float16 were written as +-65504\n", unpack.saturated);
    }
    return status;
}

bkv_status_t bkv_records_emit(const bkv_cli_t *cli, const bkv_keyset_t *keyset, const bkv_record_t *records, size_t count,
                              bkv_error_t *err) {
    const void **data = bkv_xcalloc(count, sizeof *data);
    for (size_t i = 0; i < count; i++) {
        data[i] = records[i].data;
    }
    uint64_t raw = bkv_unpack_raw_bytes(data, count), stored = bkv_unpack_stored_bytes(data, count);
    bkv_status_t status = BKV_OK;
    if (cli->out != NULL) {
        status = write_tensors(cli, keyset, data, count, raw, stored, err);
    }
    if (status == BKV_OK && cli->record != NULL) {
        status = bkv_unpack_write_records(data, count, cli->record, err);
    }
    if (status == BKV_OK && cli->json) {
        list_json(records, count, raw, stored);
    } else if (status == BKV_OK) {
        list_table(records, count);
    }
    free((void *)data);
    return status;
}

void bkv_records_free(bkv_record_t *records, size_t count) {
    for (size_t i = 0; i < count; i++) {
        bkv_record_free(&records[i]);
    }
    free(records);
}
