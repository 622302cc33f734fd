// pulse.h - how one other member answers: how long it takes, what is slow for it, and whether it is silent. Arithmetic alone: the
// clock is the caller's, and so is what follows from it. Thread-safe.
//
// Times go into a histogram with four classes an octave, whose counts are halved now and then, so that it follows a peer that
// becomes slower or faster. It begins with a few answers of 16 ms: one that has hardly been asked yet is not slow at once.
//
// Silence is the time during which a peer was asked and nothing was heard from it, whichever questions these were: many that
// were given up after a while count as one that waited long. It begins anew with each word that comes.
#ifndef BKV_PULSE_H
#define BKV_PULSE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define BKV_PULSE_CLASSES 64 // from 128 us, by quarters of an octave, to 8 s

typedef struct bkv_pulse {
    pthread_mutex_t lock;
    uint32_t timeout_ms;
    uint64_t latency_us; // smoothed, of small questions; 0: none yet
    uint32_t counts[BKV_PULSE_CLASSES], total;
    uint64_t heard_ms;    // the last word
    uint64_t silence_ms;  // asked since then, and nothing heard
    uint64_t silence_end; // up to which time that is counted
    bool suspected;
    uint64_t probe_ms, pause_ms; // when to ask it again, and how long to wait after that
} bkv_pulse_t;

void bkv_pulse_init(bkv_pulse_t *pulse, uint32_t timeout_ms);
void bkv_pulse_deinit(bkv_pulse_t *pulse);

// A question was answered after so long. small: one whose time is the way there and back, and little else.
void bkv_pulse_answered(bkv_pulse_t *pulse, uint64_t took_us, bool small);

// A word has come. True: it was suspected, and is not any more.
bool bkv_pulse_heard(bkv_pulse_t *pulse, uint64_t now_ms);

// It was asked, and from since_ms on there was nothing. True: it is suspected from now on, and was not.
bool bkv_pulse_silent(bkv_pulse_t *pulse, uint64_t since_ms, uint64_t now_ms);

// Nobody listens where it should be. True: it is suspected from now on, and was not.
bool bkv_pulse_unreachable(bkv_pulse_t *pulse, uint64_t now_ms);

bool bkv_pulse_suspected(bkv_pulse_t *pulse);

// Whether a suspected peer is to be asked again now; the next time is then later.
bool bkv_pulse_probe(bkv_pulse_t *pulse, uint64_t now_ms);

// latency_us 0: no small question has been answered yet. patience_us: about the 95th percentile, from 1 ms to the timeout.
void bkv_pulse_read(bkv_pulse_t *pulse, bool *suspected, uint64_t *latency_us, uint64_t *patience_us);

#endif
