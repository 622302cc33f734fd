// channel.c - checks the options, reads the TLS files, makes a channel for each endpoint.
#include "daemon/cluster/etcd/internal.h"

#include <ctype.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

#define PEM_FILE_MAX (1 << 20)
#define USER_MAX     256

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

static bool port_valid(const char *text) {
    unsigned port = 0;
    for (size_t i = 0; text[i] != '\0'; i++) {
        if (!isdigit((unsigned char)text[i]) || i >= 5) {
            return false;
        }
        port = port * 10 + (unsigned)(text[i] - '0');
    }
    return port >= 1 && port <= 65535;
}

// "host:port", "1.2.3.4:port", "[v6]:port" or "unix:/path". Anything else gRPC might take for one of its own URI schemes.
static bkv_status_t check_endpoint(const char *endpoint, bkv_error_t *err) {
    if (strncmp(endpoint, "unix:/", 6) == 0) {
        return strlen(endpoint) - 5 < sizeof(((struct sockaddr_un *)NULL)->sun_path)
                   ? BKV_OK
                   : bkv_fail(err, BKV_INVALID_ARGUMENT, "endpoints: the path in \"%s\" is too long", endpoint);
    }
    const char *colon = strrchr(endpoint, ':');
    size_t host = colon != NULL ? (size_t)(colon - endpoint) : 0;
    bool bracketed = host > 2 && endpoint[0] == '[' && endpoint[host - 1] == ']';
    bool plain = host > 0 && strcspn(endpoint, ":[]/ ") == host;
    if ((!bracketed && !plain) || !port_valid(colon + 1)) {
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

// ---- TLS ----

static bkv_status_t read_pem(const char *option, const char *path, char **text, bkv_error_t *err) {
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %s: %s", option, path, strerror(errno));
    }
    char *bytes = calloc(1, PEM_FILE_MAX + 1);
    size_t length = bytes != NULL ? fread(bytes, 1, PEM_FILE_MAX, file) : 0;
    bool whole = bytes != NULL && !ferror(file) && length > 0 && length < PEM_FILE_MAX;
    fclose(file);
    if (!whole) {
        free(bytes);
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %s is empty, unreadable or larger than any PEM file", option, path);
    }
    *text = bytes;
    return BKV_OK;
}

// Never ask a terminal for a key's password.
static int no_password(char *buffer, int room, int writing, void *user) {
    (void)buffer, (void)room, (void)writing, (void)user;
    return -1;
}

static X509 *parse_certificate(const char *pem) {
    BIO *bio = BIO_new_mem_buf(pem, -1);
    X509 *certificate = bio != NULL ? PEM_read_bio_X509(bio, NULL, no_password, NULL) : NULL;
    BIO_free(bio);
    return certificate;
}

static EVP_PKEY *parse_key(const char *pem) {
    BIO *bio = BIO_new_mem_buf(pem, -1);
    EVP_PKEY *key = bio != NULL ? PEM_read_bio_PrivateKey(bio, NULL, no_password, NULL) : NULL;
    BIO_free(bio);
    return key;
}

typedef struct pems {
    char *ca, *cert, *key; // cert, key NULL: none
} pems_t;

// gRPC notices bad PEM only when it connects, and then only in its log.
static bkv_status_t pems_check(const bkv_etcd_options_t *options, const pems_t *pems, bkv_error_t *err) {
    X509 *ca = parse_certificate(pems->ca), *cert = pems->cert != NULL ? parse_certificate(pems->cert) : NULL;
    EVP_PKEY *key = pems->key != NULL ? parse_key(pems->key) : NULL;
    bkv_status_t status = BKV_OK;
    if (ca == NULL) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "tls_ca: %s: no PEM certificate in it", options->tls_ca);
    } else if (pems->cert != NULL && cert == NULL) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "tls_cert: %s: no PEM certificate in it", options->tls_cert);
    } else if (pems->key != NULL && key == NULL) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "tls_key: %s: no unencrypted PEM private key in it", options->tls_key);
    } else if (cert != NULL && X509_check_private_key(cert, key) != 1) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "tls_key: %s: not the key of tls_cert", options->tls_key);
    }
    ERR_clear_error();
    X509_free(ca);
    X509_free(cert);
    EVP_PKEY_free(key);
    return status;
}

static bkv_status_t pems_read(const bkv_etcd_options_t *options, pems_t *pems, bkv_error_t *err) {
    bkv_status_t status = read_pem("tls_ca", options->tls_ca, &pems->ca, err);
    if (status == BKV_OK && set(options->tls_cert)) {
        status = read_pem("tls_cert", options->tls_cert, &pems->cert, err);
    }
    if (status == BKV_OK && set(options->tls_key)) {
        status = read_pem("tls_key", options->tls_key, &pems->key, err);
    }
    return status == BKV_OK ? pems_check(options, pems, err) : status;
}

static bkv_status_t make_credentials(const bkv_etcd_options_t *options, grpc_channel_credentials **credentials,
                                     bkv_error_t *err) {
    if (!set(options->tls_ca)) {
        *credentials = grpc_insecure_credentials_create();
        return BKV_OK;
    }
    pems_t pems = {0};
    bkv_status_t status = pems_read(options, &pems, err);
    if (status == BKV_OK) {
        grpc_ssl_pem_key_cert_pair pair = {.private_key = pems.key, .cert_chain = pems.cert};
        *credentials = grpc_ssl_credentials_create_ex(pems.ca, pems.cert != NULL ? &pair : NULL, NULL, NULL);
    }
    free(pems.ca);
    free(pems.cert);
    if (pems.key != NULL) {
        OPENSSL_cleanse(pems.key, strlen(pems.key));
        free(pems.key);
    }
    return status;
}

// ---- channels ----

static grpc_arg int_arg(const char *key, int value) {
    return (grpc_arg){.type = GRPC_ARG_INTEGER, .key = (char *)key, .value.integer = value};
}

static grpc_arg string_arg(const char *key, const char *value) {
    return (grpc_arg){.type = GRPC_ARG_STRING, .key = (char *)key, .value.string = (char *)value};
}

static grpc_channel *make_channel(const char *endpoint, const char *tls_name, grpc_channel_credentials *credentials) {
    grpc_arg args[] = {
        int_arg(GRPC_ARG_ENABLE_HTTP_PROXY, 0), // $http_proxy would apply to 127.0.0.1 as well
        int_arg(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
        int_arg(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1),
        int_arg(GRPC_ARG_ENABLE_RETRIES, 0), // call.c repeats, elsewhere
        int_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, RECEIVE_MAX),
        int_arg(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0),
        int_arg(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, RECONNECT_FIRST_MS),
        int_arg(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, RECONNECT_LONGEST_MS),
        int_arg(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, CONNECT_MS), // despite its name
        int_arg(GRPC_ARG_KEEPALIVE_TIME_MS, PING_MS),
        int_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, PING_TIMEOUT_MS),
        string_arg(GRPC_ARG_PRIMARY_USER_AGENT_STRING, "balancekvd/" BKV_VERSION),
        string_arg(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, tls_name),
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
