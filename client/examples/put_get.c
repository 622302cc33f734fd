// put_get.c - the way of an inference engine's KV cache through balancekvd, in one small program to copy from.
//
//   cc put_get.c -o put_get $(pkg-config --cflags --libs balancekv) -lm
//   balancekvd --socket /tmp/bkv.sock & ./put_get unix:/tmp/bkv.sock
//
// It makes up the K and V of a sequence of 1,000 tokens, puts all full blocks that are not there yet, gets them back as
// compressed records, computes attention over the records and merges it with that over the newest tokens, which an engine
// keeps itself. It prints how many bytes that took and how far it is from attention over everything.
#include <balancekv.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    LAYERS = 2,
    KV_HEADS = 2,
    QUERY_HEADS = 4, // grouped: two query heads read each KV head
    DIM = 64,
    BLOCK = 256,
    TOKENS = 1000,
    BLOCKS = TOKENS / BLOCK, // full ones; the rest is the newest, incomplete block
    ROWS = LAYERS * QUERY_HEADS,
};

// Every function of the library says what went wrong in a bkv_error_t. This program just stops.
static void check(bkv_status_t status, const char *what, const bkv_error_t *err) {
    if (status != BKV_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, bkv_status_name(status), err->message);
        exit(1);
    }
}

// ---- a cache such as an engine has: [layer][K,V][head][token][dim] in bf16 ----

static uint16_t cache[LAYERS][2][KV_HEADS][TOKENS][DIM];

// Keys and values that wander slowly, as those of neighbouring tokens do.
static void cache_fill(void) {
    srand(1);
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int kv = 0; kv < 2; kv++) {
            for (int head = 0; head < KV_HEADS; head++) {
                float state[DIM] = {0};
                for (int token = 0; token < TOKENS; token++) {
                    for (int i = 0; i < DIM; i++) {
                        state[i] = 0.95f * state[i] + 0.5f * ((float)rand() / (float)RAND_MAX - 0.5f);
                        cache[layer][kv][head][token][i] = bkv_float_to_bf16(state[i]);
                    }
                }
            }
        }
    }
}

// A block as Put wants it: the tokens of one block, otherwise laid out like the cache.
static uint16_t (*block_copy(int block))[BLOCK][DIM] {
    uint16_t(*payload)[BLOCK][DIM] = malloc((size_t)LAYERS * 2 * KV_HEADS * sizeof *payload);
    uint16_t(*tensors)[TOKENS][DIM] = &cache[0][0][0];
    for (int tensor = 0; payload != NULL && tensor < LAYERS * 2 * KV_HEADS; tensor++) {
        memcpy(payload[tensor], tensors[tensor][block * BLOCK], sizeof *payload);
    }
    return payload;
}

// ---- attention over a range of the cache itself, exactly; out and lse as bkv_attend gives them ----

static void attend_exactly(const float *q, int first, int count, float *out, float *lse) {
    for (int row = 0; row < ROWS; row++) {
        int layer = row / QUERY_HEADS, head = row % QUERY_HEADS / (QUERY_HEADS / KV_HEADS);
        double sum = 0, mean[DIM] = {0};
        for (int token = first; token < first + count; token++) {
            double score = 0;
            for (int i = 0; i < DIM; i++) {
                score += (double)q[row * DIM + i] * (double)bkv_bf16_to_float(cache[layer][0][head][token][i]);
            }
            double weight = exp(score / sqrt(DIM));
            sum += weight;
            for (int i = 0; i < DIM; i++) {
                mean[i] += weight * (double)bkv_bf16_to_float(cache[layer][1][head][token][i]);
            }
        }
        for (int i = 0; i < DIM; i++) {
            out[row * DIM + i] = (float)(mean[i] / sum);
        }
        lse[row] = (float)log(sum);
    }
}

// ---- the way through the daemon ----

// The key of a block names its tokens and all before it, so two sequences share what they begin with.
static void make_keys(const bkv_spec_id_t *id, bkv_key_t keys[BLOCKS]) {
    for (uint32_t block = 0; block < BLOCKS; block++) {
        uint32_t token_ids[BLOCK];
        for (uint32_t i = 0; i < BLOCK; i++) {
            token_ids[i] = (block * BLOCK + i) * 7 % 32000;
        }
        bkv_key_next(id, block > 0 ? &keys[block - 1] : NULL, token_ids, BLOCK, &keys[block]);
    }
}

// Puts what is not there. Putting a block twice would do no harm, but looking first saves its transport.
static void put_missing(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t keys[BLOCKS]) {
    bool resident[BLOCKS];
    size_t prefix;
    bkv_error_t err;
    check(bkv_lookup(client, id, keys, BLOCKS, 0, resident, &prefix, &err), "lookup", &err);
    printf("lookup: the first %zu of %d blocks are resident\n", prefix, BLOCKS);
    for (int block = 0; block < BLOCKS; block++) {
        if (resident[block]) {
            continue;
        }
        uint16_t(*payload)[BLOCK][DIM] = block_copy(block);
        bkv_put_t put = {
            .key = keys[block],
            .position = (uint64_t)block * BLOCK,
            .tokens = BLOCK,
            .payload = payload,
            .payload_bytes = (size_t)LAYERS * 2 * KV_HEADS * sizeof *payload,
        };
        bkv_put_result_t result;
        check(bkv_put(client, id, &put, 1, 0, &result, &err), "put", &err);
        printf("put: block %d: %zu bytes, stored in %llu\n", block, put.payload_bytes, (unsigned long long)result.stored_bytes);
        free(payload);
    }
}

// What is in a record can also be read section by section, dequantised: for an engine with attention of its own.
static void show_section(const bkv_record_t *record) {
    bkv_section_view_t view;
    bkv_record_section(record->data, 0, 0, &view); // layer 0, head 0
    uint32_t *index = malloc(view.tokens * sizeof *index);
    float *log_weight = malloc(view.tokens * sizeof *log_weight);
    if (index != NULL && log_weight != NULL && view.tokens > 0) {
        bkv_section_read(&view, NULL, NULL, log_weight, index);
        printf("block 0, layer 0, head 0: %u of %u tokens are kept; the last is token %u with weight %.2f\n", view.tokens,
               view.source_tokens, index[view.tokens - 1], exp((double)log_weight[view.tokens - 1]));
    }
    free(index);
    free(log_weight);
}

// Attention over records: the best backend of this machine, its scratch memory, one call.
static void attend_records(const bkv_record_t *records, size_t count, const float *q, float *out, float *lse) {
    const bkv_backend_t *backend = bkv_backend_get("auto");
    const void *data[BLOCKS];
    for (size_t i = 0; i < count; i++) {
        data[i] = records[i].data;
    }
    bkv_attend_args_t args = {.layers = LAYERS, .query_heads = QUERY_HEADS, .queries = 1, .q = q, .out = out, .lse = lse};
    bkv_error_t err;
    size_t scratch = bkv_attend_workspace(backend, data, (uint32_t)count, &args);
    void *workspace = aligned_alloc(64, (scratch + 63) / 64 * 64);
    if (workspace == NULL) {
        exit(1);
    }
    check(bkv_attend(backend, data, (uint32_t)count, &args, workspace, &err), "attend", &err);
    free(workspace);
}

static void compare(const float *q, const float *out) {
    static float exact[ROWS * DIM], lse[ROWS];
    double difference = 0, norm = 0;
    attend_exactly(q, 0, TOKENS, exact, lse);
    for (int i = 0; i < ROWS * DIM; i++) {
        difference += pow((double)out[i] - (double)exact[i], 2);
        norm += pow((double)exact[i], 2);
    }
    printf("attention: relative error %.4f\n", sqrt(difference / norm));
}

int main(int argc, char **argv) {
    bkv_error_t err;

    // One client per process is enough: it is thread-safe and reconnects by itself. Without an endpoint it takes
    // $BKV_ENDPOINT or the default socket.
    bkv_client_t *client;
    bkv_client_options_t options = {.endpoint = argc > 1 ? argv[1] : NULL, .timeout_ms = 5000};
    check(bkv_client_create(&options, &client, &err), "client", &err);

    // Say once what the cache looks like. Everything that distinguishes two caches belongs in here.
    bkv_spec_t spec = {
        .model = "example/model@1",
        .layers = LAYERS,
        .kv_heads = KV_HEADS,
        .key_dim = DIM,
        .dtype = BKV_BF16,
        .block_tokens = BLOCK,
        .codec = BKV_CODEC_BALANCE,
        .rate = 8,
    };
    bkv_spec_id_t id;
    check(bkv_open(client, &spec, 0, &id, NULL, &err), "open", &err);

    cache_fill();
    bkv_key_t keys[BLOCKS];
    make_keys(&id, keys);
    put_missing(client, &id, keys);

    // Get sets every record, also if it fails as a whole: NOT_FOUND for a block that was evicted meanwhile is a miss, not an
    // error, and an engine would compute it anew.
    bkv_record_t records[BLOCKS];
    check(bkv_get(client, &id, keys, BLOCKS, NULL, 0, records, &err), "get", &err);
    size_t bytes = 0;
    for (int block = 0; block < BLOCKS; block++) {
        bytes += records[block].length;
    }
    size_t raw = (size_t)LAYERS * 2 * KV_HEADS * BLOCKS * BLOCK * DIM * 2;
    printf("get: %d records in %zu bytes, %.1f times fewer than the blocks had\n", BLOCKS, bytes, (double)raw / (double)bytes);
    show_section(&records[0]);

    // Attention over the records, and over the newest tokens exactly; then the two become one.
    static float q[ROWS * DIM], out[ROWS * DIM], lse[ROWS], recent[ROWS * DIM], recent_lse[ROWS];
    for (int i = 0; i < ROWS * DIM; i++) {
        q[i] = 2.0f * ((float)rand() / (float)RAND_MAX - 0.5f);
    }
    attend_records(records, BLOCKS, q, out, lse);
    attend_exactly(q, BLOCKS * BLOCK, TOKENS - BLOCKS * BLOCK, recent, recent_lse);
    bkv_attend_merge(out, lse, recent, recent_lse, ROWS, DIM);
    compare(q, out);

    for (int block = 0; block < BLOCKS; block++) {
        bkv_record_free(&records[block]);
    }
    bkv_client_destroy(client);
    return 0;
}
