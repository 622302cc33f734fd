// cmd_cluster.c - `bkv cluster status`, `nodes` and `where`: how a cluster is, who is in it, and where blocks are. `drain` is
// cmd_drain.c's.
#include "cli.h"

#include "memory.h"
#include "session.h"
#include "table.h"
#include "text.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

// ---- status ----

// What is not as it should be, the gravest first. "": all is well.
static void complain(const bkv_cluster_info_t *info, char *out, size_t room) {
    uint32_t able = 0;
    const bkv_cluster_node_t *suspected = NULL;
    for (size_t i = 0; i < info->count; i++) {
        able += !info->nodes[i].draining && info->nodes[i].weight > 0;
        suspected = suspected == NULL && info->nodes[i].suspected ? &info->nodes[i] : suspected;
    }
    out[0] = '\0';
    if (strcmp(info->state, "member") != 0) {
        snprintf(out, room, "%s is %s%s%s", info->self, info->state, info->trouble[0] != '\0' ? ": " : "", info->trouble);
    } else if (suspected != NULL) {
        snprintf(out, room, "%s does not answer", suspected->id);
    } else if (able < info->replicas) {
        snprintf(out, room, "%u members for %u replicas", able, info->replicas);
    } else if (strcmp(info->repair, "idle") != 0) {
        snprintf(out, room, "repair is %s: about %" PRIu64 " blocks left", info->repair, info->repair_left_keys);
    }
}

static json_t *status_json(const bkv_cluster_info_t *info, const char *complaint) {
    char seed[BKV_TEXT_MAX];
    snprintf(seed, sizeof seed, "%016" PRIx64, info->seed);
    return json_pack("{s:s, s:s, s:s, s:s, s:b, s:s, s:I, s:I, s:s, s:I, s:I, s:s, s:I, s:I, s:I}", "name", info->name, "self",
                     info->self, "state", info->state, "trouble", info->trouble, "well", complaint[0] == '\0', "complaint",
                     complaint, "view", (json_int_t)info->view, "revision", (json_int_t)info->revision, "seed", seed,
                     "replicas", (json_int_t)info->replicas, "members", (json_int_t)info->count, "repair", info->repair,
                     "repair_left_keys", (json_int_t)info->repair_left_keys, "repair_left_bytes",
                     (json_int_t)info->repair_left_bytes, "repaired_bytes", (json_int_t)info->repaired_bytes);
}

static void show_status(const bkv_cluster_info_t *info) {
    char left[BKV_TEXT_MAX], sent[BKV_TEXT_MAX];
    printf("cluster %s, as %s sees it: %s%s%s\n", info->name, info->self, info->state, info->trouble[0] != '\0' ? ", " : "",
           info->trouble);
    printf("view %" PRIu64 " (etcd revision %" PRId64 "): %zu member%s, %u replica%s\n", info->view, info->revision,
           info->count, info->count == 1 ? "" : "s", info->replicas, info->replicas == 1 ? "" : "s");
    printf("repair %s", info->repair);
    if (info->repair_left_keys > 0) {
        printf(", about %" PRIu64 " blocks of %s left", info->repair_left_keys,
               bkv_text_of_bytes((double)info->repair_left_bytes, left));
    }
    printf("; %s sent since the start\n", bkv_text_of_bytes((double)info->repaired_bytes, sent));
}

static bkv_status_t cluster_status(const bkv_cli_t *cli, const bkv_cluster_info_t *info, bkv_error_t *err) {
    char complaint[200];
    complain(info, complaint, sizeof complaint);
    if (cli->json) {
        bkv_cli_print_json(status_json(info, complaint), false);
    } else {
        show_status(info);
    }
    return complaint[0] == '\0' ? BKV_OK : bkv_fail(err, BKV_FAILED_PRECONDITION, "not all is well: %s", complaint);
}

// ---- nodes ----

static json_t *strings_json(const char *const *strings, size_t count) {
    json_t *list = json_array();
    for (size_t i = 0; i < count; i++) {
        json_array_append_new(list, json_string(strings[i]));
    }
    return list;
}

static json_t *node_json(const bkv_cluster_info_t *info, const bkv_cluster_node_t *node) {
    char epoch[BKV_TEXT_MAX];
    snprintf(epoch, sizeof epoch, "%" PRIu64, node->epoch);
    return json_pack("{s:s, s:b, s:s, s:o, s:o, s:s, s:I, s:I, s:b, s:b, s:I, s:s}", "id", node->id, "self",
                     strcmp(node->id, info->self) == 0, "epoch", epoch, "addresses",
                     strings_json(node->addresses, node->address_count), "transports",
                     strings_json(node->transports, node->transport_count), "domain", node->domain, "capacity_bytes",
                     (json_int_t)node->capacity_bytes, "weight", (json_int_t)node->weight, "draining", node->draining,
                     "suspected", node->suspected, "latency_us", (json_int_t)node->latency_us, "version", node->version);
}

static void show_node(bkv_table_t *table, const bkv_cluster_info_t *info, const bkv_cluster_node_t *node) {
    char text[BKV_TEXT_MAX];
    bool self = strcmp(node->id, info->self) == 0;
    bkv_table_cell(table, "%s", node->id);
    bkv_table_cell(table, "%s", node->address_count > 0 ? node->addresses[0] : "");
    bkv_table_cell(table, "%s", node->domain);
    bkv_table_cell(table, "%s", bkv_text_of_bytes((double)node->capacity_bytes, text));
    bkv_table_cell(table, "%u", node->weight);
    bkv_table_cell(table, "%s", node->draining ? "yes" : "no");
    bkv_table_cell(table, "%s", node->latency_us > 0 ? bkv_text_of_ns((double)node->latency_us * 1e3, text) : "");
    bkv_table_cell(table, "%s", self ? "asked" : node->suspected ? "yes" : "no");
    bkv_table_cell(table, "%s", node->version);
}

static void cluster_nodes(const bkv_cli_t *cli, const bkv_cluster_info_t *info) {
    if (cli->json) {
        json_t *nodes = json_array();
        for (size_t i = 0; i < info->count; i++) {
            json_array_append_new(nodes, node_json(info, &info->nodes[i]));
        }
        bkv_cli_print_json(json_pack("{s:s, s:I, s:o}", "name", info->name, "view", (json_int_t)info->view, "nodes", nodes),
                           false);
        return;
    }
    bkv_table_t *table = bkv_table_create("node|address|domain|>capacity|>weight|draining|>latency|suspected|version");
    for (size_t i = 0; i < info->count; i++) {
        show_node(table, info, &info->nodes[i]);
    }
    bkv_table_print(table, stdout, bkv_table_color(stdout));
    bkv_table_destroy(table);
}

static bkv_status_t ask_cluster(const bkv_cli_t *cli, bool nodes, bkv_error_t *err) {
    bkv_session_t session;
    bkv_cluster_info_t *info = NULL;
    bkv_status_t status = bkv_session_connect(&session, cli, err);
    if (status == BKV_OK) {
        status = bkv_cluster_get(session.client, 0, &info, err);
    }
    if (status == BKV_OK && nodes) {
        cluster_nodes(cli, info);
    } else if (status == BKV_OK) {
        status = cluster_status(cli, info, err);
    }
    bkv_cluster_free(info);
    bkv_session_end(&session);
    return status;
}

// ---- where ----

// What is shown of all keys, batch by batch.
typedef struct places {
    json_t *blocks;
    bkv_table_t *table;
    size_t shown, lost; // lost: nobody has them
} places_t;

static const char *join(const char *const *names, size_t count, char *out, size_t room) {
    size_t length = 0;
    out[0] = '\0';
    for (size_t i = 0; i < count && length < room; i++) {
        length += (size_t)snprintf(out + length, room - length, "%s%s", i > 0 ? " " : "", names[i]);
    }
    return out;
}

static void add_place(places_t *places, const bkv_key_t *key, const bkv_where_key_t *where) {
    char hex[2 * BKV_KEY_BYTES + 1], owners[200], holders[200], bytes[BKV_TEXT_MAX];
    bkv_hex(key->bytes, BKV_KEY_BYTES, hex);
    json_array_append_new(places->blocks, json_pack("{s:s, s:o, s:o, s:I}", "key", hex, "owners",
                                                    strings_json(where->owners, where->owner_count), "holders",
                                                    strings_json(where->holders, where->holder_count), "record_bytes",
                                                    (json_int_t)where->record_bytes));
    bkv_table_cell(places->table, "%zu", places->shown++);
    bkv_table_cell(places->table, "%s", join(where->owners, where->owner_count, owners, sizeof owners));
    bkv_table_cell(places->table, "%s", join(where->holders, where->holder_count, holders, sizeof holders));
    bkv_table_cell(places->table, "%s", where->record_bytes > 0 ? bkv_text_of_bytes((double)where->record_bytes, bytes) : "");
    bkv_table_cell(places->table, "%s", hex);
    places->lost += where->holder_count == 0;
}

static bkv_status_t ask_where(bkv_session_t *session, bool named, places_t *places, bkv_error_t *err) {
    const bkv_keyset_t *keyset = &session->keyset;
    for (size_t done = 0; done < keyset->count;) {
        size_t batch = bkv_session_batch(session, keyset->count - done);
        bkv_where_t *where = NULL;
        bkv_status_t status =
            bkv_where(session->client, named ? &session->id : NULL, keyset->keys + done, batch, 0, &where, err);
        if (status != BKV_OK) {
            return status;
        }
        for (size_t i = 0; i < batch; i++) {
            add_place(places, &keyset->keys[done + i], &where->keys[i]);
        }
        bkv_where_free(where);
        done += batch;
    }
    return BKV_OK;
}

// Without a spec, keys say who owns them, but not whose they are.
static bkv_status_t start_unnamed(bkv_session_t *session, bkv_cli_t *cli, bkv_error_t *err) {
    bkv_status_t status = bkv_session_connect(session, cli, err);
    session->keyset.keys = bkv_xcalloc((size_t)cli->arg_count, sizeof *session->keyset.keys);
    session->keyset.count = (size_t)cli->arg_count;
    for (int i = 0; status == BKV_OK && i < cli->arg_count; i++) {
        if (!bkv_hex_parse(cli->args[i], session->keyset.keys[i].bytes, BKV_KEY_BYTES)) {
            status = bkv_cli_usage(cli, err, "%.80s: not a key (64 hex digits)", cli->args[i]);
        }
    }
    return status;
}

static bkv_status_t cluster_where(bkv_cli_t *cli, bkv_error_t *err) {
    bkv_session_t session;
    bool named = cli->keys != NULL || cli->model != NULL;
    if (!named && cli->arg_count == 0) {
        return bkv_cli_usage(cli, err, "no keys: give --keys FILE or keys as arguments");
    }
    bkv_status_t status = named ? bkv_session_start(&session, cli, err) : start_unnamed(&session, cli, err);
    places_t places = {.blocks = json_array(), .table = bkv_table_create(">#|owners|held by|>bytes|key")};
    if (status == BKV_OK) {
        status = ask_where(&session, named, &places, err);
    }
    if (status == BKV_OK && cli->json) {
        bkv_cli_print_json(json_pack("{s:O}", "blocks", places.blocks), false);
    } else if (status == BKV_OK) {
        bkv_table_print(places.table, stdout, bkv_table_color(stdout));
    }
    if (status == BKV_OK && named && places.lost > 0) {
        status = bkv_fail(err, BKV_NOT_FOUND, "%zu of %zu blocks are nowhere", places.lost, places.shown);
    }
    json_decref(places.blocks);
    bkv_table_destroy(places.table);
    bkv_session_end(&session);
    return status;
}

// ---- the command ----

bkv_status_t bkv_cmd_cluster(bkv_cli_t *cli, bkv_error_t *err) {
    const char *action = cli->args[0];
    cli->args++;
    cli->arg_count--;
    bool drain = strcmp(action, "drain") == 0;
    if ((cli->undo || cli->no_wait) && !drain) {
        return bkv_cli_usage(cli, err, "--%s: goes with drain alone", cli->undo ? "undo" : "no-wait");
    }
    if (drain) {
        return bkv_cluster_drain_command(cli, err);
    }
    if (strcmp(action, "where") == 0) {
        return cluster_where(cli, err);
    }
    bool nodes = strcmp(action, "nodes") == 0;
    if (!nodes && strcmp(action, "status") != 0) {
        return bkv_cli_usage(cli, err, "%.64s: none of status, nodes, where and drain", action);
    }
    if (cli->arg_count > 0) {
        return bkv_cli_usage(cli, err, "%s: takes no operands", action);
    }
    return ask_cluster(cli, nodes, err);
}
