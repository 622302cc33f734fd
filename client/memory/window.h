// window.h - memory that the client shares with the daemon: payloads and records move through it without messages.
//
// A window is the memory of one session. How it is shared is up to its kind (shm.c, verbs.c); window.c shares it out: regions
// are taken from it for payloads, and as room for records. A region is counted by its holders, a call and the records that lie
// in it, and goes back to the window with the last. A window is counted by its regions and by the client, so that records
// outlive both the session and the client; its memory goes with the last of them.
//
// Quarantine: a region that a call has named may be touched by the daemon until the daemon itself has answered. When a call ends
// otherwise (deadline, connection lost), its regions are lost: their holders may go on reading, but the window does not give
// that memory out again.
//
// What lies in a window the daemon may change at any time.
#ifndef BKV_CLIENT_WINDOW_H
#define BKV_CLIENT_WINDOW_H

#include "balancekv.pb-c.h"
#include "client/balancekv.h"

typedef struct bkv_client_window bkv_client_window_t;
typedef struct bkv_client_region bkv_client_region_t;

// ---- kinds ----

typedef struct bkv_window_args {
    const char *endpoint;     // the daemon's, as gRPC takes it: "unix:/path" or "host:port"
    const char *device;       // verbs_device of bkv_client_options_t; NULL: not given
    uint64_t bytes;           // wanted, at least BKV_WINDOW_LEAST
    uint64_t deadline_ns;     // of CLOCK_MONOTONIC, for anything that waits: DEADLINE_EXCEEDED
    bool (*stop)(void *user); // to be asked every 50 ms where something waits. True: give up, CANCELLED
    void *user;
} bkv_window_args_t;

#define BKV_WINDOW_LEAST 65536

// How a window is made: offer, then the Attach call, then take; leave, then close. One thread at a time.
typedef struct bkv_window_kind {
    const char *name; // as the daemon offers it
    bool held;        // leave ends the session for the daemon, too; where not, the client sends Detach
    bool verified;    // the daemon verifies what it delivers as it copies it into this memory, so that there is no link after
                      // that to change it: records are not summed again

    // Makes this end's part and sets the request's member of this kind. What that points to lives as long as *state, which is to
    // be closed, also when the call or `take` fails. args live until `take` returns. UNIMPLEMENTED: not on this machine or not
    // with this endpoint, and why.
    bkv_status_t (*offer)(const bkv_window_args_t *args, Balancekv__V1__AttachRequest *request, void **state, bkv_error_t *err);

    // Takes the daemon's answer, of which nothing is trusted (session has been checked to have 16 bytes). *memory is page-aligned
    // and has *bytes bytes, at least BKV_WINDOW_LEAST; neither changes until close.
    bkv_status_t (*take)(void *state, const bkv_window_args_t *args, const Balancekv__V1__AttachResponse *response,
                         uint8_t **memory, uint64_t *bytes, bkv_error_t *err);

    // Ends the session at this end: the daemon gets no further access. The memory stays. At most once, only after `take`.
    void (*leave)(void *state);
    void (*close)(void *state); // frees everything, in whatever state it is
} bkv_window_kind_t;

extern const bkv_window_kind_t bkv_window_shm, bkv_window_verbs;

// ---- windows ----

// A window over what kind->take has returned; it closes `state` with its last user. The caller has one reference. NULL: out of memory,
// and state is still the caller's.
bkv_client_window_t *bkv_client_window_create(const bkv_window_kind_t *kind, void *state, uint8_t *memory, uint64_t bytes,
                                              const uint8_t *session, uint64_t boot_epoch);
bkv_client_window_t *bkv_client_window_retain(bkv_client_window_t *window);
void bkv_client_window_release(bkv_client_window_t *window); // NULL is allowed

// Leaves the session. Regions stay valid, no new ones are taken. Again: nothing.
void bkv_client_window_leave(bkv_client_window_t *window);

const bkv_window_kind_t *bkv_client_window_kind(const bkv_client_window_t *window);
const uint8_t *bkv_client_window_session(const bkv_client_window_t *window); // 16 bytes
uint64_t bkv_client_window_epoch(const bkv_client_window_t *window);         // boot epoch of the daemon that has the session
uint64_t bkv_client_window_bytes(const bkv_client_window_t *window);
bool bkv_client_window_worn(const bkv_client_window_t *window); // more than half of it is lost, or it was worn out
void bkv_client_window_wear_out(bkv_client_window_t *window);

// ---- regions ----

// `bytes` (> 0) contiguous bytes, with one holder. NULL: not free right now, or the window has been left. Any thread, here and below.
bkv_client_region_t *bkv_client_region_take(bkv_client_window_t *window, uint64_t bytes);
bkv_client_region_t *bkv_client_region_retain(bkv_client_region_t *region);
void bkv_client_region_release(bkv_client_region_t *region); // NULL is allowed

void bkv_client_region_trim(bkv_client_region_t *region, uint64_t bytes); // gives back what lies after the first `bytes` (> 0)
void bkv_client_region_lose(bkv_client_region_t *region);                 // not to be given out again in this session
bool bkv_client_region_lost(bkv_client_region_t *region);

bkv_client_window_t *bkv_client_region_window(const bkv_client_region_t *region);
uint8_t *bkv_client_region_memory(const bkv_client_region_t *region); // 64-byte aligned
uint64_t bkv_client_region_offset(const bkv_client_region_t *region); // from the start of the window
uint64_t bkv_client_region_bytes(const bkv_client_region_t *region);  // as trimmed

#endif
