// records.h - records on their way out, for Get, Fold and a peer's Fetch: through messages, or to a place in memory that the
// client shares.
#ifndef BKV_RPC_RECORDS_H
#define BKV_RPC_RECORDS_H

#include "daemon/rpc/ahead.h"

// How many records of a call transports may move at a time, so that neither waits for the other.
#define BKV_RECORDS_AHEAD 8

typedef struct bkv_parcel bkv_parcel_t;

// A record that has been taken up.
typedef enum bkv_due_state {
    BKV_DUE_INLINE, // goes through messages
    BKV_DUE_MOVING, // a transport has it, until its callback
    BKV_DUE_PLACED, // lies in the client's memory
    BKV_DUE_FAILED, // see error
} bkv_due_state_t;

typedef struct bkv_due {
    bkv_call_t *call;
    bkv_parcel_t *parcel; // NULL: there was none to be had
    uint64_t offset;      // where it is placed
    bkv_error_t error;
    _Atomic bkv_due_state_t state;
} bkv_due_t;

typedef struct bkv_records {
    bkv_server_t *server;
    bkv_spec_id_t spec_id;
    bkv_deliver_range_t range;
    bkv_fold_result_t folded; // Fold: the records; those taken up are empty
    bool fold, no_data;       // no_data: only say what there is
    bkv_fold_args_t parts;    // Fold in a cluster: of what, to be folded again once that has been brought here. keys are `keys`
    bkv_bring_t *brought;     // likewise: what is being brought, or has been. NULL: nothing
    bkv_name_t *names;        // Fetch: whole records of any specs, in place of the keys; owned. Missing ones are no failure
    bkv_ahead_t *ahead;       // Get in a cluster: what is not here comes from the pool. NULL: nothing does
    bkv_session_t *session;   // NULL: everything goes through messages
    bkv_wire_place_t room;    // what is left of the request's place; moves on as records are packed

    uint32_t index, next, count;      // the record that is due; the first that has not been taken up
    bkv_due_t due[BKV_RECORDS_AHEAD]; // those between, each at its number modulo the length
    uint64_t sent;                    // bytes of the one that is due
    bool closed;                      // one taken up has failed for good: none after it
    bkv_error_t first_error;          // of the first key that could not be delivered
    bkv_error_t error;                // what ended the call early
    grpc_byte_buffer *last;           // message, which goes with the status

    _Atomic uint32_t busy; // the sender, records that transports have, and windows that are being brought here
    _Atomic bool waiting;  // for a callback, which is the sender from then on
    bkv_key_t keys[];
} bkv_records_t;

// Makes the call's body: room for `count` keys, which the caller fills in. NULL: no memory.
bkv_records_t *bkv_records_new(bkv_call_t *call, uint32_t count);

// The same of whole records of any specs, whose names are copied.
bkv_records_t *bkv_records_new_names(bkv_call_t *call, const bkv_name_t *names, uint32_t count);

// Has records that are not here brought from the pool, once spec_id and keys are filled in. Without a cluster: nothing.
bkv_status_t bkv_records_reach_out(bkv_call_t *call, bkv_error_t *err);

// Takes a request's place, NULL where it has none, as room for the records.
bkv_status_t bkv_records_set_room(bkv_records_t *records, const Balancekv__V1__Place *place, bkv_error_t *err);

// Sends all records, then ends the call: of `folded`, or of the keys. From any thread.
void bkv_records_send(bkv_call_t *call);

#endif
