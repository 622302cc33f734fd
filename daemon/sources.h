// sources.h - the daemon's metrics: where Stats (rpc/) gets those of the store, the pipeline, the transports, the
// cluster and the process.
#ifndef BKV_SOURCES_H
#define BKV_SOURCES_H

#include "daemon/cluster/cluster.h"
#include "daemon/observe/metrics.h"
#include "daemon/transport/transport.h"

#define BKV_SOURCE_COUNT 5 // at most

// store, pipeline, transports and cluster (NULL: none) must outlive their use. Returns how many sources there are.
size_t bkv_sources_init(bkv_store_t *store, bkv_pipeline_t *pipeline, bkv_transports_t *transports, bkv_cluster_t *cluster,
                        bkv_metric_source_t sources[BKV_SOURCE_COUNT]);

#endif
