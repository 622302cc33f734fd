// pooled.h - Lookup, Pin and Drop where others of the cluster have to be asked: from unary.c, which has checked the request.
#ifndef BKV_RPC_POOLED_H
#define BKV_RPC_POOLED_H

#include "daemon/rpc/keyed.h"

// states: [keyed->count], what is here; in the bump.
void bkv_pooled_lookup(bkv_call_t *call, const bkv_keyed_t *keyed, const Balancekv__V1__KeyState *states);

// Brings the records here first. They stay as long as the lease does, and after that as long as there is room.
void bkv_pooled_pin(bkv_call_t *call, const bkv_keyed_t *keyed, uint64_t ttl_ms);

void bkv_pooled_drop(bkv_call_t *call, const bkv_keyed_t *keyed);

// Leases what is here, and answers.
void bkv_reply_pin(bkv_call_t *call, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count, uint64_t ttl_ms);

#endif
