// table.c - see table.h.
#include "table.h"

#include "memory.h"
#include "text.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define REDRAW_NS 100000000u
#define BAR_WIDTH 30

struct bkv_table {
    size_t columns, cells, capacity;
    bool *right;
    char **text; // headings first, then row by row
};

static void table_add(bkv_table_t *table, const char *text, size_t length) {
    if (table->cells == table->capacity) {
        table->capacity = table->capacity == 0 ? 64 : table->capacity * 2;
        table->text = bkv_xrealloc(table->text, table->capacity, sizeof *table->text);
    }
    char *copy = bkv_xcalloc(length + 1, 1);
    memcpy(copy, text, length);
    table->text[table->cells++] = copy;
}

bkv_table_t *bkv_table_create(const char *headings) {
    bkv_table_t *table = bkv_xcalloc(1, sizeof *table);
    for (const char *at = headings;;) {
        size_t length = strcspn(at, "|");
        bool right = at[0] == '>';
        table->right = bkv_xrealloc(table->right, table->columns + 1, sizeof *table->right);
        table->right[table->columns++] = right;
        table_add(table, at + right, length - right);
        if (at[length] == '\0') {
            return table;
        }
        at += length + 1;
    }
}

void bkv_table_destroy(bkv_table_t *table) {
    if (table == NULL) {
        return;
    }
    for (size_t i = 0; i < table->cells; i++) {
        free(table->text[i]);
    }
    free(table->text);
    free(table->right);
    free(table);
}

void bkv_table_cell(bkv_table_t *table, const char *format, ...) {
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    table_add(table, text, strlen(text));
}

// Characters that a terminal shows: UTF-8 continuation bytes do not count.
static size_t width_of(const char *text) {
    size_t width = 0;
    for (; *text != '\0'; text++) {
        width += ((unsigned char)*text & 0xc0) != 0x80;
    }
    return width;
}

uint32_t bkv_table_print(const bkv_table_t *table, FILE *out, bool color) {
    size_t *widths = bkv_xcalloc(table->columns, sizeof *widths);
    for (size_t i = 0; i < table->cells; i++) {
        size_t width = width_of(table->text[i]);
        size_t column = i % table->columns;
        widths[column] = width > widths[column] ? width : widths[column];
    }
    uint32_t lines = 0;
    for (size_t i = 0; i < table->cells; i++) {
        size_t column = i % table->columns;
        bool last = column + 1 == table->columns;
        int pad = (int)(widths[column] - width_of(table->text[i]));
        fputs(color && i == 0 ? "\033[1m" : "", out);
        fprintf(out, "%*s%s", table->right[column] ? pad : 0, "", table->text[i]);
        if (!last) {
            fprintf(out, "%*s", table->right[column] ? 2 : pad + 2, "");
            continue;
        }
        fputs(color && i + 1 == table->columns ? "\033[0m\n" : "\n", out);
        lines++;
    }
    free(widths);
    return lines;
}

bool bkv_table_color(FILE *out) {
    const char *term = getenv("TERM");
    const char *no_color = getenv("NO_COLOR");
    return isatty(fileno(out)) && term != NULL && strcmp(term, "dumb") != 0 && (no_color == NULL || no_color[0] == '\0');
}

uint64_t bkv_now_monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void bkv_progress_begin(bkv_progress_t *progress, const char *title, uint64_t total, bool quiet) {
    *progress = (bkv_progress_t){.title = title, .total = total > 0 ? total : 1, .active = !quiet && isatty(STDERR_FILENO)};
    progress->start_ns = progress->active ? bkv_now_monotonic_ns() : 0;
}

static void progress_draw(const bkv_progress_t *progress, uint64_t now_ns) {
    char bar[BAR_WIDTH + 1], rate[BKV_TEXT_MAX] = "";
    size_t filled = (size_t)(progress->done * BAR_WIDTH / progress->total);
    memset(bar, ' ', BAR_WIDTH);
    memset(bar, '=', filled);
    if (filled < BAR_WIDTH) {
        bar[filled] = '>';
    }
    bar[BAR_WIDTH] = '\0';
    double seconds = (double)(now_ns - progress->start_ns) / 1e9;
    if (progress->bytes > 0 && seconds > 0) {
        bkv_text_of_bytes((double)progress->bytes / seconds, rate);
    }
    fprintf(stderr, "\r\033[K%s [%s] %3u %%  %llu/%llu%s%s%s", progress->title, bar,
            (unsigned)(progress->done * 100 / progress->total), (unsigned long long)progress->done,
            (unsigned long long)progress->total, rate[0] ? "  " : "", rate, rate[0] ? "/s" : "");
    fflush(stderr);
}

void bkv_progress_step(bkv_progress_t *progress, uint64_t steps, uint64_t bytes) {
    progress->done = progress->done + steps < progress->total ? progress->done + steps : progress->total;
    progress->bytes += bytes;
    if (!progress->active) {
        return;
    }
    uint64_t now_ns = bkv_now_monotonic_ns();
    if (now_ns - progress->shown_ns >= REDRAW_NS) {
        progress->shown_ns = now_ns;
        progress_draw(progress, now_ns);
    }
}

void bkv_progress_end(bkv_progress_t *progress) {
    if (progress->active) {
        fputs("\r\033[K", stderr);
        progress->active = false;
    }
}
