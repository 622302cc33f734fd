// address.h - "host:port", as both ends take it from options, from etcd and from other members.
#ifndef BKV_ADDRESS_H
#define BKV_ADDRESS_H

#include <stdbool.h>

// Whether what stands before the last colon is a host: a name, 1.2.3.4 or [v6], and nothing that gRPC might take for one of its
// own URI schemes. There need be no colon.
bool bkv_address_has_host(const char *address);

// Whether what stands behind the last colon is a port, 1 to 65535.
bool bkv_address_has_port(const char *address);

#endif
