// serve.h - the answering end of one-sided reads: links over which other daemons READ this one's arena, and what is held in place
// for them meanwhile. The daemon has no part in the reading itself. The asking end is verbs.h; messages are rpc/peer_verbs.c's.
//
// A link is a queue pair on which the other end may read, and this one never posts anything. It belongs to one member: when that
// one links again, restarted or after a failure, the old link ends. So does one that is not used for a while: its member has
// died without a word, or does not need it, and links again when it does.
//
// Thread-safe.
#ifndef BKV_SERVE_H
#define BKV_SERVE_H

#include "daemon/cluster/peer/device.h"
#include "daemon/cluster/peer/holds.h"

#define BKV_SERVE_LINKS   1024
#define BKV_SERVE_HOLD_MS 2000
#define BKV_SERVE_IDLE_MS 60000
#define BKV_SERVE_SHARE   4 // a link may hold this part of the arena in place: one fourth

typedef struct bkv_serve bkv_serve_t;

// Names a link. Nobody can guess it, as whoever has it may hold records.
typedef struct bkv_link_id {
    uint8_t bytes[16];
} bkv_link_id_t;

// device outlives it. RESOURCE_EXHAUSTED: no memory.
bkv_status_t bkv_serve_create(bkv_peer_device_t *device, bkv_serve_t **serve, bkv_error_t *err);
void bkv_serve_destroy(bkv_serve_t *serve); // ends all links. NULL: nothing

// Links the member (its id) whose end is *other. own: this end, with the arena as its window. May block for seconds: not for a
// thread that serves others. INVALID_ARGUMENT names the field; FAILED_PRECONDITION: there is no way to it, or the arena cannot be
// registered; UNIMPLEMENTED: the device is of no use now; RESOURCE_EXHAUSTED: there are too many links.
bkv_status_t bkv_serve_link(bkv_serve_t *serve, const char *member, const bkv_verbs_end_t *other, uint64_t now_ms,
                            bkv_link_id_t *id, bkv_verbs_end_t *own, bkv_error_t *err);

// Says where records lie: locations [count]. They stay there for BKV_SERVE_HOLD_MS, or until *hold is among the `release` of a
// later call. count may be 0. FAILED_PRECONDITION: there is no such link (any more); else as bkv_holds_take.
typedef struct bkv_locate {
    const bkv_name_t *names;
    uint32_t count;
    const uint64_t *release;
    size_t release_count;
} bkv_locate_t;
bkv_status_t bkv_serve_locate(bkv_serve_t *serve, const bkv_link_id_t *id, const bkv_locate_t *locate, uint64_t now_ms,
                              bkv_location_t *locations, uint64_t *hold, bkv_error_t *err);

// Ends holds and links whose time is over; about twice a second. Not on the thread that takes the device's events.
void bkv_serve_tick(bkv_serve_t *serve, uint64_t now_ms);

// Links there are now.
uint32_t bkv_serve_links(bkv_serve_t *serve);

#endif
