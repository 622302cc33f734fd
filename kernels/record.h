// record.h - internal: laying out and reading records. summary.h says what the bytes mean.
#ifndef BKV_RECORD_H
#define BKV_RECORD_H

#include "codec.h"

#include <string.h>

// The most tokens that share one key group: m = 95 still makes a single group, 96 makes two of 48.
#define BKV_KEY_GROUP_MAX 96

// Plane offsets are 32 bits in units of 16 bytes, so this is the largest record.
#define BKV_RECORD_MAX ((uint64_t)UINT32_MAX * BKV_RECORD_ALIGN)

// Header and directory.
static inline uint64_t bkv_record_preamble(uint32_t layers, uint32_t heads) {
    return sizeof(bkv_record_header_t) + (uint64_t)layers * heads * sizeof(bkv_section_t);
}

static inline bkv_section_t *bkv_record_directory(void *record) {
    return (bkv_section_t *)((uint8_t *)record + sizeof(bkv_record_header_t));
}

static inline const bkv_section_t *bkv_record_directory_const(const void *record) {
    return (const bkv_section_t *)((const uint8_t *)record + sizeof(bkv_record_header_t));
}

// Fills the header but for length, rate, seed and checksum, which become 0, and zeroes the directory.
void bkv_record_init(void *record, const bkv_shape_t *shape, const bkv_record_id_t *id, bkv_codec_t codec, uint8_t flags);

// The layout of one directory entry, whose tokens, bits and index kind must be set.
void bkv_record_layout(const bkv_record_header_t *header, const bkv_section_t *section, bkv_plane_layout_t *layout);

// Gives every plane of the directory its place: layer by layer all key planes, then all value planes, which is how a raw
// payload lies. Sets the header's length and returns it. The caller makes sure that it is at most BKV_RECORD_MAX.
uint64_t bkv_record_place(void *record);

// Tokens of key group `group`, 0 for the empty ones at the end of a large section.
static inline uint32_t bkv_key_group_count(const bkv_plane_layout_t *layout, uint32_t m, uint32_t group) {
    uint64_t first = (uint64_t)group * layout->key_group_tokens;
    return first >= m ? 0 : m - first < layout->key_group_tokens ? (uint32_t)(m - first) : layout->key_group_tokens;
}

// A plane that is about to be written. Its last 16 bytes become 0, so that padding never carries old memory.
static inline uint8_t *bkv_record_plane(void *record, uint32_t offset, uint64_t bytes) {
    uint8_t *plane = (uint8_t *)record + (size_t)offset * BKV_RECORD_ALIGN;
    memset(plane + bytes - BKV_RECORD_ALIGN, 0, BKV_RECORD_ALIGN);
    return plane;
}

// Rows [first, first + count) of what bkv_section_read gives. Any output may be NULL.
void bkv_section_read_range(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *k, float *v, float *logw);

// The same of quantised planes: anywhere, and on machines with AVX2, FMA and F16C. The floats are the same.
void bkv_ref_read_keys(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *k);
void bkv_ref_read_values(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *v);
#if defined(__x86_64__)
void bkv_avx2_read_keys(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *k);
void bkv_avx2_read_values(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *v);
#endif

// Scratch memory carved from one caller-given piece. With base NULL nothing is touched and `used` ends as the size that
// the same calls need: sizing and carving share their code.
typedef struct bkv_scratch {
    uint8_t *base;
    size_t used;
} bkv_scratch_t;

static inline void *bkv_scratch_take(bkv_scratch_t *scratch, uint64_t bytes) {
    void *at = scratch->base ? scratch->base + scratch->used : NULL;
    scratch->used += (size_t)((bytes + 63) / 64 * 64);
    return at;
}

#endif
