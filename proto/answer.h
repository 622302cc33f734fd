// answer.h - what the other end says of a failure: a code, words, and by which name it knows the request. For whoever asks.
#ifndef BKV_ANSWER_H
#define BKV_ANSWER_H

#include "kernels/status.h"

#include <stdint.h>

// The trailing metadata that a daemon sends along with every failure: it was the daemon, and not gRPC at the asking end.
#define BKV_ANSWER_REQUEST_ID "bkv-request-id"

// The status that has this gRPC code; INTERNAL for codes that are none of ours.
bkv_status_t bkv_answer_status(uint32_t code);

// Copies text from outside to out, as much as there is room for, without what a terminal might act on.
void bkv_answer_text(const void *text, size_t length, char *out, size_t room);

#endif
