// fake_gpu.c - see fake_gpu.h: memory, what is shared, and the device. What it does with them is fake_gpu_work.c's.
#include "fake_gpu_state.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

fake_gpu_t gpu = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER, .generation = 1};

int fake_enter(void) {
    pthread_mutex_lock(&gpu.lock);
    return gpu.broken ? BROKEN : 0;
}

int fake_leave(int error) {
    pthread_cond_broadcast(&gpu.changed);
    pthread_mutex_unlock(&gpu.lock);
    return error;
}

// ---- memory ----

static mapping_t *mapping_add(uint8_t *base, size_t bytes, int fd, int kind) {
    for (size_t i = 0; i < MAPPINGS_MOST; i++) {
        if (gpu.mappings[i].base == NULL) {
            gpu.mappings[i] = (mapping_t){.base = base, .bytes = bytes, .fd = fd, .kind = kind};
            return &gpu.mappings[i];
        }
    }
    MUST(!"room for another mapping");
    return NULL;
}

mapping_t *fake_mapping_find(const void *address, bool exactly) {
    const uint8_t *at = address;
    for (size_t i = 0; i < MAPPINGS_MOST; i++) {
        mapping_t *mapping = &gpu.mappings[i];
        if (mapping->base != NULL && mapping->kind != SPAN && at >= mapping->base && at < mapping->base + mapping->bytes &&
            (!exactly || at == mapping->base)) {
            return mapping;
        }
    }
    return NULL;
}

static void *map_fd(void *at, size_t bytes, int fd) {
    void *memory = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | (at != NULL ? MAP_FIXED : 0), fd, 0);
    MUST(memory != MAP_FAILED);
    return memory;
}

static int make_fd(size_t bytes) {
    int fd = memfd_create("fake-gpu", MFD_CLOEXEC);
    MUST(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    return fd;
}

uint8_t *fake_gpu_alloc(size_t bytes, bool chunks) {
    (void)fake_enter();
    uint8_t *base = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    size_t each = chunks ? FAKE_GRANULARITY : bytes;
    MUST(base != MAP_FAILED && bytes % each == 0);
    for (size_t at = 0; at < bytes; at += each) {
        int fd = make_fd(each);
        mapping_add(map_fd(base + at, each, fd), each, fd, chunks ? CHUNK : WORKERS);
    }
    fake_leave(0);
    return base;
}

int bkv_gpu_take(void **memory, size_t bytes) {
    int error = fake_enter();
    if (error == 0) {
        *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
        mapping_add(*memory, bytes, -1, OWN);
        gpu.counts.memory++;
        gpu.counts.memory_bytes += bytes;
    }
    return fake_leave(error);
}

void bkv_gpu_give(void *memory) {
    (void)fake_enter();
    if (memory != NULL && !gpu.broken) {
        mapping_t *mapping = fake_mapping_find(memory, true);
        MUST(mapping != NULL && mapping->kind == OWN);
        gpu.counts.memory--;
        gpu.counts.memory_bytes -= mapping->bytes;
        free(mapping->base);
        mapping->base = NULL;
    }
    fake_leave(0);
}

int bkv_gpu_host_take(void **memory, size_t bytes) {
    int error = fake_enter();
    size_t i = 0;
    while (error == 0 && gpu.hosts[i] != NULL) {
        MUST(++i < HOSTS_MOST);
    }
    if (error == 0) {
        *memory = gpu.hosts[i] = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
        gpu.counts.host++;
    }
    return fake_leave(error);
}

void bkv_gpu_host_give(void *memory) {
    (void)fake_enter();
    bool found = memory == NULL;
    for (size_t i = 0; !found && i < HOSTS_MOST; i++) {
        if (gpu.hosts[i] == memory) {
            gpu.hosts[i] = NULL;
            gpu.counts.host--;
            found = true;
        }
    }
    MUST(found);
    free(memory);
    fake_leave(0);
}

int bkv_gpu_pin(void *memory, size_t bytes) {
    int error = fake_enter();
    for (size_t i = 0; error == 0 && i < 64; i++) {
        error = gpu.pins[i].memory == memory ? ALREADY : 0;
    }
    for (size_t i = 0; error == 0 && i < 64; i++) {
        if (gpu.pins[i].memory == NULL) {
            gpu.pins[i].memory = memory;
            gpu.pins[i].bytes = bytes;
            gpu.counts.pins++;
            break;
        }
    }
    return fake_leave(error);
}

void bkv_gpu_unpin(void *memory) {
    (void)fake_enter();
    bool found = false;
    for (size_t i = 0; i < 64; i++) {
        if (gpu.pins[i].memory == memory) {
            gpu.pins[i].memory = NULL;
            gpu.counts.pins--;
            found = true;
        }
    }
    MUST(found);
    fake_leave(0);
}

// ---- sharing ----

int bkv_gpu_extent(const void *address, bkv_gpu_extent_t *extent) {
    int error = fake_enter();
    const mapping_t *mapping = fake_mapping_find(address, false);
    error = error == 0 && mapping == NULL ? INVALID : error;
    if (error == 0) {
        *extent = (bkv_gpu_extent_t){.base = mapping->base, .bytes = mapping->bytes, .chunk = mapping->kind == CHUNK};
    }
    return fake_leave(error);
}

int bkv_gpu_bytes_from(const void *address, size_t *bytes) {
    int error = fake_enter();
    const mapping_t *mapping = fake_mapping_find(address, false);
    *bytes = mapping != NULL ? (size_t)(mapping->base + mapping->bytes - (const uint8_t *)address) : 0;
    return fake_leave(error == 0 && mapping == NULL ? INVALID : error);
}

int bkv_gpu_export(void *base, uint8_t bytes[BKV_GPU_HANDLE_BYTES]) {
    int error = fake_enter();
    const mapping_t *mapping = fake_mapping_find(base, true);
    error = error == 0 && (mapping == NULL || mapping->kind != WORKERS) ? INVALID : error;
    if (error == 0) {
        const handle_t handle = {.magic = MAGIC, .fd = mapping->fd, .bytes = mapping->bytes};
        memset(bytes, 0, BKV_GPU_HANDLE_BYTES);
        memcpy(bytes, &handle, sizeof(handle));
    }
    return fake_leave(error);
}

int bkv_gpu_export_chunk(void *base, int *fd) {
    int error = fake_enter();
    const mapping_t *mapping = fake_mapping_find(base, true);
    error = error == 0 && (mapping == NULL || mapping->kind != CHUNK) ? INVALID : error;
    *fd = error == 0 ? dup(mapping->fd) : -1;
    return fake_leave(error);
}

int bkv_gpu_import(const uint8_t bytes[BKV_GPU_HANDLE_BYTES], void **base, size_t *size) {
    handle_t handle;
    memcpy(&handle, bytes, sizeof(handle));
    int error = fake_enter();
    if (error == 0 && (handle.magic != MAGIC || handle.event != NULL)) {
        error = INVALID;
    }
    for (size_t i = 0; error == 0 && i < MAPPINGS_MOST; i++) { // CUDA may refuse this, so nobody may count on it
        MUST(gpu.mappings[i].base == NULL || gpu.mappings[i].kind != IMPORT || gpu.mappings[i].fd != handle.fd);
    }
    if (error == 0) {
        *base = map_fd(NULL, handle.bytes, handle.fd);
        *size = handle.bytes;
        mapping_add(*base, handle.bytes, handle.fd, IMPORT);
        gpu.counts.imports++;
    }
    return fake_leave(error);
}

int bkv_gpu_import_close(void *base) {
    int error = fake_enter();
    if (error == 0) {
        mapping_t *mapping = fake_mapping_find(base, true);
        MUST(mapping != NULL && mapping->kind == IMPORT);
        munmap(mapping->base, mapping->bytes);
        mapping->base = NULL;
        gpu.counts.imports--;
    }
    return fake_leave(error);
}

int bkv_gpu_granularity(int device, size_t *bytes) {
    (void)device;
    *bytes = FAKE_GRANULARITY;
    return 0;
}

int bkv_gpu_span_reserve(size_t bytes, void **base) {
    int error = fake_enter();
    if (error == 0) {
        void *memory = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        error = memory == MAP_FAILED ? 2 : 0;
        if (error == 0) {
            *base = memory;
            mapping_add(memory, bytes, -1, SPAN);
            gpu.counts.spans++;
        }
    }
    return fake_leave(error);
}

static mapping_t *span_find(const void *base) {
    for (size_t i = 0; i < MAPPINGS_MOST; i++) {
        if (gpu.mappings[i].base == base && gpu.mappings[i].kind == SPAN) {
            return &gpu.mappings[i];
        }
    }
    return NULL;
}

void bkv_gpu_span_free(void *base, size_t bytes) {
    (void)fake_enter();
    if (!gpu.broken) {
        mapping_t *span = span_find(base);
        MUST(span != NULL && span->bytes == bytes);
        MUST(munmap(base, bytes) == 0);
        span->base = NULL;
        gpu.counts.spans--;
    }
    fake_leave(0);
}

int bkv_gpu_span_map(void *at, size_t bytes, int fd, int device) {
    (void)device;
    struct stat info;
    int error = fake_enter();
    error = error == 0 && (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || (size_t)info.st_size < bytes) ? INVALID : error;
    if (error == 0) {
        mapping_add(map_fd(at, bytes, fd), bytes, -1, IMPORT);
        gpu.counts.chunks++;
    }
    return fake_leave(error);
}

void bkv_gpu_span_unmap(void *at, size_t bytes) {
    (void)fake_enter();
    if (!gpu.broken) {
        mapping_t *mapping = fake_mapping_find(at, true);
        MUST(mapping != NULL && mapping->kind == IMPORT && mapping->bytes == bytes);
        MUST(mmap(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == at);
        mapping->base = NULL;
        gpu.counts.chunks--;
    }
    fake_leave(0);
}

// ---- the device ----

void fake_gpu_plug(uint32_t count) {
    gpu.count = count;
}

void fake_gpu_break(bool dead) {
    (void)fake_enter();
    gpu.broken = true;
    gpu.dead = dead;
    fake_leave(0);
}

void fake_gpu_hold(bool hold) {
    (void)fake_enter();
    gpu.held = hold;
    fake_leave(0);
}

fake_gpu_counts_t fake_gpu_counts(void) {
    (void)fake_enter();
    fake_gpu_counts_t counts = gpu.counts;
    fake_leave(0);
    return counts;
}

bool bkv_gpu_broken(void) {
    bool broken = fake_enter() != 0;
    fake_leave(0);
    return broken;
}

// What was ours on the device is gone, pins included; what is a worker's stays.
int bkv_gpu_reset(int device) {
    (void)device;
    (void)fake_enter();
    for (size_t i = 0; i < MAPPINGS_MOST; i++) {
        mapping_t *mapping = &gpu.mappings[i];
        if (mapping->base != NULL && mapping->kind >= IMPORT) {
            munmap(mapping->base, mapping->bytes);
            mapping->base = NULL;
        } else if (mapping->base != NULL && mapping->kind == OWN) {
            free(mapping->base);
            mapping->base = NULL;
        }
    }
    for (size_t i = 0; i < HOSTS_MOST; i++) {
        free(gpu.hosts[i]);
        gpu.hosts[i] = NULL;
    }
    memset(gpu.pins, 0, sizeof(gpu.pins));
    gpu.counts = (fake_gpu_counts_t){.gathers = gpu.counts.gathers, .compressions = gpu.counts.compressions};
    gpu.generation++;
    gpu.broken = gpu.dead;
    return fake_leave(gpu.dead ? BROKEN : 0);
}

int bkv_gpu_unused(size_t *bytes) {
    *bytes = 0;
    return 0;
}

int bkv_gpu_span_create(void *at, size_t bytes, int device) {
    (void)at, (void)bytes, (void)device;
    return INVALID; // what a worker has comes from fake_gpu_alloc
}

uint32_t bkv_gpu_count(void) {
    return gpu.count;
}

const char *bkv_gpu_error(int error) {
    return error == BROKEN ? "fake fault" : "fake error";
}

int bkv_gpu_uuid(int device, uint8_t uuid[BKV_GPU_UUID_BYTES]) {
    memset(uuid, 7 + device, BKV_GPU_UUID_BYTES);
    return 0;
}

int bkv_gpu_open(int device, bkv_gpu_traits_t *traits) {
    (void)device;
    *traits = (bkv_gpu_traits_t){.processors = 4, .shared_memory = 1 << 16, .capability = 90};
    return fake_leave(fake_enter());
}

int bkv_gpu_enter(int device, int *before) {
    *before = 0;
    return device >= 0 && (uint32_t)device < gpu.count ? 0 : INVALID;
}

void bkv_gpu_leave(int before) {
    (void)before;
}

void *bkv_gpu_own_stream(void) {
    return NULL;
}

int bkv_gpu_alloc(void **memory, size_t bytes, void *stream) {
    (void)stream;
    return bkv_gpu_take(memory, bytes);
}

int bkv_gpu_free(void *memory, void *stream) {
    (void)stream;
    bkv_gpu_give(memory);
    return 0;
}

int bkv_gpu_wait(void *stream) {
    (void)stream;
    return 0;
}
