// pipeline.h - what the daemon does with requests, free of any wire format: the way from a block to a stored record and back.
//
//   Put:    bkv_ingest_begin (admit) -> _write* (bytes arrive) -> _commit: verify, compress on a compute thread, seal,
//           publish -> done callback
//   Get:    bkv_deliver -> bytes are read where they lie -> bkv_delivery_release
//   Fold:   bkv_fold_start: plan bands by age -> on a compute thread, for each: find, or pin its parts, merge-and-reduce and
//           publish under its own key -> deliver
//   Attend: bkv_attend_start: pin all -> attention on a compute thread -> done callback
//
// Everything is bounded and admitted at the door: staging memory, queued jobs, batch sizes; beyond it BKV_BUSY. A callback
// runs exactly once for each accepted start, on a compute thread or (see bkv_ingest_commit) the caller's, and must not block.
// A request that its caller abandons keeps what it holds until the work on it has ended, and is then released.
//
// Time: now_ms is the monotonic clock (bkv_now_ms in observe/clock.h), an argument so that tests use a fake one; the
// pipeline reads config.now() on its own threads.
#ifndef BKV_PIPELINE_H
#define BKV_PIPELINE_H

#include "daemon/pipeline/model.h"
#include "daemon/pipeline/pool.h"
#include "daemon/store/store.h"
#include "kernels/cool.h"

typedef struct bkv_pipeline bkv_pipeline_t;
typedef struct bkv_ingest bkv_ingest_t;

typedef struct bkv_pipeline_config {
    bkv_store_t *store; // outlives the pipeline
    const bkv_backend_t *backend;
    uint32_t compute_threads; // 0: one per online CPU
    uint32_t max_jobs;        // queued compute jobs; beyond: BUSY
    uint64_t staging_bytes;   // memory for payloads on their way to a codec; beyond: BUSY
    uint64_t max_block_bytes; // largest payload
    uint64_t gpu_cache_bytes; // GPU memory for records that Attend reads there; 0: Attend runs on the CPU
    uint32_t max_specs, max_batch;
    uint64_t default_ttl_ms; // 0: none
    uint64_t (*now_ms)(void);
} bkv_pipeline_config_t;

// Counters: X(name, is_counter, help)
#define BKV_PIPELINE_METRICS(X)                                                                                                \
    X(put_blocks_total, true, "blocks taken in and published")                                                                 \
    X(put_duplicates_total, true, "blocks taken in whose key was there already")                                               \
    X(put_failed_total, true, "blocks refused, failed or given up")                                                            \
    X(get_records_total, true, "records handed out")                                                                           \
    X(folds_total, true, "records of folds computed")                                                                          \
    X(fold_hits_total, true, "records of folds answered from the store")                                                       \
    X(fold_nodes_total, true, "inner nodes of folds computed")                                                                 \
    X(fold_read_bytes_total, true, "bytes of records read to compute folds and their nodes")                                   \
    X(attends_total, true, "attention requests computed")                                                                      \
    X(attends_gpu_total, true, "of these, those computed on a GPU")                                                            \
    X(gpu_hits_total, true, "records that attention on a GPU found there")                                                     \
    X(gpu_loads_total, true, "records that were brought to a GPU")                                                             \
    X(gpu_records, false, "copies of records in GPU memory")                                                                   \
    X(gpu_bytes, false, "bytes of these")                                                                                      \
    X(busy_total, true, "requests refused at the door")                                                                        \
    X(compress_us_total, true, "microseconds spent compressing, all compute threads")                                          \
    X(staging_bytes, false, "payload bytes in staging")                                                                        \
    X(jobs_queued, false, "compute jobs waiting")                                                                              \
    X(jobs_ended_total, true, "compute jobs that have run")                                                                    \
    X(jobs_running, false, "compute jobs running")                                                                             \
    X(specs, false, "specs opened")

typedef struct bkv_pipeline_metrics {
#define X(name, is_counter, help) uint64_t name;
    BKV_PIPELINE_METRICS(X)
#undef X
} bkv_pipeline_metrics_t;

// INVALID_ARGUMENT: compute.gpu_cache without a GPU.
bkv_status_t bkv_pipeline_create(const bkv_pipeline_config_t *config, bkv_pipeline_t **pipeline, bkv_error_t *err);

// From now on new ingests, folds and attends are refused with BUSY ("draining"); what was accepted goes on, and records are
// still delivered. Call it once no call in flight may need more than that.
void bkv_pipeline_drain(bkv_pipeline_t *pipeline);

// Waits until every accepted job has called back, at most timeout_ms. Returns false when some have not.
bool bkv_pipeline_wait_idle(bkv_pipeline_t *pipeline, uint64_t timeout_ms);

// Stops the compute threads (running jobs are finished, queued ones call back with CANCELLED) and frees. Asserts that no
// ingest and no delivery is left.
void bkv_pipeline_destroy(bkv_pipeline_t *pipeline);

void bkv_pipeline_metrics(const bkv_pipeline_t *pipeline, bkv_pipeline_metrics_t *metrics);

// May be changed at any time (SIGHUP).
void bkv_pipeline_set_default_ttl(bkv_pipeline_t *pipeline, uint64_t ttl_ms);

// Queues a job of anybody's beside the pipeline's own (pool.h). BUSY: too many; counted.
bkv_status_t bkv_pipeline_submit(bkv_pipeline_t *pipeline, bkv_job_t *job, bkv_error_t *err);

// The staging memory, to be registered with devices: one mapping, for the pipeline's life.
void bkv_pipeline_staging(bkv_pipeline_t *pipeline, void **memory, uint64_t *bytes);

// The GPU is about to be reset: waits for requests of this pipeline that are there, and goes on without it. Any thread.
void bkv_pipeline_device_lost(bkv_pipeline_t *pipeline);

// The model table, for Open.
bkv_model_table_t *bkv_pipeline_models(bkv_pipeline_t *pipeline);

// ---- Put ----

typedef struct bkv_ingest_args {
    bkv_spec_id_t spec_id;
    bkv_key_t key;
    uint64_t position;
    uint32_t tokens;
    uint64_t payload_bytes;
    bkv_codec_t codec; // 0: the model's
    uint32_t rate;     // 0: the model's
    uint64_t ttl_ms;   // 0: the default
    bool has_checksum;
    uint64_t checksum; // XXH3-64 of the payload
    bool on_device;    // the payload stays in GPU memory and a finished record arrives: see bkv_ingest_device
} bkv_ingest_args_t;

typedef struct bkv_ingest_result {
    uint64_t stored_bytes;
    bool duplicate;
} bkv_ingest_result_t;

// error.status == BKV_OK: the block is published (or was there). error and result are never NULL and live for the call only.
typedef void (*bkv_ingest_done_t)(void *user, const bkv_error_t *error, const bkv_ingest_result_t *result);

// Checks the arguments against the model, takes memory for the payload (a raw payload is received straight into its slot in
// the store). A key that is resident already is accepted too: its bytes are counted, not kept.
bkv_status_t bkv_ingest_begin(bkv_pipeline_t *pipeline, const bkv_ingest_args_t *args, uint64_t now_ms, bkv_ingest_t **ingest,
                              bkv_error_t *err);

// The next bytes of the payload. More than payload_bytes in all: INVALID_ARGUMENT. One thread at a time.
bkv_status_t bkv_ingest_write(bkv_ingest_t *ingest, const void *bytes, size_t length, bkv_error_t *err);

// Bytes still missing.
uint64_t bkv_ingest_missing(const bkv_ingest_t *ingest);

// All bytes must have come, else INVALID_ARGUMENT and the ingest is still the caller's. On BKV_OK the ingest belongs to the
// pipeline and `done` will be called, for a raw block that needs no more work before this returns. BUSY: too many jobs; the
// ingest is still the caller's.
bkv_status_t bkv_ingest_commit(bkv_ingest_t *ingest, bkv_ingest_done_t done, void *user, bkv_error_t *err);

// Gives an uncommitted ingest up; nothing of it remains.
void bkv_ingest_abort(bkv_ingest_t *ingest);

// Payloads that do not come by _write from the caller:
//
//   _commit_from   a compute thread calls `read` first, which brings all bytes by bkv_ingest_write and may fail; it is called at
//                  most once (not when the key is resident), and `source` must live until `done`. Statuses as of _commit
//   _memory        where the payload is to lie, for DMA: payload_bytes bytes that stay put until commit or abort; NULL when the
//                  key is resident, and nothing need be brought. Then _filled when all bytes lie there or are not needed, and
//                  _commit, which looks through them on a compute thread
//   _device        (args.on_device) what is to be made and where: see there. Then _made, unless the key is resident, and _commit,
//                  which seals and publishes
typedef bkv_status_t (*bkv_ingest_read_t)(void *source, bkv_ingest_t *ingest, bkv_error_t *err);
bkv_status_t bkv_ingest_commit_from(bkv_ingest_t *ingest, bkv_ingest_read_t read, void *source, bkv_ingest_done_t done,
                                    void *user, bkv_error_t *err);

void *bkv_ingest_memory(bkv_ingest_t *ingest);
void bkv_ingest_filled(bkv_ingest_t *ingest);

// The record to make of a payload in GPU memory. record is memory of the arena (see bkv_store_memory), capacity at least
// bkv_codec_bound; NULL when the key is resident and nothing need be made. params.shares live as long as the pipeline.
typedef struct bkv_ingest_device {
    bkv_shape_t shape;
    bkv_codec_params_t params;
    bkv_record_id_t id;
    uint8_t *record;
    uint64_t capacity;
} bkv_ingest_device_t;
void bkv_ingest_device(bkv_ingest_t *ingest, bkv_ingest_device_t *device);
void bkv_ingest_made(bkv_ingest_t *ingest, uint64_t length); // a record without its checksum lies there

// Bytes of the payload, as checked at begin.
uint64_t bkv_ingest_bytes(const bkv_ingest_t *ingest);

// ---- Get ----

typedef struct bkv_deliver_range {
    uint32_t first_layer, layers, first_head, heads; // a count of 0: all from first on
} bkv_deliver_range_t;

// A record to be read: the pinned bytes of the store themselves, or a slice made for this request.
typedef struct bkv_delivery {
    const uint8_t *data;
    uint64_t length;
    uint64_t ttl_ms; // what is left of its time to live; 0: no end
    bkv_pin_t pin;
    void *slice; // owned; NULL where data is the pinned record
} bkv_delivery_t;

bkv_status_t bkv_deliver(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *key,
                         const bkv_deliver_range_t *range, uint64_t now_ms, bkv_delivery_t *delivery, bkv_error_t *err);

// A whole record of a spec that need not be open here.
bkv_status_t bkv_deliver_whole(bkv_pipeline_t *pipeline, const bkv_name_t *name, uint64_t now_ms, bkv_delivery_t *delivery,
                               bkv_error_t *err);

// As bkv_deliver without looking at the record's bytes, for whoever verifies them when they move: by bkv_delivery_verify before, or by
// bkv_delivery_copy in the same pass. (A slice is verified as it is made.)
bkv_status_t bkv_deliver_unverified(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *key,
                                    const bkv_deliver_range_t *range, uint64_t now_ms, bkv_delivery_t *delivery,
                                    bkv_error_t *err);

// DATA_LOSS: the delivery's bytes are damaged; the record has been dropped. The delivery is still the caller's to release.
bkv_status_t bkv_delivery_verify(bkv_pipeline_t *pipeline, const bkv_delivery_t *delivery, bkv_error_t *err);

// Copies a delivery's bytes, in one pass with their checksum. DATA_LOSS: they are damaged; the record has been dropped, and what
// was copied means nothing.
bkv_status_t bkv_delivery_copy(bkv_pipeline_t *pipeline, const bkv_delivery_t *delivery, void *to, bkv_error_t *err);

// From any thread. Leaves the delivery empty; an empty (zeroed) one is left alone.
void bkv_delivery_release(bkv_pipeline_t *pipeline, bkv_delivery_t *delivery);

// ---- Fold, Attend ----

typedef struct bkv_fold_args {
    bkv_spec_id_t spec_id;
    const bkv_key_t *keys; // [count], consecutive records, oldest first; copied
    uint32_t count;
    uint64_t budget;       // bytes of all records of the answer together; 0: by rate, or what the profile's rates come to
    uint32_t rate;         // with budget 0: the bytes that the tokens take as bf16, divided by this
    bkv_profile_t profile; // count 0: one record
    uint64_t ttl_ms;       // 0: the default
} bkv_fold_args_t;

typedef struct bkv_fold_record {
    bkv_key_t key;
    bkv_delivery_t delivery;
} bkv_fold_record_t;

// The records, oldest first (see bkv_cool_plan); 0 on error. The callback's to release, or to copy and have released later.
typedef struct bkv_fold_result {
    uint32_t count;
    bkv_fold_record_t records[BKV_FOLD_RECORDS];
} bkv_fold_result_t;

typedef void (*bkv_fold_done_t)(void *user, const bkv_error_t *error, bkv_fold_result_t *result);

// Each band's record is that of a Fold of the band's own keys under its own budget, and its key is
// SHA-256("bkv-fold-1\0" | spec id | budget as uint64 LE | keys...).
bkv_status_t bkv_fold_start(bkv_pipeline_t *pipeline, const bkv_fold_args_t *args, bkv_fold_done_t done, void *user,
                            bkv_error_t *err);

void bkv_fold_release(bkv_pipeline_t *pipeline, bkv_fold_result_t *result);

// Leaves copies of records in GPU memory, where Attend finds them. Keys that are not resident are passed over. done may be called
// before this returns. UNIMPLEMENTED: there is no GPU cache.
// count: how many there are.
typedef void (*bkv_warm_done_t)(void *user, const bkv_error_t *error, uint32_t count);
bkv_status_t bkv_warm_start(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count,
                            bkv_warm_done_t done, void *user, bkv_error_t *err);

typedef void (*bkv_attend_done_t)(void *user, const bkv_error_t *error);

// args->q, out and lse are the caller's and must live until `done`. args->first_layer and layers are of the model; layers 0:
// all from first_layer on. keys are copied.
bkv_status_t bkv_attend_start(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count,
                              const bkv_attend_args_t *args, uint64_t now_ms, bkv_attend_done_t done, void *user,
                              bkv_error_t *err);

#endif
