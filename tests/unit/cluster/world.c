// world.c - see world.h.
#include "world.h"

#include "peer.pb-c.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK (1u << 20)

void world_init(world_t *world, uint32_t records) {
    memset(world, 0, sizeof(*world));
    pthread_mutex_init(&world->lock, NULL);
    world->records = records;
    world->length = 1024;
}

intake_count_t world_taken(world_t *world) {
    pthread_mutex_lock(&world->lock);
    intake_count_t taken = world->taken;
    pthread_mutex_unlock(&world->lock);
    return taken;
}

static pthread_once_t named = PTHREAD_ONCE_INIT;
static bkv_name_t names[ASKING_NAMES];

static void name_all(void) {
    for (uint32_t i = 0; i < ASKING_NAMES; i++) {
        names[i] = record_name(i);
    }
}

uint32_t world_number(const bkv_name_t *name) {
    pthread_once(&named, name_all);
    uint32_t number = 0;
    while (number < ASKING_NAMES && memcmp(&names[number], name, sizeof(*name)) != 0) {
        number++;
    }
    return number;
}

static uint32_t names_of(world_t *world, const ProtobufCBinaryData *bytes) {
    uint32_t count = (uint32_t)(bytes->len / BKV_NAME_BYTES);
    cr_assert_eq(bytes->len % BKV_NAME_BYTES, 0);
    if (count > atomic_load(&world->largest)) {
        atomic_store(&world->largest, count);
    }
    return count;
}

static const bkv_name_t *name_at(const ProtobufCBinaryData *bytes, uint32_t i) {
    return (const bkv_name_t *)(const void *)(bytes->data + (size_t)i * BKV_NAME_BYTES);
}

static bool refuse_batch(world_t *world, impostor_call_t *call, uint32_t count) {
    if (world->max_batch != 0 && count > world->max_batch) {
        impostor_end(call, GRPC_STATUS_RESOURCE_EXHAUSTED, "names: more than max_batch");
        return true;
    }
    return false;
}

static void have(world_t *world, impostor_call_t *call) {
    Balancekv__Cluster__V1__HaveRequest *request = impostor_request(call, &balancekv__cluster__v1__have_request__descriptor);
    if (request == NULL) {
        return; // given up before it was said
    }
    uint32_t count = names_of(world, &request->names);
    if (count == 0) {
        atomic_fetch_add(&world->probes, 1);
        impostor_end(call, GRPC_STATUS_INVALID_ARGUMENT, "names: none");
    } else if (!refuse_batch(world, call, count)) {
        atomic_fetch_add(&world->haves, 1);
        Balancekv__Cluster__V1__HaveResponse response = BALANCEKV__CLUSTER__V1__HAVE_RESPONSE__INIT;
        response.n_bytes = count;
        response.bytes = calloc(count, sizeof(response.bytes[0]));
        for (uint32_t i = 0; i < count; i++) {
            response.bytes[i] = world_number(name_at(&request->names, i)) < world->records ? world->length : 0;
        }
        impostor_reply(call, &response.base);
        free(response.bytes);
    }
    balancekv__cluster__v1__have_request__free_unpacked(request, NULL);
}

static void forget(world_t *world, impostor_call_t *call) {
    Balancekv__Cluster__V1__ForgetRequest *request =
        impostor_request(call, &balancekv__cluster__v1__forget_request__descriptor);
    if (request == NULL) {
        return; // given up before it was said
    }
    uint32_t count = names_of(world, &request->names);
    atomic_fetch_add(&world->forgets, 1);
    if (!refuse_batch(world, call, count)) {
        Balancekv__Cluster__V1__ForgetResponse response = BALANCEKV__CLUSTER__V1__FORGET_RESPONSE__INIT;
        response.n_had = count;
        response.had = calloc(count, sizeof(response.had[0]));
        for (uint32_t i = 0; i < count; i++) {
            response.had[i] = world_number(name_at(&request->names, i)) < world->records;
        }
        impostor_reply(call, &response.base);
        free(response.had);
    }
    balancekv__cluster__v1__forget_request__free_unpacked(request, NULL);
}

static void drain(world_t *world, impostor_call_t *call) {
    Balancekv__Cluster__V1__PeerDrainRequest *request =
        impostor_request(call, &balancekv__cluster__v1__peer_drain_request__descriptor);
    if (request == NULL) {
        return;
    }
    atomic_fetch_add(&world->drains, 1);
    Balancekv__Cluster__V1__PeerDrainResponse response = BALANCEKV__CLUSTER__V1__PEER_DRAIN_RESPONSE__INIT;
    response.draining = !request->undo;
    response.done = request->ask;
    response.left_keys = 1;
    response.left_bytes = 2;
    response.moved_keys = 3;
    response.moved_bytes = UINT64_C(1) << 40;
    impostor_reply(call, &response.base);
    balancekv__cluster__v1__peer_drain_request__free_unpacked(request, NULL);
}

// ---- Fetch ----

bool world_chunk(impostor_call_t *call, uint32_t index, const uint8_t *record, uint64_t length, uint64_t at, uint64_t bytes,
                 uint64_t ttl_ms) {
    Balancekv__V1__RecordChunk chunk = BALANCEKV__V1__RECORD_CHUNK__INIT;
    chunk.index = index;
    if (at == 0) {
        chunk.record_bytes = length;
        chunk.key = (ProtobufCBinaryData){.len = BKV_KEY_BYTES, .data = (uint8_t *)(uintptr_t)(record + 24)};
        chunk.boot_epoch = 1;
        chunk.ttl_ms = ttl_ms;
    }
    chunk.data = (ProtobufCBinaryData){.len = bytes, .data = (uint8_t *)(uintptr_t)(record + at)};
    return impostor_send(call, &chunk.base);
}

bool world_missing(impostor_call_t *call, uint32_t index, uint32_t code) {
    Balancekv__V1__RecordChunk chunk = BALANCEKV__V1__RECORD_CHUNK__INIT;
    chunk.index = index;
    chunk.code = code;
    chunk.message = (char *)(uintptr_t) "key: not here";
    return impostor_send(call, &chunk.base);
}

static bool send_record(const world_t *world, impostor_call_t *call, uint32_t index, uint32_t number) {
    uint8_t *record = malloc(world->length);
    record_make(record, number, world->length, 7);
    bool ok = true;
    for (uint64_t at = 0; ok && at < world->length; at += CHUNK) {
        uint64_t left = world->length - at;
        ok = world_chunk(call, index, record, world->length, at, left < CHUNK ? left : CHUNK, world->ttl_ms);
    }
    free(record);
    return ok;
}

static void fetch(world_t *world, impostor_call_t *call) {
    Balancekv__Cluster__V1__FetchRequest *request = impostor_request(call, &balancekv__cluster__v1__fetch_request__descriptor);
    if (request == NULL) {
        return; // given up before it was said
    }
    uint32_t count = names_of(world, &request->names);
    atomic_fetch_add(&world->fetches, 1);
    if (!refuse_batch(world, call, count)) {
        bool ok = true;
        for (uint32_t i = 0; ok && i < count; i++) {
            uint32_t number = world_number(name_at(&request->names, i));
            ok = number < world->records ? send_record(world, call, i, number) : world_missing(call, i, GRPC_STATUS_NOT_FOUND);
        }
        impostor_end(call, GRPC_STATUS_OK, "");
    }
    balancekv__cluster__v1__fetch_request__free_unpacked(request, NULL);
}

// ---- Store ----

typedef struct intake {
    uint32_t number;
    uint64_t length, received, ttl_ms;
    uint8_t *record;
} intake_t;

static uint32_t code_of(uint32_t number) {
    return number % 7 == 6 ? GRPC_STATUS_DATA_LOSS : number % 3 == 2 ? GRPC_STATUS_ALREADY_EXISTS : GRPC_STATUS_OK;
}

static void take_in(world_t *world, intake_t *intake, const Balancekv__Cluster__V1__StoreRequest *request) {
    if (request->record != NULL) {
        world->taken.wrong =
            world->taken.wrong || intake->received != intake->length || request->record->name.len != BKV_NAME_BYTES;
        intake->number = world_number(name_at(&request->record->name, 0));
        intake->length = request->record->record_bytes;
        intake->ttl_ms = request->record->ttl_ms;
        intake->received = 0;
        intake->record = realloc(intake->record, intake->length);
    }
    if (intake->record == NULL || request->data.len > intake->length - intake->received ||
        request->data.len > CHUNK + (64 << 10)) {
        world->taken.wrong = true;
        return;
    }
    memcpy(intake->record + intake->received, request->data.data, request->data.len);
    intake->received += request->data.len;
    if (intake->received == intake->length) {
        world->taken.wrong = world->taken.wrong || !record_matches(intake->record, intake->number, intake->length);
        world->taken.bytes += intake->length;
        world->taken.last_ttl_ms = intake->ttl_ms;
    }
}

static void store(world_t *world, impostor_call_t *call) {
    intake_t intake = {0};
    uint32_t codes[WORLD_STORED], count = 0;
    size_t length;
    uint8_t *bytes;
    atomic_fetch_add(&world->stores, 1);
    while (pause_ms(world->read_delay_ms), (bytes = impostor_read(call, &length)) != NULL) {
        Balancekv__Cluster__V1__StoreRequest *request = balancekv__cluster__v1__store_request__unpack(NULL, length, bytes);
        cr_assert_not_null(request);
        pthread_mutex_lock(&world->lock);
        take_in(world, &intake, request);
        if (request->record != NULL) {
            cr_assert(count < WORLD_STORED);
            codes[count++] = code_of(intake.number);
            world->taken.records++;
        }
        pthread_mutex_unlock(&world->lock);
        balancekv__cluster__v1__store_request__free_unpacked(request, NULL);
        free(bytes);
    }
    free(intake.record);
    Balancekv__Cluster__V1__StoreResponse response = BALANCEKV__CLUSTER__V1__STORE_RESPONSE__INIT;
    response.n_codes = count;
    response.codes = codes;
    impostor_reply(call, &response.base);
}

// ---- the script ----

void world_script(impostor_call_t *call, void *user) {
    world_t *world = user;
    const char *method = impostor_method(call);
    if (atomic_load(&world->silent)) {
        atomic_fetch_add(&world->hushed, 1);
        impostor_hush(call);
        return;
    }
    pause_ms(atomic_load(&world->delay_ms));
    if (strcmp(method, "Have") == 0) {
        have(world, call);
    } else if (strcmp(method, "Fetch") == 0) {
        fetch(world, call);
    } else if (strcmp(method, "Store") == 0) {
        store(world, call);
    } else if (strcmp(method, "Forget") == 0) {
        forget(world, call);
    } else if (strcmp(method, "Drain") == 0) {
        drain(world, call);
    }
}
