// log.c - puts one event together and hands it to its target in one piece, so that lines of threads never mix.
//
// What comes from clients may stand in a message: escaping is text.c's, so that no client forges lines or fields.
#include "daemon/observe/log.h"

#include "daemon/observe/clock.h"
#include "daemon/observe/limit.h"
#include "daemon/observe/text.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <syslog.h>
#include <systemd/sd-journal.h>
#include <time.h>
#include <unistd.h>

#define LINE_MAX_BYTES       2048
#define MESSAGE_MAX_BYTES    768 // escaped at most six times as long, it is cut to what the line has room for
#define FAILURES_PER_SECOND  100
#define JOURNAL_SOCKET       "/run/systemd/journal/socket"
#define JOURNAL_FIELDS       6
#define JOURNAL_FIELD_LENGTH (MESSAGE_MAX_BYTES + 32)

static const struct {
    const char *name;
    int priority; // of syslog and journald
} levels[] = {
    [BKV_LOG_ERROR] = {"error", LOG_ERR},
    [BKV_LOG_WARN] = {"warn", LOG_WARNING},
    [BKV_LOG_INFO] = {"info", LOG_INFO},
    [BKV_LOG_DEBUG] = {"debug", LOG_DEBUG},
};

// One event. operation and status are NULL but for a failed request.
typedef struct event {
    bkv_log_level_t level;
    uint64_t request;
    const char *operation, *status, *message;
} event_t;

// The one process-wide object: target is written before threads start, level is atomic, limit has its lock.
static bkv_log_target_t target = BKV_LOG_TEXT;
static _Atomic int threshold = BKV_LOG_INFO;
static pthread_mutex_t limit_lock = PTHREAD_MUTEX_INITIALIZER;
static bkv_limit_t failure_limit = {.per_second = FAILURES_PER_SECOND};

// ---- set-up ----

// systemd sets JOURNAL_STREAM to "device:inode" of the stderr that it gave us.
static bool stderr_is_journal(void) {
    const char *stream = getenv("JOURNAL_STREAM");
    uintmax_t device, inode;
    struct stat status;
    return stream != NULL && sscanf(stream, "%ju:%ju", &device, &inode) == 2 && fstat(STDERR_FILENO, &status) == 0 &&
           status.st_dev == device && status.st_ino == inode;
}

bkv_status_t bkv_log_set_level(const char *level, bkv_error_t *err) {
    for (size_t i = 0; i < sizeof(levels) / sizeof(levels[0]); i++) {
        if (strcmp(level, levels[i].name) == 0) {
            atomic_store(&threshold, (int)i);
            return BKV_OK;
        }
    }
    return bkv_fail(err, BKV_INVALID_ARGUMENT, "log.level: \"%s\" is none of error, warn, info, debug", level);
}

bkv_status_t bkv_log_setup(const char *target_name, const char *level, bkv_error_t *err) {
    if (strcmp(target_name, "auto") == 0) {
        target = stderr_is_journal() ? BKV_LOG_JOURNALD : BKV_LOG_TEXT;
    } else if (strcmp(target_name, "text") == 0) {
        target = BKV_LOG_TEXT;
    } else if (strcmp(target_name, "json") == 0) {
        target = BKV_LOG_JSON;
    } else if (strcmp(target_name, "journald") == 0) {
        if (access(JOURNAL_SOCKET, F_OK) != 0) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "log.target: no journald here (%s)", JOURNAL_SOCKET);
        }
        target = BKV_LOG_JOURNALD;
    } else {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "log.target: \"%s\" is none of auto, journald, text, json", target_name);
    }
    return bkv_log_set_level(level, err);
}

bool bkv_log_enabled(bkv_log_level_t level) {
    return (int)level <= atomic_load_explicit(&threshold, memory_order_relaxed);
}

// ---- targets ----

// A line under construction; what does not fit is cut.
typedef struct line {
    char text[LINE_MAX_BYTES];
    size_t length;
} line_t;

static void line_add(line_t *line, const char *format, ...) BKV_PRINTF(2, 3);
static void line_add(line_t *line, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    size_t room = sizeof(line->text) - line->length;
    int length = vsnprintf(line->text + line->length, room, format, arguments);
    va_end(arguments);
    if (length > 0) {
        line->length += (size_t)length < room ? (size_t)length : room - 1;
    }
}

// The message must leave room for what closes the line.
static void line_add_message(line_t *line, const char *message, size_t (*escape)(const char *, char *, size_t)) {
    const size_t closing = 8;
    line->length += escape(message, line->text + line->length, sizeof(line->text) - line->length - closing);
}

static void line_add_time(line_t *line) {
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    line_add(line, "%04d-%02d-%02dT%02d:%02d:%02d.%03ldZ", utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday, utc.tm_hour,
             utc.tm_min, utc.tm_sec, now.tv_nsec / 1000000);
}

// One write per line: atomic on a pipe, and nothing to flush. A log that cannot be written is no reason to stop.
static void line_write(const line_t *line) {
    ssize_t written = write(STDERR_FILENO, line->text, line->length);
    (void)written;
}

static void write_text(const event_t *event) {
    line_t line = {.length = 0};
    line_add_time(&line);
    line_add(&line, " %-5s ", levels[event->level].name);
    if (event->request != 0) {
        line_add(&line, "[%" PRIu64 "] ", event->request);
    }
    if (event->operation != NULL) {
        line_add(&line, "%s: %s: ", event->operation, event->status);
    }
    line_add_message(&line, event->message, bkv_text_line);
    line_add(&line, "\n");
    line_write(&line);
}

static void write_json(const event_t *event) {
    line_t line = {.length = 0};
    line_add(&line, "{\"time\":\"");
    line_add_time(&line);
    line_add(&line, "\",\"level\":\"%s\"", levels[event->level].name);
    if (event->request != 0) {
        line_add(&line, ",\"request\":%" PRIu64, event->request);
    }
    if (event->operation != NULL) {
        line_add(&line, ",\"operation\":\"%s\",\"status\":\"%s\"", event->operation, event->status);
    }
    line_add(&line, ",\"message\":\"");
    line_add_message(&line, event->message, bkv_text_json);
    line_add(&line, "\"}\n");
    line_write(&line);
}

typedef struct journal_entry {
    char text[JOURNAL_FIELDS][JOURNAL_FIELD_LENGTH];
    struct iovec fields[JOURNAL_FIELDS];
    int count;
} journal_entry_t;

static void journal_add(journal_entry_t *entry, const char *format, ...) BKV_PRINTF(2, 3);
static void journal_add(journal_entry_t *entry, const char *format, ...) {
    char *text = entry->text[entry->count];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, JOURNAL_FIELD_LENGTH, format, arguments);
    va_end(arguments);
    entry->fields[entry->count] = (struct iovec){.iov_base = text, .iov_len = strlen(text)};
    entry->count++;
}

static void write_journal(const event_t *event) {
    journal_entry_t entry;
    entry.count = 0;
    if (event->operation != NULL) {
        journal_add(&entry, "MESSAGE=%s: %s: %s", event->operation, event->status, event->message);
        journal_add(&entry, "BKV_OPERATION=%s", event->operation);
        journal_add(&entry, "BKV_STATUS=%s", event->status);
    } else {
        journal_add(&entry, "MESSAGE=%s", event->message);
    }
    journal_add(&entry, "PRIORITY=%d", levels[event->level].priority);
    journal_add(&entry, "SYSLOG_IDENTIFIER=balancekvd");
    if (event->request != 0) {
        journal_add(&entry, "BKV_REQUEST=%" PRIu64, event->request);
    }
    sd_journal_sendv(entry.fields, entry.count);
}

static void write_event(const event_t *event) {
    switch (target) {
    case BKV_LOG_TEXT:
        write_text(event);
        break;
    case BKV_LOG_JSON:
        write_json(event);
        break;
    case BKV_LOG_JOURNALD:
        write_journal(event);
        break;
    }
}

// ---- events ----

void bkv_log(bkv_log_level_t level, uint64_t request, const char *format, ...) {
    if (!bkv_log_enabled(level)) {
        return;
    }
    char message[MESSAGE_MAX_BYTES];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof(message), format, arguments);
    va_end(arguments);
    write_event(&(event_t){.level = level, .request = request, .message = message});
}

static bkv_log_level_t failure_level(bkv_status_t status) {
    switch (status) {
    case BKV_OK:
    case BKV_CANCELLED:
    case BKV_INVALID_ARGUMENT:
    case BKV_NOT_FOUND:
    case BKV_ALREADY_EXISTS:
    case BKV_PERMISSION_DENIED:
    case BKV_UNAUTHENTICATED:
    case BKV_FAILED_PRECONDITION:
    case BKV_UNIMPLEMENTED:
        return BKV_LOG_INFO;
    case BKV_DATA_LOSS:
    case BKV_INTERNAL:
        return BKV_LOG_ERROR;
    case BKV_RESOURCE_EXHAUSTED:
    case BKV_DEADLINE_EXCEEDED:
    case BKV_BUSY:
        return BKV_LOG_WARN;
    }
    return BKV_LOG_WARN;
}

void bkv_log_failure(uint64_t request, const char *operation, const bkv_error_t *error) {
    bkv_log_level_t level = failure_level(error->status);
    if (!bkv_log_enabled(level)) {
        return;
    }
    uint64_t held = 0;
    pthread_mutex_lock(&limit_lock);
    bool pass = bkv_limit_take(&failure_limit, bkv_now_ms(), &held);
    pthread_mutex_unlock(&limit_lock);
    if (!pass) {
        return;
    }
    if (held > 0) {
        bkv_log(BKV_LOG_WARN, 0, "%" PRIu64 " more failures were not logged", held);
    }
    write_event(&(event_t){.level = level,
                           .request = request,
                           .operation = operation,
                           .status = bkv_status_name(error->status),
                           .message = error->message});
}
