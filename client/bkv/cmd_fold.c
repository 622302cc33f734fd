// cmd_fold.c - `bkv fold`: one summary of consecutive blocks, made by the daemon.
#include "cli.h"

#include "memory.h"
#include "records.h"
#include "session.h"

bkv_status_t bkv_cmd_fold(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_session_t session;
    if (cli->budget == 0) {
        return bkv_cli_usage(cli, err, "--budget: missing");
    }
    bkv_status_t status = bkv_session_start(&session, cli, err);
    if (status == BKV_OK) {
        bkv_record_t *record = bkv_xcalloc(1, sizeof *record);
        const bkv_keyset_t *keyset = &session.keyset;
        status = bkv_fold_remote(session.client, &session.id, keyset->keys, keyset->count, cli->budget, 0, record, err);
        if (status == BKV_OK) {
            status = bkv_records_emit(cli, keyset, record, 1, err);
        }
        bkv_records_free(record, 1);
    }
    bkv_session_end(&session);
    return status;
}
