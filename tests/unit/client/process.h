// process.h - a daemon in a process of its own, to be stopped, killed and started again under a running client. It must be
// forked before the test touches gRPC, which does not survive a fork.
#ifndef BKV_TEST_CLIENT_PROCESS_H
#define BKV_TEST_CLIENT_PROCESS_H

#include "fake.h"

typedef struct process {
    pid_t pid;
    int go, ready; // pipes: to it, from it
} process_t;

// What the process does once started: must leave a server running at `place`, as the daemon of boot `epoch`.
typedef void (*process_main_t)(const fake_place_t *place, uint64_t epoch);

void process_fork(process_t *process, const fake_place_t *place, uint64_t epoch, process_main_t start);
void process_start(process_t *process); // returns when it serves
void process_stop(process_t *process);  // SIGSTOP; returns when it has stopped
void process_kill(process_t *process);  // SIGKILL; returns when it is gone. Again: nothing

#endif
