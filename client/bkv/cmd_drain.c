// cmd_drain.c - `bkv cluster drain NODE`: a member hands all that it holds to others; waits until it has, and shows how far it is.
#include "cli.h"

#include "session.h"
#include "table.h"
#include "text.h"

#include <inttypes.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LOOK_MS   1000
#define CALL_MS   10000 // at most for one call
#define NS_PER_MS 1000000ull

typedef struct wait {
    const char *node;
    uint64_t until_ns; // UINT64_MAX: no end
    uint64_t begun_ns;
    bool line; // stderr is a terminal, and shows how far it is
} wait_t;

// What is left of the whole time, for one call; 0: nothing.
static uint32_t left_ms(const wait_t *wait) {
    uint64_t now_ns = bkv_now_monotonic_ns();
    uint64_t left = wait->until_ns > now_ns ? (wait->until_ns - now_ns) / NS_PER_MS : 0;
    return left < CALL_MS ? (uint32_t)left : CALL_MS;
}

static void pause_until_look(const wait_t *wait) {
    uint32_t left = left_ms(wait), ms = left < LOOK_MS ? left : LOOK_MS;
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000}, NULL);
}

static void show_line(const wait_t *wait, const bkv_drain_state_t *state) {
    char left[BKV_TEXT_MAX], moved[BKV_TEXT_MAX], rate[BKV_TEXT_MAX];
    double seconds = (double)(bkv_now_monotonic_ns() - wait->begun_ns) / 1e9;
    if (wait->line) {
        fprintf(stderr, "\r\033[K%s: %" PRIu64 " blocks moved (%s, %s/s), about %" PRIu64 " (%s) left", wait->node,
                state->moved_keys, bkv_text_of_bytes((double)state->moved_bytes, moved),
                bkv_text_of_bytes(seconds > 0.5 ? (double)state->moved_bytes / seconds : 0, rate), state->left_keys,
                bkv_text_of_bytes((double)state->left_bytes, left));
    }
}

static bkv_status_t wait_until_done(const wait_t *wait, bkv_client_t *client, bkv_drain_state_t *state, bkv_error_t *err) {
    bkv_status_t status = BKV_OK;
    while (status == BKV_OK && !state->done) {
        show_line(wait, state);
        pause_until_look(wait);
        uint32_t ms = left_ms(wait);
        if (ms == 0) {
            status = bkv_fail(err, BKV_DEADLINE_EXCEEDED, "%.64s: about %" PRIu64 " blocks are left; it goes on", wait->node,
                              state->left_keys);
        } else {
            status = bkv_drain(client, wait->node, BKV_DRAIN_LOOK, ms, state, err);
        }
        if (status == BKV_OK && !state->draining) {
            status = bkv_fail(err, BKV_CANCELLED, "%.64s: somebody has taken the drain back", wait->node);
        }
    }
    if (wait->line) {
        fprintf(stderr, "\r\033[K");
    }
    return status;
}

static void show_state(const bkv_cli_t *cli, const char *node, const bkv_drain_state_t *state) {
    char left[BKV_TEXT_MAX], moved[BKV_TEXT_MAX];
    if (cli->json) {
        bkv_cli_print_json(json_pack("{s:s, s:b, s:b, s:I, s:I, s:I, s:I}", "node", node, "draining", state->draining, "done",
                                     state->done, "left_keys", (json_int_t)state->left_keys, "left_bytes",
                                     (json_int_t)state->left_bytes, "moved_keys", (json_int_t)state->moved_keys, "moved_bytes",
                                     (json_int_t)state->moved_bytes),
                           true);
    } else if (!state->draining) {
        printf("%s takes its share of blocks again\n", node);
    } else if (state->done) {
        printf("%s is empty: %" PRIu64 " blocks moved (%s); it may be stopped\n", node, state->moved_keys,
               bkv_text_of_bytes((double)state->moved_bytes, moved));
    } else {
        printf("%s is draining: %" PRIu64 " blocks moved, about %" PRIu64 " (%s) left\n", node, state->moved_keys,
               state->left_keys, bkv_text_of_bytes((double)state->left_bytes, left));
    }
}

bkv_status_t bkv_cluster_drain_command(bkv_cli_t *cli, bkv_error_t *err) {
    if (cli->arg_count != 1) {
        return bkv_cli_usage(cli, err, "drain: expected one node, by its id");
    }
    uint64_t now_ns = bkv_now_monotonic_ns();
    wait_t wait = {.node = cli->args[0], .until_ns = UINT64_MAX, .begun_ns = now_ns};
    wait.line = !cli->json && isatty(STDERR_FILENO);
    if (bkv_cli_given(cli, BKV_OPT_timeout)) {
        wait.until_ns = now_ns + cli->timeout * NS_PER_MS;
    }
    bkv_session_t session;
    bkv_drain_state_t state = {.draining = false};
    bkv_status_t status = bkv_session_connect(&session, cli, err);
    if (status == BKV_OK) {
        status = bkv_drain(session.client, wait.node, cli->undo ? BKV_DRAIN_CLEAR : BKV_DRAIN_SET, left_ms(&wait), &state, err);
    }
    if (status == BKV_OK && !cli->undo && !cli->no_wait) {
        status = wait_until_done(&wait, session.client, &state, err);
    }
    if (status == BKV_OK) {
        show_state(cli, wait.node, &state);
    }
    bkv_session_end(&session);
    return status;
}
