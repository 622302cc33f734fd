// ingest.h - a Put on its way, as put_begin.c makes it and put.c fills and ends it; nobody else includes it.
#ifndef BKV_PIPELINE_INGEST_H
#define BKV_PIPELINE_INGEST_H

#include "daemon/pipeline/internal.h"
#include "kernels/seal.h"

// Where an ingest's payload goes, and thereby what must be given back.
typedef enum bkv_sink {
    BKV_SINK_STAGING, // staging memory, to be compressed
    BKV_SINK_SLOT,    // its final place in a slot of the store: a raw block
    BKV_SINK_DEVICE,  // nowhere: it stays in GPU memory, and a record arrives in a slot of the store
    BKV_SINK_NONE     // nowhere: the key is resident
} bkv_sink_t;

struct bkv_ingest {
    bkv_job_t job; // first: the pool knows only this
    bkv_pipeline_t *pipeline;
    const bkv_model_t *model;
    bkv_ingest_args_t args; // codec and rate resolved in params
    bkv_codec_params_t params;
    bkv_shape_t shape;
    bkv_sink_t sink;
    uint8_t *payload;       // of STAGING and SLOT, else NULL
    uint64_t received;      // bytes of the payload
    uint64_t made;          // DEVICE: length of the record, once it is there
    bkv_sum_t *sum;         // SLOT: the record's checksum so far
    bool unseen;            // SLOT: the payload came by DMA, nobody has looked at it yet
    bool finite;            // SLOT: nothing but numbers in what has been looked at
    bkv_slot_t slot;        // SLOT and DEVICE from the start; STAGING while compressing
    bkv_pin_t resident;     // NONE: the record that was there, pinned, so that the answer stays true
    bkv_ingest_read_t read; // of commit_from, with its source
    void *source;
    bkv_ingest_done_t done;
    void *user;
};

// What the record's header will say.
bkv_record_id_t bkv_ingest_record_id(const bkv_ingest_t *ingest);

// Gives back whatever the ingest still holds, and the ingest.
void bkv_ingest_free(bkv_ingest_t *ingest);

#endif
