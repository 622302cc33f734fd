// watch.c - the thread of the verbs transport: takes completions and the device's events, and looks at the clock, so that
// a link which neither works nor says so ends nevertheless.
//
// Queue pairs of broken links are destroyed here, and with their path, never on this thread: destroying one waits until all events
// about it have been acknowledged, which this thread does.
#include "daemon/verbs/internal.h"

#include "daemon/observe/log.h"

#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define LOOK_MS 500  // most between two looks at the clock
#define PORT_MS 1000 // and at the port
#define BATCH   32   // completions taken at once

// ---- completions ----

static void take_completions(bkv_verbs_t *verbs) {
    struct ibv_wc completions[BATCH];
    int count;
    while ((count = ibv_poll_cq(verbs->completions, BATCH, completions)) > 0) {
        pthread_mutex_lock(&verbs->lock);
        for (int i = 0; i < count; i++) {
            bkv_verbs_returned(verbs, &completions[i]);
        }
        bkv_verbs_post(verbs);
        pthread_mutex_unlock(&verbs->lock);
        bkv_verbs_tell(verbs);
    }
}

// Asks for the next notice before it looks, so that none is missed.
static void on_notice(bkv_verbs_t *verbs) {
    struct ibv_cq *queue;
    void *context;
    while (ibv_get_cq_event(verbs->channel, &queue, &context) == 0) {
        ibv_ack_cq_events(queue, 1);
    }
    ibv_req_notify_cq(verbs->completions, 0);
    take_completions(verbs);
}

// ---- events of the device ----

// Breaks the link with this queue pair; NULL: all of them.
static void break_links(bkv_verbs_t *verbs, const struct ibv_qp *pair, const char *cause) {
    pthread_mutex_lock(&verbs->lock);
    for (bkv_verbs_path_t *path = verbs->paths; path != NULL; path = path->next) {
        if (pair == NULL || path->link.pair == pair) {
            bkv_verbs_break(path, cause);
        }
    }
    pthread_mutex_unlock(&verbs->lock);
}

static void device_lost(bkv_verbs_t *verbs, const char *cause) {
    if (!atomic_exchange(&verbs->gone, true)) {
        bkv_log(BKV_LOG_ERROR, 0, "verbs: %s is of no use any more (%s); %s until a restart", verbs->config.device->name, cause,
                verbs->config.words.otherwise);
    }
    break_links(verbs, NULL, cause);
}

// Not every device says when its port changes, and none that its interface has lost its address.
static void look_at_port(bkv_verbs_t *verbs) {
    bkv_verbs_port_t port;
    bkv_error_t cause;
    bool down = bkv_verbs_look(verbs->config.device, &port, &cause) != BKV_OK;
    if (atomic_exchange(&verbs->port_down, down) == down) {
        return;
    }
    if (down) {
        bkv_log(BKV_LOG_WARN, 0, "verbs: %s; no more connections, and those there are fail when they are used", cause.message);
    } else {
        bkv_log(BKV_LOG_INFO, 0, "verbs: %s: port %u is active again", verbs->config.device->name, port.number);
    }
}

static void on_event(bkv_verbs_t *verbs, const struct ibv_async_event *event) {
    const char *name = ibv_event_type_str(event->event_type);
    switch (event->event_type) {
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
    case IBV_EVENT_PATH_MIG_ERR:
        break_links(verbs, event->element.qp, name);
        break;
    case IBV_EVENT_CQ_ERR:
    case IBV_EVENT_DEVICE_FATAL:
        device_lost(verbs, name);
        break;
    default: // ports, GIDs, LIDs
        bkv_log(BKV_LOG_DEBUG, 0, "verbs: %s: %s", verbs->config.device->name, name);
        look_at_port(verbs);
    }
}

static void take_events(bkv_verbs_t *verbs) {
    struct ibv_async_event event;
    while (ibv_get_async_event(verbs->config.device->context, &event) == 0) {
        on_event(verbs, &event);
        ibv_ack_async_event(&event);
    }
}

// ---- the clock ----

// Cuts what is late. What has been posted of it comes back at once where the link works; else the link is of no use.
static void look_at_transfers(bkv_verbs_path_t *path, uint64_t now_ms) {
    bkv_verbs_transfer_t *next;
    for (bkv_verbs_transfer_t *transfer = path->transfers.head; transfer != NULL; transfer = next) {
        next = transfer->next;
        bool late = transfer->deadline_ms != 0 && now_ms >= transfer->deadline_ms;
        if (late && transfer->pending > 0 && now_ms >= transfer->deadline_ms + BKV_VERBS_GRACE_MS) {
            bkv_verbs_break(path, "it is too slow for deadlines");
            return;
        }
        if (late) {
            bkv_verbs_cut(transfer, BKV_DEADLINE_EXCEEDED);
        }
    }
}

static void look_at(bkv_verbs_path_t *path, uint64_t now_ms) {
    if (path->broken.status == BKV_OK) {
        if (path->pending > 0 && now_ms > path->progress_ms + BKV_VERBS_STUCK_MS) {
            bkv_verbs_break(path, "nothing moves");
        } else if (path->until_ms != 0 && now_ms > path->until_ms && path->transfers.head != NULL) {
            bkv_verbs_break(path, "its time is over");
        } else {
            look_at_transfers(path, now_ms);
        }
    }
    bool late = atomic_load(&path->verbs->gone) || now_ms > path->broken_ms + BKV_VERBS_FLUSH_MS;
    if (path->broken.status != BKV_OK && path->link.pair != NULL && (path->pending == 0 || late)) {
        bkv_verbs_abandon(path);
    }
}

// The next deadline of a transfer, or the end of the time that it may take beyond it.
static uint64_t next_deadline(const bkv_verbs_path_t *path) {
    uint64_t next_ms = UINT64_MAX;
    for (const bkv_verbs_transfer_t *transfer = path->transfers.head; transfer != NULL; transfer = transfer->next) {
        uint64_t due_ms = transfer->deadline_ms + (transfer->cut != BKV_OK ? BKV_VERBS_GRACE_MS : 0);
        next_ms = transfer->deadline_ms != 0 && due_ms < next_ms ? due_ms : next_ms;
    }
    return next_ms;
}

// Returns how many ms there are until the next look.
static int look_at_clock(bkv_verbs_t *verbs) {
    uint64_t now_ms = verbs->config.now_ms();
    if (now_ms - verbs->looked_ms >= PORT_MS) {
        verbs->looked_ms = now_ms;
        look_at_port(verbs);
    }
    pthread_mutex_lock(&verbs->lock);
    uint64_t next_ms = now_ms + LOOK_MS;
    for (bkv_verbs_path_t *path = verbs->paths; path != NULL; path = path->next) {
        look_at(path, now_ms);
        uint64_t due_ms = next_deadline(path);
        next_ms = due_ms < next_ms ? due_ms : next_ms;
    }
    verbs->next_look_ms = next_ms;
    bkv_verbs_post(verbs); // what was abandoned has made room
    pthread_mutex_unlock(&verbs->lock);
    bkv_verbs_tell(verbs);
    if (verbs->config.tick != NULL) {
        uint64_t due_ms = verbs->config.tick(verbs->config.user, now_ms);
        next_ms = due_ms < next_ms ? due_ms : next_ms;
    }
    return next_ms > now_ms ? (int)(next_ms - now_ms) : 0;
}

// ---- the thread ----

static void *watch_main(void *argument) {
    bkv_verbs_t *verbs = argument;
    struct pollfd files[] = {{.fd = verbs->channel->fd, .events = POLLIN},
                             {.fd = verbs->config.device->context->async_fd, .events = POLLIN},
                             {.fd = verbs->wake, .events = POLLIN}};
    int wait_ms = 0;
    while (!atomic_load(&verbs->stopping)) {
        poll(files, sizeof(files) / sizeof(files[0]), wait_ms);
        if (files[2].revents != 0) {
            eventfd_t count;
            eventfd_read(verbs->wake, &count);
        }
        on_notice(verbs);
        take_events(verbs);
        for (size_t i = 0; i < 2; i++) {
            if ((files[i].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0) { // the kernel has taken it from us
                device_lost(verbs, "it was taken away");
                files[i].fd = -1;
            }
        }
        wait_ms = look_at_clock(verbs);
    }
    return NULL;
}

void bkv_verbs_wake(bkv_verbs_t *verbs) {
    eventfd_write(verbs->wake, 1); // cannot block: nobody writes so much
}

static bool unblock(int fd) {
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

bkv_status_t bkv_verbs_watch_start(bkv_verbs_t *verbs, bkv_error_t *err) {
    verbs->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (verbs->wake < 0 || !unblock(verbs->channel->fd) || !unblock(verbs->config.device->context->async_fd)) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no descriptor to watch a device by: %s", strerror(errno));
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int cause = pthread_create(&verbs->thread, NULL, watch_main, verbs);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (cause != 0) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no thread to watch a device: %s", strerror(cause));
    }
    pthread_setname_np(verbs->thread, verbs->config.thread_name);
    verbs->watched = true;
    return BKV_OK;
}

void bkv_verbs_watch_stop(bkv_verbs_t *verbs) {
    if (verbs->watched) {
        atomic_store(&verbs->stopping, true);
        bkv_verbs_wake(verbs);
        pthread_join(verbs->thread, NULL);
    }
    if (verbs->wake >= 0) {
        close(verbs->wake);
    }
}
