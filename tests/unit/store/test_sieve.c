// test_sieve.c - the queue against a plain array that does the same slowly.
#include "daemon/store/sieve.h"
#include "fixture.h"

#include <criterion/criterion.h>
#include <string.h>

#define N 40

// Oldest first; hand is an index into it, -1: none.
typedef struct {
    uint32_t entry[N];
    int count, hand;
} model_t;

static void model_remove(model_t *m, int at) {
    memmove(m->entry + at, m->entry + at + 1, (size_t)(m->count - at - 1) * sizeof(*m->entry));
    m->count--;
    if (m->hand > at) {
        m->hand--;
    }
    if (m->hand == m->count) {
        m->hand = -1;
    }
}

Test(store_sieve, does_what_an_array_does) {
    bkv_sieve_t queue;
    bkv_sieve_link_t links[N];
    model_t m = {.hand = -1};
    bool in[N] = {false};
    uint64_t seed = 1;
    bkv_sieve_init(&queue);
    for (int step = 0; step < 20000; step++) {
        uint32_t e = (uint32_t)(fixture_random(&seed) % N);
        if (fixture_random(&seed) % 3 == 0 && m.count > 0) {
            bkv_sieve_advance(&queue, links);
            m.hand = (m.hand < 0 ? 0 : m.hand) + 1;
            m.hand = m.hand == m.count ? -1 : m.hand;
        } else if (!in[e]) {
            bkv_sieve_push(&queue, links, e);
            m.entry[m.count++] = e;
            in[e] = true;
        } else {
            int at = 0;
            while (m.entry[at] != e) {
                at++;
            }
            bkv_sieve_remove(&queue, links, e);
            model_remove(&m, at);
            in[e] = false;
        }
        cr_assert_eq(queue.count, (uint32_t)m.count);
        uint32_t expected = m.count == 0 ? BKV_SIEVE_END : m.entry[m.hand < 0 ? 0 : m.hand];
        cr_assert_eq(bkv_sieve_hand(&queue), expected, "step %d", step);
        uint32_t at = queue.oldest;
        for (int i = 0; i < m.count; i++, at = links[at].newer) {
            cr_assert_eq(at, m.entry[i]);
        }
        cr_assert_eq(at, BKV_SIEVE_END);
    }
}
