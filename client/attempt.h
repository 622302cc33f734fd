// attempt.h - one gRPC call, made for a call of the API: it is fed messages, its responses are taken in, and its end is told to
// call.c (bkv_call_attempted).
//
// An attempt may outlive its call: where nobody reads at the other end, gRPC keeps a message that is half-way into the socket
// for as long as the socket blocks, deadline or not. Nothing that gRPC is given is therefore the caller's memory.
#ifndef BKV_CLIENT_ATTEMPT_H
#define BKV_CLIENT_ATTEMPT_H

#include "client/call.h"

// One gRPC call. Set up by whoever starts it, then the driver's.
struct bkv_attempt {
    bkv_call_t *call; // NULL: it has gone on without this attempt
    const bkv_call_kind_t *kind;
    grpc_call *grpc;
    bkv_call_tag_t send_tag, status_tag, receive_tag;
    bool sending;               // a batch that sends is not back
    uint32_t waiting;           // batches that receive and are not back
    grpc_byte_buffer *message;  // being sent
    grpc_byte_buffer *prepared; // to be sent after it; NULL: not made yet
    bool message_last, prepared_last;
    grpc_byte_buffer *received;
    grpc_metadata_array initial, trailing;
    grpc_status_code code;
    grpc_slice details;
    bool answered;     // a response has come
    bkv_error_t fault; // what was wrong with it
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
