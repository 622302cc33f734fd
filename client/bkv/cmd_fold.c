// cmd_fold.c - `bkv fold`: a summary of consecutive blocks, made by the daemon: one record, or one for each band of a profile.
#include "cli.h"

#include "memory.h"
#include "records.h"
#include "session.h"

// --rate is the fold's where a keys file has the spec; otherwise it is a part of the spec.
static bkv_status_t read_params(bkv_cli_t *cli, bkv_fold_request_t *params, bkv_error_t *err) {
    bool rate = cli->keys != NULL && bkv_cli_given(cli, BKV_OPT_rate);
    *params = (bkv_fold_request_t){.budget_bytes = cli->budget, .rate = rate && cli->budget == 0 ? cli->rate : 0};
    if (rate && cli->rate == 0) {
        return bkv_cli_usage(cli, err, "--rate: 0 is not in 1..%d", BKV_MAX_BAND_RATE);
    }
    bkv_status_t status = bkv_cli_profile(cli, rate ? cli->rate : 0, &params->profile, err);
    if (status == BKV_OK && params->budget_bytes == 0 && params->rate == 0 && params->profile.count == 0) {
        status = bkv_cli_usage(cli, err, "--budget: missing (or --profile, or with --keys --rate)");
    }
    return status;
}

bkv_status_t bkv_cmd_fold(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_session_t session;
    bkv_fold_request_t params;
    bkv_status_t status = read_params(cli, &params, err);
    if (status != BKV_OK) {
        return status;
    }
    status = bkv_session_start(&session, cli, err);
    if (status == BKV_OK) {
        bkv_record_t *records = bkv_xcalloc(BKV_FOLD_RECORDS, sizeof *records);
        const bkv_keyset_t *keyset = &session.keyset;
        size_t count = 0;
        status = bkv_fold_remote(session.client, &session.id, keyset->keys, keyset->count, &params, 0, records, &count, err);
        if (status == BKV_OK) {
            status = bkv_records_emit(cli, keyset, records, count, err);
        }
        bkv_records_free(records, BKV_FOLD_RECORDS);
    }
    bkv_session_end(&session);
    return status;
}
