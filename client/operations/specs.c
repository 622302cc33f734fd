// specs.c - Open, and the memory of opened specs: it lets call.c open them again after a restart of the daemon, and get.c guess
// how large their records are.
#include "client/client.h"
#include "proto/answer.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

// Of a spec that does not say (proto/balancekv.proto).
#define DEFAULT_BLOCK_TOKENS 256
#define DEFAULT_RATE         16

typedef struct open_call {
    bkv_call_t call; // first
    bkv_spec_id_t id;
    bkv_limits_t limits;
} open_call_t;

bkv_client_spec_t *bkv_client_spec_find(bkv_client_t *client, const bkv_spec_id_t *id) {
    for (bkv_client_spec_t *spec = client->specs; spec != NULL; spec = spec->next) {
        if (memcmp(spec->id.bytes, id->bytes, sizeof id->bytes) == 0) {
            return spec;
        }
    }
    return NULL;
}

void bkv_client_specs_free(bkv_client_t *client) {
    while (client->specs != NULL) {
        bkv_client_spec_t *spec = client->specs;
        client->specs = spec->next;
        grpc_slice_unref(spec->request);
        free(spec->opened);
        free(spec);
    }
}

// ---- where they are open; the lock must be held ----

bkv_client_opened_t bkv_client_spec_opened(const bkv_client_spec_t *spec, const bkv_client_endpoint_t *endpoint) {
    return endpoint->number < spec->opened_count ? spec->opened[endpoint->number] : (bkv_client_opened_t){.known = false};
}

// Out of memory it is not known, and opened again each time.
static void set_opened(bkv_client_spec_t *spec, const bkv_client_endpoint_t *endpoint, uint64_t boot_epoch) {
    uint32_t wanted = endpoint->number + 1;
    if (wanted > spec->opened_count) {
        bkv_client_opened_t *grown = realloc(spec->opened, wanted * sizeof *grown);
        if (grown == NULL) {
            return;
        }
        memset(grown + spec->opened_count, 0, (wanted - spec->opened_count) * sizeof *grown);
        spec->opened = grown;
        spec->opened_count = wanted;
    }
    spec->opened[endpoint->number] = (bkv_client_opened_t){.known = true, .boot_epoch = boot_epoch};
}

void bkv_client_saw_epoch(bkv_client_t *client, const bkv_call_t *call, uint64_t boot_epoch) {
    if (boot_epoch == 0) {
        return;
    }
    pthread_mutex_lock(&client->lock);
    call->endpoint->boot_epoch = boot_epoch;
    bkv_client_spec_t *spec = call->kind->names_spec ? bkv_client_spec_find(client, &call->spec_id) : NULL;
    if (spec != NULL) {
        set_opened(spec, call->endpoint, boot_epoch);
    }
    pthread_mutex_unlock(&client->lock);
}

// ---- how large records are ----

// The largest of late: a larger one counts at once, smaller ones wear it down.
#define FORGET 16

// Beyond its share of the record, a slice has its own header and padding.
#define SLICE_EXTRA 4096

// What `given` of `all` come to, where 0 means all from `first` on.
static uint32_t part(uint32_t first, uint32_t given, uint32_t all) {
    uint32_t rest = first < all ? all - first : 0;
    return given != 0 && given < rest ? given : rest;
}

uint64_t bkv_client_spec_room(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_range_t *range, size_t count) {
    uint64_t room = 0;
    pthread_mutex_lock(&client->lock);
    const bkv_client_spec_t *spec = bkv_client_spec_find(client, id);
    if (spec != NULL && spec->record_bytes != 0) {
        uint64_t layers = part(range->first_layer, range->layers, spec->shape.layers);
        uint64_t heads = part(range->first_head, range->heads, spec->shape.heads);
        uint64_t sections = (uint64_t)spec->shape.layers * spec->shape.heads;
        room = layers * heads == sections ? spec->record_bytes : spec->record_bytes / sections * layers * heads + SLICE_EXTRA;
    }
    pthread_mutex_unlock(&client->lock);
    return room < UINT64_MAX / 2 / count ? room * count : 0;
}

void bkv_client_spec_saw(bkv_client_t *client, const bkv_spec_id_t *id, uint64_t record_bytes) {
    uint64_t bytes = (record_bytes + 63) / 64 * 64;
    pthread_mutex_lock(&client->lock);
    bkv_client_spec_t *spec = bkv_client_spec_find(client, id);
    if (spec != NULL) {
        uint64_t worn = spec->record_bytes - spec->record_bytes / FORGET;
        spec->record_bytes = bytes > worn ? bytes : worn;
    }
    pthread_mutex_unlock(&client->lock);
}

bool bkv_client_spec_shape(bkv_client_t *client, const bkv_spec_id_t *id, bkv_shape_t *shape) {
    pthread_mutex_lock(&client->lock);
    const bkv_client_spec_t *spec = bkv_client_spec_find(client, id);
    *shape = spec != NULL ? spec->shape : (bkv_shape_t){.tokens = 0};
    pthread_mutex_unlock(&client->lock);
    return shape->tokens > 0;
}

uint64_t bkv_client_spec_bf16(bkv_client_t *client, const bkv_spec_id_t *id, size_t count) {
    bkv_shape_t shape;
    bool known = bkv_client_spec_shape(client, id, &shape);
    shape.dtype = BKV_BF16;
    uint64_t bytes = known ? bkv_shape_bytes(&shape) : 0;
    return bytes < UINT64_MAX / 2 / count ? bytes * count : 0;
}

// From the spec itself, as long as nothing has been seen. The daemon has accepted it, so only defaults are to be filled in.
static void measure(bkv_client_spec_t *known, const bkv_spec_t *spec) {
    bkv_shape_t shape = {.layers = spec->layers,
                         .heads = spec->kv_heads,
                         .tokens = spec->block_tokens != 0 ? spec->block_tokens : DEFAULT_BLOCK_TOKENS,
                         .key_dim = spec->key_dim,
                         .value_dim = spec->value_dim != 0 ? spec->value_dim : spec->key_dim,
                         .dtype = spec->dtype};
    bkv_codec_params_t params = {.codec = spec->codec != 0 ? spec->codec : BKV_CODEC_BALANCE,
                                 .rate = spec->rate != 0 ? spec->rate : DEFAULT_RATE};
    if (known->record_bytes == 0 && bkv_shape_check(&shape, NULL) == BKV_OK && bkv_codec_check(&params, NULL) == BKV_OK) {
        known->shape = shape;
        known->record_bytes = (bkv_codec_bound(&shape, &params) + 63) / 64 * 64;
    }
}

// ---- what was opened ----

static bkv_status_t response_unpack(grpc_byte_buffer *message, Balancekv__V1__OpenResponse **response, bkv_error_t *err) {
    *response = (Balancekv__V1__OpenResponse *)bkv_client_unpack(&balancekv__v1__open_response__descriptor, message);
    if (*response == NULL) {
        return bkv_fail(err, BKV_INTERNAL, "Open: the response is not an OpenResponse");
    }
    if ((*response)->spec_id.len != BKV_SPEC_ID_BYTES) {
        size_t length = (*response)->spec_id.len;
        balancekv__v1__open_response__free_unpacked(*response, NULL);
        return bkv_fail(err, BKV_INTERNAL, "Open: spec_id: %zu bytes, not %d", length, BKV_SPEC_ID_BYTES);
    }
    return BKV_OK;
}

// Adds or refreshes, for the endpoint that has answered; opened is NULL where it is known already. Out of memory, the spec is
// only not opened again by itself.
static void remember(const bkv_call_t *call, const bkv_spec_id_t *id, const bkv_spec_t *opened, const bkv_limits_t *limits) {
    bkv_client_t *client = call->client;
    bkv_client_endpoint_t *endpoint = call->endpoint;
    bkv_client_spec_t *fresh = calloc(1, sizeof *fresh);
    pthread_mutex_lock(&client->lock);
    endpoint->boot_epoch = limits->boot_epoch;
    endpoint->max_message_bytes = limits->max_message_bytes;
    endpoint->max_block_bytes = limits->max_block_bytes;
    bkv_client_spec_t *spec = bkv_client_spec_find(client, id);
    if (spec == NULL && fresh != NULL) {
        spec = fresh;
        fresh = NULL;
        spec->id = *id;
        spec->request = grpc_slice_ref(call->request);
        spec->next = client->specs;
        client->specs = spec;
    }
    if (spec != NULL) {
        set_opened(spec, endpoint, limits->boot_epoch);
        if (opened != NULL) {
            measure(spec, opened);
        }
    }
    pthread_mutex_unlock(&client->lock);
    free(fresh);
}

static bkv_limits_t limits_of(const Balancekv__V1__OpenResponse *response) {
    bkv_limits_t limits = {
        .boot_epoch = response->boot_epoch,
        .max_message_bytes = response->max_message_bytes,
        .max_block_bytes = response->max_block_bytes,
        .max_batch = response->max_batch,
    };
    bkv_answer_text(response->backend, strlen(response->backend), limits.backend, sizeof limits.backend);
    return limits;
}

bkv_status_t bkv_client_spec_reopened(bkv_call_t *call, grpc_byte_buffer *message, uint64_t *boot_epoch, bkv_error_t *err) {
    Balancekv__V1__OpenResponse *response;
    bkv_status_t status = response_unpack(message, &response, err);
    if (status != BKV_OK) {
        return status;
    }
    *boot_epoch = response->boot_epoch;
    if (memcmp(response->spec_id.data, call->spec_id.bytes, BKV_SPEC_ID_BYTES) != 0) {
        status = bkv_fail(err, BKV_FAILED_PRECONDITION,
                          "spec_id: the daemon was replaced by one that gives this spec another id; open it again");
    } else {
        bkv_limits_t limits = limits_of(response);
        remember(call, &call->spec_id, NULL, &limits);
        bkv_client_link_offered(call->endpoint, response->transports, response->n_transports);
    }
    balancekv__v1__open_response__free_unpacked(response, NULL);
    return status;
}

// ---- bkv_open ----

static bkv_status_t open_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    open_call_t *open = (open_call_t *)call;
    Balancekv__V1__OpenResponse *response;
    bkv_status_t status = response_unpack(message, &response, err);
    if (status != BKV_OK) {
        return status;
    }
    memcpy(open->id.bytes, response->spec_id.data, sizeof open->id.bytes);
    open->limits = limits_of(response);
    bkv_client_link_offered(call->endpoint, response->transports, response->n_transports);
    balancekv__v1__open_response__free_unpacked(response, NULL);
    return BKV_OK;
}

static const bkv_call_kind_t open_kind = {
    .method = BKV_CLIENT_SERVICE "Open",
    .shape = BKV_UNARY,
    .take = open_take,
};

static grpc_slice open_request(const bkv_spec_t *spec) {
    Balancekv__V1__Spec message = BALANCEKV__V1__SPEC__INIT;
    Balancekv__V1__OpenRequest request = BALANCEKV__V1__OPEN_REQUEST__INIT;
    // protobuf-c's strings are not const, but packing only reads them.
    message.model = (char *)(spec->model != NULL ? spec->model : "");
    message.tenant = (char *)(spec->tenant != NULL ? spec->tenant : "");
    message.layers = spec->layers;
    message.kv_heads = spec->kv_heads;
    message.key_dim = spec->key_dim;
    message.value_dim = spec->value_dim;
    message.dtype = (Balancekv__V1__DType)spec->dtype;
    message.block_tokens = spec->block_tokens;
    message.tp_rank = spec->tp_rank;
    message.tp_size = spec->tp_size;
    message.codec = (Balancekv__V1__Codec)spec->codec;
    message.rate = spec->rate;
    message.sink_tokens = spec->sink_tokens;
    message.no_sink = spec->no_sink;
    message.seed = spec->seed;
    message.shares = (ProtobufCBinaryData){.len = spec->share_count, .data = (uint8_t *)spec->shares};
    request.spec = &message;
    return bkv_client_pack(&request.base);
}

bkv_status_t bkv_open(bkv_client_t *client, const bkv_spec_t *spec, uint32_t timeout_ms, bkv_spec_id_t *id,
                      bkv_limits_t *limits, bkv_error_t *err) {
    assert(client != NULL && spec != NULL && id != NULL);
    open_call_t *open = bkv_call_new(sizeof *open, &open_kind, client, NULL, timeout_ms);
    if (open == NULL) {
        return bkv_call_run(NULL, err);
    }
    open->call.request = open_request(spec);
    bkv_status_t status = bkv_call_run(&open->call, err);
    if (status == BKV_OK) {
        remember(&open->call, &open->id, spec, &open->limits);
        *id = open->id;
        if (limits != NULL) {
            *limits = open->limits;
        }
    }
    bkv_call_free(&open->call);
    return status;
}
