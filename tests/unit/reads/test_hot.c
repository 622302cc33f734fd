// test_hot.c - which records are read often.
#include "pool.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>

static bool read_it(bkv_hot_t *hot, uint32_t number) {
    bkv_name_t name = name_of(number);
    return bkv_hot_read(hot, &name);
}

static bkv_hot_t *new_hot(uint32_t wanted) {
    bkv_hot_t *hot = malloc(sizeof(*hot));
    bkv_hot_init(hot, wanted, 0x1234567);
    return hot;
}

Test(hot, after_so_many_reads) {
    bkv_hot_t *hot = new_hot(3);
    cr_assert(!read_it(hot, 1) && !read_it(hot, 1) && read_it(hot, 1) && read_it(hot, 1));
    cr_assert(!read_it(hot, 2));
    bkv_hot_set_wanted(hot, 1);
    cr_assert(read_it(hot, 3));
    bkv_hot_set_wanted(hot, 0);
    cr_assert(!read_it(hot, 1));
    free(hot);
}

Test(hot, a_count_ends_somewhere) {
    bkv_hot_t *hot = new_hot(100000); // more than is counted: the most is enough
    bool is_hot = false;
    for (uint32_t i = 0; i < 1000; i++) {
        is_hot = read_it(hot, 1);
    }
    cr_assert(is_hot);
    free(hot);
}

Test(hot, a_stream_of_single_reads_is_not_hot) {
    bkv_hot_t *hot = new_hot(2);
    uint32_t wrong = 0;
    for (uint32_t i = 0; i < BKV_HOT_COUNTERS / 8; i++) {
        wrong += read_it(hot, i);
    }
    // Both counters of one have been met: (1/8)^2 at the end, a third of that on average.
    cr_assert_lt(wrong, BKV_HOT_COUNTERS / 8 / 64, "%u", wrong);
    free(hot);
}

Test(hot, forgets_with_time) {
    bkv_hot_t *hot = new_hot(8);
    for (uint32_t i = 0; i < 7; i++) {
        cr_assert(!read_it(hot, 1));
    }
    for (uint32_t i = 0; i < 3 * BKV_HOT_COUNTERS; i++) { // others, of which each is read often
        read_it(hot, 1000 + i % 50);
    }
    cr_assert(!read_it(hot, 1), "the eighth read, but long after the seventh");
    free(hot);
}

static void *read_all(void *hot) {
    for (uint32_t i = 0; i < 100000; i++) {
        read_it(hot, i % 1000);
    }
    return NULL;
}

Test(hot, from_many_threads) {
    bkv_hot_t *hot = new_hot(2);
    pthread_t threads[3];
    for (uint32_t i = 0; i < 3; i++) {
        cr_assert_eq(pthread_create(&threads[i], NULL, read_all, hot), 0);
    }
    for (uint32_t i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
    }
    uint32_t hot_ones = 0;
    for (uint32_t i = 0; i < 1000; i++) {
        hot_ones += read_it(hot, i);
    }
    cr_assert_eq(hot_ones, 1000);
    free(hot);
}
