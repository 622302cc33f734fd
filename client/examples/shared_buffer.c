// shared_buffer.c - blocks that are made where they are sent from: no copy on this side between the cache and the daemon.
//
//   cc shared_buffer.c -o shared_buffer $(pkg-config --cflags --libs balancekv) -lm
//   balancekvd --socket /tmp/bkv.sock & ./shared_buffer unix:/tmp/bkv.sock
//
// Payloads are written into buffers that the library shares with the daemon (bkv_buffer_get), two of them in turn: while the
// daemon compresses one, the next block is made in the other. Records are read where the daemon has put them. Where there is no
// memory to share, the same program works by messages; which of them it was, it says at the end. put_get.c has the rest of the
// API.
#include <balancekv.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 8, KV_HEADS = 4, DIM = 128, BLOCK = 256, BLOCKS = 8, BUFFERS = 2 };

#define BLOCK_BYTES ((size_t)LAYERS * 2 * KV_HEADS * BLOCK * DIM * sizeof(uint16_t))

static void check(bkv_status_t status, const char *what, const bkv_error_t *err) {
    if (status != BKV_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, bkv_status_name(status), err->message);
        exit(1);
    }
}

// Stands for an engine that gathers the pages of a block: [layer][K,V][head][token][dim] in bf16, written once, where it is to be.
static void make_block(uint32_t number, uint16_t *payload) {
    uint32_t state = number + 1;
    for (size_t i = 0; i < BLOCK_BYTES / sizeof *payload; i++) {
        state = state * 1664525u + 1013904223u;
        payload[i] = bkv_float_to_bf16((float)(int32_t)state / 2147483648.0f);
    }
}

static bkv_key_t key_of(const bkv_spec_id_t *id, uint32_t number) {
    bkv_key_t key;
    bkv_key_next(id, NULL, &number, 1, &key);
    return key;
}

// Waits for the Put of one buffer, so that it can be filled again. Had a Put ended without the daemon's answer, the buffer would
// have to be given back instead; this program just stops.
static uint64_t wait_for_one(bkv_queue_t *queue) {
    bkv_completion_t done;
    while (bkv_queue_poll(queue, &done, 1, 1000) == 0) {
    }
    check(done.error.status, "put", &done.error);
    return done.tag;
}

static void put_blocks(bkv_client_t *client, const bkv_spec_id_t *id) {
    bkv_error_t err;
    bkv_queue_t *queue;
    bkv_put_t puts[BUFFERS];
    uint16_t *buffers[BUFFERS];
    check(bkv_queue_create(client, BUFFERS, &queue, &err), "queue", &err);
    for (uint32_t i = 0; i < BUFFERS; i++) {
        buffers[i] = bkv_buffer_get(client, BLOCK_BYTES);
        if (buffers[i] == NULL) {
            exit(1);
        }
    }
    for (uint32_t number = 0; number < BLOCKS + BUFFERS; number++) {
        uint64_t slot = number < BUFFERS ? number : wait_for_one(queue);
        if (number >= BLOCKS) {
            continue; // only waiting for the last ones
        }
        make_block(number, buffers[slot]);
        puts[slot] = (bkv_put_t){.key = key_of(id, number),
                                 .position = (uint64_t)number * BLOCK,
                                 .tokens = BLOCK,
                                 .payload = buffers[slot],
                                 .payload_bytes = BLOCK_BYTES};
        bkv_status_t status = bkv_put_submit(queue, slot, id, &puts[slot], 1, 0, NULL);
        if (status != BKV_OK) {
            fprintf(stderr, "put: %s\n", bkv_status_name(status));
            exit(1);
        }
    }
    for (uint32_t i = 0; i < BUFFERS; i++) {
        bkv_buffer_put(client, buffers[i]);
    }
    bkv_queue_destroy(queue);
}

// Records lie in shared memory, of which there is little: use them, then free them.
static void get_blocks(bkv_client_t *client, const bkv_spec_id_t *id) {
    bkv_error_t err;
    bkv_key_t keys[BLOCKS];
    bkv_record_t records[BLOCKS];
    size_t bytes = 0, tokens = 0;
    for (uint32_t number = 0; number < BLOCKS; number++) {
        keys[number] = key_of(id, number);
    }
    check(bkv_get(client, id, keys, BLOCKS, NULL, 0, records, &err), "get", &err);
    for (uint32_t number = 0; number < BLOCKS; number++) {
        bkv_section_view_t view;
        bkv_record_section(records[number].data, 0, 0, &view);
        bytes += records[number].length;
        tokens += view.tokens;
        bkv_record_free(&records[number]);
    }
    printf("%d blocks of %zu bytes came back as records of %zu bytes in all, with %zu tokens in their first head\n", BLOCKS,
           BLOCK_BYTES, bytes, tokens);
}

static void show_transport(bkv_client_t *client) {
    bkv_error_t err;
    bkv_transport_info_t info[BKV_TRANSPORTS];
    size_t count;
    check(bkv_transports(client, 0, info, &count, &err), "transports", &err);
    for (size_t i = 0; i < count; i++) {
        printf("%-8s %s%s%s\n", info[i].name,
               info[i].chosen   ? "in use"
               : info[i].usable ? "usable"
                                : "not usable",
               info[i].reason[0] != '\0' ? ": " : "", info[i].reason);
    }
}

int main(int argc, char **argv) {
    bkv_error_t err;
    bkv_client_t *client;
    bkv_client_options_t options = {.endpoint = argc > 1 ? argv[1] : NULL, .window_bytes = 64 << 20};
    check(bkv_client_create(&options, &client, &err), "client", &err);
    bkv_spec_t spec = {.model = "example/shared-buffer@1",
                       .layers = LAYERS,
                       .kv_heads = KV_HEADS,
                       .key_dim = DIM,
                       .dtype = BKV_BF16,
                       .block_tokens = BLOCK,
                       .codec = BKV_CODEC_BALANCE,
                       .rate = 8};
    bkv_spec_id_t id;
    check(bkv_open(client, &spec, 0, &id, NULL, &err), "open", &err);
    put_blocks(client, &id);
    get_blocks(client, &id);
    show_transport(client);
    bkv_client_destroy(client);
    return 0;
}
