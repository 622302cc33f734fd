// fake_gpu_state.h - what the two files of the fake GPU share.
#ifndef BKV_TEST_FAKE_GPU_STATE_H
#define BKV_TEST_FAKE_GPU_STATE_H

#include "fake_gpu.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAGIC         0x46414b45u
#define BROKEN        719 // as cudaErrorLaunchFailure
#define INVALID       1
#define ALREADY       712
#define MAPPINGS_MOST 512
#define HOSTS_MOST    32

// What is mapped as memory of the device.
typedef struct mapping {
    uint8_t *base;
    size_t bytes;
    int fd;
    enum { OWN, WORKERS, CHUNK, IMPORT, SPAN } kind;
} mapping_t;

typedef struct fake_gpu {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t count, generation;
    bool broken, dead, held;
    mapping_t mappings[MAPPINGS_MOST];
    struct {
        void *memory;
        size_t bytes;
    } pins[64];
    void *hosts[HOSTS_MOST];
    fake_gpu_counts_t counts;
} fake_gpu_t;
extern fake_gpu_t gpu;

// A handle, as 64 bytes.
typedef struct handle {
    uint32_t magic;
    int fd;
    size_t bytes;
    void *event;
} handle_t;

#define MUST(good)                                                                                                             \
    do {                                                                                                                       \
        if (!(good)) {                                                                                                         \
            fprintf(stderr, "fake_gpu.c:%d: %s\n", __LINE__, #good);                                                           \
            abort();                                                                                                           \
        }                                                                                                                      \
    } while (0)

// Under the lock: BROKEN, or 0. leave passes its argument on.
int fake_enter(void);
int fake_leave(int error);

// The mapping with that address, or that begins there; spans are none. Under the lock.
mapping_t *fake_mapping_find(const void *address, bool exactly);

#endif
