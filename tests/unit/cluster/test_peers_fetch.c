// Records fetched from another member, which may send them otherwise than it should.
#include "world.h"

#include "daemon/observe/clock.h"
#include "peer.pb-c.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define SOON 5000

static bkv_peers_metrics_t metrics_of(const asking_t *asking) {
    bkv_peers_metrics_t metrics;
    bkv_peers_metrics(asking->peers, &metrics);
    return metrics;
}

// ---- as it should be ----

Test(peers_fetch, records_come_whole, .timeout = 60) {
    static const uint64_t lengths[] = {160, 1024, (1u << 20) - 16, 1u << 20, (1u << 20) + 16, 5u << 20};
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        world_t world;
        asking_t asking;
        fetching_t *fetching = fetching_new();
        world_init(&world, 3);
        world.length = lengths[i];
        world.ttl_ms = 1234;
        impostor_t *impostor = impostor_start(world_script, &world);
        asking_open(&asking, impostor_port(impostor), SOON, 0);
        fetch_start(&asking, fetching, 1, 4, SOON);
        fetch_wait(fetching);
        cr_assert_eq(fetching->error.status, BKV_OK, "%s", fetching->error.message);
        for (uint32_t n = 0; n < 4; n++) {
            cr_assert_eq(fetching->ended[n], n < 2 ? BKV_OK : BKV_NOT_FOUND);
            cr_assert(n >= 2 || (fetching->lengths[n] == world.length && fetching->tenants[n] == 7 &&
                                 fetching->ttls[n] == 1234 && record_matches(fetching->memory[n], n + 1, world.length)));
        }
        cr_assert_eq(metrics_of(&asking).peer_fetched_total, 2);
        cr_assert_eq(metrics_of(&asking).peer_fetched_bytes_total, 2 * world.length);
        bkv_peer_health_t health;
        bkv_peer_get_health(asking.peer, &health);
        cr_assert_eq(health.fetched_bytes, 2 * world.length);
        fetch_clear(fetching);
        asking_close(&asking);
        impostor_stop(impostor);
    }
}

Test(peers_fetch, many_come_in_parts, .timeout = 120) {
    world_t world;
    asking_t asking;
    fetching_t *fetching = fetching_new();
    world_init(&world, 4000);
    world.length = 160;
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), SOON, 1000);
    fetching->unwanted[1500] = fetching->unwanted[3999] = true;
    fetch_start(&asking, fetching, 0, 4096, UINT32_MAX);
    fetch_wait(fetching);
    cr_assert_eq(fetching->error.status, BKV_OK, "%s", fetching->error.message);
    for (uint32_t i = 0; i < 4096; i++) {
        bkv_status_t status = fetching->unwanted[i] ? BKV_CANCELLED : i < 4000 ? BKV_OK : BKV_NOT_FOUND;
        cr_assert_eq(fetching->ended[i], status, "%u: %d", i, (int)fetching->ended[i]);
        cr_assert(status != BKV_OK || record_matches(fetching->memory[i], i, 160), "%u", i);
    }
    cr_assert_eq(atomic_load(&world.fetches), 5);
    cr_assert_eq(atomic_load(&world.largest), 1000);
    fetch_clear(fetching);
    fetching = fetching_new();
    fetch_start(&asking, fetching, 0, 0, SOON);
    fetch_wait(fetching);
    cr_assert(fetching->over && fetching->error.status == BKV_OK);
    cr_assert_eq(atomic_load(&world.fetches), 5);
    fetch_clear(fetching);
    asking_close(&asking);
    impostor_stop(impostor);
}

// ---- as it should not be ----

#define LENGTH 4096

// What a bad member does about a request for three records; the first of them is good where it is sent before.
typedef struct lie {
    const char *what, *says; // says: part of the fetch's error
    uint32_t index;          // of the chunk
    uint32_t number;         // of the record in it
    uint64_t claims;         // record_bytes
    uint64_t bytes;          // of the chunk
    bool good_before;        // record 0 was sent first
    bool unfinished;         // and then the call ends
    bool twice;              // the chunk is sent once more
    uint32_t code;           // after half of the record
} lie_t;

static const lie_t lies[] = {
    {.what = "an index out of range", .says = "chunk.index", .index = 3, .claims = LENGTH, .bytes = LENGTH},
    {.what = "a large index", .says = "chunk.index", .index = UINT32_MAX, .claims = LENGTH, .bytes = LENGTH},
    {.what = "the same index again", .says = "chunk.index", .good_before = true, .claims = LENGTH, .bytes = LENGTH},
    {.what = "another record", .says = "not the one", .number = 1, .claims = LENGTH, .bytes = LENGTH},
    {.what = "no bytes", .says = "less than its header", .claims = LENGTH},
    {.what = "half a header", .says = "less than its header", .claims = LENGTH, .bytes = 64},
    {.what = "too long", .says = "record_bytes", .claims = UINT64_C(1) << 40, .bytes = LENGTH},
    {.what = "absurdly long", .says = "record_bytes", .claims = UINT64_MAX, .bytes = LENGTH},
    {.what = "too short", .says = "record_bytes", .claims = 127, .bytes = LENGTH},
    {.what = "of length 0", .says = "record_bytes", .claims = 0, .bytes = LENGTH},
    {.what = "longer than its header says", .says = "header of that length", .claims = 2 * LENGTH, .bytes = LENGTH},
    {.what = "shorter than its header says", .says = "header of that length", .claims = LENGTH / 2, .bytes = LENGTH / 2},
    {.what = "more than it announced", .says = "chunk.index", .claims = LENGTH, .bytes = LENGTH, .twice = true},
    {.what = "the rest and more", .says = "are missing", .claims = LENGTH, .bytes = LENGTH - 16, .twice = true},
    {.what = "an end half-way", .says = "never came", .claims = LENGTH, .bytes = LENGTH / 2, .unfinished = true},
    {.what = "given up half-way", .says = "half-way", .claims = LENGTH, .bytes = LENGTH / 2, .code = GRPC_STATUS_NOT_FOUND},
};

static void tell_lie(impostor_call_t *call, void *user) {
    const lie_t *lie = user;
    uint8_t record[2 * LENGTH];
    free(impostor_read(call, &(size_t){0}));
    if (lie->good_before) {
        record_make(record, 0, LENGTH, 7);
        world_chunk(call, 0, record, LENGTH, 0, LENGTH, 0);
    }
    record_make(record, lie->number, LENGTH, 7);
    world_chunk(call, lie->index, record, lie->claims, 0, lie->bytes, 0);
    if (lie->twice) {
        world_chunk(call, lie->index, record, lie->claims, 16, lie->bytes, 0);
    }
    if (lie->code != 0) {
        world_missing(call, lie->index, lie->code);
    }
    if (lie->unfinished) {
        impostor_end(call, GRPC_STATUS_OK, "");
    } else {
        impostor_hush(call); // it is the asker that ends the call
    }
}

Test(peers_fetch, nothing_that_a_member_says_is_believed, .timeout = 120) {
    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        asking_t asking;
        fetching_t *fetching = fetching_new();
        impostor_t *impostor = impostor_start(tell_lie, (void *)(uintptr_t)&lies[i]);
        asking_open(&asking, impostor_port(impostor), SOON, 0);
        fetch_start(&asking, fetching, 0, 3, 2 * SOON);
        fetch_wait(fetching);
        cr_assert_eq(fetching->error.status, BKV_INTERNAL, "%s: %s", lies[i].what, fetching->error.message);
        cr_assert_not_null(strstr(fetching->error.message, lies[i].says), "%s: %s", lies[i].what, fetching->error.message);
        uint32_t good = lies[i].good_before || strcmp(lies[i].what, "more than it announced") == 0 ? 1 : 0;
        for (uint32_t n = 0; n < 3; n++) {
            cr_assert_eq(fetching->ended[n], n < good ? BKV_OK : BKV_INTERNAL, "%s: %u", lies[i].what, n);
        }
        fetch_clear(fetching);
        asking_close(&asking);
        impostor_stop(impostor);
    }
}

// Chunks of no RecordChunk, and one that says things of itself that no daemon says.
static void talk_nonsense(impostor_call_t *call, void *user) {
    free(impostor_read(call, &(size_t){0}));
    const char *text = user;
    impostor_write(call, text, strlen(text));
    impostor_end(call, GRPC_STATUS_OK, "");
}

Test(peers_fetch, nonsense_is_an_error, .timeout = 60) {
    static const char *const texts[] = {"\x7a\x7f" /* data that does not follow */, "\x0f", "\x7a\x01x\x7a\x01y", ""};
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        asking_t asking;
        fetching_t *fetching = fetching_new();
        impostor_t *impostor = impostor_start(talk_nonsense, (void *)(uintptr_t)texts[i]);
        asking_open(&asking, impostor_port(impostor), SOON, 0);
        fetch_start(&asking, fetching, 0, 2, SOON);
        fetch_wait(fetching);
        cr_assert_eq(fetching->error.status, BKV_INTERNAL, "%zu: %s", i, fetching->error.message);
        fetch_clear(fetching);
        asking_close(&asking);
        impostor_stop(impostor);
    }
}

static void answer_codes(impostor_call_t *call, void *user) {
    (void)user;
    static const uint32_t codes[] = {GRPC_STATUS_NOT_FOUND, GRPC_STATUS_DATA_LOSS, GRPC_STATUS_INTERNAL, 4711};
    free(impostor_read(call, &(size_t){0}));
    for (uint32_t i = 0; i < 4; i++) {
        world_missing(call, i, codes[i]);
    }
    impostor_end(call, GRPC_STATUS_OK, "");
}

Test(peers_fetch, each_record_has_a_code_of_its_own, .timeout = 60) {
    asking_t asking;
    fetching_t *fetching = fetching_new();
    impostor_t *impostor = impostor_start(answer_codes, NULL);
    asking_open(&asking, impostor_port(impostor), SOON, 0);
    fetch_start(&asking, fetching, 0, 4, SOON);
    fetch_wait(fetching);
    cr_assert_eq(fetching->error.status, BKV_OK, "%s", fetching->error.message);
    cr_assert(fetching->ended[0] == BKV_NOT_FOUND && fetching->ended[1] == BKV_DATA_LOSS);
    cr_assert(fetching->ended[2] == BKV_INTERNAL && fetching->ended[3] == BKV_INTERNAL);
    fetch_clear(fetching);
    asking_close(&asking);
    impostor_stop(impostor);
}

// ---- slow, silent, given up ----

typedef struct drip {
    uint32_t chunks, pause_ms;
} drip_t;

// One record, a little at a time; then nothing.
static void send_slowly(impostor_call_t *call, void *user) {
    const drip_t *drip = user;
    uint8_t record[LENGTH];
    record_make(record, 0, LENGTH, 7);
    free(impostor_read(call, &(size_t){0}));
    for (uint32_t i = 0; i < drip->chunks; i++) {
        if (!world_chunk(call, 0, record, LENGTH, i * 256, 256, 0)) {
            break;
        }
        pause_ms(drip->pause_ms);
    }
    if (drip->chunks * 256 == LENGTH) {
        impostor_end(call, GRPC_STATUS_OK, "");
    } else {
        impostor_hush(call);
    }
}

Test(peers_fetch, a_stream_that_moves_goes_on_and_one_that_stands_still_ends, .timeout = 60) {
    for (uint32_t whole = 0; whole < 2; whole++) {
        drip_t drip = {.chunks = whole ? 16 : 3, .pause_ms = ASKING_TIMEOUT / 10};
        asking_t asking;
        fetching_t *fetching = fetching_new();
        impostor_t *impostor = impostor_start(send_slowly, &drip);
        asking_open(&asking, impostor_port(impostor), ASKING_TIMEOUT, 0);
        uint64_t start_ms = bkv_now_ms();
        fetch_start(&asking, fetching, 0, 1, UINT32_MAX);
        fetch_wait(fetching);
        uint64_t took_ms = bkv_now_ms() - start_ms;
        if (whole) { // sixteen tenths of the timeout
            cr_assert_eq(fetching->error.status, BKV_OK, "%s", fetching->error.message);
            cr_assert(took_ms > ASKING_TIMEOUT && record_matches(fetching->memory[0], 0, LENGTH));
        } else {
            cr_assert_eq(fetching->error.status, BKV_DEADLINE_EXCEEDED, "%s", fetching->error.message);
            cr_assert(fetching->begins[0] == 1 && fetching->ended[0] == BKV_DEADLINE_EXCEEDED);
            cr_assert(took_ms >= ASKING_TIMEOUT && took_ms < ASKING_TIMEOUT + SOON, "%llu", (unsigned long long)took_ms);
            cr_assert(becomes_suspected(&asking, true, 0));
        }
        fetch_clear(fetching);
        asking_close(&asking);
        impostor_stop(impostor);
    }
}

Test(peers_fetch, deadlines_end_a_stream_that_moves, .timeout = 60) {
    drip_t drip = {.chunks = 15, .pause_ms = 100};
    asking_t asking;
    fetching_t *fetching = fetching_new();
    impostor_t *impostor = impostor_start(send_slowly, &drip);
    asking_open(&asking, impostor_port(impostor), SOON, 0);
    uint64_t start_ms = bkv_now_ms();
    fetch_start(&asking, fetching, 0, 2, 300);
    fetch_wait(fetching);
    cr_assert(bkv_now_ms() - start_ms >= 295 && bkv_now_ms() - start_ms < SOON);
    cr_assert_eq(fetching->error.status, BKV_DEADLINE_EXCEEDED, "%s", fetching->error.message);
    cr_assert(fetching->ended[0] == BKV_DEADLINE_EXCEEDED && fetching->ended[1] == BKV_DEADLINE_EXCEEDED);
    cr_assert(becomes_suspected(&asking, false, 0), "it was slow, not silent");
    fetch_clear(fetching);
    asking_close(&asking);
    impostor_stop(impostor);
}

Test(peers_fetch, a_fetch_may_be_given_up_from_inside, .timeout = 60) {
    world_t world;
    asking_t asking;
    fetching_t *fetching = fetching_new();
    world_init(&world, 1000);
    world.length = 64 << 10;
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), SOON, 0);
    fetching->cancel_at = 5;
    fetch_start(&asking, fetching, 0, 1000, UINT32_MAX);
    fetch_wait(fetching);
    cr_assert_eq(fetching->error.status, BKV_CANCELLED, "%s", fetching->error.message);
    for (uint32_t i = 0; i < 1000; i++) {
        cr_assert(i < 5 ? fetching->ended[i] == BKV_OK : true);
        cr_assert(fetching->ended[i] == BKV_OK || fetching->ended[i] == BKV_CANCELLED);
        cr_assert(fetching->ended[i] != BKV_OK || record_matches(fetching->memory[i], i, world.length));
    }
    cr_assert_eq(fetching->ended[999], BKV_CANCELLED);
    fetch_clear(fetching);
    asking_close(&asking);
    impostor_stop(impostor);
}

// At any moment, also while it begins and while it ends.
Test(peers_fetch, a_fetch_may_be_given_up_at_any_time, .timeout = 120) {
    world_t world;
    asking_t asking;
    world_init(&world, 20);
    world.length = 40 << 10;
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), SOON, 5);
    uint32_t cancelled = 0;
    for (uint32_t round = 0; round < 120; round++) {
        fetching_t *fetching = fetching_new();
        bool began = round % 3 != 0;
        fetching->cancel_at = round % 3 == 2 ? round % 19 + 1 : 0;
        fetch_start(&asking, fetching, 0, 20, UINT32_MAX);
        cr_assert(!fetching->refused, "%s", fetching->error.message);
        if (!began) {
            bkv_peer_cancel(fetching->call); // nothing can have ended all 20 yet, in four parts
        }
        fetch_wait(fetching);
        cancelled += fetching->error.status == BKV_CANCELLED;
        cr_assert(fetching->error.status == BKV_OK || fetching->error.status == BKV_CANCELLED, "%s", fetching->error.message);
        for (uint32_t i = 0; i < 20; i++) {
            cr_assert(fetching->ended[i] != BKV_OK || record_matches(fetching->memory[i], i, world.length));
        }
        fetch_clear(fetching);
    }
    cr_assert(cancelled >= 40 && cancelled <= 80, "%u", cancelled);
    cr_assert(becomes_suspected(&asking, false, 0), "who is given up on is not to blame");
    asking_close(&asking);
    impostor_stop(impostor);
}
