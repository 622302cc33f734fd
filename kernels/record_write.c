// record_write.c - header, directory and slices of records: everything of a new record but what its planes hold.
#include "record.h"

#include <assert.h>
#include <string.h>

void bkv_record_init(void *record, const bkv_shape_t *shape, const bkv_record_id_t *id, bkv_codec_t codec, uint8_t flags) {
    bkv_record_header_t *header = record;
    memset(record, 0, (size_t)bkv_record_preamble(shape->layers, shape->heads));
    header->magic = BKV_RECORD_MAGIC;
    header->version = BKV_RECORD_VERSION;
    header->codec = (uint8_t)codec;
    header->flags = flags;
    memcpy(header->key, id->key.bytes, sizeof(header->key));
    memcpy(header->spec_id, id->spec_id.bytes, sizeof(header->spec_id));
    header->tenant = id->tenant;
    header->position = id->position;
    header->tokens = shape->tokens;
    header->layers = (uint16_t)shape->layers;
    header->heads = (uint16_t)shape->heads;
    header->key_dim = (uint16_t)shape->key_dim;
    header->value_dim = (uint16_t)shape->value_dim;
    header->dtype = (uint8_t)shape->dtype;
}

void bkv_record_layout(const bkv_record_header_t *header, const bkv_section_t *section, bkv_plane_layout_t *layout) {
    bkv_plane_layout(header->tokens, section->tokens, header->key_dim, header->value_dim, section->key_bits,
                     section->value_bits, (bkv_index_kind_t)section->index_kind, (header->flags & BKV_RECORD_WEIGHTS) != 0,
                     (bkv_dtype_t)header->dtype, layout);
}

uint64_t bkv_record_place(void *record) {
    bkv_record_header_t *header = record;
    bkv_section_t *directory = bkv_record_directory(record);
    uint64_t at = bkv_record_preamble(header->layers, header->heads);
    for (uint32_t layer = 0; layer < header->layers; layer++) {
        bkv_section_t *row = directory + (size_t)layer * header->heads;
        bkv_plane_layout_t layout;
        for (uint32_t head = 0; head < header->heads; head++) {
            bkv_record_layout(header, &row[head], &layout);
            row[head].key_offset = (uint32_t)(at / BKV_RECORD_ALIGN);
            at += layout.key_bytes;
        }
        for (uint32_t head = 0; head < header->heads; head++) {
            bkv_record_layout(header, &row[head], &layout);
            row[head].value_offset = (uint32_t)(at / BKV_RECORD_ALIGN);
            at += layout.value_bytes;
        }
    }
    assert(at <= BKV_RECORD_MAX);
    header->length = at;
    return at;
}

static bkv_status_t range_check(const char *name, uint32_t first, uint32_t count, uint32_t limit, bkv_error_t *err) {
    if (count == 0 || first >= limit || count > limit - first) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %u from %u on are not within the record's %u", name, count, first,
                        limit);
    }
    return BKV_OK;
}

bkv_status_t bkv_record_slice(const void *record, uint32_t first_layer, uint32_t layers, uint32_t first_head, uint32_t heads,
                              void *out, size_t *length, bkv_error_t *err) {
    const bkv_record_header_t *from = record;
    bkv_status_t status = range_check("layers", first_layer, layers, from->layers, err);
    if (status != BKV_OK) {
        return status;
    }
    status = range_check("heads", first_head, heads, from->heads, err);
    if (status != BKV_OK) {
        return status;
    }
    const bkv_section_t *source = bkv_record_directory_const(record);
    uint64_t bytes = bkv_record_preamble(layers, heads);
    for (uint32_t i = 0; i < layers * heads; i++) {
        bkv_plane_layout_t layout;
        bkv_record_layout(from, &source[(size_t)(first_layer + i / heads) * from->heads + first_head + i % heads], &layout);
        bytes += layout.key_bytes + layout.value_bytes;
    }
    if (!out) {
        *length = (size_t)bytes;
        return BKV_OK;
    }
    if (*length < bytes) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "length: %zu bytes of room, the slice needs %llu", *length,
                        (unsigned long long)bytes);
    }
    bkv_record_header_t *to = out;
    bkv_section_t *target = bkv_record_directory(out);
    *to = *from;
    to->checksum = 0;
    to->layers = (uint16_t)layers;
    to->heads = (uint16_t)heads;
    to->first_layer = (uint16_t)(from->first_layer + first_layer);
    to->first_head = (uint16_t)(from->first_head + first_head);
    if (layers != from->layers || heads != from->heads) {
        to->flags |= BKV_RECORD_SLICE;
    }
    for (uint32_t i = 0; i < layers * heads; i++) {
        target[i] = source[(size_t)(first_layer + i / heads) * from->heads + first_head + i % heads];
    }
    *length = (size_t)bkv_record_place(out);
    for (uint32_t i = 0; i < layers * heads; i++) {
        const bkv_section_t *old = &source[(size_t)(first_layer + i / heads) * from->heads + first_head + i % heads];
        bkv_plane_layout_t layout;
        bkv_record_layout(to, &target[i], &layout);
        memcpy((uint8_t *)out + (size_t)target[i].key_offset * BKV_RECORD_ALIGN,
               (const uint8_t *)record + (size_t)old->key_offset * BKV_RECORD_ALIGN, (size_t)layout.key_bytes);
        memcpy((uint8_t *)out + (size_t)target[i].value_offset * BKV_RECORD_ALIGN,
               (const uint8_t *)record + (size_t)old->value_offset * BKV_RECORD_ALIGN, (size_t)layout.value_bytes);
    }
    return BKV_OK;
}
