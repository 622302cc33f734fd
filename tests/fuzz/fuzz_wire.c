// fuzz_wire.c - requests as a hostile client or peer may send them: the split of PutRequest and AttendRequest, and every other
// parser but that of Store, which is fuzz_intake.c's.
//
// The first byte chooses the message, the second how the bytes are cut into slices. Whatever the split accepts is compared
// with protobuf-c's reading of the whole message.
#include "daemon/rpc/peer.h"
#include "proto/verbs_window.h"

#include "health.pb-c.h"
#include "peer.pb-c.h"
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define LIMIT     ((size_t)1 << 20)
#define HEAD_MOST 8192
#define MAX_BATCH 64
#define LAYERS    3 // of the spec that layouts are held against

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static grpc_byte_buffer *received(const uint8_t *data, size_t size, size_t piece) {
    grpc_slice slices[4096];
    size_t count = 0;
    piece = size / piece < 4096 ? piece : size;
    for (size_t at = 0; at < size; at += piece) {
        size_t length = piece < size - at ? piece : size - at;
        slices[count++] = grpc_slice_from_copied_buffer((const char *)data + at, length);
    }
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(slices, count);
    for (size_t i = 0; i < count; i++) {
        grpc_slice_unref(slices[i]);
    }
    return message;
}

// A place that is taken says what protobuf-c read, and nothing that would have to be checked again before it is followed.
static void check_place(const Balancekv__V1__PutBlock *block) {
    bkv_wire_place_t place;
    bkv_error_t err;
    if (block->place == NULL) {
        return;
    }
    if (bkv_wire_get_payload_place(block, LAYERS, &place, &err) == BKV_OK) {
        assert(place.place.offset % BKV_PLACE_ALIGN == 0 && place.place.bytes == block->payload_bytes);
        assert((place.place.layout != NULL) == (block->place->layout != NULL));
        assert((place.place.event != NULL) == (block->place->event.len == BKV_CUDA_HANDLE_BYTES));
    }
    if (place.place.layout != NULL) {
        const bkv_device_layout_t *layout = place.place.layout;
        uint64_t pages = 0;
        assert(layout->layers == LAYERS && layout->keys[LAYERS - 1] == block->place->layout->keys[LAYERS - 1]);
        assert(layout->values[LAYERS - 1] == block->place->layout->values[LAYERS - 1]);
        for (uint32_t i = 0; i < layout->page_count; i++) {
            pages += layout->pages[i] == block->place->layout->pages[i];
        }
        assert(pages == layout->page_count && layout->page_count <= BKV_WIRE_PAGES);
        assert(layout->page_count == 0 || (uint64_t)layout->page_count * layout->page_tokens >= block->tokens);
    }
    bkv_wire_place_clear(&place);
}

static void check_put(const bkv_split_t *split, const uint8_t *data, size_t size) {
    Balancekv__V1__PutRequest *whole = balancekv__v1__put_request__unpack(NULL, size, data);
    if (whole == NULL) {
        return; // protobuf-c is the stricter one about fields that the split ignores
    }
    uint8_t *payload = malloc(split->data_bytes + 1);
    bkv_cursor_t cursor = split->data;
    bkv_cursor_copy(&cursor, payload, split->data_bytes);
    assert(whole->data.len == split->data_bytes);
    assert(split->data_bytes == 0 || memcmp(whole->data.data, payload, split->data_bytes) == 0);
    const Balancekv__V1__PutBlock *block = ((const Balancekv__V1__PutRequest *)split->head)->block;
    assert((block == NULL) == (whole->block == NULL));
    if (block != NULL) {
        assert(block->payload_bytes == whole->block->payload_bytes && block->tokens == whole->block->tokens);
        bkv_ingest_args_t args;
        bkv_error_t err;
        (void)bkv_wire_get_block(block, &args, &err);
        check_place(block);
    }
    free(payload);
    balancekv__v1__put_request__free_unpacked(whole, NULL);
}

static void fuzz_put(grpc_byte_buffer *message, bkv_bump_t *bump, const uint8_t *data, size_t size) {
    bkv_split_t split;
    bkv_error_t err;
    if (bkv_wire_split(&balancekv__v1__put_request__descriptor, message, HEAD_MOST, bump, &split, &err) == BKV_OK) {
        check_put(&split, data, size);
    }
}

static void fuzz_attend(grpc_byte_buffer *message, bkv_bump_t *bump) {
    bkv_split_t split;
    bkv_error_t err;
    if (bkv_wire_split(&balancekv__v1__attend_request__descriptor, message, LIMIT, bump, &split, &err) == BKV_OK) {
        const Balancekv__V1__AttendRequest *request = (const Balancekv__V1__AttendRequest *)split.head;
        bkv_spec_id_t id;
        (void)bkv_wire_get_spec_id(&request->spec_id, &id, &err);
        (void)bkv_wire_check_keys(request->n_keys, request->keys, MAX_BATCH, &err);
    }
}

static void fuzz_open(const ProtobufCMessage *message, bkv_bump_t *bump) {
    (void)bump;
    const Balancekv__V1__OpenRequest *request = (const Balancekv__V1__OpenRequest *)message;
    bkv_model_t model;
    bkv_error_t err;
    if (bkv_wire_get_spec(request->spec, &model, &err) == BKV_OK && bkv_model_complete(&model, &err) == BKV_OK) {
        Balancekv__V1__Spec spec;
        bkv_model_t again;
        bkv_wire_set_spec(&model, &spec);
        assert(bkv_wire_get_spec(&spec, &again, &err) == BKV_OK && bkv_model_complete(&again, &err) == BKV_OK);
        assert(memcmp(&again.id, &model.id, sizeof(model.id)) == 0); // defaults spelled out name the same spec
    }
}

static void fuzz_lookup(const ProtobufCMessage *message, bkv_bump_t *bump) {
    (void)bump;
    const Balancekv__V1__LookupRequest *request = (const Balancekv__V1__LookupRequest *)message;
    bkv_error_t err;
    bkv_key_t keys[MAX_BATCH];
    if (bkv_wire_check_keys(request->n_keys, request->keys, MAX_BATCH, &err) == BKV_OK) {
        bkv_wire_get_keys(request->n_keys, request->keys, keys);
    }
}

static void check_room(const Balancekv__V1__Place *place) {
    bkv_wire_place_t room;
    bkv_error_t err;
    if (place != NULL && bkv_wire_get_room(place, &room, &err) == BKV_OK) {
        assert(room.place.offset % BKV_PLACE_ALIGN == 0 && room.place.offset + room.place.bytes >= room.place.offset);
        assert(room.place.layout == NULL && room.numbers == NULL);
    }
}

static void fuzz_get(const ProtobufCMessage *message, bkv_bump_t *bump) {
    (void)bump;
    check_room(((const Balancekv__V1__GetRequest *)message)->place);
}

static void fuzz_attach(const ProtobufCMessage *message, bkv_bump_t *bump) {
    const Balancekv__V1__AttachRequest *request = (const Balancekv__V1__AttachRequest *)message;
    bkv_attach_args_t args;
    bkv_error_t err;
    if (bkv_wire_get_attach(request, bump, &args, &err) != BKV_OK) {
        return;
    }
    uint64_t bytes = 0, handles = 0;
    for (uint32_t i = 0; i < args.allocation_count; i++) { // everything that is pointed to is there
        bytes |= args.allocations[i].bytes;
        handles += args.allocations[i].handle != NULL ? args.allocations[i].handle[BKV_CUDA_HANDLE_BYTES - 1] : 0u;
    }
    assert(args.kind != BKV_TRANSPORT_CUDA_IPC || (bytes != 0 && handles <= UINT64_C(255) * args.allocation_count));
    if (args.kind == BKV_TRANSPORT_VERBS) {
        Balancekv__V1__VerbsWindow again;
        bkv_verbs_window_set(&args.verbs, &again);
        assert(again.key == request->verbs->key && memcmp(again.gid.data, request->verbs->gid.data, 16) == 0);
    }
}

static void fuzz_detach(const ProtobufCMessage *message, bkv_bump_t *bump) {
    (void)bump;
    bkv_session_id_t id;
    bkv_error_t err;
    const ProtobufCBinaryData *session = &((const Balancekv__V1__DetachRequest *)message)->session;
    if (bkv_wire_get_session_id("session", session, &id, &err) == BKV_OK) {
        assert(memcmp(id.bytes, session->data, sizeof(id.bytes)) == 0);
    }
}

static void fuzz_fold(const ProtobufCMessage *message, bkv_bump_t *bump) {
    (void)bump;
    const Balancekv__V1__FoldRequest *request = (const Balancekv__V1__FoldRequest *)message;
    check_room(request->place);
    bkv_profile_t profile, again;
    bkv_error_t err;
    if (bkv_wire_get_profile(request->n_profile, request->profile, &profile, &err) != BKV_OK ||
        bkv_profile_check(&profile, &err) != BKV_OK || profile.count == 0) {
        return;
    }
    char text[BKV_PROFILE_TEXT];
    bkv_profile_format(&profile, text);
    assert(bkv_profile_parse(text, &again, &err) == BKV_OK && memcmp(&again, &profile, sizeof(profile)) == 0);
    const bkv_shape_t shape = {.layers = 2, .heads = 2, .tokens = 1, .key_dim = 16, .value_dim = 8, .dtype = BKV_BF16};
    bkv_cool_block_t blocks[MAX_BATCH];
    bkv_cool_band_t bands[BKV_FOLD_RECORDS];
    uint32_t count, covered = 0;
    for (uint32_t i = 0; i < MAX_BATCH; i++) {
        blocks[i] = (bkv_cool_block_t){.tokens = 64 + i, .bytes = 2000 + 7 * i};
    }
    if (bkv_cool_plan(&shape, blocks, MAX_BATCH, &profile, request->budget_bytes, bands, &count, &err) == BKV_OK) {
        uint64_t sum = 0;
        for (uint32_t i = 0; i < count; i++) {
            covered += bands[i].count;
            sum += bands[i].budget;
        }
        assert(covered == MAX_BATCH && (request->budget_bytes == 0 || sum <= request->budget_bytes));
    }
}

// Names that are taken are whole, and as they were sent.
static void check_names(const ProtobufCBinaryData *bytes) {
    const bkv_server_t server = {.config = {.max_batch = MAX_BATCH, .peer_batch = MAX_BATCH}};
    const bkv_name_t *names;
    uint32_t count;
    bkv_error_t err;
    if (bkv_peer_names(&server, bytes, &names, &count, &err) == BKV_OK) {
        assert(count > 0 && count <= MAX_BATCH && (size_t)count * BKV_NAME_BYTES == bytes->len);
        assert(memcmp(names[count - 1].key.bytes, bytes->data + bytes->len - BKV_KEY_BYTES, BKV_KEY_BYTES) == 0);
    }
}

static void fuzz_have(const ProtobufCMessage *message, bkv_bump_t *bump) {
    (void)bump;
    check_names(&((const Balancekv__Cluster__V1__HaveRequest *)message)->names);
}

static void fuzz_locate(const ProtobufCMessage *message, bkv_bump_t *bump) {
    (void)bump;
    check_names(&((const Balancekv__Cluster__V1__LocateRequest *)message)->names);
}

static void ignore(const ProtobufCMessage *message, bkv_bump_t *bump) {
    (void)message;
    (void)bump;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const struct {
        const ProtobufCMessageDescriptor *type;
        void (*use)(const ProtobufCMessage *message, bkv_bump_t *bump);
    } whole[] = {
        {&balancekv__v1__open_request__descriptor, fuzz_open},
        {&balancekv__v1__lookup_request__descriptor, fuzz_lookup},
        {&balancekv__v1__get_request__descriptor, fuzz_get},
        {&balancekv__v1__fold_request__descriptor, fuzz_fold},
        {&balancekv__v1__pin_request__descriptor, ignore},
        {&balancekv__v1__unpin_request__descriptor, ignore},
        {&balancekv__v1__drop_request__descriptor, ignore},
        {&balancekv__v1__stats_request__descriptor, ignore},
        {&grpc__health__v1__health_check_request__descriptor, ignore},
        {&balancekv__v1__attach_request__descriptor, fuzz_attach},
        {&balancekv__v1__detach_request__descriptor, fuzz_detach},
        {NULL, NULL}, // Put
        {NULL, NULL}, // Attend
        {&balancekv__cluster__v1__have_request__descriptor, fuzz_have},
        {&balancekv__cluster__v1__fetch_request__descriptor, fuzz_have}, // the same fields
        {&balancekv__cluster__v1__forget_request__descriptor, fuzz_have},
        {&balancekv__cluster__v1__peer_drain_request__descriptor, ignore},
        {&balancekv__cluster__v1__link_request__descriptor, ignore},
        {&balancekv__cluster__v1__locate_request__descriptor, fuzz_locate},
    };
    const size_t put = 11, attend = 12, kinds = sizeof(whole) / sizeof(whole[0]);
    if (size < 2) {
        return 0;
    }
    size_t kind = data[0] % kinds;
    size_t piece = (size_t)data[1] + 1;
    grpc_byte_buffer *message = received(data + 2, size - 2, piece);
    bkv_bump_t bump;
    bkv_bump_init(&bump, LIMIT);
    if (kind == put) {
        fuzz_put(message, &bump, data + 2, size - 2);
    } else if (kind == attend) {
        fuzz_attend(message, &bump);
    } else {
        const ProtobufCMessage *request;
        bkv_error_t err;
        if (bkv_wire_unpack(whole[kind].type, message, LIMIT, &bump, &request, &err) == BKV_OK) {
            whole[kind].use(request, &bump);
        }
    }
    bkv_bump_deinit(&bump);
    grpc_byte_buffer_destroy(message);
    return 0;
}
