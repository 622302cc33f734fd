// metrics.h - where counters are collected from: whoever owns some registers a source; Stats (rpc/) reads them all.
#ifndef BKV_METRICS_H
#define BKV_METRICS_H

#include <stdbool.h>
#include <stddef.h>

// name: without the "balancekv_" prefix, which the reader adds; it may carry Prometheus labels, peer_up{member="a"}, and is copied
// by the reader. help is static.
typedef void (*bkv_metric_emit_t)(void *sink, const char *name, const char *help, bool counter, double value);

typedef struct bkv_metric_source {
    void (*collect)(void *owner, bkv_metric_emit_t emit, void *sink); // thread-safe
    void *owner;
} bkv_metric_source_t;

#endif
