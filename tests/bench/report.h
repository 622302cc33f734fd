// report.h - measured results as a table on stdout and as JSON: what every bench ends with.
//
// The file is an array of {"name", "value", "unit", "against", "ratio", "bar", "met"}: `against` is what the value is compared
// with, `ratio` value / against, `bar` the limit that the ratio must keep; null where there is none. tests/support/report.py
// writes the same from Python.
#ifndef BKV_BENCH_REPORT_H
#define BKV_BENCH_REPORT_H

#include <stdbool.h>
#include <stddef.h>

#define BKV_REPORT_ROWS 128

typedef enum bkv_bar { BKV_BAR_NONE, BKV_BAR_AT_LEAST, BKV_BAR_AT_MOST } bkv_bar_t;

typedef struct bkv_report_row {
    char name[64], unit[16], against_name[48];
    double value, against; // against 0: compared with nothing
    double bar;
    bkv_bar_t kind;
} bkv_report_row_t;

typedef struct bkv_report {
    bkv_report_row_t rows[BKV_REPORT_ROWS];
    size_t count;
} bkv_report_t;

// Adds a row. against_name may be NULL; it is shown in the table only. Texts that are too long are cut.
void bkv_report_add(bkv_report_t *report, const char *name, double value, const char *unit, const char *against_name,
                    double against, bkv_bar_t kind, double bar);

// Prints the table.
void bkv_report_print(const bkv_report_t *report);

// Writes the JSON file. False, and a line on stderr, when that fails.
bool bkv_report_write(const bkv_report_t *report, const char *path);

// Whether every bar was met.
bool bkv_report_met(const bkv_report_t *report);

// The p-quantile (0..1) of samples, which are sorted in place. count >= 1.
double bkv_quantile(double *samples, size_t count, double p);

#endif
