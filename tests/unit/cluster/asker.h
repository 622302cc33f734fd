// asker.h - an etcd client for tests: questions that wait for their answers, and a watcher that keeps what it is told.
#ifndef BKV_TEST_CLUSTER_ASKER_H
#define BKV_TEST_CLUSTER_ASKER_H

#include "daemon/cluster/etcd/etcd.h"
#include "etcd_server.h"

#include <pthread.h>

#define ASKER_KVS 600

typedef struct asker_kv {
    char key[64], value[64];
    int64_t mod_revision, lease;
} asker_kv_t;

typedef struct answer {
    bkv_error_t error; // also of what was not even started
    bkv_etcd_reply_t reply;
    asker_kv_t kvs[ASKER_KVS]; // [reply.count]
    uint64_t took_ms;
} answer_t;

typedef enum question_kind { ASK_GRANT, ASK_KEEP, ASK_REVOKE, ASK_PUT, ASK_SWAP, ASK_REMOVE, ASK_LIST } question_kind_t;

typedef struct question {
    question_kind_t kind;
    const char *key, *value;    // key: the prefix of a list, value: its `after`; NULL: ""
    int64_t lease, expected;    // expected: of a swap; the revision of a list
    uint32_t ttl_s, timeout_ms; // 0: 10 s
    uint32_t limit;
} question_t;

bkv_etcd_t *asker_create(const etcd_server_t *server); // plain, one endpoint

// Asks and waits. The answer is static, good until the next question.
const answer_t *ask(bkv_etcd_t *etcd, question_t question);

// Writes until etcd's quota is exceeded, which it notices only now and then.
void ask_fill(bkv_etcd_t *etcd);

// ---- a watcher ----

typedef struct seen {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    asker_kv_t kvs[ASKER_KVS]; // what there is
    uint32_t count;
    uint32_t resets, losses, puts, removals, syncs;
    bool listing, whole; // whole: synced, and nothing since; not lost
    int64_t revision;
    bool went_back; // revisions did
    bkv_etcd_watch_t *watch;
} seen_t;

void seen_start(seen_t *seen, bkv_etcd_t *etcd, const char *prefix);
void seen_stop(seen_t *seen, bkv_etcd_t *etcd);

// Waits until the state is whole and has exactly `count` keys, and `key` is there with that value (NULL: is not). False after
// 20 s.
bool seen_wait(seen_t *seen, uint32_t count, const char *key, const char *value);

// Waits for a loss that is followed by no synced.
bool seen_wait_lost(seen_t *seen);

#endif
