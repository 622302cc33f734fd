// owed.c - see owed.h.
#include "daemon/cluster/move/owed.h"

#include <stdlib.h>
#include <string.h>

void bkv_owed_deinit(bkv_owed_t *owed) {
    free(owed->names);
    *owed = (bkv_owed_t){0};
}

static bool grow(bkv_owed_t *owed) {
    size_t room = owed->room == 0 ? 256 : 2 * owed->room;
    bkv_name_t *names = room <= BKV_OWED_MAX ? realloc(owed->names, room * sizeof(names[0])) : NULL;
    if (names != NULL) {
        owed->names = names;
        owed->room = room;
    }
    return names != NULL;
}

void bkv_owed_add(bkv_owed_t *owed, const bkv_name_t *name) {
    if (owed->count < owed->room || grow(owed)) {
        owed->names[owed->count++] = *name;
    } else {
        owed->overflow = true;
    }
}

size_t bkv_owed_take(bkv_owed_t *owed, bkv_name_t *names, size_t most) {
    size_t count = owed->count < most ? owed->count : most;
    owed->count -= count;
    if (count > 0) {
        memcpy(names, owed->names + owed->count, count * sizeof(names[0]));
    }
    if (owed->count == 0) { // rarely needed, so it need not lie about
        free(owed->names);
        owed->names = NULL;
        owed->room = 0;
    }
    return count;
}
