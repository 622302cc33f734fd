// session.c - see session.h.
#include "session.h"

#define BATCH_WITHOUT_LIMIT 1024

bkv_status_t bkv_session_connect(bkv_session_t *session, const bkv_cli_t *cli, bkv_error_t *err) {
    *session = (bkv_session_t){.client = NULL};
    bkv_client_options_t options = {
        .endpoint = cli->endpoint,
        .timeout_ms = cli->timeout,
        .tls_ca = cli->tls_ca,
        .tls_cert = cli->tls_cert,
        .tls_key = cli->tls_key,
        .tls_name = cli->tls_name,
        .transport = cli->transport,
        .window_bytes = cli->window_bytes,
        .verbs_device = cli->verbs_device,
        .route = cli->route,
    };
    return bkv_client_create(&options, &session->client, err);
}

bkv_status_t bkv_session_open(bkv_session_t *session, const bkv_cli_t *cli, const bkv_spec_t *spec, bkv_error_t *err) {
    bkv_status_t status = bkv_session_connect(session, cli, err);
    if (status != BKV_OK) {
        return status;
    }
    return bkv_open(session->client, spec, 0, &session->id, &session->limits, err);
}

bkv_status_t bkv_session_start(bkv_session_t *session, bkv_cli_t *cli, bkv_error_t *err) {
    bkv_keyset_t keyset;
    *session = (bkv_session_t){.client = NULL};
    bkv_status_t status = bkv_keyset_init(&keyset, cli, cli->args, cli->arg_count, err);
    if (status == BKV_OK) {
        status = bkv_session_open(session, cli, &keyset.spec, err);
    }
    session->keyset = keyset;
    return status;
}

void bkv_session_end(bkv_session_t *session) {
    bkv_client_destroy(session->client);
    bkv_keyset_deinit(&session->keyset);
    *session = (bkv_session_t){.client = NULL};
}

size_t bkv_session_batch(const bkv_session_t *session, size_t left) {
    size_t most = session->limits.max_batch > 0 ? session->limits.max_batch : BATCH_WITHOUT_LIMIT;
    return left < most ? left : most;
}
