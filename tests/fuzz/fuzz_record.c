// fuzz_record.c - bytes of unknown origin as a record: check, and whatever is accepted is read, sliced, attended over, folded.
#include "codec.h"
#include "seal.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// A mistake of ours must be seen also where no sanitizer looks.
static void require(bool condition) {
    if (!condition) {
        abort();
    }
}

static void *room(size_t bytes) {
    void *at = NULL;
    require(posix_memalign(&at, 64, bytes ? bytes : 1) == 0);
    return at;
}

static void read_all(const void *record, const bkv_shape_t *shape) {
    for (uint32_t i = 0; i < shape->layers * shape->heads; i++) {
        bkv_section_view_t view;
        bkv_record_section(record, i / shape->heads, i % shape->heads, &view);
        float *k = room((size_t)view.tokens * view.key_dim * sizeof(float));
        float *v = room((size_t)view.tokens * view.value_dim * sizeof(float));
        float *logw = room(view.tokens * sizeof(float));
        uint32_t *index = room(view.tokens * sizeof(uint32_t));
        bkv_section_read(&view, k, v, logw, index);
        for (uint32_t t = 0; t < view.tokens; t++) {
            require(index[t] < shape->tokens && (t == 0 || index[t] > index[t - 1]) && logw[t] - logw[t] == 0);
        }
        free(k);
        free(v);
        free(logw);
        free(index);
    }
}

static void slice_last(const void *record, const bkv_shape_t *shape, size_t size) {
    size_t length = 0;
    require(bkv_record_slice(record, shape->layers - 1, 1, shape->heads - 1, 1, NULL, &length, NULL) == BKV_OK);
    require(length <= size);
    void *slice = room(length);
    require(bkv_record_slice(record, shape->layers - 1, 1, shape->heads - 1, 1, slice, &length, NULL) == BKV_OK);
    require(bkv_record_check(slice, length, NULL) == BKV_OK);
    bkv_record_seal(slice);
    require(bkv_record_verify(slice, length, NULL) == BKV_OK);
    free(slice);
}

static void attend(const void *record, const bkv_shape_t *shape) {
    const bkv_backend_t *backend = bkv_backend_get("ref");
    float *q = room((size_t)shape->heads * shape->key_dim * sizeof(float));
    for (uint32_t i = 0; i < shape->heads * shape->key_dim; i++) {
        q[i] = (float)(i % 7) - 3;
    }
    float *out = room((size_t)shape->heads * shape->value_dim * sizeof(float)), *lse = room(shape->heads * sizeof(float));
    bkv_attend_args_t args = {.layers = 1, .query_heads = shape->heads, .queries = 1, .q = q, .out = out, .lse = lse};
    void *workspace = room(bkv_attend_workspace(backend, &record, 1, &args));
    (void)bkv_attend(backend, &record, 1, &args, workspace, NULL); // unquantised planes may hold what it refuses
    free(workspace);
    free(lse);
    free(out);
    free(q);
}

static void fold(const void *record, size_t size) {
    const bkv_backend_t *backend = bkv_backend_get("ref");
    bkv_record_id_t id = {0};
    size_t budget = size * 2 / 3, length = 0;
    void *out = room(budget), *workspace = room(bkv_fold_workspace(backend, &record, 1, budget));
    if (bkv_fold(backend, &record, 1, &id, &(bkv_fold_params_t){.budget = budget, .seed = 1}, out, workspace, &length, NULL) ==
        BKV_OK) {
        require(length <= budget && bkv_record_check(out, length, NULL) == BKV_OK);
    }
    free(workspace);
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size > 1 << 16) {
        return 0;
    }
    void *record = room(size);
    memcpy(record, data, size);
    bkv_error_t err;
    (void)bkv_record_check_header(record, size, &err);
    if (bkv_record_check(record, size, &err) == BKV_OK) {
        bkv_shape_t shape;
        bkv_record_shape(record, &shape);
        read_all(record, &shape);
        slice_last(record, &shape, size);
        attend(record, &shape);
        fold(record, size);
    }
    free(record);
    return 0;
}
