// test_wire_place.c - places, layouts and windows as a client may say them: every length and count is checked and named.
#include "daemon/rpc/wire.h"
#include "proto/verbs_window.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS 3
#define TOKENS 100

// A block with a place and a layout that are right, to be changed.
typedef struct sample {
    Balancekv__V1__PutBlock block;
    Balancekv__V1__Place place;
    Balancekv__V1__DeviceLayout layout;
    uint8_t session[BKV_SESSION_BYTES], event[BKV_CUDA_HANDLE_BYTES];
    uint64_t keys[LAYERS + 1], values[LAYERS + 1], pages[8];
} sample_t;

static void sample_init(sample_t *sample) {
    *sample = (sample_t){.block = BALANCEKV__V1__PUT_BLOCK__INIT,
                         .place = BALANCEKV__V1__PLACE__INIT,
                         .layout = BALANCEKV__V1__DEVICE_LAYOUT__INIT,
                         .session = {1, 2, 3},
                         .event = {4},
                         .keys = {16, 32, 48},
                         .values = {64, 80, 96},
                         .pages = {5, 6, 7, 8}};
    sample->block.tokens = TOKENS;
    sample->block.payload_bytes = 4096;
    sample->block.place = &sample->place;
    sample->place.session = (ProtobufCBinaryData){sizeof(sample->session), sample->session};
    sample->place.offset = 128;
    sample->layout.n_keys = sample->layout.n_values = LAYERS;
    sample->layout.keys = sample->keys;
    sample->layout.values = sample->values;
    sample->layout.n_pages = 4;
    sample->layout.pages = sample->pages;
    sample->layout.page_tokens = 32;
    sample->layout.page_stride = 1024;
    sample->layout.token_stride = 16;
    sample->layout.head_stride = 512;
}

static void refused(sample_t *sample, const char *message) {
    bkv_wire_place_t place;
    bkv_error_t err = {.message = ""};
    cr_assert_eq(bkv_wire_get_payload_place(&sample->block, LAYERS, &place, &err), BKV_INVALID_ARGUMENT, "%s", message);
    cr_assert_eq(strncmp(err.message, message, strlen(message)), 0, "\"%s\", expected \"%s\"", err.message, message);
    bkv_wire_place_clear(&place);
}

#define REFUSED(message, ...)                                                                                                  \
    do {                                                                                                                       \
        sample_t sample;                                                                                                       \
        sample_init(&sample);                                                                                                  \
        sample.place.layout = &sample.layout;                                                                                  \
        __VA_ARGS__;                                                                                                           \
        refused(&sample, message);                                                                                             \
    } while (0)

Test(rpc_wire_place, a_plain_place) {
    sample_t sample;
    sample_init(&sample);
    bkv_wire_place_t place;
    bkv_error_t err;
    cr_assert_eq(bkv_wire_get_payload_place(&sample.block, LAYERS, &place, &err), BKV_OK, "%s", err.message);
    cr_assert_arr_eq(place.session.bytes, sample.session, BKV_SESSION_BYTES);
    cr_assert(place.place.offset == 128 && place.place.bytes == 4096 && place.place.layout == NULL &&
              place.place.event == NULL);
    sample.place.bytes = 4096;
    sample.place.event = (ProtobufCBinaryData){sizeof(sample.event), sample.event};
    cr_assert_eq(bkv_wire_get_payload_place(&sample.block, LAYERS, &place, &err), BKV_OK, "%s", err.message);
    cr_assert(place.place.event == place.event && place.event[0] == 4);
    bkv_wire_place_clear(&place);
    cr_assert_eq(bkv_wire_get_room(&sample.place, &place, &err), BKV_OK, "%s", err.message);
    cr_assert(place.place.offset == 128 && place.place.bytes == 4096);
}

Test(rpc_wire_place, a_layout_outlives_its_message) {
    sample_t sample;
    sample_init(&sample);
    sample.place.layout = &sample.layout;
    bkv_wire_place_t place;
    bkv_error_t err;
    cr_assert_eq(bkv_wire_get_payload_place(&sample.block, LAYERS, &place, &err), BKV_OK, "%s", err.message);
    memset(sample.keys, 0xee, sizeof(sample.keys));
    memset(sample.values, 0xee, sizeof(sample.values));
    memset(sample.pages, 0xee, sizeof(sample.pages));
    const bkv_device_layout_t *layout = place.place.layout;
    cr_assert(layout == &place.layout && layout->layers == LAYERS && layout->page_count == 4 && layout->page_tokens == 32);
    cr_assert(layout->keys[2] == 48 && layout->values[0] == 64 && layout->values[2] == 96);
    cr_assert(layout->pages[0] == 5 && layout->pages[3] == 8);
    cr_assert(layout->value_token_stride == 16 && layout->value_head_stride == 512, "those of the keys");
    bkv_wire_place_clear(&place);
    cr_assert_null(place.numbers);
    sample_init(&sample); // in one piece, with strides of its own for the values
    sample.place.layout = &sample.layout;
    sample.layout.n_pages = 0;
    sample.layout.page_tokens = 0;
    sample.layout.value_token_stride = 8;
    sample.layout.value_head_stride = 9;
    cr_assert_eq(bkv_wire_get_payload_place(&sample.block, LAYERS, &place, &err), BKV_OK, "%s", err.message);
    cr_assert(place.layout.page_count == 0 && place.layout.pages == NULL);
    cr_assert(place.layout.value_token_stride == 8 && place.layout.value_head_stride == 9);
    bkv_wire_place_clear(&place);
}

Test(rpc_wire_place, what_is_wrong_is_named) {
    REFUSED("place.session: 0 bytes instead of 16", sample.place.session.len = 0);
    REFUSED("place.offset: 129 is not a multiple of 64", sample.place.offset = 129);
    REFUSED("place.bytes: 4095, but the payload has 4096", sample.place.bytes = 4095);
    REFUSED("place.bytes: 4096 from 18446744073709551552 on", sample.place.bytes = 4096; sample.place.offset = UINT64_MAX - 63);
    REFUSED("place.event: 63 bytes instead of 64", sample.place.event = (ProtobufCBinaryData){63, sample.event});
    REFUSED("place.layout.keys: 2, but the spec has 3 layers", sample.layout.n_keys = 2);
    REFUSED("place.layout.keys: 4, but", sample.layout.n_keys = 4);
    REFUSED("place.layout.values: 0, but the spec has 3 layers", sample.layout.n_values = 0);
    REFUSED("place.layout.pages: 65537 are more than 65536", sample.layout.n_pages = 65537);
    REFUSED("place.layout.pages: 4 of 24 tokens, but the block has 100", sample.layout.page_tokens = 24);
    REFUSED("place.layout.pages: 4 of 34 tokens, but the block has 100", sample.layout.page_tokens = 34);
    REFUSED("place.layout.pages: 4 of 4294967295 tokens", sample.layout.page_tokens = UINT32_MAX);
    REFUSED("place.layout.page_tokens: 0, with 4 pages", sample.layout.page_tokens = 0);
    REFUSED("place.layout.page_tokens: 32, with 0 pages", sample.layout.n_pages = 0);
}

// ---- windows ----

static bkv_status_t get_attach(const Balancekv__V1__AttachRequest *request, bkv_attach_args_t *args, bkv_error_t *err) {
    bkv_bump_t bump;
    bkv_bump_init(&bump, 1 << 20);
    bkv_status_t status = bkv_wire_get_attach(request, &bump, args, err);
    bkv_bump_deinit(&bump); // what args refers to is not looked at here
    return status;
}

static void attach_refused(const Balancekv__V1__AttachRequest *request, const char *message) {
    bkv_attach_args_t args;
    bkv_error_t err = {.message = ""};
    cr_assert_eq(get_attach(request, &args, &err), BKV_INVALID_ARGUMENT, "%s", message);
    cr_assert_eq(strncmp(err.message, message, strlen(message)), 0, "\"%s\", expected \"%s\"", err.message, message);
}

Test(rpc_wire_place, exactly_one_window) {
    Balancekv__V1__ShmWindow shm = BALANCEKV__V1__SHM_WINDOW__INIT;
    Balancekv__V1__VerbsWindow verbs = BALANCEKV__V1__VERBS_WINDOW__INIT;
    Balancekv__V1__AttachRequest request = BALANCEKV__V1__ATTACH_REQUEST__INIT;
    attach_refused(&request, "request: exactly one");
    request.shm = &shm;
    request.verbs = &verbs;
    attach_refused(&request, "request: exactly one");
    request.verbs = NULL;
    shm.bytes = 77;
    bkv_attach_args_t args;
    cr_assert_eq(get_attach(&request, &args, NULL), BKV_OK);
    cr_assert(args.kind == BKV_TRANSPORT_SHM && args.bytes == 77 && !args.local);
}

Test(rpc_wire_place, windows_on_devices_are_checked) {
    uint8_t uuid[16] = {0}, handle[64] = {0};
    Balancekv__V1__DeviceAllocation allocation = BALANCEKV__V1__DEVICE_ALLOCATION__INIT, *allocations[] = {&allocation};
    Balancekv__V1__DeviceWindow window = BALANCEKV__V1__DEVICE_WINDOW__INIT;
    Balancekv__V1__AttachRequest request = BALANCEKV__V1__ATTACH_REQUEST__INIT;
    request.cuda_ipc = &window;
    attach_refused(&request, "cuda_ipc.uuid: 0 bytes instead of 16");
    window.uuid = (ProtobufCBinaryData){sizeof(uuid), uuid};
    attach_refused(&request, "cuda_ipc.allocations: 0 are not within 1..16384");
    window.n_allocations = 1;
    window.allocations = allocations;
    attach_refused(&request, "cuda_ipc.allocations[0].bytes: 0");
    allocation.bytes = 1;
    allocation.handle = (ProtobufCBinaryData){63, handle};
    attach_refused(&request, "cuda_ipc.allocations[0].handle: 63 bytes instead of 64");
    allocation.handle.len = 0;
    bkv_attach_args_t args;
    cr_assert_eq(get_attach(&request, &args, NULL), BKV_OK);
    cr_assert(args.kind == BKV_TRANSPORT_CUDA_IPC && args.allocation_count == 1 && args.uuid == uuid);
}

Test(rpc_wire_place, queue_pairs_are_checked_and_said) {
    uint8_t gid[17] = {9};
    Balancekv__V1__VerbsWindow window = BALANCEKV__V1__VERBS_WINDOW__INIT;
    Balancekv__V1__AttachRequest request = BALANCEKV__V1__ATTACH_REQUEST__INIT;
    request.verbs = &window;
    attach_refused(&request, "verbs.gid: 0 bytes instead of 16");
    window.gid = (ProtobufCBinaryData){17, gid};
    attach_refused(&request, "verbs.gid: 17 bytes instead of 16");
    window.gid.len = 16;
    attach_refused(&request, "verbs.bytes: 0");
    window.address = UINT64_MAX - 10;
    window.bytes = 11;
    attach_refused(&request, "verbs.bytes: 11 from address");
    window.bytes = 10;
    window.queue_pair = 1, window.packet = 2, window.lid = 3, window.mtu = 4, window.reads = 5, window.key = 6;
    bkv_attach_args_t args;
    cr_assert_eq(get_attach(&request, &args, NULL), BKV_OK);
    Balancekv__V1__VerbsWindow again;
    bkv_verbs_window_set(&args.verbs, &again);
    cr_assert(again.queue_pair == 1 && again.packet == 2 && again.lid == 3 && again.mtu == 4 && again.reads == 5);
    cr_assert(again.key == 6 && again.address == UINT64_MAX - 10 && again.bytes == 10 && again.gid.len == 16);
    cr_assert_arr_eq(again.gid.data, gid, 16);
}
