// carry.h - takes a group of records to their targets: asks each target which of them it lacks, and sends it those.
//
// All targets at the same time, each of them one call after the other: first one question for all its names, then records, a few
// MiB in a call. Which records, where to, and what to do about a failure is the caller's: mover.c's, from the plans of repair.h.
#ifndef BKV_CARRY_H
#define BKV_CARRY_H

#include "daemon/cluster/move/repair.h"
#include "daemon/cluster/peer/peers.h"

// What to do next.
typedef enum bkv_carry_pace {
    BKV_CARRY_ON,
    BKV_CARRY_HALT,  // begin nothing more, and return when what is under way has ended
    BKV_CARRY_LEAVE, // return at once
} bkv_carry_pace_t;

typedef struct bkv_carry_config {
    bkv_peers_t *peers;
    const bkv_view_t *view; // whose members the targets are
    // Asked before so many bytes are sent, which it may delay; and again and again with 0 while answers are waited for.
    bkv_carry_pace_t (*pace)(void *user, uint64_t bytes);
    void *user;
} bkv_carry_config_t;

// What became of one record.
typedef enum bkv_carried {
    BKV_CARRIED,         // every target has it, or it is not in this store any more
    BKV_CARRIED_REFUSED, // a target answers that it does not take it; all others have it
    BKV_CARRIED_SHORT,   // a target could not be reached, or was not got to
} bkv_carried_t;

typedef struct bkv_carry_result {
    uint64_t sent, sent_bytes; // records that targets have taken
    uint64_t failed;           // transfers, and questions, that went wrong
    bkv_error_t error;         // of one of them
} bkv_carry_result_t;

// Blocks. outcomes: [count]. Every send has at least one target.
void bkv_carry(const bkv_carry_config_t *config, const bkv_repair_send_t *sends, size_t count, bkv_carried_t *outcomes,
               bkv_carry_result_t *result);

#endif
