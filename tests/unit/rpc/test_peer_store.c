// test_peer_store.c - records from another daemon: taken in whole, refused one by one, and nothing that a peer may send does harm.
#include "member.h"

#include "daemon/observe/clock.h"
#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// A daemon and the bytes of a record of its own, number 1, which it has forgotten again.
typedef struct {
    member_t member;
    uint8_t *record;
    size_t length;
    peer_call_t call;
} fixture_t;

static bkv_store_t *store_of(fixture_t *f) {
    return f->member.rig.daemon.store;
}

static bkv_store_metrics_t metrics_of(fixture_t *f) {
    bkv_store_metrics_t metrics;
    bkv_store_metrics(store_of(f), &metrics);
    return metrics;
}

static void forget(fixture_t *f, uint32_t number) {
    bkv_name_t name = member_name(&f->member, number);
    cr_assert(bkv_store_drop(store_of(f), &name.spec_id, &name.key, bkv_now_ms()));
}

// A call's end is heard before its slot is given back.
static bool gives_its_slot_back(fixture_t *f) {
    for (int i = 0; i < 500 && metrics_of(f).slot_bytes != 0; i++) {
        usleep(10000);
    }
    return metrics_of(f).slot_bytes == 0;
}

static void open_fixture(fixture_t *f) {
    member_open(&f->member);
    member_put(&f->member, 1, 1);
    f->record = member_fetch(&f->member, 1, &f->length, NULL);
    cr_assert_not_null(f->record);
    forget(f, 1);
    cr_assert(gives_its_slot_back(f));
}

static void close_fixture(fixture_t *f) {
    free(f->record);
    member_close(&f->member);
}

// The same record under another number.
static uint8_t *renamed(const fixture_t *f, uint32_t number) {
    uint8_t *copy = malloc(f->length);
    memcpy(copy, f->record, f->length);
    rig_key(number, ((bkv_record_header_t *)(void *)copy)->key);
    bkv_record_seal(copy);
    return copy;
}

static void start(fixture_t *f) {
    member_start_store(&f->member, 0, &f->call);
}

static bool send_number(fixture_t *f, uint32_t number, const uint8_t *record, size_t length) {
    bkv_name_t name = member_name(&f->member, number);
    return member_send_record(&f->call, &name, 0, record, length);
}

// Ends the stream, which must succeed with these codes; its message must hold text, or be empty.
static void expect(fixture_t *f, const uint32_t *codes, size_t count, const char *text) {
    Balancekv__Cluster__V1__StoreResponse *reply = member_end_store(&f->call);
    cr_assert_not_null(reply, "%s", f->call.details);
    cr_assert_eq(reply->n_codes, count);
    for (size_t i = 0; i < count; i++) {
        cr_assert_eq(reply->codes[i], codes[i], "record %zu: %u instead of %u: %s", i, reply->codes[i], codes[i],
                     reply->message);
    }
    cr_assert_not_null(strstr(reply->message, text), "%s", reply->message);
    cr_assert(text[0] != '\0' || reply->message[0] == '\0', "%s", reply->message);
    balancekv__cluster__v1__store_response__free_unpacked(reply, NULL);
    peer_free(&f->call);
}

static void expect_one(fixture_t *f, uint32_t code, const char *text) {
    expect(f, &code, 1, text);
}

// Ends the stream, which must have failed.
static void expect_failure(fixture_t *f, grpc_status_code code, const char *text) {
    cr_assert_null(member_end_store(&f->call));
    cr_assert_eq(f->call.code, code, "%s", f->call.details);
    cr_assert_not_null(strstr(f->call.details, text), "%s", f->call.details);
    peer_free(&f->call);
}

Test(rpc_peer_store, records_arrive_as_they_were_sent) {
    fixture_t f;
    open_fixture(&f);
    uint8_t *second = renamed(&f, 2);
    bkv_name_t name = member_name(&f.member, 1);
    start(&f);
    cr_assert(member_send_record(&f.call, &name, 60000, f.record, f.length));
    cr_assert(send_number(&f, 2, second, f.length));
    expect(&f, (const uint32_t[]){0, 0}, 2, "");
    for (uint32_t number = 1; number <= 2; number++) {
        size_t length;
        uint64_t ttl_ms = 0;
        uint8_t *back = member_fetch(&f.member, number, &length, &ttl_ms);
        cr_assert_eq(length, f.length);
        cr_assert_arr_eq(back, number == 1 ? f.record : second, length);
        cr_assert(number == 1 ? ttl_ms > 30000 && ttl_ms <= 60000 : ttl_ms == 0);
        free(back);
    }
    bkv_store_metrics_t m = metrics_of(&f);
    cr_assert(m.adopted_total == 2 && m.published_total == 1 && m.copies == 0 && m.misses_total == 0);
    free(second);
    close_fixture(&f);
}

// However the stream is cut: the header in pieces, the head without data, data in single bytes.
Test(rpc_peer_store, any_cut_will_do) {
    fixture_t f;
    open_fixture(&f);
    bkv_name_t name = member_name(&f.member, 1);
    Balancekv__Cluster__V1__StoreRecord head = BALANCEKV__CLUSTER__V1__STORE_RECORD__INIT;
    head.name = rig_bytes(&name, sizeof(name));
    head.record_bytes = f.length;
    static const size_t cuts[] = {0, 1, 100, 127, 128, 129, 200};
    for (size_t i = 0; i < sizeof(cuts) / sizeof(cuts[0]); i++) {
        start(&f);
        cr_assert(member_send(&f.call, &head, f.record, cuts[i]));
        cr_assert(member_send(&f.call, NULL, NULL, 0));
        for (size_t at = cuts[i]; at < cuts[i] + 40; at++) {
            cr_assert(member_send(&f.call, NULL, f.record + at, 1));
        }
        cr_assert(member_send(&f.call, NULL, f.record + cuts[i] + 40, f.length - cuts[i] - 40));
        expect_one(&f, 0, "");
        forget(&f, 1);
    }
    close_fixture(&f);
}

Test(rpc_peer_store, large_records_come_in_many_messages) {
    fixture_t f;
    open_fixture(&f);
    const uint32_t tokens = 16384; // 8 MiB
    rig_open_spec(&f.member.rig, tokens);
    size_t bytes = RIG_BLOCK / RIG_TOKENS * tokens, length;
    float *payload = rig_payload(bytes, 3);
    rig_put(&f.member.rig, 5, tokens, payload, bytes);
    free(payload);
    uint8_t *record = member_fetch(&f.member, 5, &length, NULL), *back;
    forget(&f, 5);
    bkv_name_t name = member_name(&f.member, 5);
    Balancekv__Cluster__V1__StoreRecord head = BALANCEKV__CLUSTER__V1__STORE_RECORD__INIT;
    head.name = rig_bytes(&name, sizeof(name));
    head.record_bytes = length;
    start(&f);
    cr_assert(member_send(&f.call, &head, record, 1000));
    for (size_t at = 1000, piece; at < length; at += piece) {
        piece = length - at < 1000000 ? length - at : 1000000;
        cr_assert(member_send(&f.call, NULL, record + at, piece));
    }
    expect_one(&f, 0, "");
    back = member_fetch(&f.member, 5, &bytes, NULL);
    cr_assert(bytes == length && memcmp(back, record, length) == 0);
    free(back);
    free(record);
    close_fixture(&f);
}

// What is there already is not taken again, but it is owned from now on.
Test(rpc_peer_store, a_record_that_is_there) {
    fixture_t f;
    open_fixture(&f);
    start(&f);
    for (int i = 0; i < 2; i++) {
        cr_assert(send_number(&f, 1, f.record, f.length));
    }
    expect(&f, (const uint32_t[]){0, GRPC_STATUS_ALREADY_EXISTS}, 2, "");
    bkv_name_t name = member_name(&f.member, 1);
    cr_assert(bkv_store_set_copy(store_of(&f), &name, true, bkv_now_ms()));
    cr_assert_eq(metrics_of(&f).copies, 1);
    start(&f);
    cr_assert(send_number(&f, 1, f.record, f.length));
    expect_one(&f, GRPC_STATUS_ALREADY_EXISTS, "");
    cr_assert_eq(metrics_of(&f).copies, 0);
    cr_assert_eq(metrics_of(&f).adopted_total, 1);
    close_fixture(&f);
}

Test(rpc_peer_store, a_damaged_one_is_replaced) {
    fixture_t f;
    open_fixture(&f);
    start(&f);
    cr_assert(send_number(&f, 1, f.record, f.length));
    expect_one(&f, 0, "");
    bkv_name_t name = member_name(&f.member, 1);
    bkv_pin_t pin;
    cr_assert_eq(bkv_store_pin(store_of(&f), &name.spec_id, &name.key, bkv_now_ms(), &pin, NULL), BKV_OK);
    ((uint8_t *)(uintptr_t)pin.data)[f.length - 1] ^= 1;
    bkv_store_unpin(store_of(&f), &pin);
    start(&f);
    cr_assert(send_number(&f, 1, f.record, f.length));
    expect_one(&f, 0, "");
    size_t length;
    uint8_t *back = member_fetch(&f.member, 1, &length, NULL);
    cr_assert(length == f.length && memcmp(back, f.record, length) == 0);
    cr_assert_eq(metrics_of(&f).corrupt_total, 1);
    free(back);
    close_fixture(&f);
}

// ---- refused, one by one; a sound record after each is taken ----

typedef void (*spoil_t)(bkv_record_header_t *header, uint8_t *record, size_t length);

static void spoil_sum(bkv_record_header_t *header, uint8_t *record, size_t length) {
    (void)header;
    record[length - 1] ^= 1;
}
static void spoil_magic(bkv_record_header_t *header, uint8_t *record, size_t length) {
    (void)length;
    header->magic ^= 1;
    bkv_record_seal(record);
}
static void spoil_length(bkv_record_header_t *header, uint8_t *record, size_t length) {
    (void)length;
    header->length -= 16;
    bkv_record_seal(record);
}
static void spoil_length_more(bkv_record_header_t *header, uint8_t *record, size_t length) {
    (void)record;
    header->length = length + 4096;
}
static void spoil_key(bkv_record_header_t *header, uint8_t *record, size_t length) {
    (void)length;
    header->key[31] ^= 1;
    bkv_record_seal(record);
}
static void spoil_spec(bkv_record_header_t *header, uint8_t *record, size_t length) {
    (void)length;
    header->spec_id[0] ^= 1;
    bkv_record_seal(record);
}
static void spoil_tenant(bkv_record_header_t *header, uint8_t *record, size_t length) {
    (void)length;
    header->tenant ^= 1;
    bkv_record_seal(record);
}
static void spoil_layers(bkv_record_header_t *header, uint8_t *record, size_t length) {
    (void)length;
    header->layers = 60000;
    bkv_record_seal(record);
}
static void spoil_directory(bkv_record_header_t *header, uint8_t *record, size_t length) {
    bkv_section_t *section = (void *)(record + sizeof(*header));
    section->value_offset = (uint32_t)(length / 16) + 1;
    bkv_record_seal(record);
}
static void make_slice(bkv_record_header_t *header, uint8_t *record, size_t length) {
    (void)length;
    header->flags |= BKV_RECORD_SLICE;
    bkv_record_seal(record);
}

Test(rpc_peer_store, damaged_and_forged_records_are_refused_and_the_others_taken) {
    static const struct {
        spoil_t spoil;
        uint32_t code;
        const char *text;
    } cases[] = {
        {spoil_sum, GRPC_STATUS_DATA_LOSS, "record[0]: checksum"},
        {spoil_magic, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: magic"},
        {spoil_length, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: record_bytes"},
        {spoil_length_more, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: length"},
        {spoil_key, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: name"},
        {spoil_spec, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: name"},
        {spoil_tenant, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: tenant"},
        {spoil_layers, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: "},
        {spoil_directory, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: "},
        {make_slice, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: flags"},
    };
    fixture_t f;
    open_fixture(&f);
    for (uint32_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        uint8_t *bad = renamed(&f, 100), *good = renamed(&f, i);
        cases[i].spoil((void *)bad, bad, f.length);
        start(&f);
        cr_assert(send_number(&f, 100, bad, f.length));
        cr_assert(send_number(&f, i, good, f.length));
        expect(&f, (const uint32_t[]){cases[i].code, 0}, 2, cases[i].text);
        free(bad);
        free(good);
    }
    cr_assert_eq(rig_resident(&f.member.rig, 100, 1), 0);
    cr_assert_eq(rig_resident(&f.member.rig, 0, 10), 10);
    close_fixture(&f);
}

// Without its spec being open here, a record's tenant cannot be told; it counts for the one it names.
Test(rpc_peer_store, quotas_are_the_records_tenants) {
    fixture_t f;
    open_fixture(&f);
    uint8_t *record = renamed(&f, 1);
    bkv_record_header_t *header = (void *)record;
    bkv_name_t name = member_name(&f.member, 1);
    memset(name.spec_id.bytes, 0x42, sizeof(name.spec_id.bytes));
    memcpy(header->spec_id, name.spec_id.bytes, sizeof(header->spec_id));
    header->tenant = 12345;
    bkv_record_seal(record);
    cr_assert_eq(bkv_store_set_quota(store_of(&f), 12345, 4096, NULL), BKV_OK);
    start(&f);
    cr_assert(member_send_record(&f.call, &name, 0, record, f.length));
    cr_assert(send_number(&f, 1, f.record, f.length)); // another tenant's
    expect(&f, (const uint32_t[]){GRPC_STATUS_RESOURCE_EXHAUSTED, 0}, 2, "record[0]: tenant_quota");
    cr_assert_eq(bkv_store_set_quota(store_of(&f), 12345, 0, NULL), BKV_OK);
    start(&f);
    cr_assert(member_send_record(&f.call, &name, 0, record, f.length));
    expect_one(&f, 0, "");
    free(record);
    close_fixture(&f);
}

Test(rpc_peer_store, names_and_lengths_that_cannot_be) {
    fixture_t f;
    open_fixture(&f);
    bkv_name_t name = member_name(&f.member, 1);
    uint8_t long_name[64] = {0};
    const struct {
        size_t name_bytes;
        uint64_t record_bytes;
        uint32_t code;
        const char *text;
    } cases[] = {
        {0, 4096, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: name: 0 bytes"},
        {47, 4096, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: name: 47 bytes"},
        {64, 4096, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: name: 64 bytes"},
        {48, 0, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: record_bytes: 0"},
        {48, 127, GRPC_STATUS_INVALID_ARGUMENT, "record[0]: record_bytes: 127"},
        {48, ((uint64_t)32 << 20) + 1, GRPC_STATUS_RESOURCE_EXHAUSTED, "record[0]: record_bytes: 33554433"},
        {48, UINT64_MAX, GRPC_STATUS_RESOURCE_EXHAUSTED, "record[0]: record_bytes"},
    };
    memcpy(long_name, &name, sizeof(name));
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        Balancekv__Cluster__V1__StoreRecord head = BALANCEKV__CLUSTER__V1__STORE_RECORD__INIT;
        head.name = rig_bytes(long_name, cases[i].name_bytes);
        head.record_bytes = cases[i].record_bytes;
        start(&f);
        cr_assert(member_send(&f.call, &head, f.record, cases[i].record_bytes < 4096 ? cases[i].record_bytes : 4096));
        cr_assert(send_number(&f, 1, f.record, f.length));
        expect(&f, (const uint32_t[]){cases[i].code, 0}, 2, cases[i].text);
        forget(&f, 1);
    }
    close_fixture(&f);
}

Test(rpc_peer_store, a_record_that_ends_early_is_refused) {
    fixture_t f;
    open_fixture(&f);
    bkv_name_t name = member_name(&f.member, 2);
    Balancekv__Cluster__V1__StoreRecord head = BALANCEKV__CLUSTER__V1__STORE_RECORD__INIT;
    head.name = rig_bytes(&name, sizeof(name));
    head.record_bytes = f.length;
    uint8_t *second = renamed(&f, 2);
    static const size_t sent[] = {0, 127, 128, 1000};
    for (size_t i = 0; i < sizeof(sent) / sizeof(sent[0]); i++) {
        start(&f);
        cr_assert(member_send(&f.call, &head, second, sent[i]));
        cr_assert(send_number(&f, 1, f.record, f.length));
        cr_assert(member_send(&f.call, &head, second, sent[i]));
        expect(&f,
               (const uint32_t[]){GRPC_STATUS_INVALID_ARGUMENT, i == 0 ? 0 : GRPC_STATUS_ALREADY_EXISTS,
                                  GRPC_STATUS_INVALID_ARGUMENT},
               3, "have not come");
    }
    cr_assert_eq(rig_resident(&f.member.rig, 1, 2), 1);
    free(second);
    close_fixture(&f);
}

// ---- streams that make no sense ----

Test(rpc_peer_store, data_of_no_record_end_the_stream) {
    fixture_t f;
    open_fixture(&f);
    start(&f);
    member_send(&f.call, NULL, "x", 1);
    expect_failure(&f, GRPC_STATUS_INVALID_ARGUMENT, "data: 1 bytes where 0");
    start(&f);
    cr_assert(send_number(&f, 1, f.record, f.length));
    member_send(&f.call, NULL, "x", 1); // one too many
    expect_failure(&f, GRPC_STATUS_INVALID_ARGUMENT, "data: 1 bytes where 0");
    cr_assert_eq(rig_resident(&f.member.rig, 1, 1), 1, "what came before is there");
    forget(&f, 1);
    uint8_t *longer = calloc(1, f.length + 1);
    memcpy(longer, f.record, f.length);
    bkv_name_t name = member_name(&f.member, 1);
    Balancekv__Cluster__V1__StoreRecord head = BALANCEKV__CLUSTER__V1__STORE_RECORD__INIT;
    head.name = rig_bytes(&name, sizeof(name));
    head.record_bytes = f.length;
    start(&f);
    member_send(&f.call, &head, longer, f.length + 1);
    expect_failure(&f, GRPC_STATUS_INVALID_ARGUMENT, "data:");
    free(longer);
    close_fixture(&f);
}

Test(rpc_peer_store, one_record_more_than_a_batch_ends_the_stream) {
    fixture_t f;
    open_fixture(&f);
    start(&f);
    for (uint32_t i = 0; i < 65; i++) {
        send_number(&f, 1, f.record, f.length);
    }
    expect_failure(&f, GRPC_STATUS_RESOURCE_EXHAUSTED, "more than 64");
    start(&f);
    for (uint32_t i = 0; i < 64; i++) {
        cr_assert(send_number(&f, 1, f.record, f.length));
    }
    uint32_t codes[64];
    for (size_t i = 0; i < 64; i++) {
        codes[i] = GRPC_STATUS_ALREADY_EXISTS;
    }
    expect(&f, codes, 64, "");
    close_fixture(&f);
}

Test(rpc_peer_store, an_empty_stream_is_answered) {
    fixture_t f;
    open_fixture(&f);
    start(&f);
    expect(&f, NULL, 0, "");
    close_fixture(&f);
}

Test(rpc_peer_store, too_large_a_message_ends_the_stream) {
    fixture_t f;
    open_fixture(&f);
    void *much = calloc(1, (8 << 20) + 1000);
    start(&f);
    member_send(&f.call, NULL, much, (8 << 20) + 1000);
    expect_failure(&f, GRPC_STATUS_RESOURCE_EXHAUSTED, "");
    free(much);
    close_fixture(&f);
}

// A peer that goes away or falls silent within a record leaves nothing behind.
Test(rpc_peer_store, a_peer_that_gives_up_leaves_nothing) {
    fixture_t f;
    open_fixture(&f);
    bkv_name_t name = member_name(&f.member, 1);
    Balancekv__Cluster__V1__StoreRecord head = BALANCEKV__CLUSTER__V1__STORE_RECORD__INIT;
    head.name = rig_bytes(&name, sizeof(name));
    head.record_bytes = f.length;
    for (int how = 0; how < 2; how++) {
        uint64_t aborted = metrics_of(&f).aborted_total;
        member_start_store(&f.member, how == 0 ? 0 : 1000, &f.call);
        cr_assert(member_send(&f.call, &head, f.record, 4096));
        for (int i = 0; i < 500 && metrics_of(&f).slot_bytes == 0; i++) {
            usleep(1000);
        }
        cr_assert_gt(metrics_of(&f).slot_bytes, 0);
        if (how == 0) {
            peer_cancel(&f.call);
        }
        peer_end(&f.call);
        cr_assert_eq(f.call.code, how == 0 ? GRPC_STATUS_CANCELLED : GRPC_STATUS_DEADLINE_EXCEEDED);
        peer_free(&f.call);
        cr_assert(gives_its_slot_back(&f));
        cr_assert_eq(metrics_of(&f).aborted_total, aborted + 1);
    }
    close_fixture(&f);
}

// What comes does not evict what another daemon is reading, and nobody waits for room: it is refused.
Test(rpc_peer_store, a_full_store_says_so) {
    fixture_t f;
    open_fixture(&f);
    bkv_slot_t slots[8]; // the whole arena, being filled
    for (size_t i = 0; i < 8; i++) {
        cr_assert_eq(bkv_store_reserve(store_of(&f), 1, 32 << 20, bkv_now_ms(), &slots[i], NULL), BKV_OK);
    }
    start(&f);
    cr_assert(send_number(&f, 1, f.record, f.length));
    expect_one(&f, GRPC_STATUS_RESOURCE_EXHAUSTED, "record[0]: arena");
    for (size_t i = 0; i < 8; i++) {
        bkv_store_abort(store_of(&f), &slots[i]);
    }
    start(&f);
    cr_assert(send_number(&f, 1, f.record, f.length));
    expect_one(&f, 0, "");
    close_fixture(&f);
}

// Several daemons send the same record at once: one is taken, and all learn that it is there.
Test(rpc_peer_store, two_at_once) {
    fixture_t f;
    open_fixture(&f);
    bkv_name_t name = member_name(&f.member, 1);
    Balancekv__Cluster__V1__StoreRecord head = BALANCEKV__CLUSTER__V1__STORE_RECORD__INIT;
    head.name = rig_bytes(&name, sizeof(name));
    head.record_bytes = f.length;
    peer_call_t other;
    start(&f);
    member_start_store(&f.member, 0, &other);
    cr_assert(member_send(&f.call, &head, f.record, 1000) && member_send(&other, &head, f.record, 1000));
    cr_assert(member_send(&f.call, NULL, f.record + 1000, f.length - 1000));
    expect_one(&f, 0, "");
    cr_assert(member_send(&other, NULL, f.record + 1000, f.length - 1000));
    f.call = other;
    expect_one(&f, GRPC_STATUS_ALREADY_EXISTS, "");
    close_fixture(&f);
}
