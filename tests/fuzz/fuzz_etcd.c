// fuzz_etcd.c - what an etcd, or whoever listens in its place, may answer: to calls, to a login, to a watch.
//
// The first byte chooses the question, the second how the bytes of an answer are cut. A watch gets many answers, each behind its
// length in two bytes: pages of its listing and messages of its stream, whichever is due. Nothing is sent: the client here has no
// channel and no thread, calls end before they begin, and timers run when their effect is wanted.
#include "daemon/cluster/etcd/internal.h"

#include "etcd.pb-c.h"

#include <grpc/byte_buffer.h>
#include <stdlib.h>
#include <string.h>

#define SIZE_MOST 1024
#define LEASE     INT64_C(0x1234567890)
#define PREFIX    "/b/"
#define TTL_MAX   1000000
#define SOON_MS   5000

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// A mistake of ours must be seen also where no sanitizer looks.
static void require(bool condition) {
    if (!condition) {
        abort();
    }
}

static grpc_byte_buffer *received(const uint8_t *data, size_t size, size_t piece) {
    grpc_slice slices[64];
    size_t count = 0;
    piece = size / piece < 64 ? piece : size;
    for (size_t at = 0; at < size; at += piece) {
        slices[count++] = grpc_slice_from_copied_buffer((const char *)data + at, piece < size - at ? piece : size - at);
    }
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(slices, count);
    for (size_t i = 0; i < count; i++) {
        grpc_slice_unref(slices[i]);
    }
    return message;
}

// One that a client can go on from.
static bool is_revision(int64_t revision) {
    return revision > 0 && revision < INT64_MAX;
}

// Looks at every byte, so that one which is not there is noticed.
static void read_text(bkv_etcd_text_t text) {
    unsigned sum = 0;
    for (size_t i = 0; i < text.length; i++) {
        sum += ((const uint8_t *)text.bytes)[i];
    }
    require(sum <= 255 * text.length);
}

static bkv_etcd_text_t text_of(const char *words) {
    return (bkv_etcd_text_t){.bytes = words, .length = strlen(words)};
}

// Ends what is under way; no callback comes after this.
static void end_all(bkv_etcd_t *etcd) {
    bkv_etcd_watches_end(etcd);
    bkv_etcd_calls_cancel(etcd);
    require(etcd->calls == NULL && etcd->call_count == 0 && etcd->timers == NULL);
}

// ---- calls ----

typedef enum question { GRANT, KEEP, REVOKE, PUT, REMOVE, SWAP, LIST, LOGIN, FAILURE, WATCH, QUESTIONS } question_t;

typedef struct asked {
    question_t question;
    uint32_t answers;
} asked_t;

static void check_reply(question_t question, const bkv_etcd_reply_t *reply) {
    require(is_revision(reply->revision));
    bool of_lease = question == GRANT || question == KEEP;
    require(of_lease ? reply->lease == LEASE && reply->ttl_s > 0 && reply->ttl_s <= TTL_MAX : reply->lease == 0);
    require(question == LIST || (!reply->more && reply->count <= (question == SWAP && !reply->succeeded ? 1 : 0)));
    require(question == SWAP || !reply->succeeded);
    for (size_t i = 0; i < reply->count; i++) {
        read_text(reply->kvs[i].key);
        read_text(reply->kvs[i].value);
    }
}

static void on_done(void *user, const bkv_error_t *error, const bkv_etcd_reply_t *reply) {
    asked_t *asked = user;
    asked->answers++;
    require((error->status == BKV_OK) == (reply != NULL));
    require(reply != NULL || error->message[0] != '\0');
    if (reply != NULL) {
        check_reply(asked->question, reply);
    }
}

static bkv_status_t ask(bkv_etcd_t *etcd, asked_t *asked) {
    switch (asked->question) {
    case GRANT:
        return bkv_etcd_grant(etcd, LEASE, 10, SOON_MS, on_done, asked, NULL);
    case KEEP:
        return bkv_etcd_keep(etcd, LEASE, SOON_MS, on_done, asked, NULL);
    case REVOKE:
        return bkv_etcd_revoke(etcd, LEASE, SOON_MS, on_done, asked, NULL);
    case PUT:
        return bkv_etcd_put(etcd, text_of("key"), text_of("value"), 0, SOON_MS, on_done, asked, NULL);
    case REMOVE:
        return bkv_etcd_remove(etcd, text_of("key"), SOON_MS, on_done, asked, NULL);
    case SWAP:
        return bkv_etcd_swap(etcd, text_of("key"), 0, text_of("value"), 0, SOON_MS, on_done, asked, NULL);
    default:
        return bkv_etcd_list(etcd, text_of(PREFIX), text_of(""), 0, 100, SOON_MS, on_done, asked, NULL);
    }
}

static void fuzz_call(bkv_etcd_t *etcd, question_t question, grpc_byte_buffer *message) {
    asked_t asked = {.question = question};
    require(ask(etcd, &asked) == BKV_OK && asked.answers == 0);
    bkv_etcd_call_answer(etcd->calls, message);
    require(asked.answers == 1);
    end_all(etcd);
}

static void run_timer(bkv_etcd_t *etcd, bkv_etcd_timer_t *timer) {
    bkv_etcd_timer_stop(etcd, timer);
    timer->run(timer->user);
}

// A call that needs a token waits until the login has been answered. Then it goes on, with a token that may be sent, or fails.
static void fuzz_login(bkv_etcd_t *etcd, grpc_byte_buffer *message) {
    asked_t asked = {.question = PUT};
    etcd->user = (char *)"user";
    etcd->password = (char *)"password";
    require(ask(etcd, &asked) == BKV_OK);
    bkv_etcd_call_t *call = etcd->calls;
    run_timer(etcd, &call->timer);
    require(etcd->login != NULL && etcd->call_count == 2 && call->waits_for_login);
    bkv_etcd_call_answer(etcd->login, message);
    require(etcd->login == NULL && etcd->call_count == 1 - asked.answers && (etcd->token == NULL) == (asked.answers == 1));
    if (etcd->token != NULL) {
        size_t length = strlen(etcd->token);
        require(length > 0 && length <= BKV_ETCD_TOKEN_MAX && etcd->calls == call && call->timer.armed);
        for (size_t i = 0; i < length; i++) {
            require(etcd->token[i] >= 0x20 && etcd->token[i] < 0x7f);
        }
    }
    end_all(etcd);
    require(asked.answers == 1);
    free(etcd->token);
}

// How a call has failed: a code, and words that may be anything.
static void fuzz_failure(const uint8_t *data, size_t size) {
    if (size < 1 || data[0] == GRPC_STATUS_OK) {
        return;
    }
    grpc_slice details = grpc_slice_from_copied_buffer((const char *)data + 1, size - 1);
    bkv_error_t error;
    bkv_etcd_verdict_t verdict = bkv_etcd_judge((grpc_status_code)data[0], details, &error);
    require(verdict == BKV_ETCD_FINAL || verdict == BKV_ETCD_RETRY || verdict == BKV_ETCD_LOGIN);
    size_t length = strnlen(error.message, sizeof(error.message));
    require(error.status != BKV_OK && length > 0 && length < sizeof(error.message));
    for (size_t i = 0; i < length; i++) {
        require(error.message[i] >= 0x20 && error.message[i] < 0x7f);
    }
    grpc_slice_unref(details);
}

// ---- watches ----

// What the watcher has been told, and what it may be told next.
typedef struct seen {
    bool listing, lost;
    bool synced;      // by the message that is being taken in
    int64_t revision; // of the last synced
    int64_t newest;   // of the changes since
    uint32_t listed;
} seen_t;

static void check_key(bkv_etcd_text_t key) {
    size_t prefix = strlen(PREFIX);
    read_text(key);
    require(key.length > prefix && key.length <= BKV_ETCD_KEY_MAX && memcmp(key.bytes, PREFIX, prefix) == 0);
}

static void see_change(seen_t *seen, int64_t revision) {
    require(seen->revision > 0 && revision > seen->revision && is_revision(revision));
    seen->newest = revision > seen->newest ? revision : seen->newest;
}

static void on_reset(void *user) {
    seen_t *seen = user;
    seen->listing = true;
    seen->listed = 0;
}

static void on_put(void *user, const bkv_etcd_kv_t *kv) {
    seen_t *seen = user;
    check_key(kv->key);
    read_text(kv->value);
    if (seen->listing) {
        require(++seen->listed <= BKV_ETCD_LIST_MAX);
    } else {
        see_change(seen, kv->mod_revision);
    }
}

static void on_removed(void *user, bkv_etcd_text_t key, int64_t revision) {
    seen_t *seen = user;
    check_key(key);
    require(!seen->listing);
    see_change(seen, revision);
}

// Within a stream revisions only grow, each message's changes are all told before it, and none is told twice.
static void on_synced(void *user, int64_t revision) {
    seen_t *seen = user;
    require(is_revision(revision));
    require(seen->listing || (revision > seen->revision && revision == seen->newest));
    *seen = (seen_t){.synced = true, .revision = revision, .newest = revision};
}

static void on_lost(void *user, const bkv_error_t *error) {
    seen_t *seen = user;
    require(!seen->lost && error->status != BKV_OK);
    seen->lost = true;
}

static const bkv_etcd_watcher_t watcher = {
    .reset = on_reset, .put = on_put, .removed = on_removed, .synced = on_synced, .lost = on_lost};

// Takes in a message. Afterwards a page is due, which etcd->calls waits for, or a message of the stream. The stream itself would
// be the timer's to open, behind a listing that is whole; at any other time the timer begins a new listing.
static void watch_step(bkv_etcd_t *etcd, bkv_etcd_watch_t *watch, seen_t *seen, grpc_byte_buffer *message) {
    bool page = etcd->calls != NULL;
    seen->synced = false;
    if (page) {
        bkv_etcd_call_answer(etcd->calls, message);
    } else {
        bkv_etcd_watch_take(watch, message);
    }
    require(seen->newest == seen->revision || seen->listing);
    if (etcd->calls == NULL && etcd->timers != NULL && page && seen->synced) {
        bkv_etcd_timer_stop(etcd, etcd->timers);
    } else if (etcd->calls == NULL && etcd->timers != NULL) {
        run_timer(etcd, etcd->timers);
        require(etcd->calls != NULL);
    }
    require(etcd->call_count <= 1);
}

static void fuzz_watch(bkv_etcd_t *etcd, const uint8_t *data, size_t size, size_t piece) {
    seen_t seen = {.listing = false};
    bkv_etcd_watch_t *watch;
    require(bkv_etcd_watch_create(etcd, text_of(PREFIX), &watcher, &seen, &watch, NULL) == BKV_OK);
    run_timer(etcd, etcd->timers);
    while (size >= 2) {
        size_t length = (size_t)data[0] | (size_t)data[1] << 8;
        data += 2;
        size -= 2;
        length = length < size ? length : size;
        grpc_byte_buffer *message = received(data, length, piece);
        watch_step(etcd, watch, &seen, message);
        grpc_byte_buffer_destroy(message);
        data += length;
        size -= length;
    }
    end_all(etcd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2 || size > SIZE_MOST) {
        return 0;
    }
    bkv_etcd_t etcd = {
        .endpoints = {(char *)"etcd"}, .endpoint_count = 1, .attempt_ms = 1000, .thread = pthread_self(), .jitter = 1};
    question_t question = (question_t)(data[0] % QUESTIONS);
    size_t piece = (size_t)data[1] + 1;
    if (question == FAILURE) {
        fuzz_failure(data + 2, size - 2);
        return 0;
    }
    if (question == WATCH) {
        fuzz_watch(&etcd, data + 2, size - 2, piece);
        return 0;
    }
    grpc_byte_buffer *message = received(data + 2, size - 2, piece);
    if (question == LOGIN) {
        fuzz_login(&etcd, message);
    } else {
        fuzz_call(&etcd, question, message);
    }
    grpc_byte_buffer_destroy(message);
    return 0;
}
