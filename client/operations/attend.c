// attend.c - Attend: queries go out, partial attention comes back into the caller's memory.
#include "client/client.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define REQUEST_MAX (1ull << 31) // gRPC counts a message's bytes in 32 bits
#define HEADS_MAX   (64u * BKV_MAX_HEADS)
#define QUERIES_MAX (1u << 20)

typedef struct attend_call {
    bkv_call_t call; // first
    float *out, *lse;
    uint64_t out_bytes, lse_bytes;
} attend_call_t;

static bkv_status_t attend_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    attend_call_t *attend = (attend_call_t *)call;
    Balancekv__V1__AttendResponse *response =
        (Balancekv__V1__AttendResponse *)bkv_client_unpack(&balancekv__v1__attend_response__descriptor, message);
    if (response == NULL) {
        return bkv_fail(err, BKV_INTERNAL, "Attend: the response is not an AttendResponse");
    }
    bkv_status_t status = BKV_OK;
    if (response->output.len != attend->out_bytes || response->lse.len != attend->lse_bytes) {
        status = bkv_fail(err, BKV_INTERNAL, "Attend: output, lse: %zu and %zu bytes, not %llu and %llu", response->output.len,
                          response->lse.len, (unsigned long long)attend->out_bytes, (unsigned long long)attend->lse_bytes);
    } else {
        memcpy(attend->out, response->output.data, response->output.len);
        memcpy(attend->lse, response->lse.data, response->lse.len);
        bkv_client_saw_epoch(call->client, call, response->boot_epoch);
    }
    balancekv__v1__attend_response__free_unpacked(response, NULL);
    return status;
}

static const bkv_call_kind_t attend_kind = {
    .method = BKV_CLIENT_SERVICE "Attend",
    .shape = BKV_UNARY,
    .names_spec = true,
    .may_miss = true,
    .take = attend_take,
};

// Sizes first: with these bounds no product below overflows.
static bkv_status_t args_check(const bkv_attend_args_t *args, uint32_t heads, uint32_t key_dim, uint32_t value_dim,
                               bkv_error_t *err) {
    if (args->layers < 1 || args->layers > BKV_MAX_LAYERS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "layers: %u is not between 1 and %d", args->layers, BKV_MAX_LAYERS);
    }
    if (heads < 1 || args->query_heads < 1 || args->query_heads > HEADS_MAX || args->query_heads % heads != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "query_heads: %u is not a multiple of %u heads", args->query_heads, heads);
    }
    if (args->queries < 1 || args->queries > QUERIES_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "queries: %u is not between 1 and %u", args->queries, QUERIES_MAX);
    }
    if (key_dim < 1 || key_dim > BKV_MAX_DIM || value_dim < 1 || value_dim > BKV_MAX_DIM) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "key_dim, value_dim: %u, %u are not between 1 and %d", key_dim, value_dim,
                        BKV_MAX_DIM);
    }
    uint64_t rows = (uint64_t)args->layers * args->query_heads * args->queries;
    if (rows * key_dim * sizeof(float) >= REQUEST_MAX || rows * value_dim * sizeof(float) >= REQUEST_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "q: %llu rows are more than fit into one call", (unsigned long long)rows);
    }
    return BKV_OK;
}

bkv_status_t bkv_attend_remote(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                               const bkv_attend_args_t *args, uint32_t heads, uint32_t key_dim, uint32_t value_dim,
                               uint32_t timeout_ms, bkv_error_t *err) {
    assert(client != NULL && id != NULL && (keys != NULL || count == 0) && args != NULL);
    assert(args->q != NULL && args->out != NULL && args->lse != NULL);
    bkv_status_t status = args_check(args, heads, key_dim, value_dim, err);
    if (status != BKV_OK) {
        return status;
    }
    attend_call_t *attend = bkv_call_new(sizeof *attend, &attend_kind, client, id, timeout_ms);
    ProtobufCBinaryData *list = bkv_client_key_list(keys, count);
    if (attend == NULL || list == NULL) {
        status = bkv_call_run(NULL, err);
    } else {
        uint64_t rows = (uint64_t)args->layers * args->query_heads * args->queries;
        attend->out = args->out;
        attend->lse = args->lse;
        attend->out_bytes = rows * value_dim * sizeof(float);
        attend->lse_bytes = rows * sizeof(float);
        Balancekv__V1__AttendRequest request = BALANCEKV__V1__ATTEND_REQUEST__INIT;
        request.spec_id = bkv_client_spec_bytes(id);
        request.n_keys = count;
        request.keys = list;
        request.first_layer = args->first_layer;
        request.layers = args->layers;
        request.query_heads = args->query_heads;
        request.queries = args->queries;
        request.scale = args->scale;
        request.q.len = rows * key_dim * sizeof(float);
        request.q.data = (uint8_t *)args->q;
        attend->call.request = bkv_client_pack(&request.base);
        status = bkv_call_run(&attend->call, err);
    }
    free(list);
    bkv_call_free((bkv_call_t *)attend);
    return status;
}
