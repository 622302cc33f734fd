// unit_serve.c - the answering end of one-sided reads (daemon/cluster/peer/serve.h) on a real RDMA device, with an asker in the same
// process that does as it likes: what it can read, for how long, and that it can do nothing else. test_unit.py runs it in a guest.
#include "unit_fixture.h"

#include "daemon/cluster/peer/serve.h"
#include "daemon/observe/clock.h"
#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RECORD  (UINT64_C(96) << 10)
#define RECORDS 6u
#define ARENA   (UINT64_C(32) << 20)
#define GONE_MS 3000 // a dead end has to be noticed within it

static const bkv_spec_id_t spec = {{1, 2, 3}};

typedef struct answerer {
    bkv_store_t *store;
    bkv_peer_device_t device;
    bkv_serve_t *serve;
} answerer_t;

typedef struct asker {
    bkv_verbs_device_t *device;
    uint8_t *memory;
    struct ibv_mr *region;
    bkv_verbs_t *verbs;
    bkv_verbs_path_t path;
    bkv_link_id_t id;
    bkv_verbs_end_t window;
} asker_t;

typedef struct reading {
    bkv_verbs_transfer_t transfer;
    sem_t over;
    bkv_error_t error;
} reading_t;

// ---- the answering end ----

static bkv_name_t name_of(uint32_t number) {
    return (bkv_name_t){.spec_id = spec, .key = fixture_key(number)};
}

static void put(bkv_store_t *store, uint32_t number) {
    bkv_slot_t slot;
    bkv_error_t error = {.message = ""};
    const bkv_name_t name = name_of(number);
    cr_assert_eq(bkv_store_reserve(store, 7, RECORD, fixture_now(), &slot, &error), BKV_OK, "%s", error.message);
    bkv_record_header_t header = {
        .magic = BKV_RECORD_MAGIC,
        .version = BKV_RECORD_VERSION,
        .codec = BKV_CODEC_RAW,
        .length = RECORD,
        .tenant = 7,
        .tokens = 1,
        .layers = 1,
        .heads = 1,
        .key_dim = 8,
        .value_dim = 8,
        .dtype = BKV_BF16,
    };
    memcpy(header.key, name.key.bytes, sizeof(header.key));
    memcpy(header.spec_id, name.spec_id.bytes, sizeof(header.spec_id));
    fixture_fill(slot.data, RECORD, number);
    memcpy(slot.data, &header, sizeof(header));
    bkv_record_seal(slot.data);
    cr_assert_eq(bkv_store_publish(store, &slot, 0, RECORD, fixture_now(), &error), BKV_OK, "%s", error.message);
}

static void answerer_open(answerer_t *answerer) {
    bkv_error_t error = {.message = ""};
    const bkv_store_config_t config = {.arena_bytes = ARENA, .slab_bytes = 8 << 20, .arena_fd = -1};
    cr_assert_eq(bkv_store_create(&config, fixture_now(), &answerer->store, NULL, &error), BKV_OK, "%s", error.message);
    for (uint32_t i = 0; i < RECORDS; i++) {
        put(answerer->store, i);
    }
    cr_assert_eq(bkv_peer_device_open(&answerer->device, answerer->store, "rxe0", 0, -1, &error), BKV_OK, "%s", error.message);
    cr_assert_eq(bkv_serve_create(&answerer->device, &answerer->serve, &error), BKV_OK, "%s", error.message);
}

static uint64_t pinned(const answerer_t *answerer) {
    bkv_store_metrics_t metrics;
    bkv_store_metrics(answerer->store, &metrics);
    return metrics.pinned;
}

static void answerer_close(answerer_t *answerer) {
    bkv_serve_destroy(answerer->serve);
    cr_assert_eq(pinned(answerer), 0);
    bkv_peer_device_close(&answerer->device);
    bkv_store_destroy(answerer->store);
}

// ---- the asking end ----

static void asker_open(asker_t *asker) {
    bkv_error_t error = {.message = ""};
    bkv_verbs_choice_t choice;
    cr_assert_eq(bkv_verbs_choice_set(&choice, "rxe1", 0, -1, &error), BKV_OK);
    cr_assert_eq(bkv_verbs_open(&choice, &asker->device, &error), BKV_OK, "%s", error.message);
    asker->memory = aligned_alloc(4096, RECORDS * RECORD);
    memset(asker->memory, 0xee, RECORDS * RECORD);
    cr_assert_eq(bkv_verbs_register(asker->device, asker->memory, RECORDS * RECORD, BKV_VERBS_OWN, &asker->region, &error),
                 BKV_OK, "%s", error.message);
    const bkv_verbs_config_t config = {
        .device = asker->device,
        .max_paths = 8,
        .words = {.subject = "the ", .remedy = "", .limit = "limit", .otherwise = "nothing happens"},
        .thread_name = "asker",
        .now_ms = bkv_now_ms,
    };
    cr_assert_eq(bkv_verbs_create(&config, &asker->verbs, &error), BKV_OK, "%s", error.message);
}

static bkv_status_t try_link(asker_t *asker, answerer_t *answerer, const char *member, bkv_error_t *error) {
    bkv_verbs_end_t end;
    cr_assert_eq(bkv_verbs_path_init(&asker->path, asker->verbs, error), BKV_OK, "%s", error->message);
    bkv_verbs_link_describe(&asker->path.link, NULL, &end);
    bkv_status_t status = bkv_serve_link(answerer->serve, member, &end, fixture_now(), &asker->id, &asker->window, error);
    if (status == BKV_OK) {
        status = bkv_verbs_path_connect(&asker->path, &asker->window, error);
    }
    if (status != BKV_OK) {
        bkv_verbs_path_deinit(&asker->path);
    }
    return status;
}

static void asker_link(asker_t *asker, answerer_t *answerer, const char *member) {
    bkv_error_t error = {.message = ""};
    cr_assert_eq(try_link(asker, answerer, member, &error), BKV_OK, "%s", error.message);
    cr_assert_eq(asker->window.bytes, ARENA);
}

static void asker_close(asker_t *asker) {
    bkv_verbs_destroy(asker->verbs);
    bkv_verbs_unregister(asker->region);
    bkv_verbs_close(asker->device);
    free(asker->memory);
}

static bkv_status_t locate(answerer_t *answerer, const asker_t *asker, uint32_t first, uint32_t count,
                           bkv_location_t *locations, uint64_t *hold, bkv_error_t *error) {
    bkv_name_t names[RECORDS + 1];
    for (uint32_t i = 0; i < count; i++) {
        names[i] = name_of(first + i);
    }
    const bkv_locate_t asked = {.names = names, .count = count};
    return bkv_serve_locate(answerer->serve, &asker->id, &asked, fixture_now(), locations, hold, error);
}

static void release(answerer_t *answerer, const asker_t *asker, uint64_t hold) {
    uint64_t none;
    const bkv_locate_t asked = {.release = &hold, .release_count = 1};
    cr_assert_eq(bkv_serve_locate(answerer->serve, &asker->id, &asked, fixture_now(), NULL, &none, NULL), BKV_OK);
    cr_assert_eq(none, 0);
}

static void on_over(bkv_verbs_transfer_t *transfer, const bkv_error_t *error) {
    reading_t *reading = (reading_t *)transfer;
    reading->error = *error;
    sem_post(&reading->over);
}

// One transfer from or to the arena, and how it ended.
static bkv_error_t move(asker_t *asker, bool read, const bkv_location_t *location, uint64_t deadline_ms) {
    bkv_error_t error = {.status = BKV_OK};
    reading_t reading = {.transfer = {.read = read,
                                      .local = asker->memory,
                                      .local_key = asker->region->lkey,
                                      .offset = location->offset,
                                      .bytes = location->bytes,
                                      .deadline_ms = deadline_ms,
                                      .over = on_over}};
    sem_init(&reading.over, 0, 0);
    if (bkv_verbs_begin(&asker->path, &reading.transfer, &error) == BKV_OK) {
        sem_wait(&reading.over);
        error = reading.error;
    }
    sem_destroy(&reading.over);
    return error;
}

static bool holds_record(const uint8_t *memory, uint32_t number) {
    uint8_t *wanted = malloc(RECORD);
    fixture_fill(wanted, RECORD, number);
    size_t head = sizeof(bkv_record_header_t);
    bool same = memcmp(memory + head, wanted + head, RECORD - head) == 0;
    free(wanted);
    const bkv_name_t name = name_of(number);
    return same && memcmp(((const bkv_record_header_t *)(const void *)memory)->key, name.key.bytes, BKV_KEY_BYTES) == 0;
}

// ---- what works ----

Test(serve, records_are_located_held_and_read) {
    answerer_t answerer;
    asker_t asker;
    bkv_location_t locations[RECORDS + 1];
    bkv_error_t error = {.message = ""};
    uint64_t hold;
    answerer_open(&answerer);
    asker_open(&asker);
    asker_link(&asker, &answerer, "asker");
    cr_assert_eq(locate(&answerer, &asker, 0, RECORDS + 1, locations, &hold, &error), BKV_OK, "%s", error.message);
    cr_assert_neq(hold, 0);
    cr_assert_eq(pinned(&answerer), RECORDS);
    cr_assert_eq(locations[RECORDS].bytes, 0, "it is not there");
    for (uint32_t i = 0; i < RECORDS; i++) {
        cr_assert_eq(locations[i].bytes, RECORD);
        cr_assert_eq(locations[i].tenant, 7);
        error = move(&asker, true, &locations[i], 0);
        cr_assert_eq(error.status, BKV_OK, "%s", error.message);
        cr_assert(holds_record(asker.memory, i));
    }
    const bkv_name_t dropped = name_of(2); // what is held stays where it is, whatever becomes of it otherwise
    cr_assert(bkv_store_drop(answerer.store, &dropped.spec_id, &dropped.key, fixture_now()));
    error = move(&asker, true, &locations[2], 0);
    cr_assert_eq(error.status, BKV_OK, "%s", error.message);
    cr_assert(holds_record(asker.memory, 2));
    release(&answerer, &asker, hold);
    cr_assert_eq(pinned(&answerer), 0);
    bkv_verbs_path_deinit(&asker.path);
    asker_close(&asker);
    answerer_close(&answerer);
}

Test(serve, a_hold_ends_with_its_time_and_with_its_link) {
    answerer_t answerer;
    asker_t asker;
    bkv_location_t locations[RECORDS];
    uint64_t hold;
    answerer_open(&answerer);
    asker_open(&asker);
    asker_link(&asker, &answerer, "asker");
    cr_assert_eq(locate(&answerer, &asker, 0, 3, locations, &hold, NULL), BKV_OK);
    fixture_advance(BKV_SERVE_HOLD_MS - 500);
    bkv_serve_tick(answerer.serve, fixture_now());
    cr_assert_eq(pinned(&answerer), 3);
    fixture_advance(501);
    bkv_serve_tick(answerer.serve, fixture_now());
    cr_assert_eq(pinned(&answerer), 0);
    release(&answerer, &asker, hold); // too late, and no harm
    cr_assert_eq(locate(&answerer, &asker, 0, 3, locations, &hold, NULL), BKV_OK);
    cr_assert_eq(pinned(&answerer), 3);
    fixture_advance(BKV_SERVE_IDLE_MS);
    bkv_serve_tick(answerer.serve, fixture_now());
    cr_assert_eq(pinned(&answerer), 0);
    cr_assert_eq(bkv_serve_links(answerer.serve), 0);
    cr_assert_eq(locate(&answerer, &asker, 0, 3, locations, &hold, NULL), BKV_FAILED_PRECONDITION);
    bkv_verbs_path_deinit(&asker.path);
    asker_close(&asker);
    answerer_close(&answerer);
}

// ---- what does not ----

Test(serve, the_arena_cannot_be_written) {
    answerer_t answerer;
    asker_t asker;
    bkv_location_t location;
    uint64_t hold;
    answerer_open(&answerer);
    asker_open(&asker);
    asker_link(&asker, &answerer, "asker");
    cr_assert_eq(locate(&answerer, &asker, 1, 1, &location, &hold, NULL), BKV_OK);
    bkv_error_t error = move(&asker, false, &location, 0);
    cr_assert_eq(error.status, BKV_FAILED_PRECONDITION);
    cr_log_info("a WRITE ends with: %s", error.message);
    void *arena;
    uint64_t bytes;
    bkv_store_memory(answerer.store, &arena, &bytes);
    cr_assert(holds_record((uint8_t *)arena + location.offset, 1), "nothing was written");
    cr_assert_eq(move(&asker, true, &location, 0).status, BKV_FAILED_PRECONDITION, "the link has failed for good");
    bkv_verbs_path_deinit(&asker.path);
    asker_close(&asker);
    answerer_close(&answerer);
}

Test(serve, nothing_beside_the_arena_can_be_read) {
    answerer_t answerer;
    asker_t asker;
    answerer_open(&answerer);
    asker_open(&asker);
    asker_link(&asker, &answerer, "asker");
    bkv_error_t error = move(&asker, true, &(bkv_location_t){.offset = ARENA - 4096, .bytes = 8192}, 0);
    cr_assert_eq(error.status, BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(error.message, "remote access error"), "%s", error.message);
    cr_assert_eq(asker.memory[0], 0xee);
    bkv_verbs_path_deinit(&asker.path);
    asker_close(&asker);
    answerer_close(&answerer);
}

Test(serve, a_new_link_ends_the_members_old_one_and_no_other) {
    answerer_t answerer;
    asker_t old, fresh, other;
    bkv_location_t location;
    bkv_error_t error = {.message = ""};
    uint64_t hold;
    answerer_open(&answerer);
    asker_open(&old);
    asker_open(&fresh);
    asker_open(&other);
    asker_link(&old, &answerer, "twice");
    asker_link(&other, &answerer, "once");
    cr_assert_eq(locate(&answerer, &old, 0, 1, &location, &hold, NULL), BKV_OK);
    asker_link(&fresh, &answerer, "twice");
    cr_assert_eq(bkv_serve_links(answerer.serve), 2);
    cr_assert_eq(pinned(&answerer), 0, "what the old link held");
    cr_assert_eq(locate(&answerer, &old, 0, 1, &location, &hold, &error), BKV_FAILED_PRECONDITION);
    uint64_t begin = bkv_now_ms();
    cr_assert_eq(move(&old, true, &location, 0).status, BKV_FAILED_PRECONDITION);
    cr_log_info("a READ over a link that had ended failed after %llu ms", (unsigned long long)(bkv_now_ms() - begin));
    cr_assert_lt(bkv_now_ms() - begin, GONE_MS);
    asker_t *alive[] = {&fresh, &other};
    for (int i = 0; i < 2; i++) {
        cr_assert_eq(locate(&answerer, alive[i], 4, 1, &location, &hold, NULL), BKV_OK);
        cr_assert_eq(move(alive[i], true, &location, 0).status, BKV_OK);
        cr_assert(holds_record(alive[i]->memory, 4));
        bkv_verbs_path_deinit(&alive[i]->path);
        asker_close(alive[i]);
    }
    bkv_verbs_path_deinit(&old.path);
    asker_close(&old);
    answerer_close(&answerer);
}

// The answerer is gone, and with it its queue pairs: a READ ends soon after its deadline, sooner than the device gives up.
Test(serve, a_read_from_who_is_gone_ends_soon_after_its_deadline) {
    answerer_t answerer;
    asker_t asker;
    bkv_location_t location;
    uint64_t hold;
    answerer_open(&answerer);
    asker_open(&asker);
    asker_link(&asker, &answerer, "asker");
    cr_assert_eq(locate(&answerer, &asker, 0, 1, &location, &hold, NULL), BKV_OK);
    answerer_close(&answerer);
    uint64_t begin = bkv_now_ms();
    bkv_error_t error = move(&asker, true, &location, begin + 50);
    uint64_t took = bkv_now_ms() - begin;
    cr_log_info("it ended after %llu ms: %s", (unsigned long long)took, error.message);
    cr_assert_neq(error.status, BKV_OK);
    cr_assert_lt(took, 50 + BKV_VERBS_GRACE_MS + 400, "%llu ms", (unsigned long long)took);
    cr_assert_not(bkv_verbs_path_alive(&asker.path));
    bkv_verbs_path_deinit(&asker.path);
    asker_close(&asker);
}

Test(serve, nonsense_is_refused_and_leaves_nothing_behind) {
    answerer_t answerer;
    asker_t asker;
    bkv_verbs_end_t end, own;
    bkv_link_id_t id = {{0xff, 0xff, 0xff, 0xff}};
    bkv_error_t error = {.message = ""};
    uint64_t hold;
    answerer_open(&answerer);
    asker_open(&asker);
    cr_assert_eq(try_link(&asker, &answerer, "no/member", &error), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(error.message, "member: ", 8), 0, "%s", error.message);
    cr_assert_eq(bkv_verbs_path_init(&asker.path, asker.verbs, &error), BKV_OK);
    bkv_verbs_link_describe(&asker.path.link, NULL, &end);
    end.queue_pair = 1;
    cr_assert_eq(bkv_serve_link(answerer.serve, "asker", &end, fixture_now(), &asker.id, &own, &error), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(error.message, "verbs.queue_pair: ", 18), 0, "%s", error.message);
    bkv_verbs_path_deinit(&asker.path);
    cr_assert_eq(bkv_serve_links(answerer.serve), 0);
    const bkv_locate_t nothing = {.count = 0};
    cr_assert_eq(bkv_serve_locate(answerer.serve, &id, &nothing, fixture_now(), NULL, &hold, &error), BKV_FAILED_PRECONDITION);
    id = (bkv_link_id_t){{0}};
    cr_assert_eq(bkv_serve_locate(answerer.serve, &id, &nothing, fixture_now(), NULL, &hold, &error), BKV_FAILED_PRECONDITION);
    asker_close(&asker);
    answerer_close(&answerer);
}
