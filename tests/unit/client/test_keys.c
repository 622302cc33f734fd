// Keys against SHA-256 values computed with Python's hashlib, not with this code.
#include "client/balancekv.h"

#include <criterion/criterion.h>
#include <string.h>

static bkv_spec_id_t counting_id(void) {
    bkv_spec_id_t id;
    for (size_t i = 0; i < sizeof id.bytes; i++) {
        id.bytes[i] = (uint8_t)i;
    }
    return id;
}

static void assert_key(const bkv_key_t *key, const char *hex) {
    char text[2 * BKV_KEY_BYTES + 1];
    bkv_hex(key->bytes, sizeof key->bytes, text);
    cr_assert(strcmp(text, hex) == 0, "%s is not %s", text, hex);
}

Test(keys, first_block) {
    // hashlib.sha256(bytes(range(16)) + bytes(32) + struct.pack('<3I', 1, 2, 0xdeadbeef))
    bkv_spec_id_t id = counting_id();
    bkv_key_t key;
    bkv_key_next(&id, NULL, (const uint32_t[]){1, 2, 0xdeadbeef}, 3, &key);
    assert_key(&key, "aa809bdbe9ab2bba7d9151abf890023398cab94771033dc499aebe57849e70e2");
}

Test(keys, chain_and_aliasing) {
    // The key above as the parent, tokens 0..999, more than are hashed in one step.
    bkv_spec_id_t id = counting_id();
    bkv_key_t key;
    uint32_t tokens[1000];
    for (uint32_t i = 0; i < 1000; i++) {
        tokens[i] = i;
    }
    bkv_key_next(&id, NULL, (const uint32_t[]){1, 2, 0xdeadbeef}, 3, &key);
    bkv_key_next(&id, &key, tokens, 1000, &key);
    assert_key(&key, "fed2a526528482aa1468abbf0e088583b4e5d08764f27afcb1807659b081fa18");
}

Test(keys, no_tokens) {
    // hashlib.sha256(bytes(48))
    bkv_spec_id_t id = {0};
    bkv_key_t key;
    bkv_key_next(&id, NULL, NULL, 0, &key);
    assert_key(&key, "17b0761f87b081d5cf10757ccc89f12be355c70e2e29df288b65b30710dcbcd1");
}

Test(keys, differ_by_spec_parent_and_tokens) {
    bkv_spec_id_t id = counting_id(), other = id;
    other.bytes[15] ^= 1;
    bkv_key_t zero = {0}, one = {.bytes = {1}}, key[4];
    bkv_key_next(&id, NULL, (const uint32_t[]){7}, 1, &key[0]);
    bkv_key_next(&other, NULL, (const uint32_t[]){7}, 1, &key[1]);
    bkv_key_next(&id, &one, (const uint32_t[]){7}, 1, &key[2]);
    bkv_key_next(&id, &zero, (const uint32_t[]){7}, 1, &key[3]);
    cr_assert(memcmp(&key[0], &key[1], sizeof key[0]) != 0);
    cr_assert(memcmp(&key[0], &key[2], sizeof key[0]) != 0);
    cr_assert(memcmp(&key[0], &key[3], sizeof key[0]) == 0, "no parent is 32 zero bytes");
}

Test(hex, round_trip) {
    uint8_t bytes[256], back[256];
    char text[2 * sizeof bytes + 1];
    for (size_t i = 0; i < sizeof bytes; i++) {
        bytes[i] = (uint8_t)i;
    }
    bkv_hex(bytes, sizeof bytes, text);
    cr_assert(strncmp(text, "000102", 6) == 0 && strcmp(text + 506, "fdfeff") == 0);
    cr_assert(bkv_hex_parse(text, back, sizeof back));
    cr_assert(memcmp(bytes, back, sizeof bytes) == 0);
    cr_assert(bkv_hex_parse("aBCdeF", back, 3) && memcmp(back, "\xab\xcd\xef", 3) == 0);
    bkv_hex(bytes, 0, text);
    cr_assert(text[0] == '\0' && bkv_hex_parse("", back, 0));
}

Test(hex, refuses) {
    uint8_t bytes[4];
    const char *bad[] = {"", "0011223", "001122334", "0011223g", "00112/33", "0011 233", "0x112233", "00112\xc3\xa4"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        cr_assert(!bkv_hex_parse(bad[i], bytes, sizeof bytes), "%s", bad[i]);
    }
    cr_assert(!bkv_hex_parse("00", bytes, 0));
}
