// pem.c - reads and checks PEM files.
#include "proto/pem.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PEM_FILE_MAX (1 << 20)

// ---- reading ----

// The whole file, NUL-terminated. Stays NULL where no path is given.
static bkv_status_t read_file(const char *option, const char *path, char **text, bkv_error_t *err) {
    if (path == NULL || path[0] == '\0') {
        return BKV_OK;
    }
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %s: %s", option, path, strerror(errno));
    }
    char *bytes = calloc(1, PEM_FILE_MAX + 1);
    size_t length = bytes != NULL ? fread(bytes, 1, PEM_FILE_MAX, file) : 0;
    bool failed = bytes == NULL || ferror(file) != 0;
    fclose(file);
    if (failed || length == 0 || length == PEM_FILE_MAX) {
        free(bytes);
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %s: %s", option, path,
                        failed        ? "cannot be read"
                        : length == 0 ? "empty"
                                      : "larger than any PEM file");
    }
    *text = bytes;
    return BKV_OK;
}

void bkv_pem_free(bkv_pems_t *pems) {
    if (pems->key != NULL) {
        OPENSSL_cleanse(pems->key, strlen(pems->key));
    }
    free(pems->ca);
    free(pems->cert);
    free(pems->key);
    *pems = (bkv_pems_t){0};
}

// ---- checking ----

// Never ask a terminal for a key's password.
static int no_password(char *buffer, int room, int writing, void *user) {
    (void)buffer, (void)room, (void)writing, (void)user;
    return -1;
}

static X509 *parse_certificate(const char *pem) {
    BIO *bio = pem != NULL ? BIO_new_mem_buf(pem, -1) : NULL;
    X509 *certificate = bio != NULL ? PEM_read_bio_X509(bio, NULL, no_password, NULL) : NULL;
    BIO_free(bio);
    return certificate;
}

static EVP_PKEY *parse_key(const char *pem) {
    BIO *bio = pem != NULL ? BIO_new_mem_buf(pem, -1) : NULL;
    EVP_PKEY *key = bio != NULL ? PEM_read_bio_PrivateKey(bio, NULL, no_password, NULL) : NULL;
    BIO_free(bio);
    return key;
}

static bkv_status_t check(const bkv_pem_files_t *files, const bkv_pems_t *pems, bkv_error_t *err) {
    X509 *ca = parse_certificate(pems->ca), *cert = parse_certificate(pems->cert);
    EVP_PKEY *key = parse_key(pems->key);
    bkv_status_t status = BKV_OK;
    if (pems->ca != NULL && ca == NULL) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %s: no PEM certificate in it", files->ca_option, files->ca);
    } else if (pems->cert != NULL && cert == NULL) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %s: no PEM certificate in it", files->cert_option, files->cert);
    } else if (pems->key != NULL && key == NULL) {
        status =
            bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %s: no unencrypted PEM private key in it", files->key_option, files->key);
    } else if (cert != NULL && key != NULL && X509_check_private_key(cert, key) != 1) {
        status =
            bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %s: not the key of %s", files->key_option, files->key, files->cert_option);
    }
    ERR_clear_error();
    X509_free(ca);
    X509_free(cert);
    EVP_PKEY_free(key);
    return status;
}

bkv_status_t bkv_pem_read(const bkv_pem_files_t *files, bkv_pems_t *pems, bkv_error_t *err) {
    *pems = (bkv_pems_t){0};
    bkv_status_t status = read_file(files->ca_option, files->ca, &pems->ca, err);
    if (status == BKV_OK) {
        status = read_file(files->cert_option, files->cert, &pems->cert, err);
    }
    if (status == BKV_OK) {
        status = read_file(files->key_option, files->key, &pems->key, err);
    }
    if (status == BKV_OK) {
        status = check(files, pems, err);
    }
    if (status != BKV_OK) {
        bkv_pem_free(pems);
    }
    return status;
}

// ---- credentials ----

bkv_status_t bkv_pem_credentials(const bkv_pem_files_t *files, grpc_channel_credentials **credentials, bkv_error_t *err) {
    bkv_pems_t pems;
    bkv_status_t status = bkv_pem_read(files, &pems, err);
    if (status != BKV_OK) {
        return status;
    }
    if (pems.ca != NULL) {
        grpc_ssl_pem_key_cert_pair pair = {.private_key = pems.key, .cert_chain = pems.cert};
        *credentials = grpc_ssl_credentials_create_ex(pems.ca, pems.cert != NULL ? &pair : NULL, NULL, NULL);
    } else {
        *credentials = grpc_insecure_credentials_create();
    }
    bkv_pem_free(&pems);
    return BKV_OK;
}
