// memory.c - a session's allocations, mapped here: those with a handle each at an address of its own, runs of those
// with descriptors behind one another.
//
// CUDA maps an allocation that came by handle once in a process, so sessions that name the same one share the mapping and count
// its users. Chunks are mapped anew for each session.
//
// When the client dies, its memory stays as long as we have it mapped: for chunks CUDA promises that, for allocations by handle
// the driver does so by counting. What is read of it then is what was last written, and harms nobody: a transfer of a client
// that is gone has nobody to answer to.
#include "daemon/transport/cuda_ipc/cuda_ipc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// An allocation opened by handle.
typedef struct bkv_ipc_opened {
    struct bkv_ipc_opened *next;
    uint8_t handle[BKV_GPU_HANDLE_BYTES];
    void *base;
    uint64_t bytes;
    uint32_t users, generation;
} bkv_ipc_opened_t;

typedef struct allocation {
    uint64_t bytes, offset;   // in the session's memory
    bkv_ipc_opened_t *opened; // NULL: a chunk
    _Atomic bool mapped;      // chunks come while others ask whether they are there
} allocation_t;

// No GPU has as much; and no sum of two offsets overflows.
#define SESSION_MOST ((uint64_t)1 << 44)

struct bkv_ipc_memory {
    bkv_ipc_device_t *device;
    uint64_t bytes;
    _Atomic uint32_t missing; // descriptors that have not come
    uint32_t count, span_count;
    bkv_ipc_span_t *spans; // [count] at most
    allocation_t list[];   // [count]
};

// ---- by handle ----

// Says what is wrong with a handle: most likely the client's memory is gone, or it is none at all.
static void refuse_handle(bkv_ipc_device_t *device, uint32_t index, int error, bkv_error_t *err) {
    bkv_error_t cause;
    if (bkv_ipc_device_fail(device, error, "cuda_ipc.allocations", &cause) == BKV_INTERNAL) {
        bkv_fail(&cause, BKV_INVALID_ARGUMENT, "cuda_ipc.allocations[%u].handle: %s", index, bkv_gpu_error(error));
    }
    bkv_fail(err, cause.status, "%s", cause.message);
}

// Under device->mapping. NULL: refused, as err says.
static bkv_ipc_opened_t *opened_make(bkv_ipc_device_t *device, const uint8_t *handle, uint32_t index, bkv_error_t *err) {
    bkv_ipc_opened_t *opened = calloc(1, sizeof(*opened));
    if (opened == NULL) {
        bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a session");
        return NULL;
    }
    size_t bytes = 0;
    int error = bkv_gpu_import(handle, &opened->base, &bytes);
    if (error != 0) {
        free(opened);
        refuse_handle(device, index, error, err);
        return NULL;
    }
    memcpy(opened->handle, handle, sizeof(opened->handle));
    opened->bytes = bytes;
    opened->generation = atomic_load(&device->generation);
    opened->next = device->opened;
    device->opened = opened;
    return opened;
}

// Opens the allocation, or finds it open. NULL: refused, as err says.
static bkv_ipc_opened_t *opened_get(bkv_ipc_device_t *device, const uint8_t *handle, uint32_t index, bkv_error_t *err) {
    pthread_mutex_lock(&device->mapping);
    bkv_ipc_opened_t *opened = device->opened;
    while (opened != NULL && (memcmp(opened->handle, handle, sizeof(opened->handle)) != 0 ||
                              opened->generation != atomic_load(&device->generation))) {
        opened = opened->next;
    }
    opened = opened == NULL ? opened_make(device, handle, index, err) : opened;
    if (opened != NULL) {
        opened->users++;
    }
    pthread_mutex_unlock(&device->mapping);
    return opened;
}

static void opened_put(bkv_ipc_device_t *device, bkv_ipc_opened_t *opened, bool there) {
    pthread_mutex_lock(&device->mapping);
    if (--opened->users == 0) {
        bkv_ipc_opened_t **link = &device->opened;
        while (*link != opened) {
            link = &(*link)->next;
        }
        *link = opened->next;
        if (there) {
            (void)bkv_gpu_import_close(opened->base);
        }
        free(opened);
    }
    pthread_mutex_unlock(&device->mapping);
}

static bkv_status_t map_handle(bkv_ipc_memory_t *memory, uint32_t index, const uint8_t *handle, bkv_error_t *err) {
    allocation_t *allocation = &memory->list[index];
    bkv_error_t cause;
    const bkv_ipc_opened_t *opened = allocation->opened = opened_get(memory->device, handle, index, &cause);
    if (opened == NULL) {
        return bkv_fail(err, cause.status, "%s", cause.message);
    }
    allocation->mapped = true;
    if (allocation->bytes > opened->bytes) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "cuda_ipc.allocations[%u].bytes: %llu, the allocation has %llu", index,
                        (unsigned long long)allocation->bytes, (unsigned long long)opened->bytes);
    }
    memory->spans[memory->span_count++] =
        (bkv_ipc_span_t){.first = allocation->offset, .bytes = allocation->bytes, .base = opened->base};
    return BKV_OK;
}

// ---- by descriptor ----

// Addresses for the chunks [first, end).
static bkv_status_t reserve_run(bkv_ipc_memory_t *memory, uint32_t first, uint32_t end, bkv_error_t *err) {
    size_t unit = 1;
    int error = bkv_gpu_granularity(memory->device->ordinal, &unit);
    if (error != 0) {
        return bkv_ipc_device_fail(memory->device, error, "cuda_ipc: memory by descriptor", err);
    }
    uint64_t bytes = 0;
    for (uint32_t i = first; i < end; i++) {
        if (memory->list[i].bytes % unit != 0) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "cuda_ipc.allocations[%u].bytes: %llu is not a multiple of %zu", i,
                            (unsigned long long)memory->list[i].bytes, unit);
        }
        bytes += memory->list[i].bytes; // the sum of all has been checked
    }
    void *base = NULL;
    error = bkv_gpu_span_reserve(bytes, &base);
    if (error != 0) {
        return bkv_ipc_device_fail(memory->device, error, "cuda_ipc.allocations: no addresses for them", err);
    }
    memory->missing += end - first;
    memory->spans[memory->span_count++] = (bkv_ipc_span_t){.first = memory->list[first].offset, .bytes = bytes, .base = base};
    return BKV_OK;
}

// Where a chunk is or is to be mapped.
static uint8_t *chunk_address(const bkv_ipc_memory_t *memory, const allocation_t *allocation) {
    bkv_ipc_spans_t spans = bkv_ipc_memory_spans(memory);
    return bkv_ipc_span_address(&spans, allocation->offset, allocation->bytes);
}

static bkv_status_t map_chunk(bkv_ipc_memory_t *memory, uint32_t index, int fd, bkv_error_t *err) {
    if (index >= memory->count || memory->list[index].opened != NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "index: allocation %u does not come by descriptor", index);
    }
    allocation_t *allocation = &memory->list[index];
    if (allocation->mapped) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "index: allocation %u has come already", index);
    }
    int error = bkv_gpu_span_map(chunk_address(memory, allocation), allocation->bytes, fd, memory->device->ordinal);
    if (error != 0) {
        bkv_status_t status = bkv_ipc_device_fail(memory->device, error, "descriptor", err);
        return status == BKV_INTERNAL
                   ? bkv_fail(err, BKV_INVALID_ARGUMENT, "index: allocation %u: %s", index, bkv_gpu_error(error))
                   : status;
    }
    allocation->mapped = true;
    memory->missing--;
    return BKV_OK;
}

bkv_status_t bkv_ipc_memory_give(bkv_ipc_memory_t *memory, uint32_t index, int fd, bkv_error_t *err) {
    bkv_status_t status = map_chunk(memory, index, fd, err);
    close(fd);
    return status;
}

// ---- the whole ----

// Sizes and offsets.
static bkv_status_t lay_out(bkv_ipc_memory_t *memory, const bkv_device_allocation_t *allocations, bkv_error_t *err) {
    for (uint32_t i = 0; i < memory->count; i++) {
        allocation_t *allocation = &memory->list[i];
        *allocation = (allocation_t){.bytes = allocations[i].bytes, .offset = memory->bytes};
        if (allocation->bytes == 0) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "cuda_ipc.allocations[%u].bytes: 0", i);
        }
        if (allocation->bytes > SESSION_MOST - memory->bytes) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "cuda_ipc.allocations[%u].bytes: %llu are more than any GPU has", i,
                            (unsigned long long)allocation->bytes);
        }
        memory->bytes += allocation->bytes;
    }
    return BKV_OK;
}

static bkv_status_t map_all(bkv_ipc_memory_t *memory, const bkv_device_allocation_t *allocations, bkv_error_t *err) {
    bkv_status_t status = lay_out(memory, allocations, err);
    for (uint32_t i = 0; status == BKV_OK && i < memory->count;) {
        if (allocations[i].handle != NULL) {
            status = map_handle(memory, i, allocations[i].handle, err);
            i++;
            continue;
        }
        uint32_t first = i;
        while (i < memory->count && allocations[i].handle == NULL) {
            i++;
        }
        status = reserve_run(memory, first, i, err);
    }
    return status;
}

bkv_status_t bkv_ipc_memory_open(bkv_ipc_device_t *device, const bkv_device_allocation_t *allocations, uint32_t count,
                                 bkv_ipc_memory_t **memory_out, bkv_error_t *err) {
    if (count == 0 || count > BKV_DEVICE_ALLOCATIONS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "cuda_ipc.allocations: %u, not between 1 and %d", count,
                        BKV_DEVICE_ALLOCATIONS);
    }
    bkv_ipc_memory_t *memory = calloc(1, sizeof(*memory) + count * sizeof(memory->list[0]));
    bkv_ipc_span_t *spans = calloc(count, sizeof(*spans));
    if (memory == NULL || spans == NULL) {
        free(memory);
        free(spans);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a session");
    }
    memory->device = device;
    memory->count = count;
    memory->spans = spans;
    bkv_status_t status = map_all(memory, allocations, err);
    if (status != BKV_OK) {
        bkv_ipc_memory_close(memory, true);
        return status;
    }
    *memory_out = memory;
    return BKV_OK;
}

// A run of chunks, of which list[first] is the first: those that are mapped, then their addresses.
static void free_run(bkv_ipc_memory_t *memory, uint32_t first, const bkv_ipc_span_t *span) {
    for (uint32_t i = first; i < memory->count && memory->list[i].offset - span->first < span->bytes; i++) {
        if (memory->list[i].mapped) {
            bkv_gpu_span_unmap(span->base + (memory->list[i].offset - span->first), memory->list[i].bytes);
        }
    }
    bkv_gpu_span_free(span->base, span->bytes);
}

void bkv_ipc_memory_close(bkv_ipc_memory_t *memory, bool there) {
    bkv_ipc_spans_t spans = bkv_ipc_memory_spans(memory);
    for (uint32_t i = 0; i < memory->count; i++) {
        const bkv_ipc_span_t *span = bkv_ipc_span_find(&spans, memory->list[i].offset);
        if (memory->list[i].opened != NULL) {
            opened_put(memory->device, memory->list[i].opened, there);
        } else if (there && span != NULL && span->first == memory->list[i].offset) {
            free_run(memory, i, span);
        }
    }
    free(memory->spans);
    free(memory);
}

uint64_t bkv_ipc_memory_bytes(const bkv_ipc_memory_t *memory) {
    return memory->bytes;
}

bool bkv_ipc_memory_complete(const bkv_ipc_memory_t *memory, uint32_t *index) {
    if (memory->missing == 0) {
        return true;
    }
    *index = 0;
    while (*index < memory->count - 1 && memory->list[*index].mapped) {
        ++*index;
    }
    return false;
}

bkv_ipc_spans_t bkv_ipc_memory_spans(const bkv_ipc_memory_t *memory) {
    return (bkv_ipc_spans_t){.list = memory->spans, .count = memory->span_count};
}
