// simulate.c - `make cluster-sim`: a cluster of 1,000 members and 10 M blocks on one core. How even the loads are, what moves
// when members join, leave, drain, crash or change their weight, how long the repair takes at a bandwidth limit, what it costs.
//
// All decisions are taken by the daemon's own code (proto/placement, daemon/cluster/move); world.c only keeps the
// stores. Every transfer is checked: whatever an owner lacks it is sent once, and nobody is sent anything else.
#include "tests/bench/report.h"
#include "tests/cluster/world.h"

#include "daemon/cluster/move/repair.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RACKS        50
#define RATE         (256ull << 20) // bytes a second that a member may spend on repair
#define RECORD_BYTES (256ull << 10)
#define EVEN_BAR     1.15
#define MOVEMENT_BAR 1.3

static const uint32_t equal[3] = {100, 100, 100}, uneven[3] = {50, 100, 200};

typedef struct simulation {
    uint32_t nodes, keys;
    bkv_report_t report;
} simulation_t;

// ---- loads ----

static void loads(simulation_t *simulation) {
    for (int weighted = 0; weighted < 2; weighted++) {
        world_t world;
        world_init(&world, simulation->nodes, RACKS, weighted ? uneven : equal, 3, simulation->keys);
        for (uint32_t replicas = 1; replicas <= 3; replicas++) {
            char name[64];
            world_load_t load = world_measure(&world, replicas);
            snprintf(name, sizeof(name), "fullest, R=%u, %s", replicas, weighted ? "1:2:4" : "equal");
            bkv_report_add(&simulation->report, name, load.most, "keys/w", "mean", load.mean, BKV_BAR_AT_MOST, EVEN_BAR);
        }
        world_deinit(&world);
    }
}

// ---- changes ----

static double share(const world_t *world, uint32_t index) {
    double sum = 0;
    for (uint32_t i = 0; i < world->count; i++) {
        sum += world->members[i].weight;
    }
    return (double)world->keys * world->replicas * world->members[index].weight / sum;
}

// ideal: replicas that must move because of what members' shares are before and after.
static void report_change(simulation_t *simulation, const char *what, const world_t *was, world_t *now, double ideal) {
    char name[64];
    world_repair_t repair = world_change(was, now, RATE, RECORD_BYTES);
    bkv_report_add(&simulation->report, what, (double)repair.moved, "keys", "share", ideal, BKV_BAR_AT_MOST, MOVEMENT_BAR);
    snprintf(name, sizeof(name), "%s: sent wrongly", what);
    bkv_report_add(&simulation->report, name, (double)repair.wrong, "keys", NULL, 0, BKV_BAR_AT_MOST, 0);
    snprintf(name, sizeof(name), "%s: repair", what);
    bkv_report_add(&simulation->report, name, repair.seconds, "s", "all senders alike", repair.even_seconds, BKV_BAR_NONE, 0);
    snprintf(name, sizeof(name), "%s: CPU", what);
    bkv_report_add(&simulation->report, name, repair.plan_ns, "ns/key", NULL, 0, BKV_BAR_NONE, 0);
    world_copy_free(now);
}

static void changes(simulation_t *simulation) {
    world_t was, now;
    uint32_t middle = simulation->nodes / 2;
    world_init(&was, simulation->nodes, RACKS, equal, 2, simulation->keys);

    now = world_copy(&was);
    world_add(&now, "node-0500b", "rack-8", 100);
    report_change(simulation, "join", &was, &now, share(&now, middle));

    now = world_copy(&was);
    world_remove(&now, middle);
    report_change(simulation, "crash", &was, &now, share(&was, middle));

    now = world_copy(&was);
    now.members[middle].draining = true;
    report_change(simulation, "drain", &was, &now, share(&was, middle));

    now = world_copy(&was);
    now.members[middle].weight *= 2;
    report_change(simulation, "weight x2", &was, &now, share(&now, middle) - share(&was, middle));

    now = world_copy(&was);
    now.members[middle].epoch++;
    report_change(simulation, "restart", &was, &now, share(&was, middle));

    now = world_copy(&was);
    double lost = 0;
    for (uint32_t i = now.count; i-- > 0;) {
        if (strcmp(now.members[i].domain, "rack-3") == 0) {
            lost += share(&was, i);
            world_remove(&now, i);
        }
    }
    report_change(simulation, "rack crash", &was, &now, lost);
    world_deinit(&was);
}

// ---- costs ----

static bkv_placement_t *timed_place(const world_t *world, const bkv_placement_t *previous, bool table, double *seconds) {
    const bkv_placement_config_t config = {
        .members = world->members, .count = world->count, .replicas = 2, .seed = 20, .table = table};
    bkv_placement_t *placement = NULL;
    double start = world_cpu_now();
    if (bkv_placement_create(&config, previous, &placement, NULL) != BKV_OK) {
        exit(1);
    }
    *seconds = world_cpu_now() - start;
    return placement;
}

// Million keys a second, in batches of 256 as a Lookup's, over as many different keys as fit in no cache.
static double lookup_rate(const bkv_placement_t *placement, uint32_t keys) {
    static bkv_key_t batch[256];
    static uint16_t owners[256 * 2];
    static volatile uint16_t sink;
    double seconds = 0;
    for (uint32_t from = 0; from < keys; from += 256) {
        for (uint32_t i = 0; i < 256; i++) {
            batch[i] = world_key(from + i);
        }
        double start = world_cpu_now();
        bkv_placement_owners_batch(placement, batch, 256, owners);
        seconds += world_cpu_now() - start;
        sink = owners[0];
    }
    (void)sink;
    return keys / seconds * 1e-6;
}

static void costs_of(simulation_t *simulation, uint32_t nodes) {
    char name[64];
    double build, change, none;
    world_t world, next;
    world_init(&world, nodes, nodes < RACKS ? nodes : RACKS, equal, 2, 256);
    next = world_copy(&world);
    world_add(&next, "node-0003b", "rack-1", 100);
    bkv_placement_t *table = timed_place(&world, NULL, true, &build), *races = timed_place(&world, NULL, false, &none);
    bkv_placement_t *joined = timed_place(&next, table, true, &change);
    double by_table = lookup_rate(table, 1u << 20), by_race = lookup_rate(races, (1u << 22) / (nodes + 4));
    snprintf(name, sizeof(name), "%u: owners, table", nodes);
    bkv_report_add(&simulation->report, name, by_table, "M/s", "by races", by_race, BKV_BAR_NONE, 0);
    snprintf(name, sizeof(name), "%u: table anew", nodes);
    bkv_report_add(&simulation->report, name, build * 1e3, "ms", NULL, 0, BKV_BAR_NONE, 0);
    snprintf(name, sizeof(name), "%u: table after a join", nodes);
    bkv_report_add(&simulation->report, name, change * 1e3, "ms", "anew", build * 1e3, BKV_BAR_NONE, 0);
    snprintf(name, sizeof(name), "%u: memory per node", nodes);
    bkv_report_add(&simulation->report, name, (double)bkv_placement_bytes(table) / (1 << 20), "MiB", NULL, 0, BKV_BAR_NONE, 0);
    bkv_placement_destroy(table);
    bkv_placement_destroy(races);
    bkv_placement_destroy(joined);
    world_copy_free(&next);
    world_deinit(&world);
}

int main(int argc, char **argv) {
    static simulation_t simulation = {.nodes = 1000, .keys = 10000000};
    const char *out = NULL;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--out") == 0) {
            out = argv[i + 1];
        } else if (strcmp(argv[i], "--nodes") == 0) {
            simulation.nodes = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        } else if (strcmp(argv[i], "--keys") == 0) {
            simulation.keys = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        }
    }
    if (simulation.nodes < 10 || simulation.nodes >= BKV_MEMBERS_MAX || simulation.keys < 1) {
        fprintf(stderr, "usage: cluster-sim [--nodes 10..%d] [--keys N] [--out FILE]\n", BKV_MEMBERS_MAX - 1);
        return 1;
    }
    printf("%u members in %d racks, %u keys; repair at %llu MiB/s a member, records of %llu KiB\n", simulation.nodes, RACKS,
           simulation.keys, RATE >> 20, RECORD_BYTES >> 10);
    loads(&simulation);
    changes(&simulation);
    costs_of(&simulation, 5);
    costs_of(&simulation, 100);
    costs_of(&simulation, 1000);
    bkv_report_print(&simulation.report);
    if (out != NULL && !bkv_report_write(&simulation.report, out)) {
        return 1;
    }
    return bkv_report_met(&simulation.report) ? 0 : 2;
}
