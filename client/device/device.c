// device.c - the GPU memory that a worker shares: which allocations it lies in, its session with the daemon, and the events
// that order calls behind the worker's own work.
#include "client/device/device.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define EXTENTS_MOST 16384 // as many as a session may have
#define OFFSET_UNIT  64    // places are multiples of this
#define END_MS       500   // how long unshare waits for the daemon

// ---- what is shared ----

// The extent with that address, or where it would have to be.
static uint32_t extent_rank(const bkv_device_t *device, const uint8_t *address) {
    uint32_t low = 0, high = device->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const bkv_device_extent_t *extent = &device->extents[middle];
        if (extent->base + extent->whole <= address) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static bool has_extent(const bkv_device_t *device, uint32_t rank, const uint8_t *address) {
    return rank < device->count && address >= device->extents[rank].base;
}

// Finds what lies behind an address and exports it, unless that is there already. *end: one past it.
static bkv_status_t extent_add(bkv_device_t *device, const uint8_t *address, size_t number, const uint8_t **end,
                               bkv_error_t *err) {
    uint32_t rank = extent_rank(device, address);
    if (has_extent(device, rank, address)) {
        *end = device->extents[rank].base + device->extents[rank].whole;
        return BKV_OK;
    }
    bkv_gpu_extent_t found;
    int error = bkv_gpu_extent(address, &found);
    if (error != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "ranges[%zu]: no memory of a GPU: %s", number, bkv_gpu_error(error));
    }
    if (found.device != device->ordinal) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "ranges[%zu]: memory of device %d, not of %d", number, found.device,
                        device->ordinal);
    }
    if (device->count == EXTENTS_MOST) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "ranges[%zu]: more than %d allocations or chunks", number, EXTENTS_MOST);
    }
    bkv_device_extent_t extent = {
        .base = found.base, .whole = found.bytes, .bytes = found.bytes / OFFSET_UNIT * OFFSET_UNIT, .chunk = found.chunk};
    if (extent.bytes == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "ranges[%zu]: an allocation of %zu bytes", number, found.bytes);
    }
    error = extent.chunk ? 0 : bkv_gpu_export(found.base, extent.handle);
    if (error != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "ranges[%zu]: memory that cannot be shared: %s", number,
                        bkv_gpu_error(error));
    }
    memmove(&device->extents[rank + 1], &device->extents[rank], (device->count - rank) * sizeof(extent));
    device->extents[rank] = extent;
    device->count++;
    *end = found.base + found.bytes;
    return BKV_OK;
}

static bkv_status_t range_add(bkv_device_t *device, const bkv_device_range_t *range, size_t number, bkv_error_t *err) {
    if (range->address == NULL || range->bytes == 0 || range->bytes > UINTPTR_MAX - (uintptr_t)range->address) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "ranges[%zu]: empty, or no range of addresses", number);
    }
    const uint8_t *at = range->address, *end = at + range->bytes;
    bkv_status_t status = BKV_OK;
    while (status == BKV_OK && at < end) {
        status = extent_add(device, at, number, &at, err);
    }
    return status;
}

static bkv_status_t ranges_add(bkv_device_t *device, const bkv_device_range_t *ranges, size_t count, bkv_error_t *err) {
    int before, error = bkv_gpu_enter(device->ordinal, &before);
    if (error != 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "device: %d: %s", device->ordinal, bkv_gpu_error(error));
    }
    bkv_status_t status = BKV_OK;
    for (size_t i = 0; status == BKV_OK && i < count; i++) {
        status = range_add(device, &ranges[i], i, err);
    }
    bkv_gpu_leave(before);
    for (uint32_t i = 0; i < device->count; i++) {
        device->extents[i].offset = device->bytes;
        device->bytes += device->extents[i].bytes;
    }
    return status;
}

// Within one allocation, or within chunks that follow one another here: those do in the session's memory, too.
bool bkv_device_offset(const bkv_device_t *device, const void *address, uint64_t bytes, uint64_t *offset) {
    const uint8_t *at = address;
    uint32_t rank = extent_rank(device, at);
    if (!has_extent(device, rank, at)) {
        return false;
    }
    const bkv_device_extent_t *extent = &device->extents[rank];
    uint64_t within = (uint64_t)(at - extent->base);
    *offset = extent->offset + within;
    uint64_t there = within < extent->bytes ? extent->bytes - within : 0;
    while (there < bytes && extent->chunk && rank + 1 < device->count && device->extents[rank + 1].chunk &&
           device->extents[rank + 1].base == extent->base + extent->bytes) {
        extent = &device->extents[++rank];
        there += extent->bytes;
    }
    return there >= bytes;
}

// ---- the session ----

// Gives up a hold. Under the lock; the session to be left without it, or NULL.
static bkv_device_session_t *session_drop(bkv_device_session_t *session) {
    return session != NULL && --session->holders == 0 ? session : NULL;
}

static bkv_device_session_t *session_held(bkv_device_t *device) {
    pthread_mutex_lock(&device->lock);
    bkv_device_session_t *session = device->session;
    if (session != NULL) {
        session->holders++;
    }
    pthread_mutex_unlock(&device->lock);
    return session;
}

// The session there is, or a new one. The caller has a hold on it.
static bkv_status_t session_get(bkv_device_t *device, uint32_t timeout_ms, bkv_device_session_t **session, bkv_error_t *err) {
    *session = session_held(device);
    if (*session != NULL) {
        return BKV_OK;
    }
    pthread_mutex_lock(&device->attaching);
    bkv_status_t status = BKV_OK;
    *session = session_held(device); // another thread may have made one meanwhile
    if (*session == NULL) {
        status = bkv_device_attach(device, timeout_ms, session, err);
        if (status == BKV_OK) {
            pthread_mutex_lock(&device->lock);
            (*session)->holders = 2; // the device and the caller
            device->session = *session;
            pthread_mutex_unlock(&device->lock);
        }
    }
    pthread_mutex_unlock(&device->attaching);
    return status;
}

bool bkv_device_use_lost(const bkv_device_use_t *use, const bkv_error_t *error) {
    static const char field[] = "place.session";
    if (error->status != BKV_FAILED_PRECONDITION || strstr(error->message, field) == NULL) {
        return false;
    }
    bkv_device_t *device = use->device;
    pthread_mutex_lock(&device->lock);
    bkv_device_session_t *over = NULL;
    if (device->session == use->session) {
        over = session_drop(device->session);
        device->session = NULL;
    }
    pthread_mutex_unlock(&device->lock);
    assert(over == NULL); // `use` has a hold
    (void)over;
    return true;
}

// ---- events ----

static bkv_status_t event_make(bkv_device_event_t **event, bkv_error_t *err) {
    bkv_device_event_t *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    int error = bkv_gpu_event_create(true, &made->event);
    if (error != 0) {
        free(made);
        return bkv_fail(err, BKV_UNIMPLEMENTED, "stream: no event that can be shared: %s", bkv_gpu_error(error));
    }
    error = bkv_gpu_event_export(made->event, made->handle);
    if (error != 0) {
        bkv_gpu_event_destroy(made->event);
        free(made);
        return bkv_fail(err, BKV_UNIMPLEMENTED, "stream: an event cannot be shared: %s", bkv_gpu_error(error));
    }
    *event = made;
    return BKV_OK;
}

static void event_put(bkv_device_t *device, bkv_device_event_t *event) {
    pthread_mutex_lock(&device->lock);
    event->next = device->events;
    device->events = event;
    pthread_mutex_unlock(&device->lock);
}

// An event after what has been enqueued on the stream so far. On the device.
static bkv_status_t event_record(bkv_device_t *device, void *stream, bkv_device_event_t **event, bkv_error_t *err) {
    pthread_mutex_lock(&device->lock);
    *event = device->events;
    if (*event != NULL) {
        device->events = (*event)->next;
    }
    pthread_mutex_unlock(&device->lock);
    if (*event == NULL) {
        bkv_status_t status = event_make(event, err);
        if (status != BKV_OK || *event == NULL) {
            return status;
        }
    }
    int error = bkv_gpu_event_record((*event)->event, stream);
    if (error == 0) {
        return BKV_OK;
    }
    event_put(device, *event);
    *event = NULL;
    return bkv_fail(err, BKV_INVALID_ARGUMENT, "stream: no event can be recorded: %s", bkv_gpu_error(error));
}

// ---- uses ----

bkv_status_t bkv_device_use_begin(bkv_device_use_t *use, bkv_device_t *device, void *stream, uint32_t timeout_ms,
                                  bkv_error_t *err) {
    *use = (bkv_device_use_t){.device = device};
    int before, error = bkv_gpu_enter(device->ordinal, &before);
    if (error != 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "device: %d: %s", device->ordinal, bkv_gpu_error(error));
    }
    bkv_status_t status = event_record(device, stream, &use->event, err);
    bkv_gpu_leave(before);
    return status == BKV_OK ? session_get(device, timeout_ms, &use->session, err) : status;
}

void bkv_device_use_end(bkv_device_use_t *use) {
    if (use->event != NULL) {
        event_put(use->device, use->event);
    }
    if (use->session != NULL) {
        pthread_mutex_lock(&use->device->lock);
        bkv_device_session_t *over = session_drop(use->session);
        pthread_mutex_unlock(&use->device->lock);
        bkv_device_leave(over);
    }
    *use = (bkv_device_use_t){0};
}

void bkv_device_use_describe(const bkv_device_use_t *use, Balancekv__V1__Place *place) {
    balancekv__v1__place__init(place);
    place->session = (ProtobufCBinaryData){.len = BKV_DEVICE_SESSION, .data = use->session->id};
    place->event = (ProtobufCBinaryData){.len = BKV_GPU_HANDLE_BYTES, .data = use->event->handle};
}

// ---- share and unshare ----

static bkv_status_t device_fill(bkv_device_t *device, const bkv_device_range_t *ranges, size_t count, bkv_error_t *err) {
    device->extents = calloc(EXTENTS_MOST, sizeof device->extents[0]);
    if (device->extents == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    int error = bkv_gpu_uuid(device->ordinal, device->uuid);
    if (error != 0) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "device: %d: %s", device->ordinal, bkv_gpu_error(error));
    }
    return ranges_add(device, ranges, count, err);
}

// The first on this host that works, or else the first: what is shared is with it alone. NULL: none is on this host.
static bkv_client_endpoint_t *local_endpoint(bkv_client_t *client) {
    bkv_client_endpoint_t *first = NULL, *works = NULL;
    pthread_mutex_lock(&client->lock);
    for (uint32_t i = 0; i < client->listed && works == NULL; i++) {
        bkv_client_endpoint_t *endpoint = client->endpoints[i];
        bool local = bkv_client_target_local(&endpoint->target);
        first = first == NULL && local ? endpoint : first;
        works = local && !endpoint->down ? endpoint : NULL;
    }
    pthread_mutex_unlock(&client->lock);
    return works != NULL ? works : first;
}

bkv_status_t bkv_device_share(bkv_client_t *client, uint32_t device, const bkv_device_range_t *ranges, size_t count,
                              uint32_t timeout_ms, bkv_device_t **shared, bkv_error_t *err) {
    assert(client != NULL && (ranges != NULL || count == 0) && shared != NULL);
    if (count == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "ranges: none given");
    }
    bkv_client_endpoint_t *endpoint = local_endpoint(client);
    if (endpoint == NULL) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "cuda-ipc: the daemon is not reached by a unix socket");
    }
    uint32_t devices = bkv_gpu_count();
    if (device >= devices) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "device: %u, there are %u CUDA devices here", device, devices);
    }
    bkv_device_t *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    made->client = client;
    made->endpoint = endpoint;
    made->ordinal = (int)device;
    pthread_mutex_init(&made->attaching, NULL);
    pthread_mutex_init(&made->lock, NULL);
    bkv_device_session_t *session = NULL;
    bkv_status_t status = device_fill(made, ranges, count, err);
    if (status == BKV_OK) {
        status = session_get(made, timeout_ms != 0 ? timeout_ms : client->timeout_ms, &session, err);
    }
    if (status != BKV_OK) {
        bkv_device_unshare(made);
        return status;
    }
    session->holders--; // the device keeps it
    *shared = made;
    return BKV_OK;
}

void bkv_device_unshare(bkv_device_t *shared) {
    if (shared == NULL) {
        return;
    }
    if (shared->session != NULL) {
        assert(shared->session->holders == 1 && "a call is using the device");
        bkv_client_session_end(shared->endpoint, shared->session->id, END_MS);
        bkv_device_leave(shared->session);
    }
    int before, error = shared->events != NULL ? bkv_gpu_enter(shared->ordinal, &before) : 1;
    while (shared->events != NULL) {
        bkv_device_event_t *event = shared->events;
        shared->events = event->next;
        bkv_gpu_event_destroy(event->event);
        free(event);
    }
    if (error == 0) {
        bkv_gpu_leave(before);
    }
    pthread_mutex_destroy(&shared->attaching);
    pthread_mutex_destroy(&shared->lock);
    free(shared->extents);
    free(shared);
}
