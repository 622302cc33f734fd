// fuzz_answers.c - what another daemon, or whoever listens in its place, may answer to this one: Have, Forget, Store, Drain, Link,
// records by stream (Fetch), and where records lie that are then read (Locate).
//
// Four bytes first: the question, how answers are cut, about how many names, and which records are not wanted or not read. What
// follows is what comes back, each message behind its length in two bytes; a length of 0 ends a stream well, the end of the bytes
// breaks it off. In the place of attempt.c and gRPC, and of the RDMA device, is this file: the calls, their messages and what
// becomes of them are real.
#include "daemon/cluster/peer/link.h"
#include "daemon/cluster/peer/verbs.h"
#include "kernels/seal.h"

#include "peer.pb-c.h"

#include <grpc/byte_buffer.h>
#include <infiniband/verbs.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define SIZE_MOST 2048
#define NAMES     10
#define MAX_BATCH 4
#define LENGTH    192       // of the records that are here
#define AWAY      (1 << 20) // bytes of the other's arena
#define ROOM      8192      // bytes of a record, at most
#define SAID_MOST 64
#define READ      0xa5 // what an RDMA read brings

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
bkv_status_t __wrap_bkv_peer_call_attempt(bkv_peer_call_t *call, bkv_error_t *err);
bkv_status_t __wrap_bkv_verbs_begin(bkv_verbs_path_t *path, bkv_verbs_transfer_t *transfer, bkv_error_t *err);
void __wrap_bkv_verbs_wake(bkv_verbs_t *verbs);

typedef enum question { HAVE, FORGET, STORE, DRAIN, LINK, FETCH, LOCATE, QUESTIONS } question_t;

// One record of a fetch, as its sink knows it.
typedef struct kept {
    uint8_t *memory; // where it goes; NULL: nowhere
    uint64_t bytes, said_bytes;
    bool begun, ended, read;
    uint8_t said[ROOM]; // what came of it, as protobuf-c reads it
} kept_t;

// One run: a question, and what is known about its answer.
typedef struct run {
    const uint8_t *data; // what is to come back
    size_t size, piece;
    question_t question;
    uint32_t count;
    unsigned unwanted;           // bits: records that the sink does not want
    unsigned unread;             // bits: whether the next read begins or ends badly
    bkv_peer_call_t *call;       // is due
    bkv_verbs_transfer_t *reads; // are under way
    uint32_t dones;              // of the question
    uint64_t said[SAID_MOST];    // as protobuf-c reads it
    size_t said_count;
    bool unsure; // protobuf-c would not have taken what was taken
    kept_t kept[NAMES];
} run_t;

static bkv_peers_t peers;
static bkv_peer_t peer;
static bkv_name_t names[NAMES];
static run_t run;

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

// ---- what stands in for the network and the device ----

bkv_status_t __wrap_bkv_peer_call_attempt(bkv_peer_call_t *call, bkv_error_t *err) {
    (void)err;
    require(run.call == NULL);
    run.call = call;
    return BKV_OK;
}

void __wrap_bkv_verbs_wake(bkv_verbs_t *verbs) {
    (void)verbs;
}

static bool is_unread(void) {
    bool unread = (run.unread & 1) != 0;
    run.unread >>= 1;
    return unread;
}

// Nothing is read from beyond the other's arena, whatever it said of where its records lie.
bkv_status_t __wrap_bkv_verbs_begin(bkv_verbs_path_t *path, bkv_verbs_transfer_t *transfer, bkv_error_t *err) {
    (void)path;
    require(transfer->read && transfer->bytes > 0 && transfer->offset <= AWAY && transfer->bytes <= AWAY - transfer->offset);
    if (is_unread()) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "the link has failed");
    }
    transfer->next = run.reads;
    run.reads = transfer;
    return BKV_OK;
}

static void end_read(bkv_verbs_transfer_t *transfer) {
    bkv_error_t error = {.status = BKV_OK};
    if (is_unread()) {
        bkv_fail(&error, BKV_DEADLINE_EXCEEDED, "it took too long");
    } else {
        memset(transfer->local, READ, transfer->bytes);
    }
    for (uint32_t i = 0; i < run.count; i++) {
        run.kept[i].read = run.kept[i].read || (error.status == BKV_OK && run.kept[i].memory == transfer->local);
    }
    transfer->over(transfer, &error);
}

// The next message that comes back; false: the stream ends, *well or not.
static bool next_message(const uint8_t **message, size_t *length, bool *well) {
    if (run.size < 2) {
        *well = false;
        return false;
    }
    size_t says = (size_t)run.data[0] | (size_t)run.data[1] << 8;
    run.data += 2;
    run.size -= 2;
    *message = run.data;
    *length = says < run.size ? says : run.size;
    run.data += *length;
    run.size -= *length;
    *well = says == 0;
    return says != 0;
}

// ---- what is said, as protobuf-c reads it ----

static void say(uint64_t value) {
    if (run.said_count < SAID_MOST) {
        run.said[run.said_count++] = value;
    }
}

static void say_have(const uint8_t *message, size_t length) {
    Balancekv__Cluster__V1__HaveResponse *response = balancekv__cluster__v1__have_response__unpack(NULL, length, message);
    for (size_t i = 0; response != NULL && i < response->n_bytes; i++) {
        say(response->bytes[i]);
    }
    balancekv__cluster__v1__have_response__free_unpacked(response, NULL);
}

static void say_forget(const uint8_t *message, size_t length) {
    Balancekv__Cluster__V1__ForgetResponse *response = balancekv__cluster__v1__forget_response__unpack(NULL, length, message);
    for (size_t i = 0; response != NULL && i < response->n_had; i++) {
        say(response->had[i] != 0);
    }
    balancekv__cluster__v1__forget_response__free_unpacked(response, NULL);
}

static void say_store(const uint8_t *message, size_t length) {
    Balancekv__Cluster__V1__StoreResponse *response = balancekv__cluster__v1__store_response__unpack(NULL, length, message);
    for (size_t i = 0; response != NULL && i < response->n_codes; i++) {
        say(response->codes[i]);
    }
    balancekv__cluster__v1__store_response__free_unpacked(response, NULL);
}

// Which record a chunk is of; whether that one is due is for fetch.c to find out.
static void say_chunk(const bkv_peer_fetch_t *fetch, const uint8_t *message, size_t length) {
    Balancekv__V1__RecordChunk *chunk = balancekv__v1__record_chunk__unpack(NULL, length, message);
    run.unsure = run.unsure || chunk == NULL;
    if (chunk != NULL && chunk->index < fetch->part) {
        kept_t *kept = &run.kept[fetch->rest[fetch->at + chunk->index]];
        kept->said_bytes = fetch->coming ? kept->said_bytes : 0;
        for (size_t i = 0; i < chunk->data.len; i++, kept->said_bytes++) {
            if (kept->said_bytes < ROOM) {
                kept->said[kept->said_bytes] = chunk->data.data[i];
            }
        }
    }
    balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
}

static void say_all(const bkv_peer_call_t *call, const uint8_t *message, size_t length) {
    if (call->kind->shape == BKV_DOWNLOAD) {
        say_chunk((const bkv_peer_fetch_t *)call, message, length);
    } else if (run.question == HAVE) {
        say_have(message, length);
    } else if (run.question == FORGET) {
        say_forget(message, length);
    } else if (run.question == STORE) {
        say_store(message, length);
    }
}

// ---- a call, as attempt.c runs it ----

static bool take(bkv_peer_call_t *call, const uint8_t *message, size_t length) {
    say_all(call, message, length);
    grpc_byte_buffer *buffer = received(message, length, run.piece);
    bkv_status_t status = call->kind->take(call, buffer, &call->error);
    grpc_byte_buffer_destroy(buffer);
    require(status == call->error.status && (status == BKV_OK || call->error.message[0] != '\0'));
    return status == BKV_OK;
}

// Sends all of the part that is due, to nobody. False: there was nothing to send.
static bool send_part(bkv_peer_call_t *call) {
    bool last = false, sent = false;
    while (!last) {
        grpc_byte_buffer *message = call->kind->next(call, &last);
        require(message != NULL || last);
        sent = sent || message != NULL;
        grpc_byte_buffer_destroy(message);
    }
    return sent;
}

// What comes back: one message, or of a download all up to its end.
static void receive_part(bkv_peer_call_t *call) {
    const uint8_t *message;
    size_t length;
    bool well, came = next_message(&message, &length, &well);
    if (call->kind->shape != BKV_DOWNLOAD) {
        well = came && take(call, message, length);
    } else {
        while (came && take(call, message, length)) {
            came = next_message(&message, &length, &well);
        }
    }
    if (call->error.status == BKV_OK && !well) {
        bkv_fail(&call->error, BKV_BUSY, "it broke off");
    }
}

static void attempt(bkv_peer_call_t *call) {
    call->error = (bkv_error_t){.status = BKV_OK};
    if (send_part(call)) {
        receive_part(call);
    }
    bool more = call->error.status == BKV_OK && call->kind->more != NULL && call->kind->more(call);
    if (!more || bkv_peer_call_attempt(call, &call->error) != BKV_OK) {
        bkv_peer_call_conclude(call);
    }
}

static void run_all(void) {
    while (run.call != NULL || run.reads != NULL) {
        bkv_peer_call_t *call = run.call;
        bkv_verbs_transfer_t *transfer = run.reads;
        if (call != NULL) {
            run.call = NULL;
            attempt(call);
        } else {
            run.reads = transfer->next;
            end_read(transfer);
        }
    }
}

// ---- who asks ----

static void is_done(const bkv_error_t *error, bool has_results) {
    run.dones++;
    require((error->status == BKV_OK) == has_results && (has_results || error->message[0] != '\0'));
}

static void on_have(void *user, const bkv_error_t *error, const uint64_t *bytes) {
    (void)user;
    is_done(error, bytes != NULL);
    require(bytes == NULL || run.said_count == run.count);
    for (uint32_t i = 0; bytes != NULL && i < run.count; i++) {
        require(bytes[i] == run.said[i]);
    }
}

static void on_forget(void *user, const bkv_error_t *error, const bool *had) {
    (void)user;
    is_done(error, had != NULL);
    require(had == NULL || run.said_count == run.count);
    for (uint32_t i = 0; had != NULL && i < run.count; i++) {
        require(had[i] == (run.said[i] != 0));
    }
}

// Every other record is here to be sent; of the rest the answer says nothing.
static void on_stored(void *user, const bkv_error_t *error, const bkv_status_t *results) {
    (void)user;
    is_done(error, results != NULL);
    require(results == NULL || run.said_count == (run.count + 1) / 2);
    for (uint32_t i = 0; results != NULL && i < run.count; i++) {
        uint64_t code = i % 2 == 0 ? run.said[i / 2] : BKV_NOT_FOUND;
        require((uint64_t)results[i] == code || (results[i] == BKV_INTERNAL && code != BKV_OK));
        require((unsigned)results[i] <= BKV_UNAUTHENTICATED);
    }
}

static void on_drain(void *user, const bkv_error_t *error, const bkv_drain_progress_t *progress) {
    (void)user;
    is_done(error, progress != NULL);
}

static void *on_begin(void *user, uint32_t index, uint64_t tenant, uint64_t bytes, uint64_t ttl_ms) {
    (void)user, (void)ttl_ms;
    require(index < run.count && bytes >= sizeof(bkv_record_header_t) && bytes <= peers.record_max);
    kept_t *kept = &run.kept[index];
    require(!kept->begun && !kept->ended);
    if (run.question == FETCH && !run.unsure) { // all of its header is there by now
        bkv_record_header_t header;
        memcpy(&header, kept->said, sizeof(header));
        require(kept->said_bytes >= sizeof(header) && header.tenant == tenant);
    }
    kept->begun = true;
    kept->bytes = bytes;
    if ((run.unwanted >> index & 1) == 0) {
        require(posix_memalign((void **)&kept->memory, 64, bytes) == 0);
    }
    return kept->memory;
}

// What has come is what was said, whole, and the record that was asked for.
static void check_kept(const kept_t *kept, uint32_t index) {
    const bkv_record_header_t *header = (const void *)kept->memory;
    require(kept->begun && kept->memory != NULL);
    if (kept->read) {
        require(kept->memory[0] == READ && kept->memory[kept->bytes - 1] == READ);
        return;
    }
    require(header->magic == BKV_RECORD_MAGIC && header->length == kept->bytes);
    require(memcmp(header->key, &names[index].key, BKV_KEY_BYTES) == 0);
    require(memcmp(header->spec_id, &names[index].spec_id, BKV_SPEC_ID_BYTES) == 0);
    require(run.unsure || (kept->said_bytes == kept->bytes && memcmp(kept->said, kept->memory, kept->bytes) == 0));
}

static void on_end(void *user, uint32_t index, const bkv_error_t *error) {
    (void)user;
    require(index < run.count && !run.kept[index].ended && run.dones == 0);
    kept_t *kept = &run.kept[index];
    kept->ended = true;
    if (error->status == BKV_OK) {
        check_kept(kept, index);
    }
    free(kept->memory); // whoever writes there from now on is found out
    kept->memory = NULL;
}

static void on_fetched(void *user, const bkv_error_t *error) {
    (void)user, (void)error;
    run.dones++;
    for (uint32_t i = 0; i < run.count; i++) {
        require(run.kept[i].ended);
    }
}

static const bkv_fetch_sink_t sink = {.begin = on_begin, .end = on_end, .done = on_fetched};

// ---- questions ----

// A link over which the other's arena can be read, and a device that has registered all memory there is.
static void fetch_over_link(void) {
    static struct bkv_peers_verbs verbs = {.device.lock = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER};
    struct ibv_mr all = {.length = SIZE_MAX};
    bkv_way_t way = {.verbs = &verbs, .bytes = AWAY, .refs = 1};
    struct bkv_peer_verbs *link = calloc(1, sizeof(*link));
    require(link != NULL);
    *link = (struct bkv_peer_verbs){.peer = &peer, .state = BKV_LINK_READY, .way = &way};
    if (verbs.peers == NULL) {
        bkv_links_init(&verbs);
        verbs.peers = &peers;
    }
    verbs.device.arena = &all;
    peers.verbs = &verbs;
    peer.verbs = link;
    peer.offers_verbs = true;
    require(bkv_peer_fetch(&peer, names, run.count, UINT64_MAX, &sink, NULL, NULL, NULL) == BKV_OK);
    run_all();
    bkv_peer_verbs_forget(&peer);
    require(way.refs == 0 && verbs.unused == &way && verbs.pulls == NULL);
    verbs.unused = NULL;
    peer.offers_verbs = false;
    peers.verbs = NULL;
}

static void link_answer(void) {
    const uint8_t *message;
    size_t length;
    bool well;
    if (!next_message(&message, &length, &well)) {
        return;
    }
    grpc_byte_buffer *buffer = received(message, length, run.piece);
    ProtobufCMessage *response = bkv_peer_unpack(&balancekv__cluster__v1__link_response__descriptor, buffer);
    bkv_way_t way = {.refs = 1};
    bkv_verbs_end_t other = {.reads = 0};
    bkv_error_t error;
    if (response != NULL && bkv_way_answered(&way, response, &other, &error) == BKV_OK) {
        const Balancekv__Cluster__V1__LinkResponse *said = (const Balancekv__Cluster__V1__LinkResponse *)response;
        require(other.bytes > 0 && other.reads > 0 && way.bytes == other.bytes && other.bytes == said->verbs->bytes);
        require(said->link.len == sizeof(way.id) && memcmp(&way.id, said->link.data, sizeof(way.id)) == 0);
        require(other.queue_pair == said->verbs->queue_pair &&
                memcmp(other.gid, said->verbs->gid.data, sizeof(other.gid)) == 0);
    }
    protobuf_c_message_free_unpacked(response, NULL);
    grpc_byte_buffer_destroy(buffer);
}

static bkv_status_t ask(void) {
    switch (run.question) {
    case HAVE:
        return bkv_peer_have(&peer, names, run.count, UINT64_MAX, on_have, NULL, NULL);
    case FORGET:
        return bkv_peer_forget(&peer, names, run.count, UINT64_MAX, on_forget, NULL, NULL);
    case STORE:
        return bkv_peer_store(&peer, names, run.count, UINT64_MAX, on_stored, NULL, NULL);
    case DRAIN:
        return bkv_peer_drain(&peer, BKV_DRAIN_ASK, UINT64_MAX, on_drain, NULL, NULL);
    default:
        return bkv_peer_fetch(&peer, names, run.count, UINT64_MAX, &sink, NULL, NULL, NULL);
    }
}

// ---- the daemon that asks ----

// Every other record is here: a header, and nothing in it that anybody reads.
static void fill_store(bkv_store_t *store) {
    for (uint32_t i = 0; i < NAMES; i++) {
        memset(&names[i], 'a' + (int)i, sizeof(names[i]));
        bkv_slot_t slot;
        bkv_record_header_t header = {.magic = BKV_RECORD_MAGIC, .version = BKV_RECORD_VERSION, .codec = BKV_CODEC_RAW};
        header.length = LENGTH;
        header.tokens = header.layers = header.heads = 1;
        header.key_dim = header.value_dim = 8;
        header.dtype = BKV_BF16;
        memcpy(header.key, &names[i].key, sizeof(header.key));
        memcpy(header.spec_id, &names[i].spec_id, sizeof(header.spec_id));
        if (i % 2 == 0) {
            require(bkv_store_reserve(store, 0, LENGTH, 1, &slot, NULL) == BKV_OK);
            memset(slot.data, 0, LENGTH);
            memcpy(slot.data, &header, sizeof(header));
            bkv_record_seal(slot.data);
            require(bkv_store_publish(store, &slot, 0, 0, 1, NULL) == BKV_OK);
        }
    }
}

static void start(void) {
    const bkv_store_config_t config = {.arena_bytes = 256 << 10,
                                       .slab_bytes = 64 << 10,
                                       .max_entries = 16,
                                       .shards = 1,
                                       .max_leases = 1,
                                       .max_lease_keys = 1,
                                       .arena_fd = -1};
    require(bkv_store_create(&config, 1, &peers.store, NULL, NULL) == BKV_OK);
    fill_store(peers.store);
    peers.record_max = ROOM;
    peers.timeout_ms = 1000;
    peers.max_batch = MAX_BATCH;
    pthread_mutex_init(&peers.lock, NULL);
    pthread_cond_init(&peers.idle, NULL);
    peers.lane_count = 2;
    for (uint32_t i = 0; i < peers.lane_count; i++) {
        peers.lanes[i].peers = &peers;
        pthread_mutex_init(&peers.lanes[i].lock, NULL);
    }
    peer.peers = &peers;
    strcpy(peer.id, "other");
    atomic_init(&peer.refs, 1);
    bkv_pulse_init(&peer.pulse, peers.timeout_ms);
}

// Nothing is left of the question, here or in the store.
static void check_end(void) {
    bkv_store_metrics_t metrics;
    bkv_store_metrics(peers.store, &metrics);
    require(run.dones == 1 && run.call == NULL && run.reads == NULL && metrics.pinned == 0);
    require(peers.live == 0 && atomic_load(&peer.refs) == 1 && atomic_load(&peer.calls) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (peers.store == NULL) {
        start();
    }
    if (size < 4 || size > SIZE_MOST) {
        return 0;
    }
    memset(&run, 0, offsetof(run_t, kept));
    for (uint32_t i = 0; i < NAMES; i++) {
        memset(&run.kept[i], 0, offsetof(kept_t, said));
    }
    run.question = (question_t)(data[0] % QUESTIONS);
    run.piece = (size_t)data[1] + 1;
    run.count = data[2] % (NAMES + 1u);
    run.unwanted = data[3] & 15;
    run.unread = data[3] >> 4;
    run.data = data + 4;
    run.size = size - 4;
    atomic_store(&peers.counters.peer_fetched_total, 0); // each run is as if it were the first
    if (run.question == LINK) {
        link_answer();
    } else if (run.question == LOCATE) {
        fetch_over_link();
        check_end();
    } else {
        require(ask() == BKV_OK);
        run_all();
        check_end();
    }
    return 0;
}
