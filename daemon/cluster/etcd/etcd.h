// etcd.h - a small client of etcd's v3 API over the gRPC C core: leases, keys under them, compare-and-put, listings, watches.
//
// What it is: one thread that drives all calls, over several endpoints of which one is used at a time; when that one fails or
// does not answer, calls and watches go on with the next. What it is not: it has no notion of members; that is membership.c.
//
// Threads. Everything here but create, destroy and post is called on the client's own thread, which bkv_etcd_post leads to, and
// every callback runs there: it must not block. So nothing that callbacks touch needs a lock.
//
// Time. All durations are taken from the monotonic clock; nobody's wall clock matters.
//
// Errors. DEADLINE_EXCEEDED: no endpoint has done it in time; the message says what the last one answered. It may have been
// done nevertheless, or be done later, when an etcd that stood still goes on: who cannot bear that has to swap, not to put.
// RESOURCE_EXHAUSTED: among others etcd's own disk quota (its NOSPACE alarm): nothing has been changed, leases that are there
// can be kept alive. UNAUTHENTICATED, PERMISSION_DENIED: name, password or rights. CANCELLED: the client is being destroyed.
// What etcd sends is checked: foreign keys, revisions that go back, and fields that are missing do no harm.
#ifndef BKV_ETCD_H
#define BKV_ETCD_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BKV_ETCD_ENDPOINTS_MAX 8
#define BKV_ETCD_CALLS_MAX     256 // in flight
#define BKV_ETCD_POSTS_MAX     1024
#define BKV_ETCD_KEY_MAX       1024      // bytes
#define BKV_ETCD_VALUE_MAX     (1 << 18) // bytes that may be written
#define BKV_ETCD_LIST_MAX      16384     // keys under a watched prefix

typedef struct bkv_etcd bkv_etcd_t;

typedef struct bkv_etcd_options {
    const char *const *endpoints; // "host:port" or "unix:/path"; copied, as all the rest
    size_t endpoint_count;        // 1..BKV_ETCD_ENDPOINTS_MAX
    const char *tls_ca;           // PEM files. NULL or "": none, and without a CA no TLS
    const char *tls_cert, *tls_key;
    const char *tls_name;        // the name in etcd's certificate, where it is not the endpoint's
    const char *user, *password; // NULL or "": no login
    uint32_t attempt_ms;         // after which an endpoint that is silent is given up for the next; 0: 1000
} bkv_etcd_options_t;

// Checks the options and files, and starts the thread; does not wait for a connection. INVALID_ARGUMENT names the option.
bkv_status_t bkv_etcd_create(const bkv_etcd_options_t *options, bkv_etcd_t **etcd, bkv_error_t *err);

// Ends every call with CANCELLED, and every watch, without a word to it; runs what has been posted. Returns when no callback
// runs any more. Not on the client's thread. NULL: nothing.
void bkv_etcd_destroy(bkv_etcd_t *etcd);

typedef void (*bkv_etcd_run_t)(void *user);

// Has `run` called on the client's thread, in the order of posts. BUSY: too many are waiting, or the client is being destroyed.
bkv_status_t bkv_etcd_post(bkv_etcd_t *etcd, bkv_etcd_run_t run, void *user);

bool bkv_etcd_is_own_thread(const bkv_etcd_t *etcd);

// ---- timers ----

// Zeroed at first; must not move while it is armed.
typedef struct bkv_etcd_timer {
    bkv_etcd_run_t run;
    void *user;
    uint64_t due_ms;
    bool armed;
    struct bkv_etcd_timer *next;
} bkv_etcd_timer_t;

// Calls run once, delay_ms from now; a timer that is armed already is set anew.
void bkv_etcd_timer_start(bkv_etcd_t *etcd, bkv_etcd_timer_t *timer, uint64_t delay_ms, bkv_etcd_run_t run, void *user);
void bkv_etcd_timer_stop(bkv_etcd_t *etcd, bkv_etcd_timer_t *timer);

// ---- calls ----

typedef struct bkv_etcd_text {
    const void *bytes;
    size_t length;
} bkv_etcd_text_t;

typedef struct bkv_etcd_kv {
    bkv_etcd_text_t key, value;
    int64_t mod_revision; // of its last change
    int64_t lease;        // 0: none
} bkv_etcd_kv_t;

typedef struct bkv_etcd_reply {
    int64_t revision;         // of the whole store, when etcd answered
    uint64_t cluster;         // which etcd it was
    bool succeeded;           // swap: the value was written
    int64_t lease;            // grant, keep
    uint32_t ttl_s;           // grant, keep: may be more than what was asked for
    const bkv_etcd_kv_t *kvs; // list; and what a swap found in the place of what it expected
    size_t count;
    bool more; // list: there are more keys than the limit
} bkv_etcd_reply_t;

// reply is NULL where error->status is not BKV_OK. Both are the client's, and gone after the return.
typedef void (*bkv_etcd_done_t)(void *user, const bkv_error_t *error, const bkv_etcd_reply_t *reply);

// Each of these starts a call that ends, by a call of done, within timeout_ms. BUSY (too many in flight), INVALID_ARGUMENT (a
// key or value too long, or empty) and RESOURCE_EXHAUSTED (no memory) are returned at once, and then done is not called.
// A call that has to be repeated at another endpoint may have been done at the first: all but grant and swap come to the same
// then.

// A new lease of that id (above 0; a random number that nobody else draws) for ttl_s seconds. FAILED_PRECONDITION: there is one
// of that id, perhaps by a first attempt; draw another.
bkv_status_t bkv_etcd_grant(bkv_etcd_t *etcd, int64_t lease, uint32_t ttl_s, uint32_t timeout_ms, bkv_etcd_done_t done,
                            void *user, bkv_error_t *err);
// Gives a lease its full time again, and says how long that is. NOT_FOUND: it has expired, and its keys with it.
bkv_status_t bkv_etcd_keep(bkv_etcd_t *etcd, int64_t lease, uint32_t timeout_ms, bkv_etcd_done_t done, void *user,
                           bkv_error_t *err);
// Ends a lease and deletes its keys. NOT_FOUND: it had ended.
bkv_status_t bkv_etcd_revoke(bkv_etcd_t *etcd, int64_t lease, uint32_t timeout_ms, bkv_etcd_done_t done, void *user,
                             bkv_error_t *err);

// Writes a key. lease 0: for ever. NOT_FOUND: there is no such lease.
bkv_status_t bkv_etcd_put(bkv_etcd_t *etcd, bkv_etcd_text_t key, bkv_etcd_text_t value, int64_t lease, uint32_t timeout_ms,
                          bkv_etcd_done_t done, void *user, bkv_error_t *err);
// The same if the key's mod_revision is `expected` (0: if the key is not there); otherwise reply->kvs is what is there, if
// anything. After a repeat that may be what the first attempt wrote: compare it with what was to be written.
bkv_status_t bkv_etcd_swap(bkv_etcd_t *etcd, bkv_etcd_text_t key, int64_t expected, bkv_etcd_text_t value, int64_t lease,
                           uint32_t timeout_ms, bkv_etcd_done_t done, void *user, bkv_error_t *err);
bkv_status_t bkv_etcd_remove(bkv_etcd_t *etcd, bkv_etcd_text_t key, uint32_t timeout_ms, bkv_etcd_done_t done, void *user,
                             bkv_error_t *err);

// The keys that begin with prefix and come after `after` (length 0: from the first), at most `limit` of them, in their order;
// as of a revision (0: now). FAILED_PRECONDITION: that revision has been compacted.
bkv_status_t bkv_etcd_list(bkv_etcd_t *etcd, bkv_etcd_text_t prefix, bkv_etcd_text_t after, int64_t revision, uint32_t limit,
                           uint32_t timeout_ms, bkv_etcd_done_t done, void *user, bkv_error_t *err);

// ---- watches ----

// What a watcher is told. It sees the keys under a prefix as one of etcd's revisions after the other, without a gap: first a
// listing (reset, put..., synced), then changes (put or removed..., synced). Where the gap cannot be bridged, because what has
// happened meanwhile was compacted away or etcd itself was replaced, there is a listing again. A listing may be broken off by
// another reset.
typedef struct bkv_etcd_watcher {
    void (*reset)(void *user); // what follows, up to synced, is all there is
    void (*put)(void *user, const bkv_etcd_kv_t *kv);
    void (*removed)(void *user, bkv_etcd_text_t key, int64_t revision);
    void (*synced)(void *user, int64_t revision);       // the state is a whole one again; after a loss also without a change
    void (*lost)(void *user, const bkv_error_t *error); // no contact; comes once, then synced when there is again
} bkv_etcd_watcher_t;

typedef struct bkv_etcd_watch bkv_etcd_watch_t;

// Watches until it is destroyed. The prefix is copied, the table must outlive the watch.
bkv_status_t bkv_etcd_watch_create(bkv_etcd_t *etcd, bkv_etcd_text_t prefix, const bkv_etcd_watcher_t *watcher, void *user,
                                   bkv_etcd_watch_t **watch, bkv_error_t *err);
void bkv_etcd_watch_destroy(bkv_etcd_watch_t *watch); // NULL: nothing. Not from inside one of its own callbacks

#endif
