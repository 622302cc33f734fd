// verbs.h - an RDMA device at work: reliable connections (paths) to other ends, and what is READ from them or WRITTEN to them. It
// moves bytes and knows nothing of what they mean: sessions of clients are daemon/transport/verbs.c's, records of other daemons
// daemon/cluster/peer/verbs.c's.
//
// A path is one connection: whatever its other end does, or suffers, breaks that one and no other. What fails, fails for good:
// whoever wants to go on makes a new path. Every transfer is over some time: by its completion, by the device's own retries
// (2 s), by the clock when nothing moves, or by its deadline.
//
// path.c: start and end, of all and of a path; work.c: transfers cut into work requests, posted in turn and taken back; watch.c:
// the thread that hears what the device has to say, and the clock. internal.h is what they share.
//
// Thread-safe, but for one path's own start and end.
#ifndef BKV_VERBS_H
#define BKV_VERBS_H

#include "proto/verbs_link.h"

#define BKV_VERBS_STUCK_MS 5000 // a path that completes nothing for so long is given up; its own retries take less
#define BKV_VERBS_FLUSH_MS 2000 // so long may a broken one take to return its work
#define BKV_VERBS_GRACE_MS 200  // so long past its deadline may a transfer take to return what has been posted of it

typedef struct bkv_verbs bkv_verbs_t;
typedef struct bkv_verbs_path bkv_verbs_path_t;
typedef struct bkv_verbs_transfer bkv_verbs_transfer_t;

// What messages say, around the reason: "place.session: its RDMA link has failed (REASON); Attach again".
typedef struct bkv_verbs_words {
    const char *subject, *remedy; // of a path that has failed or ended
    const char *limit;            // what decides how many there may be
    const char *otherwise;        // what happens without the device
} bkv_verbs_words_t;

typedef struct bkv_verbs_config {
    const bkv_verbs_device_t *device; // outlives this
    uint32_t max_paths;               // the device may allow fewer
    bkv_verbs_words_t words;
    const char *thread_name;
    uint64_t (*now_ms)(void);
    // NULL, or called by the device's thread, which may block for nothing: it returns when it is to be called again at the latest.
    uint64_t (*tick)(void *user, uint64_t now_ms);
    void *user;
} bkv_verbs_config_t;

// UNIMPLEMENTED: the device cannot; RESOURCE_EXHAUSTED: no memory, completion queue, descriptor or thread.
bkv_status_t bkv_verbs_create(const bkv_verbs_config_t *config, bkv_verbs_t **verbs, bkv_error_t *err);

// Once no path is left. NULL: nothing.
void bkv_verbs_destroy(bkv_verbs_t *verbs);

// Whether a new path has a chance now: the device is there and its port active.
bool bkv_verbs_usable(const bkv_verbs_t *verbs);

// Has the device's thread look at everything now, tick included.
void bkv_verbs_wake(bkv_verbs_t *verbs);

// Most paths at once.
uint32_t bkv_verbs_max_paths(const bkv_verbs_t *verbs);

// ---- transfers ----

// Bytes on their way. Whoever begins it fills in what comes first, and frees it in `over` or later.
struct bkv_verbs_transfer {
    bool read;      // from the other end's window; else to it
    uint8_t *local; // registered memory, its lkey
    uint32_t local_key;
    uint64_t offset, bytes; // in the window; not none
    uint64_t deadline_ms;   // 0: none but the path's own
    // Once, on the device's own thread: the transfer is over, and no device touches its memory any more. FAILED_PRECONDITION: the
    // path has failed. DEADLINE_EXCEEDED, CANCELLED: not all of it was moved. Must not block.
    void (*over)(bkv_verbs_transfer_t *transfer, const bkv_error_t *error);

    bkv_verbs_transfer_t *next; // from here on the room's own
    bkv_verbs_path_t *path;
    uint64_t posted;  // bytes
    uint32_t pending; // work requests posted and not come back
    bool failed;      // one of them, or it was not all posted
    bool retired;     // over, and to be told of
    bkv_status_t cut; // why no more of it is posted; BKV_OK: it is not cut short
};

// A list, oldest first.
typedef struct bkv_verbs_list {
    bkv_verbs_transfer_t *head, **tail;
} bkv_verbs_list_t;

// Begins a transfer. FAILED_PRECONDITION: the path has failed, or it has been ended; then it has not begun.
bkv_status_t bkv_verbs_begin(bkv_verbs_path_t *path, bkv_verbs_transfer_t *transfer, bkv_error_t *err);

// Gives up a transfer that has been begun and not been told to be over: it soon is.
void bkv_verbs_cancel(bkv_verbs_transfer_t *transfer);

// ---- paths ----

// One connection. Its memory is whoever's who makes it; the fields are the room's own, but `link` may be described.
struct bkv_verbs_path {
    bkv_verbs_t *verbs;
    bkv_verbs_link_t link; // empty once it has been given up
    bkv_verbs_end_t window;

    bkv_verbs_path_t *next, **prev; // all that are connected
    bkv_verbs_path_t *turn_next;    // those that could post more
    bool has_turn;
    bkv_verbs_list_t transfers;    // begun and not over
    bkv_verbs_transfer_t *posting; // the first of them that is not all posted
    uint32_t pending, reads;       // work requests posted; of these READs
    uint64_t progress_ms;          // when one last came back, or was posted on an idle link
    uint64_t until_ms;             // it has been ended, and must be over by then; 0: it has not
    bkv_error_t broken;            // why it is of no use any more; else BKV_OK
    uint64_t broken_ms;
};

// Makes a path that leads nowhere yet; bkv_verbs_link_describe(&path->link, NULL, ..) is for the other end. UNIMPLEMENTED: the
// device is of no use now. RESOURCE_EXHAUSTED: there are too many.
bkv_status_t bkv_verbs_path_init(bkv_verbs_path_t *path, bkv_verbs_t *verbs, bkv_error_t *err);

// Leads it to the other end, whose window is what transfers move from and to; offsets within it are the caller's to check.
// Statuses as of bkv_verbs_link_connect, which may block for a second; then the path can only be given up.
bkv_status_t bkv_verbs_path_connect(bkv_verbs_path_t *path, const bkv_verbs_end_t *other, bkv_error_t *err);

// Begins nothing new from now on; what has been begun is over within within_ms. Idempotent.
void bkv_verbs_path_end(bkv_verbs_path_t *path, uint64_t within_ms);

// Whether it is connected and has not failed. A path that breaks right now is noticed with the next transfer.
bool bkv_verbs_path_alive(const bkv_verbs_path_t *path);

// Once its transfers are over, and not on the device's own thread: it may wait for that.
void bkv_verbs_path_deinit(bkv_verbs_path_t *path);

#endif
