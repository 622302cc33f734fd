// arena.c - opens, checks, clears and maps the arena. Who uses which slot is slab.c's business, what survived recover.c's.
#include "arena.h"

#include "daemon/observe/log.h"
#include "kernels/summary.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define ARENA_MAGIC   0x616e657261766b62u // "bkvarena"
#define ARENA_VERSION 1u
#define ARENA_ALIGN   ((uint64_t)2 << 20)

// Page 0. Anything that differs from what this process would write means another arena than ours.
typedef struct bkv_arena_head {
    uint64_t magic;
    uint32_t version;
    uint32_t record_version;
    uint64_t page_bytes;
    uint64_t slab_bytes;
    uint64_t slab_count;
    uint64_t head_bytes;
} bkv_arena_head_t;

static uint64_t round_up(uint64_t n, uint64_t step) {
    return (n + step - 1) / step * step;
}

static uint64_t classes_offset(void) {
    return BKV_PAGE_BYTES;
}

static uint64_t states_offset(uint32_t slab_count) {
    return classes_offset() + round_up(slab_count * sizeof(uint32_t), BKV_PAGE_BYTES);
}

static bkv_arena_head_t head_of(uint64_t slab_bytes, uint32_t slab_count) {
    return (bkv_arena_head_t){
        .magic = ARENA_MAGIC,
        .version = ARENA_VERSION,
        .record_version = BKV_RECORD_VERSION,
        .page_bytes = BKV_PAGE_BYTES,
        .slab_bytes = slab_bytes,
        .slab_count = slab_count,
        .head_bytes = round_up(states_offset(slab_count) + slab_bytes / BKV_PAGE_BYTES * slab_count, ARENA_ALIGN),
    };
}

static bkv_status_t open_fd(const char *path, int fd, int *out, bkv_error_t *err) {
    if (fd >= 0) {
        *out = fcntl(fd, F_DUPFD_CLOEXEC, 3);
        if (*out < 0) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "arena_fd: %d: %s", fd, strerror(errno));
        }
    } else if (path) {
        *out = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (*out < 0) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "arena_path: %s: %s", path, strerror(errno));
        }
    } else {
        *out = memfd_create("balancekvd-arena", MFD_CLOEXEC);
        if (*out < 0) {
            return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "arena: memfd_create: %s", strerror(errno));
        }
    }
    return BKV_OK;
}

// The lock lives as long as the open file does, so that it passes to a successor together with the descriptor.
static bkv_status_t lock_fd(int fd, const char *name, bkv_error_t *err) {
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        return errno == EWOULDBLOCK
                   ? bkv_fail(err, BKV_FAILED_PRECONDITION, "arena_path: %s is in use by another process", name)
                   : bkv_fail(err, BKV_INVALID_ARGUMENT, "arena_path: %s cannot be locked: %s", name, strerror(errno));
    }
    return BKV_OK;
}

// Takes the file's memory now: on a full tmpfs or hugetlbfs it would be a SIGBUS later.
static int take_room(int fd, uint64_t bytes) {
    int rc;
    do {
        rc = posix_fallocate(fd, 0, (off_t)bytes);
    } while (rc == EINTR);
    return rc;
}

static bkv_status_t size_fd(int fd, const char *name, uint64_t bytes, bool clear, bool reserve, bkv_error_t *err) {
    if (clear && (ftruncate(fd, 0) != 0 || ftruncate(fd, (off_t)bytes) != 0)) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "arena: %s: no room for %llu bytes: %s", name, (unsigned long long)bytes,
                        strerror(errno));
    }
    int rc = reserve ? take_room(fd, bytes) : 0;
    if (rc != 0) {
        int ignored = clear ? ftruncate(fd, 0) : 0; // do not leave a tmpfs full for nothing
        (void)ignored;
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "arena: %s: no room for %llu bytes: %s", name, (unsigned long long)bytes,
                        strerror(rc));
    }
    return BKV_OK;
}

typedef enum bkv_found_file { FILE_OURS, FILE_OLD, FILE_ALIEN } bkv_found_file_t;

// FILE_OLD: an arena of another geometry or version, or one whose making was cut short. A file that is something else may be
// somebody's data behind a mistyped path.
static bkv_found_file_t look_at(int fd, uint64_t size, uint64_t wanted, const bkv_arena_head_t *ours) {
    bkv_arena_head_t found;
    if (size == 0) {
        return FILE_OLD;
    }
    if (pread(fd, &found, sizeof(found), 0) != (ssize_t)sizeof(found) || (found.magic != ARENA_MAGIC && found.magic != 0)) {
        return FILE_ALIEN;
    }
    return size == wanted && memcmp(&found, ours, sizeof(found)) == 0 ? FILE_OURS : FILE_OLD;
}

// Whoever can write to the file can write into records while they are read.
static bkv_status_t check_owner(const struct stat *st, const char *path, bkv_error_t *err) {
    if (st->st_uid != geteuid() || (st->st_mode & (S_IWGRP | S_IWOTH)) != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "arena_path: %s belongs to another user, or others may write to it", path);
    }
    return BKV_OK;
}

// The magic comes last: an arena whose making was cut short is nobody's.
static void write_head(uint8_t *map, const bkv_arena_head_t *head) {
    bkv_arena_head_t *out = (bkv_arena_head_t *)map;
    *out = *head;
    out->magic = 0;
    __atomic_store_n(&out->magic, head->magic, __ATOMIC_RELEASE);
}

static bkv_status_t map_fd(bkv_arena_t *arena, bool prefault, bkv_error_t *err) {
    int flags = MAP_SHARED | (prefault ? MAP_POPULATE : 0);
    void *map = mmap(NULL, arena->map_bytes, PROT_READ | PROT_WRITE, flags, arena->fd, 0);
    if (map == MAP_FAILED) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "arena: mapping %llu bytes: %s", (unsigned long long)arena->map_bytes,
                        strerror(errno));
    }
    arena->map = map;
    // Both are wishes. A core dump with other people's KV in it helps nobody.
    (void)madvise(map, arena->map_bytes, MADV_HUGEPAGE);
    (void)madvise(map, arena->map_bytes, MADV_DONTDUMP);
    return BKV_OK;
}

static bkv_status_t open_locked(bkv_arena_t *arena, const char *path, int fd, bool prefault, bool *intact, bkv_error_t *err) {
    const char *name = fd >= 0 ? "the inherited descriptor" : path ? path : "memfd";
    bkv_arena_head_t head = head_of(arena->slab_bytes, arena->slab_count);
    struct stat st;
    if (fstat(arena->fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "arena: %s is not a regular file", name);
    }
    bool is_path = path && fd < 0;
    bkv_status_t status = is_path ? check_owner(&st, path, err) : BKV_OK;
    if (status == BKV_OK) {
        status = lock_fd(arena->fd, name, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    // On hugetlbfs the block size is the huge page's, and files are whole huge pages.
    uint64_t block = st.st_blksize > 0 ? (uint64_t)st.st_blksize : 1;
    arena->map_bytes = round_up(head.head_bytes + arena->slab_bytes * arena->slab_count, block);
    bkv_found_file_t found = look_at(arena->fd, (uint64_t)st.st_size, arena->map_bytes, &head);
    if (found == FILE_ALIEN) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "arena: %s holds something else than an arena; remove it first", name);
    }
    *intact = found == FILE_OURS;
    if (!*intact && st.st_size > 0) {
        bkv_log(BKV_LOG_WARN, 0, "arena: %s is of another version or geometry; cleared", name);
    }
    // An inherited memfd was not reserved when it was made; a file always is.
    status = size_fd(arena->fd, name, arena->map_bytes, !*intact, prefault || is_path, err);
    if (status == BKV_OK) {
        status = map_fd(arena, prefault, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    if (!*intact) {
        write_head(arena->map, &head);
    }
    arena->classes = (uint32_t *)(void *)(arena->map + classes_offset());
    arena->states = arena->map + states_offset(arena->slab_count);
    arena->slabs = arena->map + head.head_bytes;
    return BKV_OK;
}

bkv_status_t bkv_arena_open(bkv_arena_t *arena, const char *path, int fd, uint64_t slab_bytes, uint32_t slab_count,
                            bool prefault, bool *intact, bkv_error_t *err) {
    assert(slab_bytes > 0 && slab_bytes % BKV_PAGE_BYTES == 0 && slab_count > 0);
    assert(slab_bytes / BKV_PAGE_BYTES * slab_count < UINT32_MAX);
    *arena = (bkv_arena_t){.fd = -1, .slab_bytes = slab_bytes, .slab_count = slab_count};
    bkv_status_t status = open_fd(path, fd, &arena->fd, err);
    if (status != BKV_OK) {
        return status;
    }
    status = open_locked(arena, path, fd, prefault, intact, err);
    if (status != BKV_OK) {
        close(arena->fd);
        arena->fd = -1;
    }
    return status;
}

void bkv_arena_close(bkv_arena_t *arena) {
    if (arena->fd < 0) {
        return;
    }
    munmap(arena->map, arena->map_bytes);
    close(arena->fd);
    arena->fd = -1;
}

uint8_t *bkv_arena_at(const bkv_arena_t *arena, uint32_t page) {
    return arena->slabs + (uint64_t)page * BKV_PAGE_BYTES;
}

uint32_t bkv_arena_class(const bkv_arena_t *arena, uint32_t slab) {
    assert(slab < arena->slab_count);
    return __atomic_load_n(&arena->classes[slab], __ATOMIC_ACQUIRE) - 1; // 0, none, becomes BKV_NO_CLASS
}

void bkv_arena_set_class(bkv_arena_t *arena, uint32_t slab, uint32_t size_class) {
    assert(slab < arena->slab_count);
    __atomic_store_n(&arena->classes[slab], size_class + 1, __ATOMIC_RELEASE);
}

bool bkv_arena_is_live(const bkv_arena_t *arena, uint32_t page) {
    return __atomic_load_n(&arena->states[page], __ATOMIC_ACQUIRE) == BKV_SLOT_LIVE;
}

void bkv_arena_set_state(bkv_arena_t *arena, uint32_t page, bkv_slot_state_t state) {
    __atomic_store_n(&arena->states[page], (uint8_t)state, __ATOMIC_RELEASE);
}
