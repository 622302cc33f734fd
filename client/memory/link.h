// link.h - by which memory payloads and records move: the choice of a transport, and the window that the client has of it with one
// of its endpoints.
//
// There is at most one window with an endpoint at a time. It is attached when a call first wants one, by a thread of its own for that moment,
// while the call and others wait; after a restart of the daemon, and when too much of it is lost, it is given up for another.
// Where there can be none, everything goes inline: under "auto" for some seconds, until that is tried again. Where one was asked
// for by name, calls that want it fail instead.
#ifndef BKV_CLIENT_LINK_H
#define BKV_CLIENT_LINK_H

#include "client/call.h"
#include "client/memory/window.h"

// Payloads and rooms for records below this go inline: a place saves copies, and costs a hand-over within the daemon. Put, then Get,
// of raw blocks over a unix socket, p50 in us, inline and by place (Xeon with AMX, 2 cores, busy):
//   16 KiB 49, 58; 53, 48    64 KiB 68, 68; 69, 55    128 KiB 92, 80; 110, 59    1 MiB 524, 369; 653, 372
#define BKV_PLACE_LEAST 65536u

// Memory handed out by bkv_buffer_get.
typedef struct bkv_client_shared bkv_client_shared_t;

// What the options say of it, for all endpoints.
typedef struct bkv_client_transport {
    const bkv_window_kind_t *kind; // NULL: everything goes inline, or under `automatic` what is best for each endpoint
    bool automatic;
    uint64_t window_bytes;
    const char *device; // the options'
} bkv_client_transport_t;

typedef struct bkv_client_link {
    // Fixed.
    const bkv_window_kind_t *kind; // to use, or under `automatic` to try; NULL: everything goes inline
    bool automatic;
    uint64_t window_bytes;

    // Under the client's lock.
    bkv_client_window_t *window; // counted, as the next; NULL: none
    bkv_client_window_t *worn;   // to be detached before another is attached
    bool attaching;
    bool closed;         // the client is being destroyed
    bkv_error_t failure; // of the latest attempt to attach; BKV_OK: none yet, or it worked
    uint64_t retry_ns;   // when to try again
    bool offers_known;   // from Open
    bool offered;        // `kind` is among them
} bkv_client_link_t;

// Reads the options and $BKV_TRANSPORT. INVALID_ARGUMENT names the option.
bkv_status_t bkv_client_transport_init(bkv_client_transport_t *transport, const bkv_client_options_t *options,
                                       bkv_error_t *err);

// Of an endpoint whose target is known.
void bkv_client_link_init(bkv_client_endpoint_t *endpoint);
void bkv_client_link_deinit(bkv_client_link_t *link);

// Ends all sessions, where their daemons would not notice: before calls are cancelled. No window is attached after this.
void bkv_client_links_close(bkv_client_t *client);

// Does a call that moves so many bytes in one piece want a window?
bool bkv_client_link_wanted(const bkv_client_link_t *link, uint64_t bytes);

typedef enum bkv_link_answer {
    BKV_LINK_READY,   // call->window is set, or NULL for inline
    BKV_LINK_LATER,   // the call is started again when that is known; it may be gone already
    BKV_LINK_REFUSED, // call->error says why
} bkv_link_answer_t;

// Finds the window for the next attempt of a call, at its endpoint.
bkv_link_answer_t bkv_client_link_join(bkv_call_t *call);

// The window there is, attached first if need be, which takes at most timeout_ms. Counted. NULL: none is to be had.
bkv_client_window_t *bkv_client_link_window(bkv_client_endpoint_t *endpoint, uint32_t timeout_ms);

// The daemon does not know the window's session.
void bkv_client_link_gone(bkv_client_endpoint_t *endpoint, bkv_client_window_t *window);

// What the daemon offers, from its answer to an Open.
void bkv_client_link_offered(bkv_client_endpoint_t *endpoint, char *const *names, size_t count);

// ---- attach.c: the two calls, waited for ----

// A window of about `bytes`; the caller has the one reference.
bkv_status_t bkv_client_attach(bkv_client_endpoint_t *endpoint, const bkv_window_kind_t *kind, uint64_t bytes,
                               uint32_t timeout_ms, bkv_client_window_t **window, bkv_error_t *err);

// Has the daemon end the session, then leaves it. The reference stays the caller's.
void bkv_client_detach(bkv_client_endpoint_t *endpoint, bkv_client_window_t *window, uint32_t timeout_ms);

// What a session takes that is no window (device.c): a session asked for, whose answer is the caller's to free and names one of
// 16 bytes; and its end, whatever comes of it.
bkv_status_t bkv_client_session_ask(bkv_client_endpoint_t *endpoint, const Balancekv__V1__AttachRequest *request,
                                    uint32_t timeout_ms, Balancekv__V1__AttachResponse **response, bkv_error_t *err);
void bkv_client_session_end(bkv_client_endpoint_t *endpoint, const uint8_t *session, uint32_t timeout_ms);

// ---- shared.c ----

// The region of a buffer of bkv_buffer_get that has all of [payload, payload + bytes), counted, and the payload's offset in its
// window. NULL: none has, or it is lost.
bkv_client_region_t *bkv_client_shared_find(bkv_client_t *client, const void *payload, uint64_t bytes, uint64_t *offset);
void bkv_client_shared_free(bkv_client_t *client);

#endif
