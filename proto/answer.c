// answer.c - see answer.h.
#include "proto/answer.h"

bkv_status_t bkv_answer_status(uint32_t code) {
    switch (code) {
#define X(name, number, text)                                                                                                  \
    case number:                                                                                                               \
        return BKV_##name;
        BKV_STATUS_LIST(X)
#undef X
    default:
        return BKV_INTERNAL;
    }
}

void bkv_answer_text(const void *text, size_t length, char *out, size_t room) {
    const unsigned char *from = text;
    size_t n = length < room - 1 ? length : room - 1;
    for (size_t i = 0; i < n; i++) {
        out[i] = (char)(from[i] < 0x20 || from[i] >= 0x7f ? ' ' : from[i]);
    }
    out[n] = '\0';
}
