// sources.h - the daemon's metrics: where Stats (rpc/) gets those of the store, the pipeline, the transports and the process.
#ifndef BKV_SOURCES_H
#define BKV_SOURCES_H

#include "daemon/observe/metrics.h"
#include "daemon/transport/transport.h"

#define BKV_SOURCE_COUNT 4

// store, pipeline and transports must outlive their use.
void bkv_sources_init(bkv_store_t *store, bkv_pipeline_t *pipeline, bkv_transports_t *transports,
                      bkv_metric_source_t sources[BKV_SOURCE_COUNT]);

#endif
