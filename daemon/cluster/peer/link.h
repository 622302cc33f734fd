// link.h - the asking end of one-sided reads, between verbs.h, which reads records, and the device: links to peers, how they are
// made and given up. Shared by link.c and verbs.c.
//
// A link is made when it is first wanted, while records come by stream, and again after it has failed, at times that grow apart.
// Making one asks the peer, registers memory and may wait for an address to be found, so it is done on a thread of this room's
// own. What is read over is a way: one connection. A link that has failed gets a new one, while the old one lasts for as long as
// somebody reads over it.
#ifndef BKV_PEER_LINK_H
#define BKV_PEER_LINK_H

#include "daemon/cluster/peer/internal.h"

#define BKV_LINK_PATHS     1024  // most ways at once
#define BKV_LINK_ASK_MS    10000 // the peer may have to register its arena first
#define BKV_LINK_PAUSE_MS  1000  // after a failure; doubled with each that follows, up to
#define BKV_LINK_PAUSE_MAX 60000
#define BKV_LINK_TICK_MS   500 // between looks at what is held for others
#define BKV_LINK_WATCH_MS  10  // and at whether what is being read is still wanted

typedef struct bkv_way {
    bkv_verbs_path_t path;
    struct bkv_peers_verbs *verbs;
    bkv_link_id_t id;
    uint64_t bytes;                       // of the other end's arena
    uint32_t refs;                        // [verbs->lock] the link's, and those of who reads
    uint32_t release_count;               // [verbs->lock]
    uint64_t releases[BKV_HOLDS_MAX / 2]; // holds that the next Locate gives back
    struct bkv_way *next;                 // [verbs->lock] of those to be freed
} bkv_way_t;

typedef enum bkv_link_state {
    BKV_LINK_NONE,     // until retry_ms
    BKV_LINK_WANTED,   // the thread is to make it
    BKV_LINK_ASKED,    // the peer is to answer
    BKV_LINK_ANSWERED, // the thread is to connect it, or to note why not
    BKV_LINK_READY,
} bkv_link_state_t;

// A peer's link: peer->verbs.
struct bkv_peer_verbs {
    bkv_peer_t *peer;       // counted while it is being made
    bkv_link_state_t state; // [verbs->lock], and the following
    bkv_way_t *way;         // being made, or ready
    uint64_t retry_ms, pause_ms;
    struct bkv_peer_verbs *next; // of those that the thread is to look at
    bkv_error_t answer;          // the peer's
    bkv_verbs_end_t other;
};

// All there is of one-sided reads: peers->verbs.
struct bkv_peers_verbs {
    bkv_peers_t *peers;
    char self[BKV_MEMBER_NAME_MAX];
    bkv_peer_device_t device;
    bkv_serve_t *serve;
    bkv_verbs_t *verbs; // NULL: not yet
    pthread_t thread;
    bool running;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool ending; // [lock], and the following
    struct bkv_peer_verbs *todo, **todo_end;
    bkv_way_t *unused;      // ways that nobody refers to
    struct bkv_pull *pulls; // verbs.c's: what is being read
};

void bkv_links_init(struct bkv_peers_verbs *verbs);
bkv_status_t bkv_links_start(struct bkv_peers_verbs *verbs, bkv_error_t *err);
void bkv_links_stop(struct bkv_peers_verbs *verbs); // there are no links any more; also where it was not started

// A reference to the peer's way; NULL: there is none now. Then one is made, unless the last failure was not long ago. Does not
// block.
bkv_way_t *bkv_link_get(bkv_peer_t *peer, uint64_t now_ms);

// Gives the reference back. hold: to be released with the next Locate; 0: none.
void bkv_way_put(bkv_way_t *way, uint64_t hold);

// Takes in a LinkResponse: the way's id, how much of an arena it leads to, and what to connect to. INTERNAL, INVALID_ARGUMENT: it
// is not an answer, or not one that can be read from.
bkv_status_t bkv_way_answered(bkv_way_t *way, const ProtobufCMessage *response, bkv_verbs_end_t *other, bkv_error_t *err);

// The way is of no use any more. again: it may be made anew at once, as it is the other end that has forgotten it.
void bkv_link_failed(bkv_peer_t *peer, const bkv_way_t *way, bool again, uint64_t now_ms);

// It has been: the next failure is a first one.
void bkv_link_worked(bkv_peer_t *peer);

// Moves what the next Locate is to release to `releases`, with room for all; returns how many.
uint32_t bkv_way_releases(bkv_way_t *way, uint64_t releases[BKV_HOLDS_MAX / 2]);

#endif
