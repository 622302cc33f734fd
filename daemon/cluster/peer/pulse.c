// pulse.c - the arithmetic of pulse.h.
#include "daemon/cluster/peer/pulse.h"

#include <string.h>

// What a peer is taken for before it has answered.
#define PRIOR_US    16384
#define PRIOR_COUNT 4

#define FOLLOWED 256 // answers after which all counts are halved
#define PATIENCE 95  // percent

#define LATENCY_SHARE 8 // of a new answer: 1 / 8

// A suspected peer is asked again soon, then ever more rarely.
#define PROBE_FIRST_MS   100
#define PROBE_LONGEST_MS 2000

// ---- classes ----

// 0: below 128 us. From there on four to an octave.
static uint32_t class_of(uint64_t us) {
    if (us < 128) {
        return 0;
    }
    uint32_t octave = 63 - (uint32_t)__builtin_clzll(us);
    uint32_t class = 1 + 4 * (octave - 7) + (uint32_t)(us >> (octave - 2) & 3);
    return class < BKV_PULSE_CLASSES ? class : BKV_PULSE_CLASSES - 1;
}

// Where a class ends.
static uint64_t class_end(uint32_t class) {
    if (class == 0) {
        return 128;
    }
    uint32_t octave = 7 + (class - 1) / 4, quarter = (class - 1) % 4;
    return (uint64_t)(5 + quarter) << (octave - 2);
}

void bkv_pulse_init(bkv_pulse_t *pulse, uint32_t timeout_ms) {
    *pulse = (bkv_pulse_t){.timeout_ms = timeout_ms, .total = PRIOR_COUNT};
    pulse->counts[class_of(PRIOR_US)] = PRIOR_COUNT;
    pthread_mutex_init(&pulse->lock, NULL);
}

void bkv_pulse_deinit(bkv_pulse_t *pulse) {
    pthread_mutex_destroy(&pulse->lock);
}

// ---- how long ----

static void follow(bkv_pulse_t *pulse) {
    pulse->total = 0;
    for (uint32_t i = 0; i < BKV_PULSE_CLASSES; i++) {
        pulse->counts[i] /= 2;
        pulse->total += pulse->counts[i];
    }
}

void bkv_pulse_answered(bkv_pulse_t *pulse, uint64_t took_us, bool small) {
    pthread_mutex_lock(&pulse->lock);
    pulse->counts[class_of(took_us)]++;
    if (++pulse->total >= FOLLOWED) {
        follow(pulse);
    }
    if (small && pulse->latency_us == 0) {
        pulse->latency_us = took_us > 0 ? took_us : 1;
    } else if (small) {
        uint64_t smoothed = (pulse->latency_us * (LATENCY_SHARE - 1) + took_us) / LATENCY_SHARE;
        pulse->latency_us = smoothed > 0 ? smoothed : 1;
    }
    pthread_mutex_unlock(&pulse->lock);
}

static uint64_t patience_of(const bkv_pulse_t *pulse) {
    const uint64_t least = 1000, most = (uint64_t)pulse->timeout_ms * 1000;
    uint32_t seen = 0, class = 0;
    for (; class < BKV_PULSE_CLASSES - 1; class ++) {
        seen += pulse->counts[class];
        if ((uint64_t)seen * 100 >= (uint64_t)pulse->total * PATIENCE) {
            break;
        }
    }
    uint64_t patience = class_end(class);
    patience = patience < least ? least : patience;
    return patience < most ? patience : most;
}

void bkv_pulse_read(bkv_pulse_t *pulse, bool *suspected, uint64_t *latency_us, uint64_t *patience_us) {
    pthread_mutex_lock(&pulse->lock);
    *suspected = pulse->suspected;
    *latency_us = pulse->latency_us;
    *patience_us = patience_of(pulse);
    pthread_mutex_unlock(&pulse->lock);
}

// ---- silence ----

bool bkv_pulse_heard(bkv_pulse_t *pulse, uint64_t now_ms) {
    pthread_mutex_lock(&pulse->lock);
    bool was = pulse->suspected;
    pulse->suspected = false;
    pulse->heard_ms = now_ms > pulse->heard_ms ? now_ms : pulse->heard_ms;
    pulse->silence_ms = 0;
    pthread_mutex_unlock(&pulse->lock);
    return was;
}

// The lock is held. True: it was not suspected yet.
static bool suspect(bkv_pulse_t *pulse, uint64_t now_ms) {
    bool news = !pulse->suspected;
    if (news) {
        pulse->suspected = true;
        pulse->pause_ms = PROBE_FIRST_MS;
        pulse->probe_ms = now_ms + pulse->pause_ms;
    }
    return news;
}

static uint64_t later(uint64_t a, uint64_t b) {
    return a > b ? a : b;
}

bool bkv_pulse_silent(bkv_pulse_t *pulse, uint64_t since_ms, uint64_t now_ms) {
    bool news = false;
    pthread_mutex_lock(&pulse->lock);
    uint64_t from = later(since_ms, later(pulse->heard_ms, pulse->silence_end)); // no time counts twice
    if (now_ms > from) {
        pulse->silence_ms += now_ms - from;
        pulse->silence_end = now_ms;
    }
    if (pulse->silence_ms >= pulse->timeout_ms) {
        news = suspect(pulse, now_ms);
    }
    pthread_mutex_unlock(&pulse->lock);
    return news;
}

bool bkv_pulse_unreachable(bkv_pulse_t *pulse, uint64_t now_ms) {
    pthread_mutex_lock(&pulse->lock);
    bool news = suspect(pulse, now_ms);
    pthread_mutex_unlock(&pulse->lock);
    return news;
}

bool bkv_pulse_suspected(bkv_pulse_t *pulse) {
    pthread_mutex_lock(&pulse->lock);
    bool suspected = pulse->suspected;
    pthread_mutex_unlock(&pulse->lock);
    return suspected;
}

bool bkv_pulse_probe(bkv_pulse_t *pulse, uint64_t now_ms) {
    pthread_mutex_lock(&pulse->lock);
    bool due = pulse->suspected && now_ms >= pulse->probe_ms;
    if (due) {
        pulse->pause_ms = pulse->pause_ms < PROBE_LONGEST_MS / 2 ? pulse->pause_ms * 2 : PROBE_LONGEST_MS;
        pulse->probe_ms = now_ms + pulse->pause_ms;
    }
    pthread_mutex_unlock(&pulse->lock);
    return due;
}
