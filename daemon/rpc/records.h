// records.h - records on their way out, for Get and Fold: through messages, or to a place in memory that the client shares.
#ifndef BKV_RPC_RECORDS_H
#define BKV_RPC_RECORDS_H

#include "daemon/rpc/call.h"

typedef struct bkv_parcel bkv_parcel_t;

typedef struct bkv_records {
    bkv_server_t *server;
    bkv_spec_id_t spec_id;
    bkv_deliver_range_t range;
    bkv_fold_result_t folded; // Fold: the records; those sent are empty
    bkv_parcel_t *parcel;     // the record being sent; NULL between two
    uint64_t sent;            // of its bytes
    bool fold, no_data;       // no_data: only say what there is
    uint32_t index, count;
    bkv_session_t *session;  // NULL: everything goes through messages
    bkv_wire_place_t room;   // what is left of the request's place; moves on as records are packed
    bkv_error_t first_error; // of the first key that could not be delivered
    bkv_key_t keys[];
} bkv_records_t;

// Makes the call's body: room for `count` keys, which the caller fills in. NULL: no memory.
bkv_records_t *bkv_records_new(bkv_call_t *call, uint32_t count);

// Takes a request's place, NULL where it has none, as room for the records.
bkv_status_t bkv_records_set_room(bkv_records_t *records, const Balancekv__V1__Place *place, bkv_error_t *err);

// Sends all records, then ends the call: of `folded`, or of the keys. From any thread.
void bkv_records_send(bkv_call_t *call);

#endif
