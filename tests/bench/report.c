// report.c - see report.h.
#include "tests/bench/report.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void bkv_report_add(bkv_report_t *report, const char *name, double value, const char *unit, const char *against_name,
                    double against, bkv_bar_t kind, double bar) {
    assert(report->count < BKV_REPORT_ROWS);
    bkv_report_row_t *row = &report->rows[report->count++];
    *row = (bkv_report_row_t){.value = value, .against = against, .kind = kind, .bar = bar};
    snprintf(row->name, sizeof(row->name), "%s", name);
    snprintf(row->unit, sizeof(row->unit), "%s", unit);
    snprintf(row->against_name, sizeof(row->against_name), "%s", against_name != NULL ? against_name : "");
}

static double ratio_of(const bkv_report_row_t *row) {
    return row->against > 0 ? row->value / row->against : row->value;
}

static bool met(const bkv_report_row_t *row) {
    switch (row->kind) {
    case BKV_BAR_AT_LEAST:
        return ratio_of(row) >= row->bar;
    case BKV_BAR_AT_MOST:
        return ratio_of(row) <= row->bar;
    case BKV_BAR_NONE:
        break;
    }
    return true;
}

bool bkv_report_met(const bkv_report_t *report) {
    bool all = true;
    for (size_t i = 0; i < report->count; i++) {
        all = all && met(&report->rows[i]);
    }
    return all;
}

void bkv_report_print(const bkv_report_t *report) {
    printf("%-30s %9s %-6s %-30s %9s %7s %8s %s\n", "name", "value", "unit", "against", "", "ratio", "bar", "met");
    for (size_t i = 0; i < report->count; i++) {
        const bkv_report_row_t *row = &report->rows[i];
        printf("%-30s %9.3g %-6s", row->name, row->value, row->unit);
        if (row->against > 0) {
            printf(" %-30s %9.3g %7.2f", row->against_name, row->against, ratio_of(row));
        }
        if (row->kind != BKV_BAR_NONE) {
            printf(" %s %5.2f %s", row->kind == BKV_BAR_AT_LEAST ? ">=" : "<=", row->bar, met(row) ? "yes" : "NO");
        }
        printf("\n");
    }
}

// A number, or null where there is none.
static void write_number(FILE *file, const char *key, bool there, double value) {
    if (there) {
        fprintf(file, ", \"%s\": %.6g", key, value);
    } else {
        fprintf(file, ", \"%s\": null", key);
    }
}

// Names and units are ours and need no escapes.
static void write_row(FILE *file, const bkv_report_row_t *row) {
    bool compared = row->against > 0, judged = row->kind != BKV_BAR_NONE;
    assert(strpbrk(row->name, "\"\\") == NULL && strpbrk(row->unit, "\"\\") == NULL);
    fprintf(file, " {\"name\": \"%s\", \"value\": %.6g, \"unit\": \"%s\"", row->name, row->value, row->unit);
    write_number(file, "against", compared, row->against);
    write_number(file, "ratio", compared, ratio_of(row));
    write_number(file, "bar", judged, row->bar);
    fprintf(file, ", \"met\": %s}", !judged ? "null" : met(row) ? "true" : "false");
}

bool bkv_report_write(const bkv_report_t *report, const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) {
        fprintf(stderr, "cannot write %s: %s\n", path, strerror(errno));
        return false;
    }
    fprintf(file, "[\n");
    for (size_t i = 0; i < report->count; i++) {
        write_row(file, &report->rows[i]);
        fprintf(file, i + 1 < report->count ? ",\n" : "\n");
    }
    fprintf(file, "]\n");
    bool written = !ferror(file);
    written = fclose(file) == 0 && written;
    if (!written) {
        fprintf(stderr, "cannot write %s\n", path);
    }
    return written;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bkv_quantile(double *samples, size_t count, double p) {
    assert(count >= 1);
    qsort(samples, count, sizeof(*samples), compare);
    return samples[(size_t)(p * (double)(count - 1) + 0.5)];
}
