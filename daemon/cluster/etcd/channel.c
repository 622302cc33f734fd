// channel.c - checks the options, reads the TLS files, makes a channel for each endpoint.
#include "daemon/cluster/etcd/internal.h"

#include "proto/address.h"
#include "proto/grpc_arg.h"
#include "proto/pem.h"

#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

#define USER_MAX 256

// A listing comes in pages (watch.c); nothing that we ask for is near this, unless somebody else writes under our prefix.
#define RECEIVE_MAX (8 << 20)

// An etcd that was started again is found within half a second. CONNECT bounds one try, handshakes included.
#define RECONNECT_FIRST_MS   50
#define RECONNECT_LONGEST_MS 500
#define CONNECT_MS           2000

// Servers of etcd close connections that ping more often than every 5 s. A peer that is gone while a watch is quiet is noticed
// by the watch's own questions; the pings are for connections that eat what is written.
#define PING_MS         10000
#define PING_TIMEOUT_MS 5000

static bool set(const char *text) {
    return text != NULL && text[0] != '\0';
}

// ---- endpoints ----

// "host:port" or "unix:/path".
static bkv_status_t check_endpoint(const char *endpoint, bkv_error_t *err) {
    if (strncmp(endpoint, "unix:/", 6) == 0) {
        return strlen(endpoint) - 5 < sizeof(((struct sockaddr_un *)NULL)->sun_path)
                   ? BKV_OK
                   : bkv_fail(err, BKV_INVALID_ARGUMENT, "endpoints: the path in \"%s\" is too long", endpoint);
    }
    if (!bkv_address_has_host(endpoint) || !bkv_address_has_port(endpoint)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "endpoints: \"%s\" is neither host:port nor unix:/path", endpoint);
    }
    return BKV_OK;
}

static bkv_status_t check_options(const bkv_etcd_options_t *options, bkv_error_t *err) {
    if (options->endpoint_count < 1 || options->endpoint_count > BKV_ETCD_ENDPOINTS_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "endpoints: %zu, must be 1 to %d", options->endpoint_count,
                        BKV_ETCD_ENDPOINTS_MAX);
    }
    for (size_t i = 0; i < options->endpoint_count; i++) {
        bkv_status_t status = check_endpoint(options->endpoints[i], err);
        if (status != BKV_OK) {
            return status;
        }
    }
    if (set(options->tls_cert) != set(options->tls_key)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: missing; a client certificate needs both tls_cert and tls_key",
                        set(options->tls_cert) ? "tls_key" : "tls_cert");
    }
    if (!set(options->tls_ca) && (set(options->tls_cert) || set(options->tls_name))) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "tls_ca: missing; without it there is no TLS");
    }
    if (set(options->user) != set(options->password)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: missing; a login needs both user and password",
                        set(options->user) ? "password" : "user");
    }
    if (set(options->user) && (strlen(options->user) > USER_MAX || strlen(options->password) > USER_MAX)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "user, password: at most %d bytes each", USER_MAX);
    }
    return BKV_OK;
}

static bkv_status_t make_credentials(const bkv_etcd_options_t *options, grpc_channel_credentials **credentials,
                                     bkv_error_t *err) {
    const bkv_pem_files_t files = {.ca = options->tls_ca,
                                   .cert = options->tls_cert,
                                   .key = options->tls_key,
                                   .ca_option = "tls_ca",
                                   .cert_option = "tls_cert",
                                   .key_option = "tls_key"};
    return bkv_pem_credentials(&files, credentials, err);
}

// ---- channels ----

static grpc_channel *make_channel(const char *endpoint, const char *tls_name, grpc_channel_credentials *credentials) {
    grpc_arg args[] = {
        bkv_int_arg(GRPC_ARG_ENABLE_HTTP_PROXY, 0), // $http_proxy would apply to 127.0.0.1 as well
        bkv_int_arg(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
        bkv_int_arg(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1),
        bkv_int_arg(GRPC_ARG_ENABLE_RETRIES, 0), // call.c repeats, elsewhere
        bkv_int_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, RECEIVE_MAX),
        bkv_int_arg(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0),
        bkv_int_arg(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, RECONNECT_FIRST_MS),
        bkv_int_arg(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, RECONNECT_LONGEST_MS),
        bkv_int_arg(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, CONNECT_MS), // despite its name
        bkv_int_arg(GRPC_ARG_KEEPALIVE_TIME_MS, PING_MS),
        bkv_int_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, PING_TIMEOUT_MS),
        bkv_string_arg(GRPC_ARG_PRIMARY_USER_AGENT_STRING, "balancekvd/" BKV_VERSION),
        bkv_string_arg(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, tls_name),
    };
    const grpc_channel_args channel_args = {.num_args = sizeof(args) / sizeof(args[0]) - (set(tls_name) ? 0 : 1), .args = args};
    return grpc_channel_create(endpoint, credentials, &channel_args);
}

static char *copy(const char *text) {
    return set(text) ? strdup(text) : NULL;
}

bkv_status_t bkv_etcd_connect(bkv_etcd_t *etcd, const bkv_etcd_options_t *options, bkv_error_t *err) {
    grpc_channel_credentials *credentials = NULL;
    bkv_status_t status = check_options(options, err);
    if (status == BKV_OK) {
        status = make_credentials(options, &credentials, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    etcd->user = copy(options->user);
    etcd->password = copy(options->password);
    bool enough = !set(options->user) || (etcd->user != NULL && etcd->password != NULL);
    for (size_t i = 0; i < options->endpoint_count; i++) {
        etcd->endpoints[i] = strdup(options->endpoints[i]);
        etcd->channels[i] = make_channel(options->endpoints[i], options->tls_name, credentials);
        etcd->endpoint_count++;
        enough = enough && etcd->endpoints[i] != NULL;
    }
    grpc_channel_credentials_release(credentials);
    return enough ? BKV_OK : bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "etcd: out of memory");
}
