// attach_session.c - Attach and Detach: sessions of clients that share memory. What a session is, transport/ knows.
//
// Both map or register memory, which takes milliseconds, so they run on a compute thread.
#include "daemon/rpc/call.h"
#include "proto/verbs_window.h"

#include <stdlib.h>
#include <string.h>

// Of each allocation, on the wire: its handle, its length, and what frames them, with room for fields to come.
#define REQUEST_MOST ((size_t)BKV_DEVICE_ALLOCATIONS * 96 + 4096)

typedef struct attach {
    bkv_job_t job; // first: the pool knows only this
    bkv_call_t *call;
    bkv_session_id_t id;    // Detach: the session; Attach: the one that was made
    bool made;              // there is one
    bkv_attach_args_t args; // of Attach; refers to what follows
    uint8_t uuid[BKV_CUDA_UUID_BYTES];
    bkv_device_allocation_t *allocations;
    uint8_t *handles;
} attach_t;

static void attach_free(void *body) {
    attach_t *attach = body;
    // Who did not get the answer does not know the session.
    if (attach->made && attach->call->cancelled) {
        bkv_session_detach(attach->call->server->config.transports, &attach->id, NULL, NULL, NULL);
    }
    free(attach->allocations);
    free(attach->handles);
    free(attach);
}

static attach_t *attach_new(bkv_call_t *call) {
    attach_t *attach = calloc(1, sizeof(*attach));
    if (attach != NULL) {
        attach->call = call;
        call->body = attach;
        call->body_free = attach_free;
    }
    return attach;
}

static void on_cancel(bkv_job_t *job) {
    bkv_error_t error;
    bkv_fail(&error, BKV_CANCELLED, "the daemon stopped first");
    bkv_call_fail(((attach_t *)job)->call, &error);
}

static bkv_status_t start(attach_t *attach, void (*run)(bkv_job_t *job, bkv_scratch_t *scratch), bkv_error_t *err) {
    attach->job = (bkv_job_t){.run = run, .cancel = on_cancel};
    return bkv_pipeline_submit(attach->call->server->config.pipeline, &attach->job, err);
}

static bkv_status_t check_offered(const bkv_call_t *call, bkv_error_t *err) {
    return call->server->config.transports != NULL ? BKV_OK : bkv_fail(err, BKV_UNIMPLEMENTED, "this daemon shares no memory");
}

// ---- Attach ----

static void run_attach(bkv_job_t *job, bkv_scratch_t *scratch) {
    (void)scratch;
    attach_t *attach = (attach_t *)job;
    bkv_call_t *call = attach->call;
    bkv_attach_result_t result;
    bkv_error_t error;
    if (bkv_session_attach(call->server->config.transports, &attach->args, &result, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
        return;
    }
    attach->id = result.id;
    attach->made = true;
    Balancekv__V1__AttachResponse reply = BALANCEKV__V1__ATTACH_RESPONSE__INIT;
    Balancekv__V1__VerbsWindow verbs;
    reply.session = (ProtobufCBinaryData){BKV_SESSION_BYTES, result.id.bytes};
    reply.bytes = result.bytes;
    reply.idle_ms = result.idle_ms;
    reply.boot_epoch = call->server->config.boot_epoch;
    if (attach->args.kind == BKV_TRANSPORT_VERBS) {
        bkv_verbs_window_set(&result.verbs, &verbs);
        reply.verbs = &verbs;
    }
    bkv_call_reply(call, &reply.base);
}

// Copies what the arguments refer to: the message and the bump are gone when the job runs.
static bkv_status_t keep_args(attach_t *attach, const bkv_attach_args_t *args, bkv_error_t *err) {
    uint32_t count = args->allocation_count;
    attach->args = *args;
    if (args->uuid != NULL) {
        memcpy(attach->uuid, args->uuid, sizeof(attach->uuid));
        attach->args.uuid = attach->uuid;
    }
    if (count == 0) {
        return BKV_OK;
    }
    attach->allocations = calloc(count, sizeof(attach->allocations[0]));
    attach->handles = calloc(count, BKV_CUDA_HANDLE_BYTES);
    if (attach->allocations == NULL || attach->handles == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cuda_ipc.allocations: no memory for %u", count);
    }
    for (uint32_t i = 0; i < count; i++) {
        attach->allocations[i] = args->allocations[i];
        if (args->allocations[i].handle != NULL) {
            uint8_t *handle = attach->handles + (size_t)i * BKV_CUDA_HANDLE_BYTES;
            memcpy(handle, args->allocations[i].handle, BKV_CUDA_HANDLE_BYTES);
            attach->allocations[i].handle = handle;
        }
    }
    attach->args.allocations = attach->allocations;
    return BKV_OK;
}

static bkv_status_t attach_begin(bkv_call_t *call, bkv_bump_t *bump, const Balancekv__V1__AttachRequest *request,
                                 bkv_error_t *err) {
    bkv_attach_args_t args;
    bkv_status_t status = bkv_wire_get_attach(request, bump, &args, err);
    if (status == BKV_OK) {
        status = check_offered(call, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    attach_t *attach = attach_new(call);
    if (attach == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a session");
    }
    args.local = bkv_call_is_local(call);
    status = keep_args(attach, &args, err);
    return status == BKV_OK ? start(attach, run_attach, err) : status;
}

void bkv_handle_attach(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__AttachRequest *request = (const Balancekv__V1__AttachRequest *)bkv_call_long_request(
        call, &balancekv__v1__attach_request__descriptor, REQUEST_MOST, bump);
    if (request == NULL) {
        return;
    }
    bkv_error_t error;
    if (attach_begin(call, bump, request, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
    } // else run_attach may have ended the call already
}

// ---- Detach ----

// Nothing of the session is under way any more.
static void on_gone(void *user) {
    bkv_call_t *call = user;
    Balancekv__V1__DetachResponse reply = BALANCEKV__V1__DETACH_RESPONSE__INIT;
    reply.boot_epoch = call->server->config.boot_epoch;
    bkv_call_reply(call, &reply.base);
}

static void run_detach(bkv_job_t *job, bkv_scratch_t *scratch) {
    (void)scratch;
    attach_t *attach = (attach_t *)job;
    bkv_call_t *call = attach->call;
    bkv_error_t error;
    if (bkv_session_detach(call->server->config.transports, &attach->id, on_gone, call, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
    } // else on_gone may have ended the call already
}

static bkv_status_t detach_begin(bkv_call_t *call, const Balancekv__V1__DetachRequest *request, bkv_error_t *err) {
    bkv_session_id_t id;
    bkv_status_t status = bkv_wire_get_session_id("session", &request->session, &id, err);
    if (status == BKV_OK) {
        status = check_offered(call, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    attach_t *attach = attach_new(call);
    if (attach == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory to end a session");
    }
    attach->id = id;
    return start(attach, run_detach, err);
}

void bkv_handle_detach(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__DetachRequest *request =
        (const Balancekv__V1__DetachRequest *)bkv_call_request(call, &balancekv__v1__detach_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_error_t error;
    if (detach_begin(call, request, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
    } // else run_detach may have ended the call already
}
