// test_arena.c - files, descriptors, locks, other geometries, no room.
#include "fixture.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static bkv_status_t open_at(bkv_arena_t *arena, const char *path, int fd, bool *intact, bkv_error_t *err) {
    return bkv_arena_open(arena, path, fd, 256 * KIB, 8, false, intact, err);
}

Test(store_arena, keeps_its_contents) {
    char path[64];
    fixture_path(path, sizeof(path));
    bkv_arena_t arena;
    bool intact;
    cr_assert_eq(open_at(&arena, path, -1, &intact, NULL), BKV_OK);
    cr_assert(!intact);
    cr_assert_eq(arena.map_bytes % (2 * MIB), 0);
    cr_assert_eq((uintptr_t)(arena.slabs - arena.map) % (2 * MIB), 0);
    cr_assert_eq(bkv_arena_class(&arena, 7), BKV_NO_CLASS);
    bkv_arena_set_class(&arena, 7, 3);
    bkv_arena_set_state(&arena, 511, BKV_SLOT_LIVE);
    memset(bkv_arena_at(&arena, 511), 0xab, BKV_PAGE_BYTES);
    bkv_arena_close(&arena);
    cr_assert_eq(open_at(&arena, path, -1, &intact, NULL), BKV_OK);
    cr_assert(intact);
    cr_assert_eq(bkv_arena_class(&arena, 7), 3);
    cr_assert_eq(bkv_arena_class(&arena, 6), BKV_NO_CLASS);
    cr_assert(bkv_arena_is_live(&arena, 511) && !bkv_arena_is_live(&arena, 510));
    cr_assert_eq(bkv_arena_at(&arena, 511)[BKV_PAGE_BYTES - 1], 0xab);
    bkv_arena_close(&arena);
    unlink(path);
}

Test(store_arena, another_geometry_is_cleared) {
    char path[64];
    fixture_path(path, sizeof(path));
    bkv_arena_t arena;
    bool intact;
    static const uint64_t slabs[][2] = {{256 * KIB, 8}, {128 * KIB, 16}, {256 * KIB, 9}, {256 * KIB, 8}};
    for (size_t i = 0; i < 4; i++) {
        cr_assert_eq(bkv_arena_open(&arena, path, -1, slabs[i][0], (uint32_t)slabs[i][1], false, &intact, NULL), BKV_OK);
        cr_assert(!intact);
        cr_assert(!bkv_arena_is_live(&arena, 1));
        cr_assert_eq(bkv_arena_at(&arena, 1)[0], 0);
        bkv_arena_set_state(&arena, 1, BKV_SLOT_LIVE);
        bkv_arena_at(&arena, 1)[0] = 1;
        bkv_arena_close(&arena);
    }
    unlink(path);
}

// Any single wrong byte in what the head says is another arena; in the magic, something that is none of ours to clear.
Test(store_arena, damaged_head_is_cleared) {
    char path[64];
    fixture_path(path, sizeof(path));
    for (size_t at = 0; at < 48; at++) {
        bkv_arena_t arena;
        bool intact;
        cr_assert_eq(open_at(&arena, path, -1, &intact, NULL), BKV_OK);
        cr_assert_eq(intact, false);
        bkv_arena_close(&arena);
        cr_assert_eq(open_at(&arena, path, -1, &intact, NULL), BKV_OK);
        cr_assert(intact);
        arena.map[at] ^= 1;
        bkv_arena_close(&arena);
        if (at < 8) {
            bkv_error_t err;
            cr_assert_eq(open_at(&arena, path, -1, &intact, &err), BKV_INVALID_ARGUMENT);
            cr_assert(strstr(err.message, "something else than an arena"), "%s", err.message);
            cr_assert_eq(unlink(path), 0);
        }
    }
    unlink(path);
}

Test(store_arena, two_daemons_never_share) {
    char path[64];
    fixture_path(path, sizeof(path));
    bkv_arena_t first, second;
    bool intact;
    bkv_error_t err;
    cr_assert_eq(open_at(&first, path, -1, &intact, NULL), BKV_OK);
    cr_assert_eq(open_at(&second, path, -1, &intact, &err), BKV_FAILED_PRECONDITION);
    cr_assert(strstr(err.message, path) && strstr(err.message, "in use by another process"), "%s", err.message);
    bkv_arena_close(&first);
    cr_assert_eq(open_at(&second, path, -1, &intact, &err), BKV_OK);
    cr_assert(intact);
    bkv_arena_close(&second);
    unlink(path);
}

Test(store_arena, descriptor_is_handed_on) {
    bkv_arena_t arena, heir;
    bool intact;
    cr_assert_eq(open_at(&arena, NULL, -1, &intact, NULL), BKV_OK);
    cr_assert(!intact);
    cr_assert(fcntl(arena.fd, F_GETFD) & FD_CLOEXEC);
    bkv_arena_set_state(&arena, 5, BKV_SLOT_LIVE);
    int kept = dup(arena.fd); // as systemd does
    bkv_arena_close(&arena);
    cr_assert_eq(open_at(&heir, NULL, kept, &intact, NULL), BKV_OK);
    cr_assert(intact);
    cr_assert(bkv_arena_is_live(&heir, 5));
    cr_assert_neq(heir.fd, kept);
    bkv_arena_close(&heir);
    cr_assert_neq(fcntl(kept, F_GETFD), -1); // the caller's stays open
    close(kept);
}

Test(store_arena, what_is_no_arena) {
    bkv_arena_t arena;
    bool intact;
    bkv_error_t err;
    cr_assert_eq(open_at(&arena, "/nonexistent/folder/arena", -1, &intact, &err), BKV_INVALID_ARGUMENT);
    cr_assert(strstr(err.message, "arena_path: /nonexistent/folder/arena"), "%s", err.message);
    cr_assert_eq(open_at(&arena, "/tmp", -1, &intact, &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(open_at(&arena, "/dev/null", -1, &intact, &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(open_at(&arena, NULL, 9999, &intact, &err), BKV_INVALID_ARGUMENT);
    int pipes[2];
    cr_assert_eq(pipe(pipes), 0);
    cr_assert_eq(open_at(&arena, NULL, pipes[0], &intact, &err), BKV_INVALID_ARGUMENT);
    char path[64];
    fixture_path(path, sizeof(path));
    char link_path[80];
    snprintf(link_path, sizeof(link_path), "%s-link", path);
    cr_assert_eq(symlink(path, link_path), 0);
    cr_assert_eq(open_at(&arena, link_path, -1, &intact, &err), BKV_INVALID_ARGUMENT); // somebody else may have made it
    unlink(link_path);
    int fd = open(path, O_RDWR);
    cr_assert_eq(write(fd, "precious", 8), 8);
    cr_assert_eq(open_at(&arena, path, -1, &intact, &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(open_at(&arena, NULL, fd, &intact, &err), BKV_INVALID_ARGUMENT);
    char text[8];
    cr_assert_eq(pread(fd, text, 8, 0), 8);
    cr_assert_eq(memcmp(text, "precious", 8), 0);
    close(fd); // and with it the lock
    cr_assert_eq(truncate(path, 0), 0);
    cr_assert_eq(chmod(path, 0666), 0);
    cr_assert_eq(open_at(&arena, path, -1, &intact, &err), BKV_INVALID_ARGUMENT);
    cr_assert(strstr(err.message, "others may write"), "%s", err.message);
    cr_assert_eq(chmod(path, 0600), 0);
    cr_assert_eq(open_at(&arena, path, -1, &intact, &err), BKV_OK);
    bkv_arena_close(&arena);
    unlink(path);
}

// A crash before the head was written leaves zeros: cleared without ado.
Test(store_arena, making_was_cut_short) {
    char path[64];
    fixture_path(path, sizeof(path));
    cr_assert_eq(truncate(path, 10 * MIB), 0);
    bkv_arena_t arena;
    bool intact;
    cr_assert_eq(open_at(&arena, path, -1, &intact, NULL), BKV_OK);
    cr_assert(!intact);
    bkv_arena_close(&arena);
    unlink(path);
}

// No room is a status at start, not a SIGBUS later, and leaves nothing behind.
Test(store_arena, no_room) {
    char path[64];
    fixture_path(path, sizeof(path));
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit = {MIB, MIB};
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    bkv_arena_t arena;
    bool intact;
    bkv_error_t err;
    cr_assert_eq(open_at(&arena, path, -1, &intact, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.message, "no room for"), "%s", err.message);
    struct stat st;
    cr_assert_eq(stat(path, &st), 0);
    cr_assert_eq(st.st_size, 0);
    unlink(path);
}

Test(store_arena, file_memory_is_taken_at_once) {
    char path[64];
    fixture_path(path, sizeof(path));
    bkv_arena_t arena;
    bool intact;
    cr_assert_eq(open_at(&arena, path, -1, &intact, NULL), BKV_OK);
    struct stat st;
    cr_assert_eq(stat(path, &st), 0);
    cr_assert_geq((uint64_t)st.st_blocks * 512, arena.map_bytes);
    cr_assert_eq(st.st_mode & 0777, 0600);
    bkv_arena_close(&arena);
    unlink(path);
}
