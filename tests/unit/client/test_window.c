// A window's regions against a model, their holders, and quarantine. The memory is plain here: no kind, no daemon.
#include "client/memory/window.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define WINDOW (4u << 20)
#define UNIT   4096u

typedef struct plain {
    uint8_t *memory;
    atomic_int left, closed;
} plain_t;

static void plain_leave(void *state) {
    atomic_fetch_add(&((plain_t *)state)->left, 1);
}

static void plain_close(void *state) {
    plain_t *plain = state;
    atomic_fetch_add(&plain->closed, 1);
    free(plain->memory);
}

static const bkv_window_kind_t plain_kind = {.name = "plain", .leave = plain_leave, .close = plain_close};

static bkv_client_window_t *plain_window(plain_t *plain, uint64_t bytes) {
    static const uint8_t session[16] = {1, 2, 3};
    *plain = (plain_t){.memory = aligned_alloc(UNIT, (bytes + UNIT - 1) / UNIT * UNIT)};
    bkv_client_window_t *window = bkv_client_window_create(&plain_kind, plain, plain->memory, bytes, session, 42);
    cr_assert(window != NULL && bkv_client_window_epoch(window) == 42 && bkv_client_window_bytes(window) == bytes);
    cr_assert(bkv_client_window_kind(window) == &plain_kind && bkv_client_window_session(window)[2] == 3);
    return window;
}

// ---- against a model ----

#define REGIONS 96

typedef struct model {
    uint8_t owner[WINDOW / UNIT]; // 0: free; 255: lost; else 1 + the region's number
    bkv_client_region_t *regions[REGIONS];
    uint8_t fill[REGIONS];
} model_t;

static uint64_t next_random(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

static size_t units_of(uint64_t bytes) {
    return (size_t)((bytes + UNIT - 1) / UNIT);
}

// The lowest gap of the model that is large enough; the number of units when there is none.
static size_t first_fit(const model_t *model, size_t units) {
    size_t all = WINDOW / UNIT, run = 0;
    for (size_t u = 0; u < all; u++) {
        run = model->owner[u] == 0 ? run + 1 : 0;
        if (run == units) {
            return u + 1 - units;
        }
    }
    return all;
}

static void mark(model_t *model, const bkv_client_region_t *region, uint8_t owner) {
    size_t at = (size_t)(bkv_client_region_offset(region) / UNIT);
    memset(model->owner + at, owner, units_of(bkv_client_region_bytes(region)));
}

static void take_one(model_t *model, bkv_client_window_t *window, size_t i, uint64_t bytes) {
    size_t expected = first_fit(model, units_of(bytes));
    bkv_client_region_t *region = bkv_client_region_take(window, bytes);
    if (expected == WINDOW / UNIT) {
        cr_assert(region == NULL, "%zu bytes where the model has no room", (size_t)bytes);
        return;
    }
    cr_assert(region != NULL && bkv_client_region_offset(region) == expected * UNIT, "not the first fit");
    cr_assert(bkv_client_region_bytes(region) == bytes && bkv_client_region_window(region) == window);
    cr_assert((uintptr_t)bkv_client_region_memory(region) % 64 == 0);
    model->regions[i] = region;
    model->fill[i] = (uint8_t)(i * 7 + bytes);
    memset(bkv_client_region_memory(region), model->fill[i], (size_t)bytes);
    mark(model, region, (uint8_t)(i + 1));
}

static void change_one(model_t *model, size_t i, uint64_t choice) {
    bkv_client_region_t *region = model->regions[i];
    uint64_t bytes = bkv_client_region_bytes(region);
    const uint8_t *memory = bkv_client_region_memory(region);
    cr_assert(memory[0] == model->fill[i] && memory[bytes - 1] == model->fill[i], "somebody else was given these bytes");
    if (choice % 8 == 0) {
        mark(model, region, 0);
        bkv_client_region_trim(region, bytes / 2 + 1);
        mark(model, region, (uint8_t)(i + 1));
        return;
    }
    bool lost = choice % 32 == 1;
    if (lost) {
        bkv_client_region_lose(region);
        bkv_client_region_lose(region); // again: nothing
        bkv_client_region_trim(region, 1);
        cr_assert(bkv_client_region_lost(region) && bkv_client_region_bytes(region) == bytes, "what is lost stays whole");
    }
    mark(model, region, lost ? 255 : 0);
    bkv_client_region_release(region);
    model->regions[i] = NULL;
}

static void run_model(uint64_t seed) {
    plain_t plain;
    bkv_client_window_t *window = plain_window(&plain, WINDOW);
    model_t *model = calloc(1, sizeof *model);
    uint64_t state = seed;
    for (int step = 0; step < 4000; step++) {
        size_t i = (size_t)(next_random(&state) % REGIONS);
        if (model->regions[i] != NULL) {
            change_one(model, i, next_random(&state));
        } else {
            uint64_t scale = next_random(&state) % 3 == 0 ? 512 << 10 : 32 << 10;
            take_one(model, window, i, 1 + next_random(&state) % scale);
        }
        size_t lost = 0;
        for (size_t u = 0; u < WINDOW / UNIT; u++) {
            lost += model->owner[u] == 255;
        }
        cr_assert(bkv_client_window_worn(window) == (lost > WINDOW / UNIT / 2));
    }
    for (size_t i = 0; i < REGIONS; i++) {
        bkv_client_region_release(model->regions[i]);
    }
    cr_assert(plain.closed == 0);
    bkv_client_window_release(window);
    cr_assert(plain.closed == 1);
    free(model);
}

Test(window, regions_as_a_model_has_them) {
    for (uint64_t seed = 1; seed <= 8; seed++) {
        run_model(seed);
    }
}

// ---- holders ----

Test(window, lives_as_long_as_anything_in_it) {
    plain_t plain;
    bkv_client_window_t *window = plain_window(&plain, WINDOW);
    bkv_client_region_t *region = bkv_client_region_take(window, 100000), *lost = bkv_client_region_take(window, 100000);
    cr_assert(region != NULL && lost != NULL);
    for (int record = 0; record < 3; record++) {
        cr_assert(bkv_client_region_retain(region) == region);
    }
    bkv_client_region_lose(lost);
    bkv_client_region_release(lost); // what is lost holds nothing
    bkv_client_region_release(region);
    bkv_client_window_leave(window);
    bkv_client_window_leave(window);
    cr_assert(plain.left == 1 && bkv_client_region_take(window, 1) == NULL, "nothing is taken from a window that was left");
    bkv_client_window_release(window);
    memset(bkv_client_region_memory(region), 1, 100000); // still there
    bkv_client_region_release(region);
    bkv_client_region_release(region);
    cr_assert(plain.closed == 0);
    bkv_client_region_release(region);
    cr_assert(plain.closed == 1 && plain.left == 1);
    bkv_client_region_release(NULL);
    bkv_client_window_release(NULL);
}

Test(window, lost_memory_is_not_given_out_again) {
    plain_t plain;
    bkv_client_window_t *window = plain_window(&plain, WINDOW);
    bkv_client_region_t *first = bkv_client_region_take(window, WINDOW / 2);
    uint64_t offset = bkv_client_region_offset(first);
    bkv_client_region_lose(first);
    bkv_client_region_release(first);
    cr_assert(!bkv_client_window_worn(window), "half of it is not more than half");
    bkv_client_region_t *rest = bkv_client_region_take(window, WINDOW / 2);
    cr_assert(rest != NULL && bkv_client_region_offset(rest) != offset);
    cr_assert(bkv_client_region_take(window, 1) == NULL);
    bkv_client_region_trim(rest, UNIT);
    bkv_client_region_t *little = bkv_client_region_take(window, 1);
    cr_assert(little != NULL && bkv_client_region_offset(little) == WINDOW / 2 + UNIT);
    bkv_client_region_lose(little);
    cr_assert(bkv_client_window_worn(window));
    bkv_client_region_release(little);
    bkv_client_region_release(rest);
    bkv_client_window_release(window);
    cr_assert(plain.closed == 1);
}

Test(window, odd_sizes) {
    plain_t plain;
    bkv_client_window_t *window = plain_window(&plain, BKV_WINDOW_LEAST + 100); // the last 100 bytes are no unit
    cr_assert(bkv_client_region_take(window, BKV_WINDOW_LEAST + 1) == NULL);
    cr_assert(bkv_client_region_take(window, UINT64_MAX) == NULL);
    bkv_client_region_t *all = bkv_client_region_take(window, BKV_WINDOW_LEAST);
    cr_assert(all != NULL && bkv_client_region_take(window, 1) == NULL);
    bkv_client_region_release(all);
    bkv_client_window_release(window);
}

// ---- threads ----

#define THREADS 4
#define ROUNDS  2000

typedef struct worker {
    bkv_client_window_t *window;
    pthread_t thread;
    uint8_t mark;
} worker_t;

static void *work(void *argument) {
    worker_t *worker = argument;
    uint64_t state = worker->mark;
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t bytes = 1 + next_random(&state) % (256 << 10);
        bkv_client_region_t *region = bkv_client_region_take(worker->window, bytes);
        if (region == NULL) {
            continue;
        }
        uint8_t *memory = bkv_client_region_memory(region);
        memory[0] = memory[bytes - 1] = worker->mark;
        bkv_client_region_retain(region);
        bkv_client_region_trim(region, bytes / 2 + 1);
        bkv_client_region_release(region);
        cr_assert(memory[0] == worker->mark);
        bkv_client_region_release(region);
    }
    bkv_client_window_release(worker->window);
    return NULL;
}

Test(window, many_threads) {
    plain_t plain;
    worker_t workers[THREADS];
    bkv_client_window_t *window = plain_window(&plain, WINDOW);
    for (size_t i = 0; i < THREADS; i++) {
        workers[i] = (worker_t){.window = bkv_client_window_retain(window), .mark = (uint8_t)(i + 1)};
        cr_assert(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0);
    }
    for (size_t i = 0; i < THREADS; i++) {
        pthread_join(workers[i].thread, NULL);
    }
    bkv_client_region_t *all = bkv_client_region_take(window, WINDOW);
    cr_assert(all != NULL, "everything came back");
    bkv_client_region_release(all);
    bkv_client_window_release(window);
    cr_assert(plain.closed == 1);
}
