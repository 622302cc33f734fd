// Endpoints and TLS options: what is refused, and with which words; TLS and mutual TLS against a server.
#include "fake.h"

#include <criterion/criterion.h>
#include <grpc/grpc_security.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void assert_refused(const bkv_client_options_t *options, const char *word) {
    bkv_client_t *client = NULL;
    bkv_error_t err = {0};
    cr_assert(bkv_client_create(options, &client, &err) == BKV_INVALID_ARGUMENT && client == NULL, "%s", options->endpoint);
    cr_assert(strstr(err.message, word) != NULL, "no %s in: %s", word, err.message);
}

Test(target, endpoints) {
    static const char *good[] = {"unix:/a/b", "unix:relative", "localhost:1", "10.0.0.1:65535", "[::1]:7420", "a-b.example:80"};
    static const char *bad[] = {"unix:",
                                "localhost",
                                "localhost:",
                                ":7420",
                                "localhost:0",
                                "localhost:65536",
                                "localhost:99999999999",
                                "localhost:12x",
                                "::1:7420",
                                "dns:///localhost:80",
                                "http://localhost:80",
                                "[]:80",
                                "[::1]",
                                "a b:80"};
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        bkv_client_t *client = NULL;
        bkv_error_t err = {0};
        bkv_client_options_t options = {.endpoint = good[i]};
        cr_assert(bkv_client_create(&options, &client, &err) == BKV_OK, "%s: %s", good[i], err.message);
        bkv_client_destroy(client);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_refused(&(bkv_client_options_t){.endpoint = bad[i]}, "endpoint:");
    }
    char path[200] = "unix:/";
    memset(path + 6, 'x', sizeof path - 7);
    path[sizeof path - 1] = '\0';
    assert_refused(&(bkv_client_options_t){.endpoint = path}, "path");
}

Test(target, environment) {
    setenv("BKV_ENDPOINT", "nonsense", 1);
    assert_refused(&(bkv_client_options_t){.timeout_ms = 5}, "nonsense");
    bkv_client_t *client = NULL;
    cr_assert(bkv_client_create(&(bkv_client_options_t){.endpoint = "unix:/x"}, &client, NULL) == BKV_OK);
    bkv_client_destroy(client);
    unsetenv("BKV_ENDPOINT");
    cr_assert(bkv_client_create(NULL, &client, NULL) == BKV_OK);
    bkv_client_destroy(client);
}

// ---- TLS: certificates made by openssl for each run ----

typedef struct pki {
    char directory[40], ca[64], ca_key[64], server[64], server_key[64], client[64], client_key[64], stranger[64];
} pki_t;

static void run(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void run(const char *format, ...) {
    char command[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(command, sizeof command, format, arguments);
    va_end(arguments);
    cr_assert(system(command) == 0, "%s", command);
}

static void issue(const pki_t *pki, const char *name, const char *extension) {
    run("cd %s && openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout %s.key -out %s.csr -subj /CN=%s "
        "2>/dev/null"
        " && echo '%s' > %s.ext && openssl x509 -req -in %s.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile "
        "%s.ext"
        " -out %s.pem 2>/dev/null",
        pki->directory, name, name, name, extension, name, name, name, name);
}

static void pki_make(pki_t *pki) {
    strcpy(pki->directory, "/tmp/bkv-pki-XXXXXX");
    cr_assert(mkdtemp(pki->directory) != NULL);
    run("cd %s && for n in ca stranger; do openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-keyout $n.key"
        " -out $n.pem -subj /CN=$n 2>/dev/null || exit 1; done",
        pki->directory);
    issue(pki, "server", "subjectAltName=DNS:daemon.test");
    issue(pki, "client", "subjectAltName=DNS:worker.test");
    snprintf(pki->ca, sizeof pki->ca, "%s/ca.pem", pki->directory);
    snprintf(pki->stranger, sizeof pki->stranger, "%s/stranger.pem", pki->directory);
    snprintf(pki->server, sizeof pki->server, "%s/server.pem", pki->directory);
    snprintf(pki->server_key, sizeof pki->server_key, "%s/server.key", pki->directory);
    snprintf(pki->client, sizeof pki->client, "%s/client.pem", pki->directory);
    snprintf(pki->client_key, sizeof pki->client_key, "%s/client.key", pki->directory);
}

static void pki_remove(const pki_t *pki) {
    run("rm -r %s", pki->directory);
}

Test(target, tls_options) {
    pki_t pki;
    pki_make(&pki);
    const char *tcp = "127.0.0.1:1";
    assert_refused(&(bkv_client_options_t){.endpoint = tcp, .tls_ca = "/nonexistent"}, "tls_ca: /nonexistent: No such file");
    assert_refused(&(bkv_client_options_t){.endpoint = tcp, .tls_ca = "/dev/null"}, "tls_ca:");
    assert_refused(&(bkv_client_options_t){.endpoint = tcp, .tls_ca = "/dev/zero"}, "larger");
    assert_refused(&(bkv_client_options_t){.endpoint = tcp, .tls_ca = "/tmp"}, "tls_ca:");
    assert_refused(&(bkv_client_options_t){.endpoint = tcp, .tls_ca = pki.ca, .tls_cert = pki.client}, "tls_key: missing");
    assert_refused(&(bkv_client_options_t){.endpoint = tcp, .tls_ca = pki.ca, .tls_key = pki.client_key}, "tls_cert: missing");
    assert_refused(&(bkv_client_options_t){.endpoint = tcp, .tls_cert = pki.client, .tls_key = pki.client_key},
                   "tls_ca: missing");
    assert_refused(&(bkv_client_options_t){.endpoint = tcp, .tls_name = "x"}, "tls_ca: missing");
    assert_refused(&(bkv_client_options_t){.endpoint = "unix:/x", .tls_ca = pki.ca}, "tls_name");
    bkv_client_options_t swapped = {.endpoint = tcp, .tls_ca = pki.ca, .tls_cert = pki.client_key, .tls_key = pki.client_key};
    assert_refused(&swapped, "tls_cert:");
    swapped.tls_cert = swapped.tls_key = pki.client;
    assert_refused(&swapped, "tls_key:");
    swapped.tls_key = pki.server_key;
    assert_refused(&swapped, "not the key of tls_cert");
    pki_remove(&pki);
}

static char *slurp(const char *path) {
    char *text = calloc(1, 1 << 16);
    FILE *file = fopen(path, "r");
    cr_assert(file != NULL && fread(text, 1, (1 << 16) - 1, file) > 0);
    fclose(file);
    return text;
}

static void serve(fake_call_t *call, void *user) {
    (void)user;
    fake_lookup(call, 1);
}

static bkv_status_t try_tls(const bkv_client_options_t *options) {
    bkv_client_t *client = NULL;
    bkv_error_t err = {0};
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t key = fake_key(2, 2);
    cr_assert(bkv_client_create(options, &client, &err) == BKV_OK, "%s", err.message);
    bkv_status_t status = bkv_lookup(client, &id, &key, 1, options->timeout_ms, NULL, NULL, NULL);
    bkv_client_destroy(client);
    return status;
}

Test(target, mutual_tls) {
    pki_t pki;
    fake_place_t place;
    pki_make(&pki);
    fake_place_make(&place);
    grpc_init();
    char *ca = slurp(pki.ca), *cert = slurp(pki.server), *key = slurp(pki.server_key);
    grpc_ssl_pem_key_cert_pair pair = {.private_key = key, .cert_chain = cert};
    grpc_server_credentials *credentials =
        grpc_ssl_server_credentials_create_ex(ca, &pair, 1, GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY, NULL);
    fake_server_t *server = fake_server_start_with(place.endpoint, credentials, serve, NULL);
    bkv_client_options_t good = {.endpoint = place.endpoint,
                                 .timeout_ms = 10000,
                                 .tls_ca = pki.ca,
                                 .tls_cert = pki.client,
                                 .tls_key = pki.client_key,
                                 .tls_name = "daemon.test"};
    cr_assert(try_tls(&good) == BKV_OK);
    bkv_client_options_t bad = good;
    bad.timeout_ms = 1500; // time for a handshake on a busy machine: a refusal is what is to be seen, not the deadline
    bad.tls_name = "another.test";
    cr_assert(try_tls(&bad) == BKV_BUSY, "a name that the certificate does not have");
    bad.tls_name = good.tls_name;
    bad.tls_ca = pki.stranger;
    cr_assert(try_tls(&bad) == BKV_BUSY, "a CA that did not sign it");
    bad.tls_ca = pki.ca;
    bad.tls_cert = bad.tls_key = NULL;
    cr_assert(try_tls(&bad) == BKV_BUSY, "no client certificate");
    fake_server_stop(server);
    free(ca);
    free(cert);
    free(key);
    fake_place_remove(&place);
    pki_remove(&pki);
}
