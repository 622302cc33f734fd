// cmd_get.c - `bkv get`: fetch records and show or write them.
#include "cli.h"

#include "memory.h"
#include "records.h"
#include "session.h"
#include "table.h"

// Few enough that the bar moves, many enough that round trips do not matter.
#define KEYS_PER_CALL 16

static bkv_status_t fetch(const bkv_cli_t *cli, bkv_session_t *session, bkv_record_t *records, bkv_error_t *err) {
    const bkv_keyset_t *keyset = &session->keyset;
    bkv_range_t range = {
        .first_layer = cli->layer_range.first,
        .layers = cli->layer_range.count,
        .first_head = cli->head_range.first,
        .heads = cli->head_range.count,
    };
    bkv_status_t status = BKV_OK;
    bkv_progress_t progress;
    bkv_progress_begin(&progress, "get", keyset->count, cli->json);
    for (size_t done = 0; done < keyset->count && status == BKV_OK;) {
        size_t batch = bkv_session_batch(session, keyset->count - done);
        batch = batch < KEYS_PER_CALL ? batch : KEYS_PER_CALL;
        uint64_t bytes = 0;
        status = bkv_get(session->client, &session->id, keyset->keys + done, batch, &range, 0, records + done, err);
        for (size_t i = 0; i < batch; i++) {
            bytes += records[done + i].length;
        }
        done += batch;
        bkv_progress_step(&progress, batch, bytes);
    }
    bkv_progress_end(&progress);
    return status;
}

bkv_status_t bkv_cmd_get(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_session_t session;
    bkv_status_t status = bkv_session_start(&session, cli, err);
    if (status == BKV_OK) {
        size_t count = session.keyset.count;
        bkv_record_t *records = bkv_xcalloc(count, sizeof *records);
        status = fetch(cli, &session, records, err);
        if (status == BKV_OK) {
            status = bkv_records_emit(cli, &session.keyset, records, count, err);
        }
        bkv_records_free(records, count);
    }
    bkv_session_end(&session);
    return status;
}
