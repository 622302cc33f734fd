// relay.h - a TCP connection's middle, for tests: passes bytes on both ways, until it is told to stand still, as a host does that
// has been stopped or cut off.
#ifndef BKV_TEST_RELAY_H
#define BKV_TEST_RELAY_H

#include <stdbool.h>
#include <stdint.h>

typedef struct relay relay_t;

relay_t *relay_start(uint16_t to_port); // of 127.0.0.1
void relay_stop(relay_t *relay);        // closes what it has open
uint16_t relay_port(const relay_t *relay);
void relay_freeze(relay_t *relay, bool frozen);

#endif
