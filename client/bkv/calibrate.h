// calibrate.h - how much of a layer's attention output is lost with each of its heads, measured on a trace with queries.
#ifndef BKV_CLI_CALIBRATE_H
#define BKV_CLI_CALIBRATE_H

#include "summarize.h"

// Compresses all tokens but the newest options->window, which are those that ask, with equal shares and has their queries attend
// causally: over what is left of the older tokens, and over the newest themselves, exact. Adds to errors [layers][heads] what each
// head alone changes, |change|^2 / |exact output of all the layer's heads|^2, sums over the queries.
//   trace    needs q.N [query heads, n, key_dim] for every layer N, n >= window: the newest tokens' queries come last
//   scale    on <q, k>; 0 means 1 / sqrt(key_dim)
// INVALID_ARGUMENT names the tensor at fault, or is bkv_summarize_trace's.
bkv_status_t bkv_calibrate_trace(const bkv_trace_t *trace, const bkv_summarize_t *options, float scale, double *errors,
                                 bkv_error_t *err);

#endif
