// stream.c - bkv_stream_copy with SSE2's streaming stores, which every x86-64 has; elsewhere it is memcpy.
#include "daemon/pipeline/stream.h"

#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#include <stdint.h>

#define LINE ((size_t)64)

// A whole line at a time, so that it leaves the core in one piece.
static void stream_line(__m128i *to, const __m128i *from) {
    __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1), c = _mm_loadu_si128(from + 2),
            d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
}

void bkv_stream_copy(void *to, const void *from, size_t bytes) {
    uint8_t *out = to;
    const uint8_t *in = from;
    size_t head = (LINE - (uintptr_t)out % LINE) % LINE;
    if (bytes < head + LINE) {
        memcpy(out, in, bytes);
        return;
    }
    memcpy(out, in, head);
    size_t at = head;
    for (; bytes - at >= LINE; at += LINE) {
        stream_line((__m128i *)(void *)(out + at), (const __m128i *)(const void *)(in + at));
    }
    memcpy(out + at, in + at, bytes - at);
    _mm_sfence(); // streaming stores are ordered by nothing else
}
#else
void bkv_stream_copy(void *to, const void *from, size_t bytes) {
    memcpy(to, from, bytes);
}
#endif
