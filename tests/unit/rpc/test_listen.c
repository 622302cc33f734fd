// test_listen.c - addresses: what is one, and what counts as loopback.
#include "daemon/rpc/listen.h"

#include <criterion/criterion.h>

static void assert_parsed(const char *address, const char *host, uint16_t port) {
    char found[64];
    uint16_t number;
    bkv_error_t err;
    cr_assert_eq(bkv_listen_parse(address, found, sizeof(found), &number, &err), BKV_OK, "%s", err.message);
    cr_assert_str_eq(found, host);
    cr_assert_eq(number, port);
}

Test(rpc_listen, parses_host_and_port) {
    assert_parsed("127.0.0.1:7420", "127.0.0.1", 7420);
    assert_parsed("localhost:0", "localhost", 0);
    assert_parsed("[::1]:65535", "::1", 65535);
    assert_parsed(":7420", "", 7420);
}

Test(rpc_listen, refuses_what_is_no_address) {
    const char *wrong[] = {
        "",         "localhost", "localhost:", "localhost:x", "localhost:65536", "localhost:-1", "localhost:80x",
        "::1:7420", "[::1:7420", "[[::1]]:1",  "host: 80"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        char host[64];
        uint16_t port;
        bkv_error_t err;
        cr_assert_eq(bkv_listen_parse(wrong[i], host, sizeof(host), &port, &err), BKV_INVALID_ARGUMENT, "%s", wrong[i]);
    }
    char small[8];
    uint16_t port;
    cr_assert_eq(bkv_listen_parse("longhost:1", small, sizeof(small), &port, NULL), BKV_INVALID_ARGUMENT);
}

Test(rpc_listen, knows_loopback) {
    const struct {
        const char *host;
        bool loopback;
    } cases[] = {{"127.0.0.1", true}, {"127.9.9.9", true}, {"::1", true}, {"::ffff:127.0.0.1", true},
                 {"0.0.0.0", false},  {"10.0.0.1", false}, {"::", false}, {"::ffff:10.0.0.1", false},
                 {"", false}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        bool loopback;
        bkv_error_t err;
        cr_assert_eq(bkv_listen_is_loopback(cases[i].host, &loopback, &err), BKV_OK);
        cr_assert_eq(loopback, cases[i].loopback, "%s", cases[i].host);
    }
}
