// verbs_window.c - see verbs_window.h.
#include "proto/verbs_window.h"

#include <string.h>

void bkv_verbs_window_set(const bkv_verbs_end_t *end, Balancekv__V1__VerbsWindow *window) {
    balancekv__v1__verbs_window__init(window);
    window->queue_pair = end->queue_pair;
    window->packet = end->packet;
    window->gid = (ProtobufCBinaryData){sizeof(end->gid), (uint8_t *)(uintptr_t)end->gid}; // protobuf-c only reads it
    window->lid = end->lid;
    window->mtu = end->mtu;
    window->reads = end->reads;
    window->address = end->address;
    window->key = end->key;
    window->bytes = end->bytes;
}

bkv_status_t bkv_verbs_window_get(const Balancekv__V1__VerbsWindow *window, bkv_verbs_end_t *end, bkv_error_t *err) {
    if (window->gid.len != sizeof(end->gid)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs.gid: %zu bytes instead of %zu", window->gid.len, sizeof(end->gid));
    }
    *end = (bkv_verbs_end_t){
        .queue_pair = window->queue_pair,
        .packet = window->packet,
        .lid = window->lid,
        .mtu = window->mtu,
        .reads = window->reads,
        .key = window->key,
        .address = window->address,
        .bytes = window->bytes,
    };
    memcpy(end->gid, window->gid.data, sizeof(end->gid));
    return BKV_OK;
}
