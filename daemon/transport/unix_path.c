// unix_path.c - a lock file beside the socket, as a socket itself tells nobody whether it is served.
#include "daemon/transport/unix_path.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

bkv_status_t bkv_unix_path_lock(const char *path, int *fd, bkv_error_t *err) {
    char lock_path[PATH_MAX];
    snprintf(lock_path, sizeof(lock_path), "%s.lock", path);
    int lock = open(lock_path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (lock < 0) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "listen.socket: cannot open %s: %s", lock_path, strerror(errno));
    }
    if (flock(lock, LOCK_EX | LOCK_NB) != 0) {
        int cause = errno;
        close(lock);
        return cause == EWOULDBLOCK
                   ? bkv_fail(err, BKV_FAILED_PRECONDITION, "listen.socket: %s is served by another daemon", path)
                   : bkv_fail(err, BKV_FAILED_PRECONDITION, "listen.socket: cannot lock %s: %s", lock_path, strerror(cause));
    }
    *fd = lock; // the file stays: unlinking a lock file lets two processes hold "the" lock
    return BKV_OK;
}

bkv_status_t bkv_unix_path_clear(const char *path, bkv_error_t *err) {
    struct stat status;
    if (lstat(path, &status) != 0) {
        return errno == ENOENT ? BKV_OK
                               : bkv_fail(err, BKV_FAILED_PRECONDITION, "listen.socket: %s: %s", path, strerror(errno));
    }
    if (!S_ISSOCK(status.st_mode)) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "listen.socket: %s is there and is not a socket", path);
    }
    if (unlink(path) != 0) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "listen.socket: cannot remove %s: %s", path, strerror(errno));
    }
    return BKV_OK;
}
