// fake_gpu.h - a GPU made of host memory and threads, for tests of what is around a GPU: it takes the place of gpu.h and
// share.h in this room's program. Streams run what is enqueued in order, later and on threads of their own; what is shared is
// mapped at another address, and gone when it is unmapped; what a reset has ended must not be used again. Kernels are the
// reference backend's. tests/gpu tests the real one.
//
// There is none until fake_gpu_plug. Misuse of it aborts.
#ifndef BKV_TEST_FAKE_GPU_H
#define BKV_TEST_FAKE_GPU_H

#include "kernels/cuda/share.h"

#define FAKE_GRANULARITY ((size_t)65536)

void fake_gpu_plug(uint32_t count);

// A worker's memory: by handle, or as chunks of FAKE_GRANULARITY bytes behind one another that bkv_gpu_export_chunk shares.
uint8_t *fake_gpu_alloc(size_t bytes, bool chunks);

// A worker's event, which has not come; its handle; and its coming.
void *fake_gpu_event(uint8_t handle[BKV_GPU_HANDLE_BYTES]);
void fake_gpu_event_come(void *event);

// A fault: everything fails until the device is reset. dead: and afterwards.
void fake_gpu_break(bool dead);

// Holds up what streams do, and lets it go on.
void fake_gpu_hold(bool hold);

// What there is now, of everything that can be taken and must be given back.
typedef struct fake_gpu_counts {
    uint32_t imports, spans, chunks, events, streams, memory, host, pins;
    uint32_t gathers, compressions, attends; // so far
    size_t memory_bytes;
} fake_gpu_counts_t;
fake_gpu_counts_t fake_gpu_counts(void);

#endif
