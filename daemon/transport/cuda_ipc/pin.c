// pin.c - the arena and the staging memory as a GPU sees them: pinned, where the system lets us, so that it reads and
// writes them by itself while our threads do something else. Where it does not, the driver copies through buffers of its own:
// slower, and nothing else.
//
// Pinning touches every page, so it is done piece by piece beside the transfers. A copy never crosses from one piece to the
// next in one call, as CUDA would take its two ends for different memory.
#include "daemon/transport/cuda_ipc/cuda_ipc.h"

#include "daemon/observe/log.h"

#define PIECE ((uint64_t)64 << 20) // takes some milliseconds, for which the gate keeps events waiting

// What CUDA says of memory that another device has pinned already; pinned is pinned.
#define ALREADY_PINNED 712

void bkv_ipc_pins_init(bkv_ipc_pins_t *pins, const bkv_transports_config_t *config) {
    *pins = (bkv_ipc_pins_t){0};
    pthread_mutex_init(&pins->lock, NULL);
    void *arena, *staging;
    bkv_store_memory(config->store, &arena, &pins->regions[0].bytes);
    bkv_pipeline_staging(config->pipeline, &staging, &pins->regions[1].bytes);
    pins->regions[0].memory = arena;
    pins->regions[1].memory = staging;
}

static uint64_t piece_bytes(const bkv_ipc_region_t *region, uint64_t at) {
    return region->bytes - at < PIECE ? region->bytes - at : PIECE;
}

void bkv_ipc_pins_deinit(bkv_ipc_pins_t *pins) {
    for (size_t i = 0; i < BKV_IPC_REGIONS; i++) {
        for (uint64_t at = 0; at < pins->regions[i].pinned; at += PIECE) {
            bkv_gpu_unpin(pins->regions[i].memory + at);
        }
    }
    pthread_mutex_destroy(&pins->lock);
}

void bkv_ipc_pins_forget(bkv_ipc_pins_t *pins) {
    pthread_mutex_lock(&pins->lock);
    for (size_t i = 0; i < BKV_IPC_REGIONS; i++) {
        pins->regions[i].pinned = 0;
        pins->regions[i].refused = false;
    }
    pthread_mutex_unlock(&pins->lock);
}

// The region with something left to pin. Under the lock.
static bkv_ipc_region_t *unfinished(bkv_ipc_pins_t *pins) {
    for (size_t i = 0; i < BKV_IPC_REGIONS; i++) {
        if (!pins->regions[i].refused && pins->regions[i].pinned < pins->regions[i].bytes) {
            return &pins->regions[i];
        }
    }
    return NULL;
}

bool bkv_ipc_pins_complete(bkv_ipc_pins_t *pins) {
    pthread_mutex_lock(&pins->lock);
    bool complete = unfinished(pins) == NULL;
    pthread_mutex_unlock(&pins->lock);
    return complete;
}

bool bkv_ipc_pins_advance(bkv_ipc_pins_t *pins) {
    pthread_mutex_lock(&pins->lock);
    bkv_ipc_region_t *region = unfinished(pins);
    if (region != NULL) {
        uint64_t bytes = piece_bytes(region, region->pinned);
        int error = bkv_gpu_pin(region->memory + region->pinned, bytes);
        if (error == 0 || error == ALREADY_PINNED) {
            region->pinned += bytes;
        } else {
            region->refused = true;
            bkv_log(BKV_LOG_WARN, 0, "cuda-ipc: %llu of %llu bytes cannot be pinned (%s); copies to and from them are slower",
                    (unsigned long long)(region->bytes - region->pinned), (unsigned long long)region->bytes,
                    bkv_gpu_error(error));
        }
    }
    bool more = unfinished(pins) != NULL;
    pthread_mutex_unlock(&pins->lock);
    return more;
}

// Bytes from `at` on that a single call may copy.
static uint64_t copy_reach(const bkv_ipc_pins_t *pins, const uint8_t *at, uint64_t bytes) {
    for (size_t i = 0; i < BKV_IPC_REGIONS; i++) {
        const bkv_ipc_region_t *region = &pins->regions[i];
        if (at >= region->memory && (uint64_t)(at - region->memory) < region->bytes) {
            uint64_t left = PIECE - (uint64_t)(at - region->memory) % PIECE;
            return left < bytes ? left : bytes;
        }
    }
    return bytes;
}

int bkv_ipc_copy(const bkv_ipc_pins_t *pins, void *to, const void *from, uint64_t bytes, void *stream) {
    int error = 0;
    for (uint64_t at = 0; error == 0 && at < bytes;) {
        uint64_t left = bytes - at, reach = copy_reach(pins, (const uint8_t *)from + at, left);
        reach = copy_reach(pins, (uint8_t *)to + at, reach);
        error = bkv_gpu_copy((uint8_t *)to + at, (const uint8_t *)from + at, reach, stream);
        at += reach;
    }
    return error;
}
