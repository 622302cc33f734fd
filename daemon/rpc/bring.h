// bring.h - records of a call that are brought here from the pool before they are used: for Get in windows (ahead.h), for Fold,
// Attend and Pin all at once.
//
// What is brought stays pinned until it is let go of, and so does what was here already, so that the one does not push the other
// out. Where everything is here, nothing is pinned and nobody asked: the call goes on as if there were no cluster.
#ifndef BKV_RPC_BRING_H
#define BKV_RPC_BRING_H

#include "daemon/rpc/call.h"

typedef struct bkv_bring bkv_bring_t;

// Keys are copied. The server must have a cluster. NULL: no memory.
bkv_bring_t *bkv_bring_new(bkv_server_t *server, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count);

// True: all records are here, and that was all. False: `then` is called once, perhaps before this returns, on a thread of the
// cluster's or the caller's; until then nobody else touches the batch.
bool bkv_bring_start(bkv_bring_t *bring, uint64_t deadline_ms, void (*then)(void *user), void *user);

// Whether it has been started, and is not over. From any thread.
bool bkv_bring_under_way(const bkv_bring_t *bring);

uint32_t bkv_bring_count(const bkv_bring_t *bring);

// What became of one record: BKV_OK, it is here; else as of bkv_cluster_fetch, and err names no key.
bkv_status_t bkv_bring_status(const bkv_bring_t *bring, uint32_t number, bkv_error_t *err);

// Of all: the first that is not here, "keys[2]: ...".
bkv_status_t bkv_bring_result(const bkv_bring_t *bring, bkv_error_t *err);

// Whether the record was not here before.
bool bkv_bring_came(const bkv_bring_t *bring, uint32_t number);

// Takes the pin off a record, if there is one.
void bkv_bring_unpin(bkv_bring_t *bring, uint32_t number);

// Unpins all, and says of those that came that they have been used (bkv_cluster_used).
void bkv_bring_used(bkv_bring_t *bring);

// Unpins what is pinned and frees. It must not be under way. NULL: nothing.
void bkv_bring_free(bkv_bring_t *bring);

#endif
