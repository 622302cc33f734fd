// share.h - the fake daemon's part of shared memory: windows for those who Attach, handed out by an fd socket of its own.
#ifndef BKV_TEST_CLIENT_SHARE_H
#define BKV_TEST_CLIENT_SHARE_H

#include "fake.h"

#include <pthread.h>

#define SHARE_WINDOWS 16

// What the fd socket says that is not so.
typedef enum share_lie {
    SHARE_HONEST,
    SHARE_NO_DESCRIPTOR,
    SHARE_NOT_SEALED,
    SHARE_TOO_SMALL, // the memfd
    SHARE_OTHER_SIZE,
    SHARE_OTHER_SESSION,
    SHARE_OTHER_OP,
    SHARE_SHORT,
    SHARE_HANGS_UP,
    SHARE_SILENT,
    SHARE_REFUSES,
    SHARE_LIES
} share_lie_t;

typedef struct share {
    char path[96];     // of the fd socket
    uint64_t most;     // bytes of a window at most
    atomic_uint epoch; // of the answers
    atomic_int lie;    // share_lie_t
    atomic_uint attaches, takes, detaches;
    pthread_mutex_t lock;
    struct {
        int fd;
        uint8_t *memory;
        uint64_t bytes;
    } windows[SHARE_WINDOWS]; // by number; the first byte of the session is that number + 1
    int listener, stop[2];    // a pipe
    pthread_t thread;
} share_t;

void share_start(share_t *share, const fake_place_t *place, uint64_t most);
void share_stop(share_t *share); // what clients have mapped stays theirs

// Answers Attach and Detach.
void share_attach(fake_call_t *call, share_t *share);
void share_detach(fake_call_t *call, share_t *share);

uint8_t *share_memory(share_t *share, size_t number); // of that window, the daemon's mapping

// The memory of a place; NULL: there is no such session, or it is not within.
uint8_t *share_at(share_t *share, const Balancekv__V1__Place *place, uint64_t bytes);

#endif
