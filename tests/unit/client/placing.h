// placing.h - a fake daemon that keeps what it is put and returns it, by places where it is given any. What it does wrong, and
// whether it answers, a test says while it runs.
#ifndef BKV_TEST_CLIENT_PLACING_H
#define BKV_TEST_CLIENT_PLACING_H

#include "share.h"

#define PLACING_TOKENS 1024 // of a full block
#define PLACING_KEYS   64

// What Get says that is not so: about its last record, the others are honest.
typedef enum placing_lie {
    PLACING_HONEST,
    PLACING_BEFORE,     // the room
    PLACING_BEHIND,     // it
    PLACING_ACROSS,     // its end
    PLACING_OVERLAP,    // the record before
    PLACING_UNALIGNED,  // offset
    PLACING_FAR,        // an offset near 2^64
    PLACING_LONG,       // a record longer than what lies there
    PLACING_SHORT,      // a record cut off
    PLACING_WITH_DATA,  // as well
    PLACING_AFTER_DATA, // half of it came as data
    PLACING_TWICE,      // the same record
    PLACING_GARBAGE,    // no record
    PLACING_OTHER_KEY,  // another block's record
    PLACING_LIES
} placing_lie_t;

typedef struct placing {
    fake_place_t place;
    share_t share;
    fake_server_t *server;
    bool sharing;
    atomic_uint epoch, opened_at;          // the spec is known while both are equal
    atomic_bool no_attach;                 // UNIMPLEMENTED
    atomic_bool busy;                      // Attach is UNAVAILABLE
    atomic_bool not_offered;               // by Open
    atomic_uint forget;                    // so many calls with a place find no session
    atomic_bool hang;                      // Put and Get never end
    atomic_bool break_off;                 // Put and Get end with UNAVAILABLE that does not name the request
    atomic_int lie;                        // placing_lie_t
    atomic_uint attach_ms;                 // how long Attach takes
    atomic_uint puts, gets, placed, plain; // calls; blocks and records that moved by a place, or as data
    _Atomic uint64_t sums[PLACING_KEYS];   // by the key's second byte: the sum of the payload's bytes
    _Atomic uint64_t last_offset;          // of the latest place
} placing_t;

void placing_start(placing_t *placing, uint64_t window); // 0: no fd socket
void placing_stop(placing_t *placing);

// A client of it with the spec open; transport and window_bytes as in bkv_client_options_t.
bkv_client_t *placing_client(placing_t *placing, const char *transport, uint64_t window_bytes, bkv_spec_id_t *id);

// Asserts that the record is that of a full block, got or made, and frees it.
void placing_check(bkv_record_t *record, const bkv_key_t *key, bool in_window);

// A Put of `bytes` bytes that all are `value`; the caller frees nothing.
bkv_status_t placing_put(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *key, void *payload, size_t bytes,
                         uint8_t value, uint32_t timeout_ms, bkv_put_result_t *result, bkv_error_t *err);

#endif
