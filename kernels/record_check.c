// record_check.c - is this a record? Everything that comes from a peer, a file or a recovered arena passes here before
// any other function looks at it. Checks run from the header inwards, and each may rely on those before it.
#include "record.h"

#include "convert.h"

#include <assert.h>
#include <string.h>

#define KNOWN_FLAGS (BKV_RECORD_WEIGHTS | BKV_RECORD_FOLD | BKV_RECORD_SLICE)

#define FAIL(...) bkv_fail(err, BKV_INVALID_ARGUMENT, __VA_ARGS__)

static bool is_zero(const uint8_t *bytes, size_t n) {
    uint8_t seen = 0;
    for (size_t i = 0; i < n; i++) {
        seen |= bytes[i];
    }
    return seen == 0;
}

static bkv_status_t check_kind(const bkv_record_header_t *header, bkv_error_t *err) {
    if (header->magic != BKV_RECORD_MAGIC) {
        return FAIL("magic: %08x is not a record's", header->magic);
    }
    if (header->version != BKV_RECORD_VERSION) {
        return FAIL("version: %u, this build reads %d", header->version, BKV_RECORD_VERSION);
    }
    if (!bkv_codec_name((bkv_codec_t)header->codec)) {
        return FAIL("codec: %u is unknown", header->codec);
    }
    if (header->flags & ~KNOWN_FLAGS) {
        return FAIL("flags: %02x has unknown bits", header->flags);
    }
    bool rated = header->codec == BKV_CODEC_BALANCE && !(header->flags & BKV_RECORD_FOLD);
    if (rated ? header->rate < BKV_MIN_RATE || header->rate > BKV_MAX_RATE : header->rate != 0) {
        return FAIL("rate: %u does not go with codec %s", header->rate, bkv_codec_name((bkv_codec_t)header->codec));
    }
    if (header->codec != BKV_CODEC_BALANCE && header->flags & (BKV_RECORD_WEIGHTS | BKV_RECORD_FOLD)) {
        return FAIL("flags: %02x does not go with codec %s", header->flags, bkv_codec_name((bkv_codec_t)header->codec));
    }
    if (!is_zero(header->reserved0, sizeof(header->reserved0)) || header->reserved1 != 0) {
        return FAIL("reserved: not 0");
    }
    return BKV_OK;
}

static bkv_status_t check_extent(const bkv_record_header_t *header, bkv_error_t *err) {
    bkv_shape_t shape;
    bkv_record_shape(header, &shape);
    bkv_status_t status = bkv_shape_check(&shape, err);
    if (status != BKV_OK) {
        return status;
    }
    if (header->first_layer + header->layers > BKV_MAX_LAYERS || header->first_head + header->heads > BKV_MAX_HEADS) {
        return FAIL("first_layer %u, first_head %u: the slice ends beyond the format's limits", header->first_layer,
                    header->first_head);
    }
    if (!(header->flags & BKV_RECORD_SLICE) && (header->first_layer != 0 || header->first_head != 0)) {
        return FAIL("first_layer %u, first_head %u: not 0 in a record that is no slice", header->first_layer,
                    header->first_head);
    }
    if (header->position > UINT64_MAX - header->tokens) {
        return FAIL("position: %llu leaves no room for %u tokens", (unsigned long long)header->position, header->tokens);
    }
    return BKV_OK;
}

bkv_status_t bkv_record_check_header(const void *record, size_t capacity, bkv_error_t *err) {
    assert((uintptr_t)record % BKV_RECORD_ALIGN == 0);
    const bkv_record_header_t *header = record;
    if (capacity < sizeof(*header)) {
        return FAIL("length: %zu bytes are no header", capacity);
    }
    bkv_status_t status = check_kind(header, err);
    if (status != BKV_OK) {
        return status;
    }
    status = check_extent(header, err);
    if (status != BKV_OK) {
        return status;
    }
    uint64_t preamble = bkv_record_preamble(header->layers, header->heads);
    if (header->length < preamble || header->length > capacity || header->length % BKV_RECORD_ALIGN != 0) {
        return FAIL("length: %llu is not a multiple of %d between the directory's end %llu and %zu",
                    (unsigned long long)header->length, BKV_RECORD_ALIGN, (unsigned long long)preamble, capacity);
    }
    return BKV_OK;
}

static bool bits_known(uint8_t bits) {
    return bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == BKV_BITS_NATIVE;
}

// The directory entry alone: does it say something possible, and what its codec promises?
static bkv_status_t check_entry(const bkv_record_header_t *header, const bkv_section_t *section, uint32_t number,
                                bkv_error_t *err) {
    if (section->tokens == 0 || section->tokens > header->tokens) {
        return FAIL("section %u tokens: %u is not in 1..%u", number, section->tokens, header->tokens);
    }
    if (!bits_known(section->key_bits) || !bits_known(section->value_bits)) {
        return FAIL("section %u bits: %u and %u are not both 2, 3, 4, 8 or native", number, section->key_bits,
                    section->value_bits);
    }
    if (section->index_kind > BKV_INDEX_LIST || section->reserved != 0) {
        return FAIL("section %u index_kind: %u is unknown", number, section->index_kind);
    }
    if (section->index_kind == BKV_INDEX_ALL && section->tokens != header->tokens) {
        return FAIL("section %u tokens: %u, but all %u are said to be kept", number, section->tokens, header->tokens);
    }
    if (header->codec != BKV_CODEC_BALANCE) {
        uint8_t bits = header->codec == BKV_CODEC_RAW ? BKV_BITS_NATIVE : header->codec == BKV_CODEC_DENSE8 ? 8 : 4;
        if (section->index_kind != BKV_INDEX_ALL || section->key_bits != bits || section->value_bits != bits) {
            return FAIL("section %u bits: not what codec %s stores", number, bkv_codec_name((bkv_codec_t)header->codec));
        }
    }
    return BKV_OK;
}

static bkv_status_t check_plane(const bkv_record_header_t *header, uint32_t number, const char *name, uint32_t offset,
                                uint64_t bytes, bkv_error_t *err) {
    uint64_t at = (uint64_t)offset * BKV_RECORD_ALIGN;
    if (at < bkv_record_preamble(header->layers, header->heads) || at > header->length || bytes > header->length - at) {
        return FAIL("section %u %s: %llu bytes at %llu are not within the record's %llu", number, name,
                    (unsigned long long)bytes, (unsigned long long)at, (unsigned long long)header->length);
    }
    return BKV_OK;
}

static bkv_status_t check_bitmap(const bkv_section_view_t *view, uint32_t number, bkv_error_t *err) {
    uint32_t kept = 0, last = 0, words = (view->source_tokens + 31) / 32;
    for (uint32_t i = 0; i < words; i++) {
        memcpy(&last, view->key_plane + 4 * (size_t)i, sizeof(last));
        kept += (uint32_t)__builtin_popcount(last);
    }
    uint32_t rest = view->source_tokens % 32;
    if (rest != 0 && last >> rest != 0) {
        return FAIL("section %u index: a bit beyond the %u source tokens is set", number, view->source_tokens);
    }
    if (kept != view->tokens) {
        return FAIL("section %u index: %u bits are set for %u tokens", number, kept, view->tokens);
    }
    return BKV_OK;
}

static bkv_status_t check_list(const bkv_section_view_t *view, uint32_t number, bkv_error_t *err) {
    uint32_t previous = 0;
    for (uint32_t t = 0; t < view->tokens; t++) {
        uint32_t index;
        memcpy(&index, view->key_plane + 4 * (size_t)t, sizeof(index));
        if (index >= view->source_tokens || (t > 0 && index <= previous)) {
            return FAIL("section %u index: %u at %u is not ascending within %u", number, index, t, view->source_tokens);
        }
        previous = index;
    }
    return BKV_OK;
}

// Everything that is float16 in the planes: a NaN here would spread over whole channels.
static bkv_status_t check_params(const bkv_section_view_t *view, uint32_t number, bkv_error_t *err) {
    const bkv_plane_layout_t *layout = &view->layout;
    if (view->has_weights && bkv_row_exceeds(BKV_FP16, view->key_plane + layout->weights, 2, true)) {
        return FAIL("section %u weights: base or step is not finite", number);
    }
    if (bkv_row_exceeds(BKV_FP16, view->key_plane + layout->key_params, 2ull * layout->key_groups * view->key_dim, true)) {
        return FAIL("section %u key params: a scale or zero is not finite", number);
    }
    if (bkv_row_exceeds(BKV_FP16, view->value_plane, 2ull * layout->value_groups * view->tokens, true)) {
        return FAIL("section %u value params: a scale or zero is not finite", number);
    }
    return BKV_OK;
}

static bkv_status_t check_section(const void *record, uint32_t number, uint64_t *planes, bkv_error_t *err) {
    const bkv_record_header_t *header = record;
    const bkv_section_t *section = &bkv_record_directory_const(record)[number];
    bkv_status_t status = check_entry(header, section, number, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_section_view_t view;
    bkv_record_section(record, number / header->heads, number % header->heads, &view);
    status = check_plane(header, number, "key_offset", section->key_offset, view.layout.key_bytes, err);
    if (status != BKV_OK) {
        return status;
    }
    status = check_plane(header, number, "value_offset", section->value_offset, view.layout.value_bytes, err);
    if (status != BKV_OK) {
        return status;
    }
    *planes += view.layout.key_bytes + view.layout.value_bytes;
    if (view.index_kind == BKV_INDEX_BITMAP) {
        status = check_bitmap(&view, number, err);
    } else if (view.index_kind == BKV_INDEX_LIST) {
        status = check_list(&view, number, err);
    }
    return status != BKV_OK ? status : check_params(&view, number, err);
}

bkv_status_t bkv_record_check(const void *record, size_t length, bkv_error_t *err) {
    bkv_status_t status = bkv_record_check_header(record, length, err);
    if (status != BKV_OK) {
        return status;
    }
    const bkv_record_header_t *header = record;
    if (header->length != length) {
        return FAIL("length: the record says %llu bytes, %zu are there", (unsigned long long)header->length, length);
    }
    // Planes that share bytes would let a small record stand for an enormous slice.
    uint64_t preamble = bkv_record_preamble(header->layers, header->heads), planes = 0;
    for (uint32_t number = 0; number < (uint32_t)header->layers * header->heads; number++) {
        status = check_section(record, number, &planes, err);
        if (status != BKV_OK) {
            return status;
        }
        if (planes > length - preamble) {
            return FAIL("section %u: its planes overlap others", number);
        }
    }
    return BKV_OK;
}
