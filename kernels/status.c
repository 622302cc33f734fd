// status.c - names and meanings of statuses, and the one way in which an error is filled.
#include "status.h"

#include <stdarg.h>
#include <stdio.h>

const char *bkv_status_name(bkv_status_t status) {
    switch (status) {
#define X(name, code, text)                                                                                                    \
    case BKV_##name:                                                                                                           \
        return #name;
        BKV_STATUS_LIST(X)
#undef X
    }
    return "UNKNOWN";
}

const char *bkv_status_text(bkv_status_t status) {
    switch (status) {
#define X(name, code, text)                                                                                                    \
    case BKV_##name:                                                                                                           \
        return text;
        BKV_STATUS_LIST(X)
#undef X
    }
    return "a status that this version does not know";
}

bkv_status_t bkv_fail(bkv_error_t *err, bkv_status_t status, const char *format, ...) {
    if (err) {
        va_list args;
        va_start(args, format);
        err->status = status;
        (void)vsnprintf(err->message, sizeof(err->message), format, args);
        va_end(args);
    }
    return status;
}
