// keys.c - block keys (SHA-256 chains), their hex form and the library's version: the parts of the client without a network.
#include "client/balancekv.h"

#include <assert.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#define TOKENS_PER_STEP 256

const char *bkv_version(void) {
    return BKV_VERSION;
}

static void store_u32(uint32_t value, uint8_t *out) {
    for (int i = 0; i < 4; i++) {
        out[i] = (uint8_t)(value >> (8 * i));
    }
}

// libcrypto fails here only without memory or without SHA-256 at all. There is no key to return then, and a wrong one would
// name another block, so the process ends.
static void require(int ok) {
    if (ok != 1) {
        abort();
    }
}

void bkv_key_next(const bkv_spec_id_t *id, const bkv_key_t *parent, const uint32_t *token_ids, size_t count, bkv_key_t *key) {
    static const bkv_key_t none;
    uint8_t tokens[TOKENS_PER_STEP * 4];
    EVP_MD_CTX *hash = EVP_MD_CTX_new();
    require(hash != NULL);
    require(EVP_DigestInit_ex(hash, EVP_sha256(), NULL));
    require(EVP_DigestUpdate(hash, id->bytes, sizeof id->bytes));
    require(EVP_DigestUpdate(hash, (parent != NULL ? parent : &none)->bytes, sizeof none.bytes));
    for (size_t at = 0; at < count; at += TOKENS_PER_STEP) {
        size_t step = count - at < TOKENS_PER_STEP ? count - at : TOKENS_PER_STEP;
        for (size_t i = 0; i < step; i++) {
            store_u32(token_ids[at + i], tokens + 4 * i);
        }
        require(EVP_DigestUpdate(hash, tokens, 4 * step));
    }
    // parent and key may be the same object: nothing is read after this.
    require(EVP_DigestFinal_ex(hash, key->bytes, NULL));
    EVP_MD_CTX_free(hash);
}

void bkv_hex(const uint8_t *bytes, size_t n, char *out) {
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < n; i++) {
        out[2 * i] = digits[bytes[i] >> 4];
        out[2 * i + 1] = digits[bytes[i] & 15];
    }
    out[2 * n] = '\0';
}

static int digit_value(char c) {
    if (c >= '0' && c <= '9') {
        return c - '0';
    }
    if (c >= 'a' && c <= 'f') {
        return c - 'a' + 10;
    }
    if (c >= 'A' && c <= 'F') {
        return c - 'A' + 10;
    }
    return -1;
}

bool bkv_hex_parse(const char *text, uint8_t *bytes, size_t n) {
    if (strnlen(text, 2 * n + 1) != 2 * n) {
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        int high = digit_value(text[2 * i]), low = digit_value(text[2 * i + 1]);
        if (high < 0 || low < 0) {
            return false;
        }
        bytes[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}
