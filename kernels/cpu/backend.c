// backend.c - the tables of the backends that run on a CPU: one driver over the inner loops of an instruction set. codec.h
// says what each entry does.
#include "backend.h"

#include "cpu.h"

static size_t compress_workspace(const bkv_lanes_t *lanes, const bkv_shape_t *shape, const bkv_codec_params_t *params) {
    return params->codec == BKV_CODEC_BALANCE ? bkv_balance_workspace(lanes, shape) : bkv_dense_scratch(shape);
}

static bkv_status_t compress(const bkv_lanes_t *lanes, const bkv_block_t *block, const bkv_codec_params_t *params,
                             const bkv_record_id_t *id, void *record, void *workspace, size_t *length, bkv_error_t *err) {
    bkv_status_t status = params->codec == BKV_CODEC_BALANCE
                              ? bkv_balance_compress(lanes, block, params, id, record, workspace, err)
                              : bkv_dense_compress(lanes, block, params, id, record, workspace, err);
    *length = (size_t)((bkv_record_header_t *)record)->length;
    return status;
}

// A backend of the given name over bkv_lanes_<name>. Capacity and arguments were checked in codec.c.
#define CPU_BACKEND(isa, can_run)                                                                                              \
    static bkv_status_t isa##_compress(const bkv_block_t *block, const bkv_codec_params_t *params, const bkv_record_id_t *id,  \
                                       void *record, size_t capacity, void *workspace, size_t *length, bkv_error_t *err) {     \
        (void)capacity;                                                                                                        \
        return compress(&bkv_lanes_##isa, block, params, id, record, workspace, length, err);                                  \
    }                                                                                                                          \
    static size_t isa##_compress_workspace(const bkv_shape_t *shape, const bkv_codec_params_t *params) {                       \
        return compress_workspace(&bkv_lanes_##isa, shape, params);                                                            \
    }                                                                                                                          \
    static bkv_status_t isa##_fold(const void *const *records, uint32_t count, const bkv_record_id_t *id,                      \
                                   const bkv_fold_params_t *params, void *record, void *workspace, size_t *length,             \
                                   bkv_error_t *err) {                                                                         \
        return bkv_fold_records(&bkv_lanes_##isa, records, count, id, params, record, workspace, length, err);                 \
    }                                                                                                                          \
    static size_t isa##_fold_workspace(const void *const *records, uint32_t count, uint64_t budget) {                          \
        (void)budget;                                                                                                          \
        return bkv_fold_scratch(&bkv_lanes_##isa, records, count);                                                             \
    }                                                                                                                          \
    const bkv_backend_t bkv_backend_##isa = {                                                                                  \
        .name = #isa,                                                                                                          \
        .available = can_run,                                                                                                  \
        .checks_values = true,                                                                                                 \
        .compress = isa##_compress,                                                                                            \
        .fold = isa##_fold,                                                                                                    \
        .attend = bkv_##isa##_attend,                                                                                          \
        .compress_workspace = isa##_compress_workspace,                                                                        \
        .fold_workspace = isa##_fold_workspace,                                                                                \
        .attend_workspace = bkv_##isa##_attend_workspace,                                                                      \
    }

static bool always(void) {
    return true; // portable C
}

CPU_BACKEND(ref, always);
#if defined(__x86_64__)
CPU_BACKEND(avx2, bkv_cpu_avx2);
CPU_BACKEND(avx512, bkv_cpu_avx512);
CPU_BACKEND(amx, bkv_cpu_amx);
#endif
