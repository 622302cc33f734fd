// test_stream.c - a streaming copy is a copy, whatever the alignment of its ends, and touches nothing beside.
#include "daemon/pipeline/stream.h"

#include <criterion/criterion.h>
#include <stdint.h>
#include <string.h>

Test(pipeline_stream, every_alignment_and_length) {
    enum { ROOM = 512, MOST = 300 };
    uint8_t from[ROOM], to[ROOM], expected[ROOM];
    for (size_t i = 0; i < ROOM; i++) {
        from[i] = (uint8_t)(i * 7 + i / 256);
    }
    for (size_t length = 0; length <= MOST; length += length < 140 ? 1 : 13) {
        for (size_t at = 0; at < 66; at++) {
            size_t source = at * 11 % 67;
            memset(to, 0xee, sizeof(to));
            memset(expected, 0xee, sizeof(expected));
            memcpy(expected + at, from + source, length);
            bkv_stream_copy(to + at, from + source, length);
            cr_assert_eq(memcmp(to, expected, sizeof(to)), 0, "%zu bytes to %zu from %zu", length, at, source);
        }
    }
}
