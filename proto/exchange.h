// exchange.h - one gRPC call at the end that asks, for the client and for daemons that ask each other: messages are sent as they are
// made, responses handed on as they come, and its end is told. What is asked, and what follows, is its owner's.
//
// An exchange may outlive the interest in it: where nobody reads at the other end, gRPC keeps a message that is half-way into the
// socket for as long as the socket blocks, deadline or not. So whatever gRPC has been given is the exchange's, and it is gone
// when gRPC has given all of it back, which may be long after it is over.
//
// Threads: all hooks run on the thread that takes from the completion queue, but the first `next`, which the preparer runs.
#ifndef BKV_EXCHANGE_H
#define BKV_EXCHANGE_H

#include <grpc/grpc.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// A batch of gRPC operations under way: what the completion queue hands back.
typedef struct bkv_batch_tag {
    void (*run)(void *owner, bool ok);
    void *owner;
} bkv_batch_tag_t;

// Anything but OK is a batch that is wrong in itself.
void bkv_batch_start(grpc_call *call, const grpc_op *ops, size_t count, bkv_batch_tag_t *tag);

// Does what is to be done when a batch is back: of an event that completes one.
void bkv_batch_back(const grpc_event *event);

typedef enum bkv_exchange_shape {
    BKV_UNARY,    // one message each way
    BKV_UPLOAD,   // many out, one back
    BKV_DOWNLOAD, // one out, many back
} bkv_exchange_shape_t;

typedef struct bkv_exchange bkv_exchange_t;

typedef struct bkv_exchange_hooks {
    // The next message, from then on the exchange's; *last when none follows it. NULL with *last: there was none left. Without,
    // there is no memory for it: the exchange is given up.
    grpc_byte_buffer *(*next)(bkv_exchange_t *exchange, bool *last);
    // A message has gone into somebody's buffers. Optional.
    void (*sent)(bkv_exchange_t *exchange);
    // A response, which stays the exchange's. False: the exchange is given up. Optional.
    bool (*take)(bkv_exchange_t *exchange, grpc_byte_buffer *message);
    // It is over, with code, details and trailing metadata; nothing but `gone` follows.
    void (*over)(bkv_exchange_t *exchange);
    // gRPC has given everything back: to be deinitialised and freed.
    void (*gone)(bkv_exchange_t *exchange);
} bkv_exchange_hooks_t;

struct bkv_exchange {
    // Fixed.
    const bkv_exchange_hooks_t *hooks;
    bkv_exchange_shape_t shape;
    grpc_call *grpc;

    // The owner's to set before the start: what the call begins with, kept until it is gone; and its flags.
    grpc_metadata *metadata;
    size_t metadata_count;
    uint32_t metadata_flags;

    // The owner's to read in its hooks.
    uint64_t sent_bytes;        // given to gRPC
    bool answered;              // a response has come
    bool given_up;              // by a hook
    bool empty;                 // there was nothing to send: over at once, with OK
    grpc_byte_buffer *received; // the latest response; of a download only within `take`
    grpc_metadata_array initial, trailing;
    grpc_status_code code;
    grpc_slice details;

    // Its own.
    bkv_batch_tag_t send_tag, status_tag, receive_tag;
    bool sending, over;         // sending: a batch that sends is not back
    uint32_t waiting;           // batches that receive and are not back
    grpc_byte_buffer *message;  // being sent
    grpc_byte_buffer *prepared; // to be sent after it
    bool is_prepared, last;     // last: nothing follows what was prepared, or, where nothing is, what was sent
};

// Of a zeroed exchange. grpc: the exchange's from here on.
void bkv_exchange_init(bkv_exchange_t *exchange, const bkv_exchange_hooks_t *hooks, bkv_exchange_shape_t shape,
                       grpc_call *grpc);

// Makes the first message. False: no memory for it, and the exchange is to be deinitialised.
bool bkv_exchange_prepare(bkv_exchange_t *exchange);

// Begins a prepared exchange; it may be gone on return. One whose grpc was cancelled before ends at once.
void bkv_exchange_start(bkv_exchange_t *exchange);

void bkv_exchange_deinit(bkv_exchange_t *exchange);

// Of one that is over: whether the daemon has named its request, as it does wherever it fails one.
bool bkv_exchange_named(const bkv_exchange_t *exchange);

#endif
