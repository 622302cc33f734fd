// test_table.c - client/bkv/table.c: alignment, colour, and progress that stays out of pipes.
#include "client/bkv/table.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

static char *print(const bkv_table_t *table, bool color, uint32_t *lines) {
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);
    *lines = bkv_table_print(table, out, color);
    fclose(out);
    return text;
}

Test(bkv_table, aligns_columns) {
    uint32_t lines;
    bkv_table_t *table = bkv_table_create("name|>n|last");
    bkv_table_cell(table, "%s", "a");
    bkv_table_cell(table, "%d", 5);
    bkv_table_cell(table, "x");
    bkv_table_cell(table, "longer");
    bkv_table_cell(table, "%d", 1234);
    bkv_table_cell(table, "yy");
    char *text = print(table, false, &lines);
    cr_expect_str_eq(text, "name       n  last\n"
                           "a          5  x\n"
                           "longer  1234  yy\n");
    cr_expect_eq(lines, 3);
    free(text);
    text = print(table, true, &lines);
    cr_expect(strncmp(text, "\033[1mname", 8) == 0);
    cr_expect_not_null(strstr(text, "last\033[0m\n"));
    free(text);
    bkv_table_destroy(table);
}

Test(bkv_table, counts_characters_not_bytes) {
    uint32_t lines;
    bkv_table_t *table = bkv_table_create("a|b");
    bkv_table_cell(table, "\u00e4\u00f6");
    bkv_table_cell(table, "1");
    bkv_table_cell(table, "xyz");
    bkv_table_cell(table, "2");
    char *text = print(table, false, &lines);
    cr_expect_str_eq(text, "a    b\n\u00e4\u00f6   1\nxyz  2\n");
    free(text);
    bkv_table_destroy(table);
}

Test(bkv_table, a_pipe_gets_no_color) {
    FILE *out = tmpfile();
    setenv("TERM", "xterm", 1);
    cr_expect_not(bkv_table_color(out));
    fclose(out);
}

Test(bkv_progress, quiet_counts_and_clamps) {
    bkv_progress_t progress;
    bkv_progress_begin(&progress, "x", 3, true);
    cr_expect_not(progress.active);
    bkv_progress_step(&progress, 2, 10);
    bkv_progress_step(&progress, 2, 10);
    cr_expect_eq(progress.done, 3);
    cr_expect_eq(progress.bytes, 20);
    bkv_progress_end(&progress);
}
