// session.h - a connection of one command: the client and the opened spec.
#ifndef BKV_CLI_SESSION_H
#define BKV_CLI_SESSION_H

#include "cli.h"
#include "keyset.h"

typedef struct bkv_session {
    bkv_client_t *client;
    bkv_spec_id_t id;
    bkv_limits_t limits;
    bkv_keyset_t keyset; // of bkv_session_start
} bkv_session_t;

// Only the client. Each of these is ended by bkv_session_end, also after failure.
bkv_status_t bkv_session_connect(bkv_session_t *session, const bkv_cli_t *cli, bkv_error_t *err);

// The client with a spec opened.
bkv_status_t bkv_session_open(bkv_session_t *session, const bkv_cli_t *cli, const bkv_spec_t *spec, bkv_error_t *err);

// What commands about resident blocks start with: keys and spec from cli, then the client with that spec opened.
bkv_status_t bkv_session_start(bkv_session_t *session, bkv_cli_t *cli, bkv_error_t *err);

void bkv_session_end(bkv_session_t *session);

// How many of `left` keys may go into one call.
size_t bkv_session_batch(const bkv_session_t *session, size_t left);

#endif
