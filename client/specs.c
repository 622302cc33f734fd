// specs.c - Open, and the memory of opened specs that lets call.c open them again after a restart of the daemon.
#include "client.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

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
        free(spec);
    }
}

void bkv_client_saw_epoch(bkv_client_t *client, const bkv_call_t *call, uint64_t boot_epoch) {
    if (boot_epoch == 0) {
        return;
    }
    pthread_mutex_lock(&client->lock);
    client->boot_epoch = boot_epoch;
    bkv_client_spec_t *spec = call->kind->names_spec ? bkv_client_spec_find(client, &call->spec_id) : NULL;
    if (spec != NULL) {
        spec->boot_epoch = boot_epoch;
    }
    pthread_mutex_unlock(&client->lock);
}

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

// Adds or refreshes. Out of memory, the spec is only not opened again by itself.
static void remember(bkv_client_t *client, const bkv_spec_id_t *id, grpc_slice request, uint64_t boot_epoch) {
    bkv_client_spec_t *fresh = calloc(1, sizeof *fresh);
    pthread_mutex_lock(&client->lock);
    client->boot_epoch = boot_epoch;
    bkv_client_spec_t *spec = bkv_client_spec_find(client, id);
    if (spec == NULL && fresh != NULL) {
        spec = fresh;
        fresh = NULL;
        spec->id = *id;
        spec->request = grpc_slice_ref(request);
        spec->next = client->specs;
        client->specs = spec;
    }
    if (spec != NULL) {
        spec->boot_epoch = boot_epoch;
    }
    pthread_mutex_unlock(&client->lock);
    free(fresh);
}

bkv_status_t bkv_client_spec_reopened(bkv_client_t *client, const bkv_spec_id_t *id, grpc_byte_buffer *message,
                                      uint64_t *boot_epoch, bkv_error_t *err) {
    Balancekv__V1__OpenResponse *response;
    bkv_status_t status = response_unpack(message, &response, err);
    if (status != BKV_OK) {
        return status;
    }
    *boot_epoch = response->boot_epoch;
    if (memcmp(response->spec_id.data, id->bytes, sizeof id->bytes) != 0) {
        status = bkv_fail(err, BKV_FAILED_PRECONDITION,
                          "spec_id: the daemon was replaced by one that gives this spec another id; open it again");
    } else {
        remember(client, id, grpc_empty_slice(), response->boot_epoch);
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
    open->limits = (bkv_limits_t){
        .boot_epoch = response->boot_epoch,
        .max_message_bytes = response->max_message_bytes,
        .max_block_bytes = response->max_block_bytes,
        .max_batch = response->max_batch,
    };
    bkv_client_text(response->backend, strlen(response->backend), open->limits.backend, sizeof open->limits.backend);
    balancekv__v1__open_response__free_unpacked(response, NULL);
    return BKV_OK;
}

static const bkv_call_kind_t open_kind = {
    .method = BKV_CLIENT_SERVICE "Open",
    .shape = BKV_CALL_UNARY,
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
        remember(client, &open->id, open->call.request, open->limits.boot_epoch);
        pthread_mutex_lock(&client->lock);
        client->max_message_bytes = open->limits.max_message_bytes;
        client->max_block_bytes = open->limits.max_block_bytes;
        pthread_mutex_unlock(&client->lock);
        *id = open->id;
        if (limits != NULL) {
            *limits = open->limits;
        }
    }
    bkv_call_free(&open->call);
    return status;
}
