// endpoint.h - one daemon that a client may talk to: its channel, its memory shared with us (link.h), and whether it works.
//
// A client has one endpoint or several: those that its options list, in order of preference, and behind them those that were
// learned from the cluster (route.h). Every attempt of a call goes to one of them, and a call's next attempt may go to another.
// Boots, limits, sessions and opened specs are of one endpoint each and never mixed up.
//
// An endpoint is down when it could not be reached, lost the connection, is draining, was busy for long, or did not answer though
// others did: no call goes there while another works. It is then asked for its health now and then, and is up again when it
// serves; so calls come back to the first that works, in order of preference. Silence is told from work by asking, too: where a
// call waits, nothing has been heard from its endpoint meanwhile, and there are others, the daemon's health is asked for on the
// same connection. A daemon that is there answers that at once, however long the call itself takes; from one that does not, all
// calls go elsewhere within their deadlines (watch.c).
//
// A client with a single endpoint does none of this: with nowhere to go it waits, as call.c says.
#ifndef BKV_CLIENT_ENDPOINT_H
#define BKV_CLIENT_ENDPOINT_H

#include "client/endpoints/target.h"
#include "client/memory/link.h"

#define BKV_ENDPOINTS_LISTED 16   // at most, by the options
#define BKV_ENDPOINTS_MAX    1024 // with those learned

typedef struct bkv_client_endpoint {
    // Fixed.
    bkv_client_t *client;
    bkv_client_target_t target;
    grpc_channel *channel; // reconnects by itself
    uint32_t number;       // among the client's
    bool listed;           // by the options

    bkv_client_link_t link;

    _Atomic uint64_t heard_ns; // when anything came from it last; 0: never

    // Under the client's lock.
    uint64_t boot_epoch;                         // of the latest response; 0: none yet
    uint64_t max_message_bytes, max_block_bytes; // of the latest Open; 0: none yet
    bool down;
    uint64_t down_ns;   // since when
    bool probing;       // a probe is under way
    bool wanted;        // of one that was learned: it is a member
    uint32_t fruitless; // probes in a row that did not find it serving
    uint32_t silences;  // and those that were not answered at all
    uint64_t probe_ns;  // where down: when to ask again
} bkv_client_endpoint_t;

// Makes the endpoints that the options list. INVALID_ARGUMENT names the option.
bkv_status_t bkv_client_endpoints_init(bkv_client_t *client, const bkv_client_options_t *options, bkv_error_t *err);
void bkv_client_endpoints_deinit(bkv_client_t *client);

// The endpoint with that address, made if there is none: NULL where that is no address of ours to go to, or there are too many.
bkv_client_endpoint_t *bkv_client_endpoint_learn(bkv_client_t *client, const char *address);

// The listed one that has one of these addresses; NULL: none has.
bkv_client_endpoint_t *bkv_client_endpoint_find(bkv_client_t *client, char *const *addresses, size_t count);

// Is there another one to go to from here, for a call that is not bound to its own?
bool bkv_client_endpoint_others(const bkv_call_t *call);

// Where the next attempt of a call is to go. Never NULL: where all have been tried in vain in this round, another round begins.
// The lock must be held, as for the next.
bkv_client_endpoint_t *bkv_client_endpoint_choose(bkv_call_t *call);

// The one that a new call would go to.
bkv_client_endpoint_t *bkv_client_endpoint_first(bkv_client_t *client);

// The attempt has ended with BUSY. answered: by the daemon's own word. True: the call is to go elsewhere at once; false: it is to
// wait, or to end.
bool bkv_client_endpoint_forsake(bkv_call_t *call, bool answered);

// What the call asked for is not there: is another one to be asked? Then the next attempt goes to it.
bool bkv_client_endpoint_ask_next(bkv_call_t *call);

// Anything has come from the call's endpoint; served: the end of an attempt, and it is not one that wants to be left alone.
void bkv_client_endpoint_heard(bkv_call_t *call, bool served);

// An attempt ended by its deadline, unanswered.
void bkv_client_endpoint_unheard(bkv_call_t *call);

// ---- watch.c ----

// An attempt has begun. The lock must be held. True: the driver must be woken, without the lock.
bool bkv_client_watch_begin(bkv_client_t *client);

// What is due at now_ns; returns when more will be. For the driver.
uint64_t bkv_client_watch_run(bkv_client_t *client, uint64_t now_ns);

// Takes an endpoint for down from now on. The lock must be held.
void bkv_client_watch_down(bkv_client_endpoint_t *endpoint);

#endif
