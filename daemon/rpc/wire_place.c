// wire_place.c - what clients say about memory that they share: places, layouts, windows. Here lengths and counts are checked,
// so that everybody may follow the pointers; whether numbers lie within a session is the transports' to check.
#include "daemon/rpc/wire.h"

#include "proto/verbs_window.h"

#include <stdlib.h>
#include <string.h>

typedef unsigned long long ull; // for messages

// ---- places ----

bkv_status_t bkv_wire_get_session_id(const char *field, const ProtobufCBinaryData *bytes, bkv_session_id_t *id,
                                     bkv_error_t *err) {
    if (bytes->len != BKV_SESSION_BYTES) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %zu bytes instead of %d", field, bytes->len, BKV_SESSION_BYTES);
    }
    memcpy(id->bytes, bytes->data, BKV_SESSION_BYTES);
    return BKV_OK;
}

// Everything but the layout.
static bkv_status_t get_place(const Balancekv__V1__Place *place, bkv_wire_place_t *out, bkv_error_t *err) {
    *out = (bkv_wire_place_t){.place = {.offset = place->offset, .bytes = place->bytes}};
    bkv_status_t status = bkv_wire_get_session_id("place.session", &place->session, &out->session, err);
    if (status != BKV_OK) {
        return status;
    }
    if (place->offset % BKV_PLACE_ALIGN != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.offset: %llu is not a multiple of %d", (ull)place->offset,
                        BKV_PLACE_ALIGN);
    }
    if (place->bytes > UINT64_MAX - place->offset) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.bytes: %llu from %llu on are past any end", (ull)place->bytes,
                        (ull)place->offset);
    }
    if (place->event.len == BKV_CUDA_HANDLE_BYTES) {
        memcpy(out->event, place->event.data, BKV_CUDA_HANDLE_BYTES);
        out->place.event = out->event;
    } else if (place->event.len != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.event: %zu bytes instead of %d", place->event.len,
                        BKV_CUDA_HANDLE_BYTES);
    }
    return BKV_OK;
}

bkv_status_t bkv_wire_get_room(const Balancekv__V1__Place *place, bkv_wire_place_t *out, bkv_error_t *err) {
    bkv_status_t status = get_place(place, out, err);
    if (status == BKV_OK && place->layout != NULL) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "place.layout: only payloads have one, records lie in one piece");
    }
    return status;
}

// ---- layouts ----

static bkv_status_t check_layout(const Balancekv__V1__DeviceLayout *layout, uint32_t layers, uint32_t tokens,
                                 bkv_error_t *err) {
    if (layout->n_keys != layers) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.layout.keys: %zu, but the spec has %u layers", layout->n_keys,
                        layers);
    }
    if (layout->n_values != layers) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.layout.values: %zu, but the spec has %u layers", layout->n_values,
                        layers);
    }
    if (layout->n_pages > BKV_WIRE_PAGES) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.layout.pages: %zu are more than %d", layout->n_pages, BKV_WIRE_PAGES);
    }
    if ((layout->n_pages == 0) != (layout->page_tokens == 0)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.layout.page_tokens: %u, with %zu pages", layout->page_tokens,
                        layout->n_pages);
    }
    uint64_t room = (uint64_t)layout->n_pages * layout->page_tokens;
    if (layout->n_pages > 0 && (room < tokens || room - layout->page_tokens >= tokens)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.layout.pages: %zu of %u tokens, but the block has %u",
                        layout->n_pages, layout->page_tokens, tokens);
    }
    return BKV_OK;
}

// The arrays are copied: a Put that has to wait outlives its message.
static bkv_status_t keep_layout(const Balancekv__V1__DeviceLayout *layout, uint32_t layers, bkv_wire_place_t *out,
                                bkv_error_t *err) {
    size_t pages = layout->n_pages;
    uint64_t *numbers = malloc((2 * (size_t)layers + pages) * sizeof(numbers[0]));
    if (numbers == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "place.layout: no memory for it");
    }
    memcpy(numbers, layout->keys, layers * sizeof(numbers[0]));
    memcpy(numbers + layers, layout->values, layers * sizeof(numbers[0]));
    if (pages > 0) {
        memcpy(numbers + 2 * (size_t)layers, layout->pages, pages * sizeof(numbers[0]));
    }
    out->numbers = numbers;
    out->layout = (bkv_device_layout_t){
        .keys = numbers,
        .values = numbers + layers,
        .layers = layers,
        .pages = pages > 0 ? numbers + 2 * (size_t)layers : NULL,
        .page_count = (uint32_t)pages,
        .page_tokens = layout->page_tokens,
        .page_stride = layout->page_stride,
        .token_stride = layout->token_stride,
        .head_stride = layout->head_stride,
        .value_token_stride = layout->value_token_stride != 0 ? layout->value_token_stride : layout->token_stride,
        .value_head_stride = layout->value_head_stride != 0 ? layout->value_head_stride : layout->head_stride,
    };
    out->place.layout = &out->layout;
    return BKV_OK;
}

bkv_status_t bkv_wire_get_payload_place(const Balancekv__V1__PutBlock *block, uint32_t layers, bkv_wire_place_t *out,
                                        bkv_error_t *err) {
    const Balancekv__V1__Place *place = block->place;
    bkv_status_t status = get_place(place, out, err);
    if (status == BKV_OK && place->bytes != 0 && place->bytes != block->payload_bytes) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "place.bytes: %llu, but the payload has %llu", (ull)place->bytes,
                          (ull)block->payload_bytes);
    }
    out->place.bytes = block->payload_bytes;
    if (status != BKV_OK || place->layout == NULL) {
        return status;
    }
    status = check_layout(place->layout, layers, block->tokens, err);
    return status == BKV_OK ? keep_layout(place->layout, layers, out, err) : status;
}

void bkv_wire_place_clear(bkv_wire_place_t *place) {
    free(place->numbers);
    *place = (bkv_wire_place_t){0};
}

// ---- windows ----

static bkv_status_t get_device_window(const Balancekv__V1__DeviceWindow *window, bkv_bump_t *bump, bkv_attach_args_t *args,
                                      bkv_error_t *err) {
    if (window->uuid.len != BKV_CUDA_UUID_BYTES) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "cuda_ipc.uuid: %zu bytes instead of %d", window->uuid.len,
                        BKV_CUDA_UUID_BYTES);
    }
    size_t count = window->n_allocations;
    if (count == 0 || count > BKV_DEVICE_ALLOCATIONS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "cuda_ipc.allocations: %zu are not within 1..%d", count,
                        BKV_DEVICE_ALLOCATIONS);
    }
    bkv_device_allocation_t *allocations = bkv_bump_alloc(bump, count * sizeof(allocations[0]));
    if (allocations == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cuda_ipc.allocations: no memory for %zu", count);
    }
    for (size_t i = 0; i < count; i++) {
        const Balancekv__V1__DeviceAllocation *from = window->allocations[i];
        if (from->handle.len != 0 && from->handle.len != BKV_CUDA_HANDLE_BYTES) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "cuda_ipc.allocations[%zu].handle: %zu bytes instead of %d", i,
                            from->handle.len, BKV_CUDA_HANDLE_BYTES);
        }
        if (from->bytes == 0) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "cuda_ipc.allocations[%zu].bytes: 0", i);
        }
        allocations[i] =
            (bkv_device_allocation_t){.handle = from->handle.len != 0 ? from->handle.data : NULL, .bytes = from->bytes};
    }
    args->kind = BKV_TRANSPORT_CUDA_IPC;
    args->uuid = window->uuid.data;
    args->allocations = allocations;
    args->allocation_count = (uint32_t)count;
    return BKV_OK;
}

static bkv_status_t get_verbs_window(const Balancekv__V1__VerbsWindow *window, bkv_attach_args_t *args, bkv_error_t *err) {
    args->kind = BKV_TRANSPORT_VERBS;
    bkv_status_t status = bkv_verbs_window_get(window, &args->verbs, err);
    if (status == BKV_OK && (window->bytes == 0 || window->bytes > UINT64_MAX - window->address)) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs.bytes: %llu from address %llx on", (ull)window->bytes,
                          (ull)window->address);
    }
    return status;
}

bkv_status_t bkv_wire_get_attach(const Balancekv__V1__AttachRequest *request, bkv_bump_t *bump, bkv_attach_args_t *args,
                                 bkv_error_t *err) {
    *args = (bkv_attach_args_t){0};
    if ((request->shm != NULL) + (request->cuda_ipc != NULL) + (request->verbs != NULL) != 1) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "request: exactly one of shm, cuda_ipc and verbs must be there");
    }
    if (request->cuda_ipc != NULL) {
        return get_device_window(request->cuda_ipc, bump, args, err);
    }
    if (request->verbs != NULL) {
        return get_verbs_window(request->verbs, args, err);
    }
    args->kind = BKV_TRANSPORT_SHM;
    args->bytes = request->shm->bytes;
    return BKV_OK;
}
