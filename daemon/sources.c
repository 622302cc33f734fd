// sources.c - walks the X-macros in which each room declares its metrics.
#include "daemon/sources.h"

#include <stdio.h>
#include <unistd.h>

static void collect_store(void *owner, bkv_metric_emit_t emit, void *sink) {
    bkv_store_metrics_t metrics;
    bkv_store_metrics(owner, &metrics);
#define X(name, is_counter, help) emit(sink, #name, help, is_counter, (double)metrics.name);
    BKV_STORE_METRICS(X)
#undef X
}

static void collect_pipeline(void *owner, bkv_metric_emit_t emit, void *sink) {
    bkv_pipeline_metrics_t metrics;
    bkv_pipeline_metrics(owner, &metrics);
#define X(name, is_counter, help) emit(sink, #name, help, is_counter, (double)metrics.name);
    BKV_PIPELINE_METRICS(X)
#undef X
}

static void collect_transports(void *owner, bkv_metric_emit_t emit, void *sink) {
    bkv_transport_metrics_t metrics;
    bkv_transports_metrics(owner, &metrics);
#define X(name, is_counter, help) emit(sink, #name, help, is_counter, (double)metrics.name);
    BKV_TRANSPORT_METRICS(X)
#undef X
}

static void collect_process(void *owner, bkv_metric_emit_t emit, void *sink) {
    (void)owner;
    unsigned long long size, resident;
    FILE *statm = fopen("/proc/self/statm", "re");
    if (statm == NULL) {
        return;
    }
    if (fscanf(statm, "%llu %llu", &size, &resident) == 2) {
        emit(sink, "process_resident_bytes", "memory of the process, arena included where it was touched", false,
             (double)resident * (double)sysconf(_SC_PAGESIZE));
    }
    fclose(statm);
}

size_t bkv_sources_init(bkv_store_t *store, bkv_pipeline_t *pipeline, bkv_transports_t *transports, bkv_cluster_t *cluster,
                        bkv_metric_source_t sources[BKV_SOURCE_COUNT]) {
    size_t count = 0;
    sources[count++] = (bkv_metric_source_t){collect_store, store};
    sources[count++] = (bkv_metric_source_t){collect_pipeline, pipeline};
    sources[count++] = (bkv_metric_source_t){collect_transports, transports};
    sources[count++] = (bkv_metric_source_t){collect_process, NULL};
    if (cluster != NULL) { // last, as it may have more than a reader takes
        sources[count++] = (bkv_metric_source_t){bkv_cluster_collect, cluster};
    }
    return count;
}
