// cmd_lookup.c - `bkv lookup`, `bkv drop`, `bkv pin` and `bkv unpin`: what the daemon holds, and how long.
#include "cli.h"

#include "memory.h"
#include "session.h"
#include "table.h"
#include "text.h"

#include <inttypes.h>
#include <stdlib.h>

#define DEFAULT_LEASE_MS 60000

static void show_states(const bkv_cli_t *cli, const bkv_keyset_t *keyset, const bool *resident, size_t prefix, size_t found) {
    if (cli->json) {
        json_t *blocks = json_array();
        for (size_t i = 0; i < keyset->count; i++) {
            json_array_append_new(blocks, json_pack("{s:o, s:b}", "key", bkv_cli_json_hex(keyset->keys[i].bytes, BKV_KEY_BYTES),
                                                    "resident", resident[i]));
        }
        bkv_cli_print_json(json_pack("{s:I, s:I, s:I, s:o}", "prefix", (json_int_t)prefix, "resident", (json_int_t)found,
                                     "count", (json_int_t)keyset->count, "blocks", blocks),
                           false);
        return;
    }
    bkv_table_t *table = bkv_table_create(">#|state|key");
    for (size_t i = 0; i < keyset->count; i++) {
        char key[2 * BKV_KEY_BYTES + 1];
        bkv_hex(keyset->keys[i].bytes, BKV_KEY_BYTES, key);
        bkv_table_cell(table, "%zu", i);
        bkv_table_cell(table, "%s", resident[i] ? "resident" : "absent");
        bkv_table_cell(table, "%s", key);
    }
    bkv_table_print(table, stdout, bkv_table_color(stdout));
    printf("%zu of %zu resident, the first %zu without a gap\n", found, keyset->count, prefix);
    bkv_table_destroy(table);
}

static bkv_status_t look_up(bkv_session_t *session, bool *resident, bkv_error_t *err) {
    const bkv_keyset_t *keyset = &session->keyset;
    for (size_t done = 0; done < keyset->count;) {
        size_t batch = bkv_session_batch(session, keyset->count - done);
        bkv_status_t status =
            bkv_lookup(session->client, &session->id, keyset->keys + done, batch, 0, resident + done, NULL, err);
        if (status != BKV_OK) {
            return status;
        }
        done += batch;
    }
    return BKV_OK;
}

bkv_status_t bkv_cmd_lookup(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_session_t session;
    bkv_status_t status = bkv_session_start(&session, cli, err);
    if (status == BKV_OK) {
        size_t count = session.keyset.count, found = 0, prefix = 0;
        bool *resident = bkv_xcalloc(count, sizeof *resident);
        status = look_up(&session, resident, err);
        for (size_t i = 0; i < count; i++) {
            found += resident[i];
            prefix += resident[i] && prefix == i;
        }
        if (status == BKV_OK) {
            show_states(cli, &session.keyset, resident, prefix, found);
        }
        if (status == BKV_OK && found < count) {
            status = bkv_fail(err, BKV_NOT_FOUND, "%zu of %zu blocks are not resident", count - found, count);
        }
        free(resident);
    }
    bkv_session_end(&session);
    return status;
}

bkv_status_t bkv_cmd_drop(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_session_t session;
    size_t dropped = 0;
    bkv_status_t status = bkv_session_start(&session, cli, err);
    for (size_t done = 0; status == BKV_OK && done < session.keyset.count;) {
        size_t batch = bkv_session_batch(&session, session.keyset.count - done), now = 0;
        status = bkv_drop(session.client, &session.id, session.keyset.keys + done, batch, 0, &now, err);
        dropped += now;
        done += batch;
    }
    if (status == BKV_OK && cli->json) {
        bkv_cli_print_json(json_pack("{s:I, s:I}", "dropped", (json_int_t)dropped, "count", (json_int_t)session.keyset.count),
                           true);
    } else if (status == BKV_OK) {
        printf("dropped %zu of %zu\n", dropped, session.keyset.count);
    }
    bkv_session_end(&session);
    return status;
}

bkv_status_t bkv_cmd_pin(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_session_t session;
    uint64_t lease = 0;
    uint32_t ttl_ms = bkv_cli_given(cli, BKV_OPT_ttl) ? cli->ttl : DEFAULT_LEASE_MS;
    bkv_status_t status = bkv_session_start(&session, cli, err);
    if (status == BKV_OK) {
        const bkv_keyset_t *keyset = &session.keyset;
        status = bkv_pin(session.client, &session.id, keyset->keys, keyset->count, ttl_ms, 0, &lease, err);
    }
    char number[BKV_TEXT_MAX], span[BKV_TEXT_MAX];
    snprintf(number, sizeof number, "%" PRIu64, lease);
    if (status == BKV_OK && cli->json) {
        bkv_cli_print_json(json_pack("{s:s, s:I, s:I}", "lease", number, "ttl_ms", (json_int_t)ttl_ms, "count",
                                     (json_int_t)session.keyset.count),
                           true);
    } else if (status == BKV_OK) {
        printf("lease %s: %zu blocks pinned for %s\n", number, session.keyset.count, bkv_text_of_ns(ttl_ms * 1e6, span));
    }
    bkv_session_end(&session);
    return status;
}

bkv_status_t bkv_cmd_unpin(bkv_cli_t *cli, bkv_error_t *err) {
    uint64_t lease;
    bkv_session_t session;
    if (!bkv_text_u64(cli->args[0], UINT64_MAX, &lease)) {
        return bkv_cli_usage(cli, err, "%.80s: not a lease", cli->args[0]);
    }
    bkv_status_t status = bkv_session_connect(&session, cli, err);
    if (status == BKV_OK) {
        status = bkv_unpin(session.client, lease, 0, err);
    }
    if (status == BKV_OK && cli->json) {
        bkv_cli_print_json(json_pack("{s:s}", "unpinned", cli->args[0]), true);
    } else if (status == BKV_OK) {
        printf("lease %" PRIu64 " ended\n", lease);
    }
    bkv_session_end(&session);
    return status;
}
