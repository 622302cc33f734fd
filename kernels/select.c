// select.c - which backends this build has, and which one to use.
#include "backend.h"

static const bkv_backend_t *const backends[] = {
#if defined(__x86_64__)
    &bkv_backend_amx, &bkv_backend_avx512, &bkv_backend_avx2,
#endif
    &bkv_backend_ref,
    // Never chosen by itself: the device is the engine's, and a daemon takes time on it only when told to.
    &bkv_backend_cuda, NULL};

const bkv_backend_t *const *bkv_backend_list(void) {
    return backends;
}

const bkv_backend_t *bkv_backend_get(const char *name) {
    bool any = !name || strcmp(name, "auto") == 0;
    for (size_t i = 0; backends[i]; i++) {
        if ((any || strcmp(name, backends[i]->name) == 0) && backends[i]->available()) {
            return backends[i];
        }
    }
    return NULL;
}
