// attempt.h - one exchange with a daemon, made for a call of the API: it is fed the call's messages, its responses are taken in, and
// its end is told to call.c (bkv_call_attempted). It may outlive its call (proto/exchange.h): nothing that gRPC is given is therefore
// the caller's memory.
#ifndef BKV_CLIENT_ATTEMPT_H
#define BKV_CLIENT_ATTEMPT_H

#include "client/call.h"

// Set up by whoever starts it, then the driver's.
struct bkv_attempt {
    bkv_exchange_t exchange;
    bkv_call_t *call; // until it is over
    const bkv_call_kind_t *kind;
    grpc_slice request; // counted; the only message where kind->next makes none
    bkv_error_t fault;  // of a response
};

// At call->endpoint, with its first message: what the kind makes, or the request, which stays the caller's. NULL: out of memory.
bkv_attempt_t *bkv_attempt_new(bkv_call_t *call, const bkv_call_kind_t *kind, grpc_slice request);

// From here on it is driven by whoever takes its completions, and frees itself.
void bkv_attempt_start(bkv_attempt_t *attempt);

// What it came to, in our words. cancelled, moving: as of its call, whose error is still that of the attempt before it.
bkv_error_t bkv_attempt_result(const bkv_attempt_t *attempt, bool cancelled, bool moving);

// Was it the daemon that ended it, or gRPC at this end?
bool bkv_attempt_answered(const bkv_attempt_t *attempt);

#endif
