// pem.h - the TLS files of a configuration, read and checked, for whoever connects or listens. gRPC notices bad PEM only at the
// first handshake, and then only in its log.
#ifndef BKV_PEM_H
#define BKV_PEM_H

#include "kernels/status.h"

#include <grpc/grpc_security.h>

// Paths, NULL or "" where there is none, and what messages call them. A certificate and its key come together, which is the
// caller's to check.
typedef struct bkv_pem_files {
    const char *ca, *cert, *key;
    const char *ca_option, *cert_option, *key_option;
} bkv_pem_files_t;

typedef struct bkv_pems {
    char *ca, *cert, *key; // PEM text; NULL: none
} bkv_pems_t;

// Reads the files and checks that each holds what it should, and that the key is the certificate's. INVALID_ARGUMENT names the
// option and the path, as in "tls_key: /etc/x.key: not the key of tls_cert".
bkv_status_t bkv_pem_read(const bkv_pem_files_t *files, bkv_pems_t *pems, bkv_error_t *err);

// Wipes the key and frees all.
void bkv_pem_free(bkv_pems_t *pems);

// What a client connects with: TLS where there is a CA, with the certificate if there is one; else plain. The caller releases it.
bkv_status_t bkv_pem_credentials(const bkv_pem_files_t *files, grpc_channel_credentials **credentials, bkv_error_t *err);

#endif
