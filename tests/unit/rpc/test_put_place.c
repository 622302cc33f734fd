// test_put_place.c - Put of blocks that lie in shared memory: in flight together, refused by name, never answered too early.
#include "rig.h"

#include "daemon/rpc/wire.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCKS 4
#define AT(i)  ((uint64_t)(i)*RIG_BLOCK + 64)

typedef struct shared {
    rig_t rig;
    bkv_transports_t *sharing;
    uint8_t *memory; // room for BLOCKS blocks at AT(i), filled from the seeds 1, 2, ...
    uint8_t session[BKV_SESSION_BYTES];
    peer_call_t call;
} shared_t;

static void shared_open(shared_t *shared) {
    rig_open_sharing(&shared->rig);
    shared->sharing = shared->rig.config.transports;
    shared->memory = rig_attach(&shared->rig, AT(BLOCKS), shared->session);
    for (uint32_t i = 0; i < BLOCKS; i++) {
        float *payload = rig_payload(RIG_BLOCK, i + 1);
        memcpy(shared->memory + AT(i), payload, RIG_BLOCK);
        free(payload);
    }
}

// A block and its place, to be changed before they are sent.
typedef struct placed {
    uint8_t key[BKV_KEY_BYTES];
    Balancekv__V1__PutBlock block;
    Balancekv__V1__Place place;
} placed_t;

static void placed_init(placed_t *placed, const shared_t *shared, uint32_t number) {
    rig_key(number, placed->key);
    balancekv__v1__put_block__init(&placed->block);
    balancekv__v1__place__init(&placed->place);
    placed->block.spec_id = rig_bytes(shared->rig.spec_id, BKV_SPEC_ID_BYTES);
    placed->block.key = rig_bytes(placed->key, sizeof(placed->key));
    placed->block.tokens = RIG_TOKENS;
    placed->block.payload_bytes = RIG_BLOCK;
    placed->block.place = &placed->place;
    placed->place.session = rig_bytes(shared->session, sizeof(shared->session));
    placed->place.offset = AT(number);
}

static void send_placed(shared_t *shared, uint32_t number) {
    placed_t placed;
    placed_init(&placed, shared, number);
    cr_assert(rig_send_block(&shared->call, &placed.block, NULL, 0));
}

static void assert_stored(shared_t *shared, uint32_t number) {
    rig_start_get(&shared->rig, &number, 1, 0, &shared->call);
    size_t length;
    uint8_t *bytes = peer_receive(&shared->call, &length);
    Balancekv__V1__RecordChunk *chunk = balancekv__v1__record_chunk__unpack(NULL, length, bytes);
    cr_assert_eq(chunk->code, 0);
    cr_assert_eq(memcmp(chunk->data.data + chunk->data.len - RIG_BLOCK, shared->memory + AT(number), RIG_BLOCK), 0);
    balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
    free(bytes);
    cr_assert_eq(peer_end(&shared->call), GRPC_STATUS_OK);
    peer_free(&shared->call);
}

static void expect_results(shared_t *shared, uint32_t count) {
    size_t length;
    uint8_t *message = peer_receive(&shared->call, &length);
    cr_assert_eq(peer_end(&shared->call), GRPC_STATUS_OK, "%s", shared->call.details);
    Balancekv__V1__PutResponse *reply = balancekv__v1__put_response__unpack(NULL, length, message);
    cr_assert_eq(reply->n_results, count);
    for (uint32_t i = 0; i < count; i++) {
        cr_assert(reply->results[i]->stored_bytes > RIG_BLOCK && !reply->results[i]->duplicate);
    }
    balancekv__v1__put_response__free_unpacked(reply, NULL);
    free(message);
    peer_free(&shared->call);
}

// Sends one block and expects its refusal.
static void refused(shared_t *shared, const Balancekv__V1__PutBlock *block, size_t data_bytes, grpc_status_code code,
                    const char *message) {
    static const uint8_t data[16];
    peer_start(shared->rig.channel, "Put", 0, &shared->call);
    rig_send_block(&shared->call, block, data, data_bytes);
    peer_send_last(&shared->call);
    cr_assert_eq(peer_end(&shared->call), code, "%s", shared->call.details);
    cr_assert_eq(strncmp(shared->call.details, message, strlen(message)), 0, "\"%s\", expected \"%s\"", shared->call.details,
                 message);
    peer_free(&shared->call);
}

Test(rpc_put_place, blocks_are_in_flight_together_and_the_answer_waits_for_all) {
    shared_t shared;
    shared_open(&shared);
    sharing_order(shared.sharing, (sharing_orders_t){.late = true});
    peer_start(shared.rig.channel, "Put", 0, &shared.call);
    for (uint32_t i = 0; i < BLOCKS; i++) {
        send_placed(&shared, i);
    }
    peer_send_last(&shared.call);
    cr_assert(sharing_waits_for(shared.sharing, BLOCKS));
    cr_assert(rig_reaches_open_calls(&shared.rig, 1));
    sharing_let_go(shared.sharing);
    expect_results(&shared, BLOCKS);
    for (uint32_t i = 0; i < BLOCKS; i++) {
        assert_stored(&shared, i);
    }
    rig_close(&shared.rig);
}

Test(rpc_put_place, places_and_data_mix_in_a_stream) {
    shared_t shared;
    shared_open(&shared);
    float *payload = rig_payload(RIG_BLOCK, 99);
    peer_start(shared.rig.channel, "Put", 0, &shared.call);
    send_placed(&shared, 0);
    cr_assert(rig_send_put(&shared.call, &shared.rig, 50, RIG_TOKENS, RIG_BLOCK, payload, 1000));
    cr_assert(rig_send_data(&shared.call, (uint8_t *)payload + 1000, RIG_BLOCK - 1000));
    send_placed(&shared, 1);
    peer_send_last(&shared.call);
    expect_results(&shared, 3);
    assert_stored(&shared, 0);
    assert_stored(&shared, 1);
    cr_assert_eq(rig_resident(&shared.rig, 50, 1), 1);
    free(payload);
    rig_close(&shared.rig);
}

Test(rpc_put_place, what_is_wrong_with_a_place_is_named) {
    shared_t shared;
    shared_open(&shared);
    placed_t placed;
    placed_init(&placed, &shared, 0);
    refused(&shared, &placed.block, 16, GRPC_STATUS_INVALID_ARGUMENT, "block[0].place: says where the payload lies, and 16");
    placed.place.session.len = 5;
    refused(&shared, &placed.block, 0, GRPC_STATUS_INVALID_ARGUMENT, "block[0].place.session: 5 bytes");
    placed_init(&placed, &shared, 0);
    placed.place.offset = 32;
    refused(&shared, &placed.block, 0, GRPC_STATUS_INVALID_ARGUMENT, "block[0].place.offset: 32 is not");
    placed_init(&placed, &shared, 0);
    placed.place.bytes = RIG_BLOCK - 1;
    refused(&shared, &placed.block, 0, GRPC_STATUS_INVALID_ARGUMENT, "block[0].place.bytes: 32767, but");
    placed_init(&placed, &shared, 0);
    uint8_t unknown[BKV_SESSION_BYTES] = {0xaa};
    placed.place.session = rig_bytes(unknown, sizeof(unknown));
    refused(&shared, &placed.block, 0, GRPC_STATUS_FAILED_PRECONDITION, "block[0].place.session: there is none");
    placed_init(&placed, &shared, 0);
    sharing_order(shared.sharing, (sharing_orders_t){.start = BKV_INVALID_ARGUMENT});
    refused(&shared, &placed.block, 0, GRPC_STATUS_INVALID_ARGUMENT, "block[0].place.offset: refused at command");
    sharing_order(shared.sharing, (sharing_orders_t){.end = BKV_INTERNAL});
    refused(&shared, &placed.block, 0, GRPC_STATUS_INTERNAL, "block[0]: the link broke");
    sharing_order(shared.sharing, (sharing_orders_t){.on_device = true});
    refused(&shared, &placed.block, 0, GRPC_STATUS_INVALID_ARGUMENT, "block[0].place.layout: missing");
    cr_assert_eq(rig_resident(&shared.rig, 0, 1), 0);
    rig_close(&shared.rig);
}

Test(rpc_put_place, a_busy_transport_is_waited_for_while_blocks_of_ours_are_under_way) {
    shared_t shared;
    shared_open(&shared);
    sharing_order(shared.sharing, (sharing_orders_t){.late = true});
    peer_start(shared.rig.channel, "Put", 0, &shared.call);
    send_placed(&shared, 0);
    cr_assert(sharing_waits_for(shared.sharing, 1));
    sharing_order(shared.sharing, (sharing_orders_t){.late = true, .busy = 1});
    send_placed(&shared, 1); // is refused once
    send_placed(&shared, 2); // and this one not even read before that has been taken
    peer_send_last(&shared.call);
    for (int i = 0; i < 500 && sharing_look(shared.sharing).busy != 0; i++) {
        usleep(10000);
    }
    usleep(20000);
    cr_assert_eq(sharing_look(shared.sharing).waiting, 1);
    sharing_let_go(shared.sharing);
    expect_results(&shared, 3);
    for (uint32_t i = 0; i < 3; i++) {
        assert_stored(&shared, i);
    }
    placed_t placed; // with none of ours under way there is nothing to wait for
    placed_init(&placed, &shared, 3);
    sharing_order(shared.sharing, (sharing_orders_t){.busy = 1});
    refused(&shared, &placed.block, 0, GRPC_STATUS_UNAVAILABLE, "block[0].place.offset: refused at command");
    rig_close(&shared.rig);
}

Test(rpc_put_place, a_call_given_up_ends_only_when_its_transfers_have) {
    shared_t shared;
    shared_open(&shared);
    sharing_order(shared.sharing, (sharing_orders_t){.late = true});
    peer_start(shared.rig.channel, "Put", 0, &shared.call);
    send_placed(&shared, 0);
    send_placed(&shared, 1);
    cr_assert(sharing_waits_for(shared.sharing, 2));
    peer_cancel(&shared.call);
    cr_assert_eq(peer_end(&shared.call), GRPC_STATUS_CANCELLED);
    peer_free(&shared.call);
    usleep(100000);
    cr_assert_eq(bkv_server_open_calls(shared.rig.daemon.server), 1, "two transfers are still under way");
    sharing_order(shared.sharing, (sharing_orders_t){.late = true, .end = BKV_INTERNAL});
    sharing_let_go(shared.sharing);
    cr_assert(rig_reaches_open_calls(&shared.rig, 0));
    cr_assert_eq(rig_resident(&shared.rig, 0, 2), 0);
    rig_close(&shared.rig); // asserts that no slot stayed reserved, no session referred to
}

Test(rpc_put_place, a_deadline_does_not_cut_a_transfer_off) {
    shared_t shared;
    shared_open(&shared);
    sharing_order(shared.sharing, (sharing_orders_t){.late = true});
    peer_start(shared.rig.channel, "Put", 200, &shared.call);
    send_placed(&shared, 0);
    cr_assert(sharing_waits_for(shared.sharing, 1));
    cr_assert_eq(peer_end(&shared.call), GRPC_STATUS_DEADLINE_EXCEEDED);
    peer_free(&shared.call);
    usleep(300000);
    cr_assert_eq(bkv_server_open_calls(shared.rig.daemon.server), 1);
    sharing_let_go(shared.sharing);
    cr_assert(rig_reaches_open_calls(&shared.rig, 0));
    assert_stored(&shared, 0); // it came late, but whole
    rig_close(&shared.rig);
}

Test(rpc_put_place, a_layout_with_the_most_pages_reaches_the_transport_also_after_waiting) {
    enum { PAGES = BKV_WIRE_PAGES };
    shared_t shared;
    shared_open(&shared);
    shared.rig.codec = BALANCEKV__V1__CODEC__CODEC_DENSE4;
    rig_open_spec(&shared.rig, PAGES); // a page a token
    sharing_order(shared.sharing, (sharing_orders_t){.late = true});
    peer_start(shared.rig.channel, "Put", 0, &shared.call);
    placed_t placed;
    placed_init(&placed, &shared, 0);
    placed.block.spec_id = rig_bytes(shared.rig.spec_id, BKV_SPEC_ID_BYTES);
    cr_assert(rig_send_block(&shared.call, &placed.block, NULL, 0));
    cr_assert(sharing_waits_for(shared.sharing, 1));
    sharing_order(shared.sharing, // for the next one: it waits once, then it is refused
                  (sharing_orders_t){.late = true, .on_device = true, .busy = 1, .start = BKV_INVALID_ARGUMENT});
    uint64_t *pages = malloc(PAGES * sizeof(*pages)), keys = 4096, values = 8192;
    for (int i = 0; i < PAGES; i++) {
        pages[i] = UINT64_MAX - (uint64_t)i; // ten bytes each
    }
    uint8_t event[BKV_CUDA_HANDLE_BYTES] = {1};
    Balancekv__V1__DeviceLayout layout = BALANCEKV__V1__DEVICE_LAYOUT__INIT;
    layout.n_keys = layout.n_values = 1;
    layout.keys = &keys, layout.values = &values;
    layout.n_pages = PAGES, layout.pages = pages, layout.page_tokens = 1, layout.token_stride = 256;
    placed_init(&placed, &shared, 1);
    placed.block.tokens = PAGES;
    placed.block.payload_bytes = (uint64_t)RIG_BLOCK / RIG_TOKENS * PAGES;
    placed.place.offset = 0;
    placed.place.layout = &layout;
    placed.place.event = rig_bytes(event, sizeof(event));
    cr_assert(rig_send_block(&shared.call, &placed.block, NULL, 0));
    peer_send_last(&shared.call);
    for (int i = 0; i < 500 && sharing_look(shared.sharing).busy != 0; i++) {
        usleep(10000);
    }
    cr_assert_eq(sharing_look(shared.sharing).busy, 0);
    sharing_let_go(shared.sharing);
    cr_assert_eq(peer_end(&shared.call), GRPC_STATUS_INVALID_ARGUMENT);
    cr_assert_str_eq(shared.call.details, "block[1].place.offset: refused at command");
    peer_free(&shared.call);
    const sharing_seen_t seen = sharing_look(shared.sharing);
    cr_assert(seen.layout.page_count == PAGES && seen.layout.layers == 1);
    cr_assert(seen.layout.value_token_stride == 256 && seen.layout.page_tokens == 1);
    cr_assert(seen.first_page == UINT64_MAX && seen.first_key == 4096 && seen.event);
    free(pages);
    rig_close(&shared.rig);
}
