// model.c - checks specs, gives them their ids, and keeps the table of the open ones.
//
// The table only grows: models lie in an array that is allocated once, and a hash of pointers into it is read without a
// lock. A writer fills the model first and then publishes its pointer, so a reader sees a whole model or none.
#include "daemon/pipeline/model.h"

#include "daemon/observe/text.h"

#include <assert.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_BLOCK_TOKENS 256
#define MAX_BLOCK_TOKENS     65536
#define DEFAULT_RATE         16

struct bkv_model_table {
    bkv_model_t *models; // [capacity], filled from the front
    uint32_t capacity;
    uint32_t mask; // slots - 1
    _Atomic uint32_t count;
    uint8_t **shares;     // [capacity], of models[i]; NULL: none
    pthread_mutex_t lock; // taken by writers only
    _Atomic(const bkv_model_t *) slots[];
};

// ---- canonical encoding ----

#define ENCODING_TAG "bkv-spec-1"

typedef struct encoder {
    uint8_t bytes[sizeof(ENCODING_TAG) + 2 * 4 + BKV_MODEL_NAME_MAX + BKV_TENANT_NAME_MAX + 11 * 4 + 8];
    size_t length;
} encoder_t;

static void encode_bytes(encoder_t *encoder, const void *bytes, size_t length) {
    assert(encoder->length + length <= sizeof(encoder->bytes));
    memcpy(encoder->bytes + encoder->length, bytes, length);
    encoder->length += length;
}

static void encode_u32(encoder_t *encoder, uint32_t value) {
    uint8_t bytes[4];
    for (int i = 0; i < 4; i++) {
        bytes[i] = (uint8_t)(value >> (8 * i));
    }
    encode_bytes(encoder, bytes, sizeof(bytes));
}

static void encode_text(encoder_t *encoder, const char *text) {
    size_t length = strlen(text);
    encode_u32(encoder, (uint32_t)length);
    encode_bytes(encoder, text, length);
}

static void encode_model(const bkv_model_t *model, encoder_t *encoder) {
    encoder->length = 0;
    encode_bytes(encoder, ENCODING_TAG, sizeof(ENCODING_TAG)); // with its NUL
    encode_text(encoder, model->name);
    encode_u32(encoder, model->shape.layers);
    encode_u32(encoder, model->shape.heads);
    encode_u32(encoder, model->shape.key_dim);
    encode_u32(encoder, model->shape.value_dim);
    encode_u32(encoder, (uint32_t)model->shape.dtype);
    encode_u32(encoder, model->shape.tokens);
    encode_text(encoder, model->tenant_name);
    encode_u32(encoder, model->tp_rank);
    encode_u32(encoder, model->tp_size);
    encode_u32(encoder, (uint32_t)model->params.codec);
    encode_u32(encoder, model->params.rate);
    encode_u32(encoder, model->params.sink);
    encode_u32(encoder, (uint32_t)model->params.seed);
    encode_u32(encoder, (uint32_t)(model->params.seed >> 32));
}

// Fails only when libcrypto has no SHA-256 or no memory.
static bool sha256(const void *bytes, size_t length, uint8_t digest[32]) {
    return EVP_Digest(bytes, length, digest, NULL, EVP_sha256(), NULL) == 1;
}

// Shares can be many, so they are hashed where they lie.
static bool digest_model(const bkv_model_t *model, const encoder_t *encoder, uint8_t digest[32]) {
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    bool ok = context != NULL && EVP_DigestInit_ex(context, EVP_sha256(), NULL) == 1 &&
              EVP_DigestUpdate(context, encoder->bytes, encoder->length) == 1 &&
              EVP_DigestUpdate(context, model->params.shares, model->share_count) == 1 &&
              EVP_DigestFinal_ex(context, digest, NULL) == 1;
    EVP_MD_CTX_free(context);
    return ok;
}

static uint64_t load_le64(const uint8_t *bytes) {
    uint64_t value = 0;
    for (int i = 0; i < 8; i++) {
        value |= (uint64_t)bytes[i] << (8 * i);
    }
    return value;
}

uint64_t bkv_tenant_tag(const char *name) {
    uint8_t digest[32];
    if (!sha256(name, strlen(name), digest)) {
        abort(); // no tag can be made up: it would mix tenants
    }
    return load_le64(digest);
}

// ---- checks ----

static void fill_defaults(bkv_model_t *model) {
    if (model->shape.value_dim == 0) {
        model->shape.value_dim = model->shape.key_dim;
    }
    if (model->shape.tokens == 0) {
        model->shape.tokens = DEFAULT_BLOCK_TOKENS;
    }
    if (model->tp_size == 0) {
        model->tp_size = 1;
    }
    if (model->params.codec == 0) {
        model->params.codec = BKV_CODEC_BALANCE;
    }
    if (model->params.rate == 0) {
        model->params.rate = DEFAULT_RATE; // for any codec: a Put may ask for balance and leave the rate to the spec
    }
}

// Shares that are all alike are what no shares are, and should be the same spec.
static void drop_equal_shares(bkv_model_t *model) {
    const uint8_t *shares = model->params.shares;
    if (model->share_count == 0 || memcmp(shares, shares + 1, model->share_count - 1) == 0) {
        model->params.shares = NULL;
        model->share_count = 0;
    }
}

static bkv_status_t check_range(const char *field, uint32_t value, uint32_t lowest, uint32_t highest, bkv_error_t *err) {
    if (value < lowest || value > highest) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.%s: %u is not within %u..%u", field, value, lowest, highest);
    }
    return BKV_OK;
}

static bkv_status_t check_dim(const char *field, uint32_t dim, bkv_error_t *err) {
    if (dim % BKV_DIM_STEP != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.%s: %u is not a multiple of %d", field, dim, BKV_DIM_STEP);
    }
    return check_range(field, dim, BKV_DIM_STEP, BKV_MAX_DIM, err);
}

static bkv_status_t check_shape(const bkv_shape_t *shape, bkv_error_t *err) {
    bkv_status_t status = check_range("layers", shape->layers, 1, BKV_MAX_LAYERS, err);
    if (status == BKV_OK) {
        status = check_range("kv_heads", shape->heads, 1, BKV_MAX_HEADS, err);
    }
    if (status == BKV_OK && shape->layers * shape->heads > BKV_MAX_SECTIONS) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.kv_heads: %u layers of %u heads are more than %d sections",
                          shape->layers, shape->heads, BKV_MAX_SECTIONS);
    }
    if (status == BKV_OK) {
        status = check_dim("key_dim", shape->key_dim, err);
    }
    if (status == BKV_OK) {
        status = check_dim("value_dim", shape->value_dim, err);
    }
    if (status == BKV_OK && bkv_dtype_name(shape->dtype) == NULL) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.dtype: %d is not a known type", (int)shape->dtype);
    }
    if (status == BKV_OK) {
        status = check_range("block_tokens", shape->tokens, 1, MAX_BLOCK_TOKENS, err);
    }
    bkv_error_t cause;
    if (status == BKV_OK && bkv_shape_check(shape, &cause) != BKV_OK) { // anything the format refuses beyond the above
        status = bkv_fail(err, cause.status, "spec.%s", cause.message);
    }
    return status;
}

static bkv_status_t check_names(const bkv_model_t *model, bkv_error_t *err) {
    assert(memchr(model->name, '\0', sizeof(model->name)) != NULL);
    assert(memchr(model->tenant_name, '\0', sizeof(model->tenant_name)) != NULL);
    if (model->name[0] == '\0') {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.model: empty, but it must name weights and revision");
    }
    if (!bkv_utf8_check(model->name)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.model: not UTF-8");
    }
    if (!bkv_utf8_check(model->tenant_name)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.tenant: not UTF-8");
    }
    return BKV_OK;
}

static bkv_status_t check_shares(const bkv_model_t *model, bkv_error_t *err) {
    size_t sections = (size_t)model->shape.layers * model->shape.heads;
    if (model->share_count != 0 && model->share_count != sections) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.shares: %zu bytes for %u layers of %u heads", model->share_count,
                        model->shape.layers, model->shape.heads);
    }
    for (size_t i = 0; i < model->share_count; i++) {
        if (model->params.shares[i] == 0) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.shares: 0 for layer %zu, head %zu is not within 1..255",
                            i / model->shape.heads, i % model->shape.heads);
        }
    }
    return BKV_OK;
}

static bkv_status_t check_model(const bkv_model_t *model, bkv_error_t *err) {
    bkv_status_t status = check_names(model, err);
    if (status == BKV_OK) {
        status = check_shape(&model->shape, err);
    }
    if (status == BKV_OK && model->tp_rank >= model->tp_size) {
        status =
            bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.tp_rank: %u is not below tp_size %u", model->tp_rank, model->tp_size);
    }
    if (status == BKV_OK && bkv_codec_name(model->params.codec) == NULL) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "spec.codec: %d is not a known codec", (int)model->params.codec);
    }
    if (status == BKV_OK) {
        status = check_range("rate", model->params.rate, BKV_MIN_RATE, BKV_MAX_RATE, err);
    }
    bkv_error_t cause;
    if (status == BKV_OK && bkv_codec_check(&model->params, &cause) != BKV_OK) {
        status = bkv_fail(err, cause.status, "spec.%s", cause.message);
    }
    return status == BKV_OK ? check_shares(model, err) : status;
}

bkv_status_t bkv_model_complete(bkv_model_t *model, bkv_error_t *err) {
    fill_defaults(model);
    bkv_status_t status = check_model(model, err);
    if (status != BKV_OK) {
        return status;
    }
    drop_equal_shares(model);
    encoder_t encoder;
    encode_model(model, &encoder);
    uint8_t digest[32];
    if (!digest_model(model, &encoder, digest)) {
        return bkv_fail(err, BKV_INTERNAL, "libcrypto has no SHA-256");
    }
    memcpy(model->id.bytes, digest, sizeof(model->id.bytes));
    model->tenant = bkv_tenant_tag(model->tenant_name);
    return BKV_OK;
}

// ---- table ----

bkv_model_table_t *bkv_model_table_create(uint32_t capacity) {
    assert(capacity > 0 && capacity <= UINT32_C(1) << 24);
    uint32_t slots = 2;
    while (slots < 2 * capacity) { // at most half full: probes are short and always meet an empty slot
        slots *= 2;
    }
    bkv_model_table_t *table = calloc(1, sizeof(*table) + slots * sizeof(table->slots[0]));
    if (table == NULL) {
        return NULL;
    }
    table->models = calloc(capacity, sizeof(table->models[0]));
    table->shares = calloc(capacity, sizeof(table->shares[0]));
    if (table->models == NULL || table->shares == NULL) {
        free(table->models);
        free(table->shares);
        free(table);
        return NULL;
    }
    table->capacity = capacity;
    table->mask = slots - 1;
    atomic_init(&table->count, 0);
    for (uint32_t i = 0; i < slots; i++) {
        atomic_init(&table->slots[i], NULL);
    }
    pthread_mutex_init(&table->lock, NULL);
    return table;
}

void bkv_model_table_destroy(bkv_model_table_t *table) {
    if (table == NULL) {
        return;
    }
    pthread_mutex_destroy(&table->lock);
    for (uint32_t i = 0; i < atomic_load_explicit(&table->count, memory_order_relaxed); i++) {
        free(table->shares[i]);
    }
    free(table->shares);
    free(table->models);
    free(table);
}

// The slot that holds id, or the empty one where it would go. An id is the output of SHA-256, so its bytes are the hash.
static uint32_t probe(const bkv_model_table_t *table, const bkv_spec_id_t *id, const bkv_model_t **found) {
    uint32_t slot = (uint32_t)load_le64(id->bytes) & table->mask;
    for (;; slot = (slot + 1) & table->mask) {
        *found = atomic_load_explicit(&table->slots[slot], memory_order_acquire);
        if (*found == NULL || memcmp((*found)->id.bytes, id->bytes, sizeof(id->bytes)) == 0) {
            return slot;
        }
    }
}

// The model as the i-th of the table, which owns its shares from here on. False: no memory for them.
static bool keep_model(bkv_model_table_t *table, uint32_t i, const bkv_model_t *model) {
    table->models[i] = *model;
    if (model->share_count > 0) {
        table->shares[i] = malloc(model->share_count);
        if (table->shares[i] == NULL) {
            return false;
        }
        memcpy(table->shares[i], model->params.shares, model->share_count);
        table->models[i].params.shares = table->shares[i];
    }
    return true;
}

bkv_status_t bkv_model_table_add(bkv_model_table_t *table, const bkv_model_t *model, bkv_error_t *err) {
    const bkv_model_t *found;
    bkv_status_t status = BKV_OK;
    pthread_mutex_lock(&table->lock);
    uint32_t slot = probe(table, &model->id, &found);
    uint32_t count = atomic_load_explicit(&table->count, memory_order_relaxed);
    if (found == NULL && count == table->capacity) {
        status = bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "spec: %u specs are open already (limits.max_specs)", count);
    } else if (found == NULL && !keep_model(table, count, model)) {
        status = bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "spec.shares: no memory for them");
    } else if (found == NULL) {
        atomic_store_explicit(&table->slots[slot], &table->models[count], memory_order_release);
        atomic_store_explicit(&table->count, count + 1, memory_order_relaxed);
    }
    pthread_mutex_unlock(&table->lock);
    return status;
}

const bkv_model_t *bkv_model_table_find(const bkv_model_table_t *table, const bkv_spec_id_t *id) {
    const bkv_model_t *found;
    probe(table, id, &found);
    return found;
}

bkv_status_t bkv_model_table_require(const bkv_model_table_t *table, const bkv_spec_id_t *id, const bkv_model_t **model,
                                     bkv_error_t *err) {
    const bkv_model_t *found = bkv_model_table_find(table, id);
    if (found == NULL) {
        return bkv_fail(err, BKV_NOT_FOUND, "spec_id: not open here; Open the spec first (again after a restart)");
    }
    if (model != NULL) {
        *model = found;
    }
    return BKV_OK;
}

uint32_t bkv_model_table_count(const bkv_model_table_t *table) {
    return atomic_load_explicit(&table->count, memory_order_relaxed);
}
