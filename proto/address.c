// address.c - see address.h.
#include "proto/address.h"

#include <ctype.h>
#include <stddef.h>
#include <string.h>

bool bkv_address_has_host(const char *address) {
    const char *colon = strrchr(address, ':');
    size_t host = colon != NULL ? (size_t)(colon - address) : 0;
    bool bracketed = host > 2 && address[0] == '[' && address[host - 1] == ']';
    bool plain = host > 0 && strcspn(address, ":[]/ ") == host;
    return bracketed || plain;
}

bool bkv_address_has_port(const char *address) {
    const char *colon = strrchr(address, ':');
    unsigned port = 0;
    for (size_t i = 1; colon != NULL && colon[i] != '\0'; i++) {
        if (!isdigit((unsigned char)colon[i]) || i > 5) {
            return false;
        }
        port = port * 10 + (unsigned)(colon[i] - '0');
    }
    return port >= 1 && port <= 65535;
}
