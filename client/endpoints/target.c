// target.c - checks endpoint and TLS options, and makes channels. Calls over them are call.c's.
#include "client/endpoints/target.h"

#include "proto/address.h"
#include "proto/grpc_arg.h"
#include "proto/pem.h"

#include <assert.h>
#include <grpc/grpc_security.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

// Largest message taken from a daemon: its own default bound is 80 MiB, records come in far smaller chunks.
#define RECEIVE_MAX (128 << 20)

// A restarted daemon is found within a second. CONNECT_TIMEOUT bounds one try, handshakes included.
#define RECONNECT_FIRST_MS   100
#define RECONNECT_LONGEST_MS 1000
#define CONNECT_TIMEOUT_MS   5000

// Servers of gRPC close connections that ping more often than every 5 minutes. Besides, keepalive sets TCP_USER_TIMEOUT to
// its timeout: a peer that is gone while bytes are on the way is noticed after that.
#define KEEPALIVE_MS         330000
#define KEEPALIVE_TIMEOUT_MS 15000

static bool set(const char *text) {
    return text != NULL && text[0] != '\0';
}

// ---- endpoint ----

static bkv_status_t check_unix(const char *path, bkv_error_t *err) {
    if (path[0] == '\0') {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "endpoint: unix: without a path");
    }
    if (strlen(path) >= sizeof((struct sockaddr_un *)NULL)->sun_path) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "endpoint: the socket's path has %zu bytes, at most %zu are possible",
                        strlen(path), sizeof((struct sockaddr_un *)NULL)->sun_path - 1);
    }
    return BKV_OK;
}

static bkv_status_t check_tcp(const char *endpoint, bkv_error_t *err) {
    if (!bkv_address_has_host(endpoint)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "endpoint: \"%s\" is neither unix:/path nor host:port", endpoint);
    }
    if (!bkv_address_has_port(endpoint)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "endpoint: \"%s\" has no port between 1 and 65535", endpoint);
    }
    return BKV_OK;
}

static bkv_status_t check_endpoint(const char *endpoint, bool *is_unix, bkv_error_t *err) {
    *is_unix = strncmp(endpoint, "unix:", 5) == 0;
    return *is_unix ? check_unix(endpoint + 5, err) : check_tcp(endpoint, err);
}

// ---- TLS ----

static bkv_status_t check_tls_options(const bkv_client_options_t *options, bool is_unix, bkv_error_t *err) {
    if (set(options->tls_cert) != set(options->tls_key)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: missing; a client certificate needs both tls_cert and tls_key",
                        set(options->tls_cert) ? "tls_key" : "tls_cert");
    }
    if (!set(options->tls_ca) && (set(options->tls_cert) || set(options->tls_name))) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "tls_ca: missing; without it there is no TLS");
    }
    if (set(options->tls_ca) && is_unix && !set(options->tls_name)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "tls_name: needed for TLS over a unix socket, which has no host name");
    }
    return BKV_OK;
}

static bkv_status_t make_credentials(const bkv_client_options_t *options, grpc_channel_credentials **credentials,
                                     bkv_error_t *err) {
    const bkv_pem_files_t files = {.ca = options->tls_ca,
                                   .cert = options->tls_cert,
                                   .key = options->tls_key,
                                   .ca_option = "tls_ca",
                                   .cert_option = "tls_cert",
                                   .key_option = "tls_key"};
    return bkv_pem_credentials(&files, credentials, err);
}

// ---- options ----

static const char *choose_endpoint(const bkv_client_options_t *options) {
    if (set(options->endpoint)) {
        return options->endpoint;
    }
    const char *environment = getenv("BKV_ENDPOINT");
    return set(environment) ? environment : BKV_DEFAULT_ENDPOINT;
}

static bool copy_string(const char **copy, const char *text) {
    *copy = text != NULL ? strdup(text) : NULL;
    return *copy != NULL || text == NULL;
}

bkv_status_t bkv_client_options_init(bkv_client_options_t *copy, const bkv_client_options_t *options, bkv_error_t *err) {
    static const bkv_client_options_t defaults;
    const bkv_client_options_t *from = options != NULL ? options : &defaults;
    *copy = (bkv_client_options_t){.timeout_ms = from->timeout_ms, .window_bytes = from->window_bytes, .route = from->route};
    bool all = copy_string(&copy->endpoint, choose_endpoint(from));
    all = copy_string(&copy->tls_ca, from->tls_ca) && all;
    all = copy_string(&copy->tls_cert, from->tls_cert) && all;
    all = copy_string(&copy->tls_key, from->tls_key) && all;
    all = copy_string(&copy->tls_name, from->tls_name) && all;
    all = copy_string(&copy->transport, from->transport) && all;
    all = copy_string(&copy->verbs_device, from->verbs_device) && all;
    return all ? BKV_OK : bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
}

void bkv_client_options_deinit(bkv_client_options_t *copy) {
    const char *strings[] = {copy->endpoint, copy->tls_ca,    copy->tls_cert,    copy->tls_key,
                             copy->tls_name, copy->transport, copy->verbs_device};
    for (size_t i = 0; i < sizeof strings / sizeof strings[0]; i++) {
        free((void *)strings[i]);
    }
    *copy = (bkv_client_options_t){0};
}

// ---- target ----

static bkv_status_t target_init(bkv_client_target_t *target, const char *endpoint, const bkv_client_options_t *options,
                                bool alone, bkv_error_t *err) {
    *target = (bkv_client_target_t){0};
    bool is_unix = false;
    bkv_status_t status = check_endpoint(endpoint, &is_unix, err);
    bool tls = set(options->tls_ca) && (alone || !is_unix);
    if (status == BKV_OK) {
        status = check_tls_options(options, is_unix && alone, err);
    }
    if (status == BKV_OK && tls) {
        status = make_credentials(options, &target->credentials, err);
    } else if (status == BKV_OK) {
        target->credentials = grpc_insecure_credentials_create();
    }
    if (status != BKV_OK) {
        return status;
    }
    target->protected_link = is_unix || tls;
    target->address = strdup(endpoint);
    target->tls_name = set(options->tls_name) ? strdup(options->tls_name) : NULL;
    if (target->address == NULL || (set(options->tls_name) && target->tls_name == NULL)) {
        bkv_client_target_deinit(target);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    return BKV_OK;
}

static bool known(const bkv_client_target_t *targets, uint32_t count, const char *endpoint) {
    for (uint32_t i = 0; i < count; i++) {
        assert(targets[i].address != NULL);
        if (strcmp(targets[i].address, endpoint) == 0) {
            return true;
        }
    }
    return false;
}

bkv_status_t bkv_client_targets_init(bkv_client_target_t *targets, uint32_t most, uint32_t *count,
                                     const bkv_client_options_t *options, bkv_error_t *err) {
    bool alone = strchr(options->endpoint, ',') == NULL;
    bkv_status_t status = BKV_OK;
    *count = 0;
    for (const char *at = options->endpoint; status == BKV_OK && at != NULL;) {
        size_t length = strcspn(at, ",");
        char *endpoint = strndup(at, length);
        if (endpoint == NULL) {
            status = bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
        } else if (known(targets, *count, endpoint)) {
            status = bkv_fail(err, BKV_INVALID_ARGUMENT, "endpoint: \"%.100s\" is there twice", endpoint);
        } else if (*count == most) {
            status = bkv_fail(err, BKV_INVALID_ARGUMENT, "endpoint: more than %u of them", most);
        } else {
            status = target_init(&targets[*count], endpoint, options, alone, err);
            *count += status == BKV_OK;
        }
        free(endpoint);
        at = at[length] == ',' ? at + length + 1 : NULL;
    }
    for (; status != BKV_OK && *count > 0; (*count)--) {
        bkv_client_target_deinit(&targets[*count - 1]);
    }
    return status;
}

bkv_status_t bkv_client_target_learn(bkv_client_target_t *target, const bkv_client_options_t *options, const char *address) {
    bkv_status_t status = check_tcp(address, NULL);
    return status == BKV_OK ? target_init(target, address, options, false, NULL) : status;
}

bool bkv_client_target_local(const bkv_client_target_t *target) {
    return strncmp(target->address, "unix:", 5) == 0;
}

void bkv_client_target_deinit(bkv_client_target_t *target) {
    if (target->credentials != NULL) {
        grpc_channel_credentials_release(target->credentials);
    }
    free(target->address);
    free(target->tls_name);
    *target = (bkv_client_target_t){0};
}

grpc_channel *bkv_client_target_connect(const bkv_client_target_t *target) {
    grpc_arg args[] = {
        bkv_int_arg(GRPC_ARG_ENABLE_HTTP_PROXY, 0), // $http_proxy would apply to 127.0.0.1 as well
        bkv_int_arg(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
        bkv_int_arg(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1), // two clients, two connections
        bkv_int_arg(GRPC_ARG_ENABLE_RETRIES, 0),            // call.c retries; gRPC's own would hold on to payloads
        bkv_int_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, RECEIVE_MAX),
        bkv_int_arg(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1),
        bkv_int_arg(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0), // nobody compresses here but to make us run out of memory
        bkv_int_arg(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, RECONNECT_FIRST_MS),
        bkv_int_arg(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, RECONNECT_LONGEST_MS),
        bkv_int_arg(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, CONNECT_TIMEOUT_MS), // despite its name
        bkv_int_arg(GRPC_ARG_KEEPALIVE_TIME_MS, KEEPALIVE_MS),
        bkv_int_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KEEPALIVE_TIMEOUT_MS),
        bkv_string_arg(GRPC_ARG_PRIMARY_USER_AGENT_STRING, "libbalancekv/" BKV_VERSION),
        bkv_string_arg(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, target->tls_name),
    };
    size_t count = sizeof args / sizeof args[0] - (target->tls_name == NULL ? 1 : 0);
    const grpc_channel_args channel_args = {.num_args = count, .args = args};
    return grpc_channel_create(target->address, target->credentials, &channel_args);
}
