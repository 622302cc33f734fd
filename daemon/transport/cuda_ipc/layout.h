// layout.h - where the values of a block lie in GPU memory that a client shares: checking what the client says of it,
// and turning it into addresses. Pure arithmetic: no device is touched, and none is needed to test it.
//
// A session's memory is its allocations one after the other, and everything that a client says is an offset in it. What may be
// read without a gap is a span: one allocation that came by handle, or all that came by descriptor and follow one another, as
// those are mapped one behind the other. Spans lie anywhere in the daemon's addresses.
#ifndef BKV_CUDA_IPC_LAYOUT_H
#define BKV_CUDA_IPC_LAYOUT_H

#include "daemon/transport/transport.h"
#include "kernels/codec.h"

typedef struct bkv_ipc_span {
    uint64_t first, bytes; // offsets in the session's memory
    uint8_t *base;         // where `first` is mapped
} bkv_ipc_span_t;

// Ascending, each beginning where the one before it ends; the first at 0.
typedef struct bkv_ipc_spans {
    const bkv_ipc_span_t *list;
    uint32_t count;
} bkv_ipc_spans_t;

// The span with that offset; NULL: past the end.
const bkv_ipc_span_t *bkv_ipc_span_find(const bkv_ipc_spans_t *spans, uint64_t offset);

// Where [offset, offset + bytes) is mapped; NULL where it is not within one span.
uint8_t *bkv_ipc_span_address(const bkv_ipc_spans_t *spans, uint64_t offset, uint64_t bytes);

// Whether every byte of a block of that shape lies in the spans: all that is read of one tensor of one layer within a single
// one. INVALID_ARGUMENT names the field. The shape is checked already.
bkv_status_t bkv_ipc_layout_check(const bkv_device_layout_t *layout, const bkv_shape_t *shape, const bkv_ipc_spans_t *spans,
                                  bkv_error_t *err);

// The block as strides, where they can say it: layers evenly spaced, pages in a row. False: it must be gathered. The layout
// must have been checked.
bool bkv_ipc_layout_direct(const bkv_device_layout_t *layout, const bkv_shape_t *shape, const bkv_ipc_spans_t *spans,
                           bkv_block_t *block);

// What bkv_gpu_gather wants, of a checked layout: 2 * layers addresses, K and V of each layer, and for each page the offset of
// its first token from those. A layout without pages is one page of all tokens.
void bkv_ipc_layout_tables(const bkv_device_layout_t *layout, const bkv_shape_t *shape, const bkv_ipc_spans_t *spans,
                           uint64_t *bases, uint64_t *pages);
uint32_t bkv_ipc_layout_pages(const bkv_device_layout_t *layout);                                 // at least 1
uint32_t bkv_ipc_layout_page_tokens(const bkv_device_layout_t *layout, const bkv_shape_t *shape); // likewise

#endif
