// TLS files: what is read, and what is said of those that are not as they should be.
#include "proto/pem.h"

#include <criterion/criterion.h>
#include <grpc/grpc.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct pki {
    char directory[40], cert[64], key[64], other_key[64], locked_key[64];
} pki_t;

static void run(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void run(const char *format, ...) {
    char command[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(command, sizeof(command), format, arguments);
    va_end(arguments);
    cr_assert(system(command) == 0, "%s", command);
}

static void pki_make(pki_t *pki) {
    strcpy(pki->directory, "/tmp/bkv-pem-XXXXXX");
    cr_assert_not_null(mkdtemp(pki->directory));
    run("cd %s && for n in one two; do openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-keyout $n.key -out $n.pem -subj /CN=$n 2>/dev/null || exit 1; done"
        " && openssl pkey -in one.key -aes128 -passout pass:secret -out locked.key 2>/dev/null",
        pki->directory);
    snprintf(pki->cert, sizeof(pki->cert), "%s/one.pem", pki->directory);
    snprintf(pki->key, sizeof(pki->key), "%s/one.key", pki->directory);
    snprintf(pki->other_key, sizeof(pki->other_key), "%s/two.key", pki->directory);
    snprintf(pki->locked_key, sizeof(pki->locked_key), "%s/locked.key", pki->directory);
}

static bkv_pem_files_t files_of(const char *ca, const char *cert, const char *key) {
    return (bkv_pem_files_t){
        .ca = ca, .cert = cert, .key = key, .ca_option = "x.ca", .cert_option = "x.cert", .key_option = "x.key"};
}

static void refused(bkv_pem_files_t files, const char *format, const char *path) {
    bkv_pems_t pems;
    bkv_error_t err = {0};
    char says[256];
    snprintf(says, sizeof(says), format, path);
    cr_assert_eq(bkv_pem_read(&files, &pems, &err), BKV_INVALID_ARGUMENT, "%s", says);
    cr_assert(strncmp(err.message, says, strlen(says)) == 0, "%s where %s was expected", err.message, says);
    cr_assert(pems.ca == NULL && pems.cert == NULL && pems.key == NULL);
}

Test(pem, files_are_read_and_what_is_missing_stays_out) {
    pki_t pki;
    bkv_pems_t pems;
    bkv_error_t err = {0};
    pki_make(&pki);
    bkv_pem_files_t all = files_of(pki.cert, pki.cert, pki.key), some = files_of("", pki.cert, NULL), none = {0};
    cr_assert_eq(bkv_pem_read(&all, &pems, &err), BKV_OK, "%s", err.message);
    cr_assert(strstr(pems.ca, "BEGIN CERTIFICATE") && strstr(pems.cert, "BEGIN CERTIFICATE") &&
              strstr(pems.key, "PRIVATE KEY"));
    bkv_pem_free(&pems);
    cr_assert_null(pems.key);
    cr_assert_eq(bkv_pem_read(&some, &pems, &err), BKV_OK, "%s", err.message);
    cr_assert(pems.ca == NULL && pems.cert != NULL && pems.key == NULL);
    bkv_pem_free(&pems);
    cr_assert_eq(bkv_pem_read(&none, &pems, &err), BKV_OK, "%s", err.message);
    bkv_pem_free(&pems);
    run("rm -r %s", pki.directory);
}

Test(pem, each_mistake_is_named) {
    pki_t pki;
    pki_make(&pki);
    refused(files_of("/nonexistent", "", ""), "x.ca: %s: No such file", "/nonexistent");
    refused(files_of("/dev/null", "", ""), "x.ca: %s: empty", "/dev/null");
    refused(files_of("/dev/zero", "", ""), "x.ca: %s: larger than any PEM file", "/dev/zero");
    refused(files_of("/tmp", "", ""), "x.ca: %s: cannot be read", "/tmp");
    refused(files_of(pki.key, "", ""), "x.ca: %s: no PEM certificate in it", pki.key);
    refused(files_of("", pki.key, pki.key), "x.cert: %s: no PEM certificate in it", pki.key);
    refused(files_of("", pki.cert, pki.cert), "x.key: %s: no unencrypted PEM private key in it", pki.cert);
    refused(files_of("", pki.cert, pki.locked_key), "x.key: %s: no unencrypted PEM private key in it", pki.locked_key);
    refused(files_of("", pki.cert, pki.other_key), "x.key: %s: not the key of x.cert", pki.other_key);
    run("rm -r %s", pki.directory);
}

Test(pem, credentials_are_plain_without_a_ca) {
    pki_t pki;
    bkv_error_t err = {0};
    pki_make(&pki);
    grpc_init();
    bkv_pem_files_t kinds[] = {files_of(NULL, NULL, NULL), files_of(pki.cert, "", ""), files_of(pki.cert, pki.cert, pki.key)};
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        grpc_channel_credentials *credentials = NULL;
        cr_assert_eq(bkv_pem_credentials(&kinds[i], &credentials, &err), BKV_OK, "%s", err.message);
        cr_assert_not_null(credentials);
        grpc_channel_credentials_release(credentials);
    }
    run("rm -r %s", pki.directory);
}
