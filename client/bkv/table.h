// table.h - what bkv shows: aligned tables, and progress bars for whoever watches.
//
// Cells are plain text without escapes; colour is the printer's business and never goes to a pipe (see bkv_table_color).
#ifndef BKV_CLI_TABLE_H
#define BKV_CLI_TABLE_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

typedef struct bkv_table bkv_table_t;

// `columns` headings, separated by '|'. A heading that starts with '>' has its column set flush right.
bkv_table_t *bkv_table_create(const char *headings);
void bkv_table_destroy(bkv_table_t *table);

// The next cell, row by row from left to right. Text that outgrows 255 characters is cut.
void bkv_table_cell(bkv_table_t *table, const char *format, ...) BKV_PRINTF(2, 3);

// Prints headings and rows and returns the number of lines. With `color` the headings are bold.
uint32_t bkv_table_print(const bkv_table_t *table, FILE *out, bool color);

// Colour on this stream: it is a terminal that knows how, and NO_COLOR (no-color.org) is not set.
bool bkv_table_color(FILE *out);

// A bar on stderr while something long runs: `title [=====>    ] 42 %  5/12  1.2 GiB/s`. Where stderr is no terminal or
// `quiet` is set, every call does nothing.
typedef struct bkv_progress {
    const char *title;
    uint64_t total, done, bytes; // steps, steps done, bytes that those moved (0: not shown)
    uint64_t start_ns, shown_ns;
    bool active;
} bkv_progress_t;

void bkv_progress_begin(bkv_progress_t *progress, const char *title, uint64_t total, bool quiet);
void bkv_progress_step(bkv_progress_t *progress, uint64_t steps, uint64_t bytes);
void bkv_progress_end(bkv_progress_t *progress); // wipes the bar

// CLOCK_MONOTONIC in nanoseconds.
uint64_t bkv_now_monotonic_ns(void);

#endif
