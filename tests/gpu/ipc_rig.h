// ipc_rig.h - a real daemon, and a worker of another process with memory on the GPU: what the test and the bench of CUDA IPC
// share.
#ifndef BKV_TESTS_GPU_IPC_RIG_H
#define BKV_TESTS_GPU_IPC_RIG_H

#include "client/bkv_device.h"
#include "kernels/cuda/bkv_cuda.h"
#include "kernels/cuda/share.h"
#include "support.h"

#include <sys/types.h>

typedef struct ipc_daemon {
    pid_t pid;
    char folder[32], socket[64], endpoint[80];
    const char *program, *arena, *gpu_cache; // the last: NULL for none
} ipc_daemon_t;

// Where balancekvd is: beside this program's folder, in bin/. The string is static.
const char *ipc_daemon_program(void);

// Starts a daemon with an arena of that size, and waits until it serves. Before CUDA is first used: it forks.
void ipc_daemon_start(ipc_daemon_t *daemon, const char *program, const char *arena);
// The same with GPU memory for records that Attend reads there.
void ipc_daemon_start_cache(ipc_daemon_t *daemon, const char *program, const char *arena, const char *gpu_cache);
void ipc_daemon_restart(ipc_daemon_t *daemon); // kills it and starts another in its place
void ipc_daemon_stop(ipc_daemon_t *daemon);    // and says how it ended: REQUIREs an exit of its own

// A client of it, no retries beyond timeout_ms.
bkv_client_t *ipc_client(const ipc_daemon_t *daemon, uint32_t timeout_ms);
double ipc_metric(bkv_client_t *client, const char *name); // -1: there is none

// Waits up to 10 s for a metric to have that value.
bool ipc_metric_becomes(bkv_client_t *client, const char *name, double value);

// Memory as a worker has it, to be shared; freed with the process.
uint8_t *ipc_memory(size_t bytes);
uint8_t *ipc_chunks(size_t chunk, uint32_t count); // behind one another

// Copies on a stream that keep it busy for about so long.
void ipc_keep_busy(void *stream, double seconds);

#endif
