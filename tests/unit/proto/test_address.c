// test_address.c - what is a host and a port, and what gRPC would take for something else.
#include "proto/address.h"

#include <criterion/criterion.h>

Test(address, hosts) {
    static const char *const good[] = {"a:1", "10.0.0.1:7420", "[::1]:7420", "node-3.example:0", "a:"};
    static const char *const bad[] = {"", ":1", "a", "::1:7420", "[]:1", "unix:/s", "dns:///a:1", "a b:1", "[::1:1"};
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        cr_assert(bkv_address_has_host(good[i]), "%s", good[i]);
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        cr_assert(!bkv_address_has_host(bad[i]) || !bkv_address_has_port(bad[i]), "%s", bad[i]);
    }
}

Test(address, ports) {
    static const char *const good[] = {"a:1", "a:65535", "[::1]:00080"};
    static const char *const bad[] = {"", "a", "a:", "a:0", "a:65536", "a:1x", "a:-1", "a: 1", "a:000001"};
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        cr_assert(bkv_address_has_port(good[i]), "%s", good[i]);
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        cr_assert_not(bkv_address_has_port(bad[i]), "%s", bad[i]);
    }
}
