// backend.h - internal: what backends share. codec.h has the table that a backend fills.
#ifndef BKV_BACKEND_H
#define BKV_BACKEND_H

#include "cpu/lanes.h"
#include "record.h"

// The reference backend: portable C, and the definition of the result.
extern const bkv_backend_t bkv_backend_ref;
#if defined(__x86_64__)
extern const bkv_backend_t bkv_backend_avx2, bkv_backend_avx512, bkv_backend_amx;
#endif

// Compression on an NVIDIA GPU; see backend.c.
extern const bkv_backend_t bkv_backend_cuda;

// The bytes that a balance record of this shape may have: bf16 bytes / rate, rounded down to whole 16 bytes.
uint64_t bkv_balance_budget(const bkv_shape_t *shape, uint32_t rate);

// Whether `budget` bytes hold a record of this shape: one token in each section.
bool bkv_balance_fits(const bkv_shape_t *shape, uint64_t budget);

// What each section of a balance record keeps under `budget` bytes, divided by `shares` (see bkv_codec_params_t): bits of both
// planes and, of the sections[i].tokens that are available on entry, the most that fit. shape->tokens are the source tokens
// that the record stands for; weighted says that the available ones carry weights already, *weights that those kept do. The
// sections' offsets are still to be given (bkv_record_place). False when the budget does not fit.
bool bkv_balance_plan(const bkv_shape_t *shape, bool weighted, uint64_t budget, const uint8_t *shares, bkv_section_t *sections,
                      bool *weights);

// How many of the m tokens that a section keeps of n are kept for being outliers.
uint32_t bkv_protect_count(uint32_t n, uint32_t m);

// INVALID_ARGUMENT when a key or value of one head is one that no quantised record may hold (see bkv_compress).
bkv_status_t bkv_head_check(const bkv_block_t *block, uint32_t layer, uint32_t head, bkv_error_t *err);

// dense8 and dense4, every token of every section. scratch: bkv_dense_scratch bytes.
bkv_status_t bkv_dense_compress(const bkv_lanes_t *lanes, const bkv_block_t *block, const bkv_codec_params_t *params,
                                const bkv_record_id_t *id, void *record, void *scratch, bkv_error_t *err);
size_t bkv_dense_scratch(const bkv_shape_t *shape);

// Rows [first, first + count) of one head's keys (or values) as contiguous floats.
void bkv_block_read(const bkv_lanes_t *lanes, const bkv_block_t *block, bool values, uint32_t layer, uint32_t head,
                    uint32_t first, uint32_t count, float *out);

// The balance codec, and bkv_fold, over any table of inner loops.
bkv_status_t bkv_balance_compress(const bkv_lanes_t *lanes, const bkv_block_t *block, const bkv_codec_params_t *params,
                                  const bkv_record_id_t *id, void *record, void *workspace, bkv_error_t *err);
size_t bkv_balance_workspace(const bkv_lanes_t *lanes, const bkv_shape_t *shape);

bkv_status_t bkv_fold_records(const bkv_lanes_t *lanes, const void *const *records, uint32_t count, const bkv_record_id_t *id,
                              const bkv_fold_params_t *params, void *record, void *workspace, size_t *length, bkv_error_t *err);
size_t bkv_fold_scratch(const bkv_lanes_t *lanes, const void *const *records, uint32_t count);

bkv_status_t bkv_ref_attend(const void *const *records, uint32_t count, const bkv_attend_args_t *args, void *workspace,
                            bkv_error_t *err);
size_t bkv_ref_attend_workspace(const void *const *records, uint32_t count, const bkv_attend_args_t *args);

#if defined(__x86_64__)
// Attention in each instruction set; amx wants tiles, the others what cpu.h says of their names.
bkv_status_t bkv_avx2_attend(const void *const *records, uint32_t count, const bkv_attend_args_t *args, void *workspace,
                             bkv_error_t *err);
bkv_status_t bkv_avx512_attend(const void *const *records, uint32_t count, const bkv_attend_args_t *args, void *workspace,
                               bkv_error_t *err);
bkv_status_t bkv_amx_attend(const void *const *records, uint32_t count, const bkv_attend_args_t *args, void *workspace,
                            bkv_error_t *err);
size_t bkv_avx2_attend_workspace(const void *const *records, uint32_t count, const bkv_attend_args_t *args);
size_t bkv_avx512_attend_workspace(const void *const *records, uint32_t count, const bkv_attend_args_t *args);
size_t bkv_amx_attend_workspace(const void *const *records, uint32_t count, const bkv_attend_args_t *args);
#endif

#endif
