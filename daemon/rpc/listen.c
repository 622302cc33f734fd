// listen.c - binding. gRPC opens the sockets; what it does not look after is here: two daemons on one path (it would let the
// second steal the first one's socket; transport/unix_path.c), permissions, plain TCP to the world, TLS files that do not fit
// together.
#include "daemon/rpc/listen.h"

#include "daemon/transport/unix_path.h"
#include "proto/pem.h"

#include <arpa/inet.h>
#include <errno.h>
#include <grpc/grpc_security.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define HOST_MAX 256

// ---- unix ----

// gRPC reads the address as a URI, in which % starts an escape.
static void make_uri(const char *path, char *uri, size_t room) {
    size_t used = (size_t)snprintf(uri, room, "unix:");
    for (; *path != '\0'; path++) {
        used += (size_t)snprintf(uri + used, room - used, *path == '%' ? "%%25" : "%c", *path);
    }
}

static bkv_status_t bind_unix(grpc_server *server, const bkv_server_config_t *config, bkv_error_t *err) {
    char uri[8 + 3 * sizeof(((struct sockaddr_un *)0)->sun_path)];
    make_uri(config->socket_path, uri, sizeof(uri));
    mode_t mask = umask(0777); // nobody gets in before the permissions are as wanted
    grpc_server_credentials *plain = grpc_insecure_server_credentials_create();
    int bound = grpc_server_add_http2_port(server, uri, plain);
    grpc_server_credentials_release(plain);
    umask(mask);
    if (bound == 0) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "listen.socket: cannot bind %s", config->socket_path);
    }
    if (chmod(config->socket_path, (mode_t)config->socket_mode & 0777) != 0) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "listen.socket_mode: cannot set it on %s: %s", config->socket_path,
                        strerror(errno));
    }
    return BKV_OK;
}

bkv_status_t bkv_listen_unix(grpc_server *server, const bkv_server_config_t *config, int *lock_fd, bkv_error_t *err) {
    const size_t most = sizeof(((struct sockaddr_un *)0)->sun_path) - 1;
    if (strlen(config->socket_path) > most) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "listen.socket: longer than %zu bytes: %s", most, config->socket_path);
    }
    bkv_status_t status = bkv_unix_path_lock(config->socket_path, lock_fd, err);
    if (status == BKV_OK) {
        status = bkv_unix_path_clear(config->socket_path, err);
    }
    return status == BKV_OK ? bind_unix(server, config, err) : status;
}

// ---- TLS ----

static bool given(const char *text) {
    return text != NULL && text[0] != '\0';
}

// Credentials for TCP: TLS where a certificate is configured, plain otherwise.
static bkv_status_t make_credentials(const bkv_server_config_t *config, grpc_server_credentials **credentials,
                                     bkv_error_t *err) {
    if (given(config->tls_cert) != given(config->tls_key)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "listen.tls_cert, listen.tls_key: one needs the other");
    }
    if (given(config->tls_client_ca) && !given(config->tls_cert)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "listen.tls_client_ca: needs tls_cert and tls_key");
    }
    if (!given(config->tls_cert)) {
        *credentials = grpc_insecure_server_credentials_create();
        return BKV_OK;
    }
    const bkv_pem_files_t files = {.ca = config->tls_client_ca,
                                   .cert = config->tls_cert,
                                   .key = config->tls_key,
                                   .ca_option = "listen.tls_client_ca",
                                   .cert_option = "listen.tls_cert",
                                   .key_option = "listen.tls_key"};
    bkv_pems_t pems;
    bkv_status_t status = bkv_pem_read(&files, &pems, err);
    if (status == BKV_OK) {
        grpc_ssl_pem_key_cert_pair pair = {.private_key = pems.key, .cert_chain = pems.cert};
        *credentials =
            grpc_ssl_server_credentials_create_ex(pems.ca, &pair, 1,
                                                  pems.ca != NULL ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                                                                  : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE,
                                                  NULL);
        bkv_pem_free(&pems);
    }
    return status;
}

// ---- TCP ----

bkv_status_t bkv_listen_parse(const char *address, char *host, size_t room, uint16_t *port, bkv_error_t *err) {
    const char *colon = strrchr(address, ':');
    if (colon == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "listen.tcp: %s has no :port", address);
    }
    char *end;
    unsigned long number = strtoul(colon + 1, &end, 10);
    if (colon[1] < '0' || colon[1] > '9' || *end != '\0' || number > UINT16_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "listen.tcp: %s is no port", colon + 1);
    }
    size_t length = (size_t)(colon - address);
    bool bracketed = length >= 2 && address[0] == '[' && colon[-1] == ']';
    if (bracketed) {
        address++;
        length -= 2;
    }
    if (length >= room || memchr(address, '[', length) != NULL || (!bracketed && memchr(address, ':', length) != NULL)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "listen.tcp: host:port expected, [host]:port for IPv6");
    }
    memcpy(host, address, length);
    host[length] = '\0';
    *port = (uint16_t)number;
    return BKV_OK;
}

static bool is_loopback(const struct sockaddr *address) {
    if (address->sa_family == AF_INET) {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)(const void *)address;
        return ntohl(v4->sin_addr.s_addr) >> 24 == 127;
    }
    const struct in6_addr *v6 = &((const struct sockaddr_in6 *)(const void *)address)->sin6_addr;
    return IN6_IS_ADDR_LOOPBACK(v6) || (IN6_IS_ADDR_V4MAPPED(v6) && v6->s6_addr[12] == 127);
}

bkv_status_t bkv_listen_is_loopback(const char *host, bool *loopback, bkv_error_t *err) {
    *loopback = false;
    if (host[0] == '\0') {
        return BKV_OK;
    }
    const struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
    struct addrinfo *found;
    int failure = getaddrinfo(host, NULL, &hints, &found);
    if (failure != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "listen.tcp: %s: %s", host, gai_strerror(failure));
    }
    *loopback = true;
    for (const struct addrinfo *one = found; one != NULL; one = one->ai_next) {
        *loopback = *loopback && (one->ai_family == AF_INET || one->ai_family == AF_INET6) && is_loopback(one->ai_addr);
    }
    freeaddrinfo(found);
    return BKV_OK;
}

bkv_status_t bkv_listen_tcp(grpc_server *server, const bkv_server_config_t *config, int *port, bkv_error_t *err) {
    char host[HOST_MAX] = "";
    uint16_t wanted = 0;
    bool loopback = false;
    grpc_server_credentials *credentials = NULL;
    bkv_status_t status = bkv_listen_parse(config->tcp, host, sizeof(host), &wanted, err);
    if (status == BKV_OK) {
        status = bkv_listen_is_loopback(host, &loopback, err);
    }
    if (status == BKV_OK && !loopback && !given(config->tls_cert) && !config->insecure) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT,
                          "listen.tcp: %s is not loopback; that needs tls_cert and tls_key, or insecure = yes", config->tcp);
    }
    if (status == BKV_OK) {
        status = make_credentials(config, &credentials, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    char address[HOST_MAX + 16];
    const char *format = host[0] == '\0' || strchr(host, ':') != NULL ? "[%s]:%u" : "%s:%u";
    snprintf(address, sizeof(address), format, host[0] == '\0' ? "::" : host, wanted);
    *port = grpc_server_add_http2_port(server, address, credentials);
    grpc_server_credentials_release(credentials);
    if (*port == 0) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "listen.tcp: cannot bind %s; is another daemon there?", config->tcp);
    }
    return BKV_OK;
}
