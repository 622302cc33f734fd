// cmd_stats.c - `bkv ping` and `bkv stats`: is the daemon there, and what it counts.
#include "cli.h"

#include "memory.h"
#include "session.h"
#include "table.h"
#include "text.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_INTERVAL_MS 1000

static void pause_ms(uint32_t ms) {
    struct timespec span = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    nanosleep(&span, NULL);
}

static const char *yes(bool value) {
    return value ? "yes" : "no";
}

static void show_transports(const bkv_cli_t *cli, const bkv_transport_info_t *info, size_t count) {
    json_t *list = json_array();
    bkv_table_t *table = bkv_table_create("transport|offered|usable|in use|why not");
    for (size_t i = 0; i < count; i++) {
        json_array_append_new(list, json_pack("{s:s, s:b, s:b, s:b, s:s}", "name", info[i].name, "offered", info[i].offered,
                                              "usable", info[i].usable, "in_use", info[i].chosen, "reason", info[i].reason));
        bkv_table_cell(table, "%s", info[i].name);
        bkv_table_cell(table, "%s", yes(info[i].offered));
        bkv_table_cell(table, "%s", yes(info[i].usable));
        bkv_table_cell(table, "%s", yes(info[i].chosen));
        bkv_table_cell(table, "%s", info[i].reason);
    }
    if (cli->json) {
        bkv_cli_print_json(json_pack("{s:O}", "transports", list), false);
    } else {
        bkv_table_print(table, stdout, bkv_table_color(stdout));
    }
    json_decref(list);
    bkv_table_destroy(table);
}

static bkv_status_t ping_transports(const bkv_cli_t *cli, bkv_session_t *session, bkv_error_t *err) {
    bkv_transport_info_t info[BKV_TRANSPORTS];
    size_t count = 0;
    bkv_status_t status = bkv_transports(session->client, 0, info, &count, err);
    if (status == BKV_OK) {
        show_transports(cli, info, count);
    }
    return status;
}

// ---- ping of several endpoints: each by itself ----

typedef struct ping_round {
    json_t *list;
    bkv_table_t *table;
    uint32_t serving;
} ping_round_t;

// `endpoint` alone. Only a client that cannot be made at all is a failure.
static bkv_status_t ping_one(const bkv_cli_t *cli, const char *endpoint, ping_round_t *round, bkv_error_t *err) {
    bkv_session_t session;
    bkv_cli_t one = *cli;
    bkv_error_t error = {.status = BKV_OK};
    uint64_t round_trip_ns = 0;
    char text[BKV_TEXT_MAX];
    one.endpoint = endpoint;
    bkv_status_t status = bkv_session_connect(&session, &one, err);
    if (status == BKV_OK && bkv_ping(session.client, 0, &round_trip_ns, &error) == BKV_OK) {
        round->serving++;
        json_array_append_new(round->list, json_pack("{s:s, s:b, s:I}", "endpoint", endpoint, "serving", 1, "round_trip_ns",
                                                     (json_int_t)round_trip_ns));
    } else if (status == BKV_OK) {
        json_t *reason = json_string(error.message); // NULL where a peer's text is not UTF-8
        json_array_append_new(round->list, json_pack("{s:s, s:b, s:o?}", "endpoint", endpoint, "serving", 0, "reason", reason));
    }
    bkv_table_cell(round->table, "%s", endpoint);
    bkv_table_cell(round->table, "%s", error.status == BKV_OK ? "serving" : bkv_status_name(error.status));
    bkv_table_cell(round->table, "%s", error.status == BKV_OK ? bkv_text_of_ns((double)round_trip_ns, text) : error.message);
    bkv_session_end(&session);
    return status;
}

static bkv_status_t ping_each(const bkv_cli_t *cli, const char *endpoints, bkv_error_t *err) {
    ping_round_t round = {.list = json_array(), .table = bkv_table_create("endpoint|state|round trip")};
    bkv_status_t status = BKV_OK;
    char *copy = bkv_xstrdup(endpoints), *rest = copy, *endpoint;
    while (status == BKV_OK && (endpoint = strsep(&rest, ",")) != NULL) {
        status = ping_one(cli, endpoint, &round, err);
    }
    if (status == BKV_OK && cli->json) {
        bkv_cli_print_json(json_pack("{s:b, s:O}", "serving", round.serving > 0, "endpoints", round.list), true);
    } else if (status == BKV_OK) {
        bkv_table_print(round.table, stdout, bkv_table_color(stdout));
    }
    if (status == BKV_OK && round.serving == 0) {
        status = bkv_fail(err, BKV_BUSY, "none of the endpoints serves");
    }
    free(copy);
    json_decref(round.list);
    bkv_table_destroy(round.table);
    return status;
}

static bkv_status_t ping_list(const bkv_cli_t *cli, const char *endpoints, uint32_t count, bkv_error_t *err) {
    bkv_status_t status = BKV_OK;
    for (uint32_t i = 0; i < count && status == BKV_OK; i++) {
        if (i > 0) {
            pause_ms(DEFAULT_INTERVAL_MS);
        }
        status = ping_each(cli, endpoints, err);
    }
    return status;
}

bkv_status_t bkv_cmd_ping(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_session_t session;
    uint32_t count = bkv_cli_given(cli, BKV_OPT_count) ? cli->count : 1;
    const char *endpoints = cli->endpoint != NULL ? cli->endpoint : getenv("BKV_ENDPOINT");
    if (endpoints != NULL && strchr(endpoints, ',') != NULL && !cli->transports) {
        return ping_list(cli, endpoints, count, err);
    }
    bkv_status_t status = bkv_session_connect(&session, cli, err);
    if (status == BKV_OK && cli->transports) {
        status = ping_transports(cli, &session, err);
        count = 0;
    }
    for (uint32_t i = 0; i < count && status == BKV_OK; i++) {
        uint64_t round_trip_ns = 0;
        char text[BKV_TEXT_MAX];
        if (i > 0) {
            pause_ms(DEFAULT_INTERVAL_MS);
        }
        status = bkv_ping(session.client, 0, &round_trip_ns, err);
        if (status == BKV_OK && cli->json) {
            bkv_cli_print_json(json_pack("{s:b, s:I}", "serving", 1, "round_trip_ns", (json_int_t)round_trip_ns), true);
        } else if (status == BKV_OK) {
            printf("serving, %s\n", bkv_text_of_ns((double)round_trip_ns, text));
            fflush(stdout);
        }
    }
    bkv_session_end(&session);
    return status;
}

static json_t *stats_json(const bkv_stats_t *stats) {
    json_t *metrics = json_object();
    for (size_t i = 0; i < stats->count; i++) {
        double value = stats->metrics[i].value;
        bool whole = fabs(value) < 9007199254740992.0 && value == floor(value); // 2^53
        json_object_set_new(metrics, stats->metrics[i].name, whole ? json_integer((json_int_t)value) : json_real(value));
    }
    char epoch[BKV_TEXT_MAX];
    snprintf(epoch, sizeof epoch, "%" PRIu64, stats->boot_epoch);
    return json_pack("{s:s?, s:s?, s:s, s:I, s:b, s:o}", "version", stats->version, "backend", stats->backend, "boot_epoch",
                     epoch, "uptime_ms", (json_int_t)stats->uptime_ms, "draining", stats->draining, "metrics", metrics);
}

static bool ends_with(const char *text, const char *end) {
    size_t length = strlen(text), tail = strlen(end);
    return length >= tail && strcmp(text + length - tail, end) == 0;
}

// Prometheus names carry their unit.
static const char *value_text(const char *name, double value, char *out) {
    if (strstr(name, "_bytes") != NULL) {
        return bkv_text_of_bytes(value, out);
    }
    if (ends_with(name, "_us_total")) {
        return bkv_text_of_ns(value * 1e3, out);
    }
    if (ends_with(name, "_seconds") || ends_with(name, "_seconds_total")) {
        return bkv_text_of_ns(value * 1e9, out);
    }
    return bkv_text_of_count(value, out);
}

// The same metric in an earlier answer; NULL: not there.
static const bkv_metric_t *find_metric(const bkv_stats_t *stats, const char *name) {
    for (size_t i = 0; stats != NULL && i < stats->count; i++) {
        if (strcmp(stats->metrics[i].name, name) == 0) {
            return &stats->metrics[i];
        }
    }
    return NULL;
}

// How a table of metrics is to look.
typedef struct view {
    bool rates;     // a column of rates instead of explanations
    uint32_t lines; // most lines; 0: no limit. With a limit, metrics that are 0 are left out
} view_t;

static void add_metric(bkv_table_t *table, const bkv_metric_t *metric, const bkv_metric_t *old, double seconds, bool rates) {
    char text[BKV_TEXT_MAX];
    bkv_table_cell(table, "%s", metric->name);
    bkv_table_cell(table, "%s", value_text(metric->name, metric->value, text));
    if (!rates) {
        bkv_table_cell(table, "%s", metric->help ? metric->help : "");
    } else if (metric->counter && old != NULL && seconds > 0) {
        bkv_table_cell(table, "%s", value_text(metric->name, (metric->value - old->value) / seconds, text));
    } else {
        bkv_table_cell(table, "%s", "");
    }
}

// Prints the table and returns its lines. before: an earlier answer, for rates; may be NULL.
static uint32_t show_stats(const bkv_stats_t *stats, const bkv_stats_t *before, view_t view) {
    char text[BKV_TEXT_MAX];
    printf("balancekvd %s, kernels %s, up %s%s\n", stats->version ? stats->version : "?", stats->backend ? stats->backend : "?",
           bkv_text_of_ns((double)stats->uptime_ms * 1e6, text), stats->draining ? ", draining" : "");
    bkv_table_t *table = bkv_table_create(view.rates ? "metric|>value|>per second" : "metric|>value|what it is");
    double seconds = before != NULL ? (double)(stats->uptime_ms - before->uptime_ms) / 1e3 : 0;
    uint32_t lines = 2;
    for (size_t i = 0; i < stats->count && (view.lines == 0 || lines < view.lines); i++) {
        const bkv_metric_t *metric = &stats->metrics[i];
        if (view.lines == 0 || metric->value != 0) {
            add_metric(table, metric, find_metric(before, metric->name), seconds, view.rates);
            lines++;
        }
    }
    lines = 1 + bkv_table_print(table, stdout, bkv_table_color(stdout));
    bkv_table_destroy(table);
    fflush(stdout);
    return lines;
}

// Lines that fit on the terminal, one kept free for the cursor; 0: stdout is none.
static uint32_t terminal_lines(void) {
    struct winsize size = {.ws_row = 0};
    if (!isatty(STDOUT_FILENO)) {
        return 0;
    }
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_row > 4 ? size.ws_row - 1u : 23;
}

// Looks again and again. On a terminal each look overwrites the one before (and fits, or that would not work); elsewhere
// they follow one another.
static bkv_status_t watch(const bkv_cli_t *cli, const bkv_session_t *session, bkv_error_t *err) {
    uint32_t interval_ms = bkv_cli_given(cli, BKV_OPT_interval) ? cli->interval : DEFAULT_INTERVAL_MS;
    bool endless = !bkv_cli_given(cli, BKV_OPT_count);
    bkv_stats_t *before = NULL;
    bkv_status_t status = BKV_OK;
    uint32_t lines = 0;
    for (uint32_t i = 0; (endless || i < cli->count) && status == BKV_OK; i++) {
        bkv_stats_t *now = NULL;
        if (i > 0) {
            pause_ms(interval_ms);
        }
        status = bkv_stats_get(session->client, 0, &now, err);
        if (status != BKV_OK) {
            break;
        }
        if (cli->json) {
            bkv_cli_print_json(stats_json(now), true);
        } else {
            view_t view = {.rates = true, .lines = terminal_lines()};
            if (i > 0) {
                view.lines > 0 ? printf("\033[%uA\033[J", lines) : printf("\n");
            }
            // A daemon started anew counts from 0 again: no rate across that.
            bool same = before != NULL && before->boot_epoch == now->boot_epoch;
            lines = show_stats(now, same ? before : NULL, view);
        }
        if (before != NULL) {
            bkv_stats_free(before);
        }
        before = now;
    }
    if (before != NULL) {
        bkv_stats_free(before);
    }
    return status;
}

bkv_status_t bkv_cmd_stats(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_session_t session;
    bkv_stats_t *stats = NULL;
    bkv_status_t status = bkv_session_connect(&session, cli, err);
    if (status == BKV_OK && cli->watch) {
        status = watch(cli, &session, err);
    } else if (status == BKV_OK) {
        status = bkv_stats_get(session.client, 0, &stats, err);
        if (status == BKV_OK && cli->json) {
            bkv_cli_print_json(stats_json(stats), false);
        } else if (status == BKV_OK) {
            show_stats(stats, NULL, (view_t){.rates = false});
        }
        if (stats != NULL) {
            bkv_stats_free(stats);
        }
    }
    bkv_session_end(&session);
    return status;
}
