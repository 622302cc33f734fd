// test_work.c - how transfers share an RDMA device: what is posted, in which order, and how much at once. No device is
// needed: posting a work request goes through a table in the queue pair's context, and the one here only writes down what it is
// given. What becomes of links that break needs a device: tests/rdma/unit_verbs_faults.c.
#include "daemon/verbs/internal.h"

#include <criterion/criterion.h>
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>

#define PATHS  3
#define POSTED 256
#define NOW_MS 1000
#define PIECE  1000u // so that pieces and their rests are easily told apart

typedef struct desk {
    bkv_verbs_t verbs;
    struct ibv_context context;
    struct ibv_qp pair[PATHS];
    bkv_verbs_path_t path[PATHS];
    struct ibv_send_wr posted[POSTED]; // sg_list is not kept
    struct ibv_sge part[POSTED];
    unsigned poster[POSTED], count;
} desk_t;

typedef struct test_transfer {
    bkv_verbs_transfer_t transfer;
    unsigned calls;
    bkv_error_t error;
} test_transfer_t;

static uint64_t now_ms(void) {
    return NOW_MS;
}

static int write_down(struct ibv_qp *pair, struct ibv_send_wr *request, struct ibv_send_wr **refused) {
    desk_t *desk = pair->qp_context;
    (void)refused;
    cr_assert_lt(desk->count, POSTED);
    cr_assert_null(request->next);
    cr_assert_eq(request->num_sge, 1);
    cr_assert(request->send_flags & IBV_SEND_SIGNALED);
    desk->posted[desk->count] = *request;
    desk->part[desk->count] = request->sg_list[0];
    desk->poster[desk->count++] = (unsigned)(pair - desk->pair);
    return 0;
}

static desk_t *desk_open(uint32_t work, uint32_t link_work, uint32_t reads) {
    desk_t *desk = calloc(1, sizeof(*desk));
    desk->context.ops.post_send = write_down;
    desk->verbs = (bkv_verbs_t){
        .config = {.now_ms = now_ms, .words = {.subject = "subject: its ", .remedy = "; remedy"}}, .piece = PIECE, .wake = -1};
    pthread_mutex_init(&desk->verbs.lock, NULL);
    cr_assert_eq(bkv_verbs_work_init(&desk->verbs, work, NULL), BKV_OK);
    for (unsigned i = 0; i < PATHS; i++) {
        desk->pair[i] = (struct ibv_qp){.context = &desk->context, .qp_context = desk};
        desk->path[i] = (bkv_verbs_path_t){
            .verbs = &desk->verbs,
            .link = {.pair = &desk->pair[i], .work = link_work, .reads = reads},
            .window = {.address = (i + 1) * UINT64_C(0x100000), .bytes = 0x100000, .key = i + 77},
        };
        bkv_verbs_list_init(&desk->path[i].transfers);
    }
    return desk;
}

static void desk_close(desk_t *desk) {
    for (unsigned i = 0; i < PATHS; i++) {
        cr_assert_null(desk->path[i].transfers.head);
        cr_assert_null(desk->path[i].posting);
        cr_assert_eq(desk->path[i].pending, 0);
        cr_assert_eq(desk->path[i].reads, 0);
    }
    bkv_verbs_work_deinit(&desk->verbs);
    pthread_mutex_destroy(&desk->verbs.lock);
    free(desk);
}

static void on_over(bkv_verbs_transfer_t *transfer, const bkv_error_t *error) {
    test_transfer_t *test = (test_transfer_t *)transfer;
    test->calls++;
    test->error = *error;
}

static void begin(desk_t *desk, unsigned path, test_transfer_t *test, bool read, uint64_t bytes) {
    bkv_error_t error = {.message = ""};
    *test = (test_transfer_t){
        .transfer = {.read = read, .local = (uint8_t *)0x5000, .local_key = 5, .offset = 64, .bytes = bytes, .over = on_over}};
    cr_assert_eq(bkv_verbs_begin(&desk->path[path], &test->transfer, &error), BKV_OK, "%s", error.message);
}

// The i-th request posted has come back.
static void come_back(desk_t *desk, unsigned i) {
    const struct ibv_wc completion = {.wr_id = desk->posted[i].wr_id, .status = IBV_WC_SUCCESS};
    pthread_mutex_lock(&desk->verbs.lock);
    bkv_verbs_returned(&desk->verbs, &completion);
    bkv_verbs_post(&desk->verbs);
    pthread_mutex_unlock(&desk->verbs.lock);
    bkv_verbs_tell(&desk->verbs);
}

static void all_come_back(desk_t *desk, unsigned from) {
    for (unsigned i = from; i < desk->count; i++) {
        come_back(desk, i);
    }
}

Test(verbs_work, a_transfer_is_cut_into_pieces_that_cover_it) {
    desk_t *desk = desk_open(64, 8, 8);
    test_transfer_t test;
    begin(desk, 1, &test, true, 3 * PIECE + 7);
    cr_assert_eq(desk->count, 4);
    for (unsigned i = 0; i < 4; i++) {
        cr_assert_eq(desk->posted[i].opcode, IBV_WR_RDMA_READ);
        cr_assert_eq(desk->posted[i].wr.rdma.rkey, 78);
        cr_assert_eq(desk->posted[i].wr.rdma.remote_addr, 0x200000 + 64 + i * PIECE);
        cr_assert_eq(desk->part[i].addr, 0x5000 + i * PIECE);
        cr_assert_eq(desk->part[i].length, i < 3 ? PIECE : 7);
        cr_assert_eq(desk->part[i].lkey, 5);
    }
    for (unsigned i = 0; i < 4; i++) {
        cr_assert_eq(test.calls, 0);
        come_back(desk, i);
    }
    cr_assert_eq(test.calls, 1);
    cr_assert_eq(test.error.status, BKV_OK);
    desk_close(desk);
}

Test(verbs_work, a_record_is_written) {
    desk_t *desk = desk_open(64, 8, 8);
    test_transfer_t test;
    begin(desk, 0, &test, false, PIECE);
    cr_assert_eq(desk->count, 1);
    cr_assert_eq(desk->posted[0].opcode, IBV_WR_RDMA_WRITE);
    come_back(desk, 0);
    cr_assert_eq(test.calls, 1);
    desk_close(desk);
}

Test(verbs_work, a_link_gets_few_requests_at_a_time_and_fewer_reads) {
    desk_t *desk = desk_open(64, 4, 2);
    test_transfer_t read, write;
    begin(desk, 0, &read, true, 5 * PIECE);
    begin(desk, 0, &write, false, 6 * PIECE);
    cr_assert_eq(desk->count, 2, "as many READs as the other end answers");
    come_back(desk, 0);
    come_back(desk, 1);
    come_back(desk, 2);
    cr_assert_eq(desk->count, 7, "the last READ, and then WRITEs up to the link's bound");
    cr_assert_eq(desk->path[0].pending, 4);
    all_come_back(desk, 3);
    cr_assert_eq(desk->count, 11);
    cr_assert_eq(read.calls, 1);
    cr_assert_eq(write.calls, 1);
    desk_close(desk);
}

Test(verbs_work, transfers_of_a_path_are_over_in_order) {
    desk_t *desk = desk_open(64, 8, 8);
    test_transfer_t first, second;
    begin(desk, 0, &first, false, 2 * PIECE);
    begin(desk, 0, &second, true, PIECE);
    come_back(desk, 0);
    cr_assert_eq(first.calls, 0);
    come_back(desk, 1);
    cr_assert_eq(first.calls, 1);
    cr_assert_eq(second.calls, 0);
    come_back(desk, 2);
    cr_assert_eq(second.calls, 1);
    desk_close(desk);
}

// With room for four requests in all, whoever came first has taken them; what comes back goes to the paths in turn.
Test(verbs_work, paths_take_turns_where_there_is_little_room) {
    desk_t *desk = desk_open(4, 8, 8);
    test_transfer_t greedy[3], modest[2];
    for (int i = 0; i < 3; i++) {
        begin(desk, 0, &greedy[i], false, 4 * PIECE);
    }
    begin(desk, 1, &modest[0], false, 2 * PIECE);
    begin(desk, 2, &modest[1], true, PIECE);
    cr_assert_eq(desk->count, 4);
    all_come_back(desk, 0);
    static const unsigned expected[] = {0, 0, 0, 0, 0, 1, 2, 0, 1, 0, 0, 0, 0, 0, 0};
    cr_assert_eq(desk->count, sizeof(expected) / sizeof(expected[0]));
    for (unsigned i = 0; i < desk->count; i++) {
        cr_assert_eq(desk->poster[i], expected[i], "request %u was of path %u", i, desk->poster[i]);
    }
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(greedy[i].calls, 1);
    }
    cr_assert_eq(modest[0].calls, 1);
    cr_assert_eq(modest[1].calls, 1);
    desk_close(desk);
}

Test(verbs_work, what_comes_back_twice_or_from_nowhere_means_nobody) {
    desk_t *desk = desk_open(2, 8, 8);
    test_transfer_t first, second;
    begin(desk, 0, &first, false, PIECE);
    come_back(desk, 0);
    cr_assert_eq(first.calls, 1);
    begin(desk, 0, &second, false, 2 * PIECE);
    come_back(desk, 0); // its place has been given to another since
    cr_assert_eq(second.calls, 0);
    cr_assert_eq(desk->path[0].pending, 2);
    desk->posted[3] = desk->posted[2];
    desk->posted[3].wr_id = 99;
    desk->count = 4;
    come_back(desk, 3);
    cr_assert_eq(desk->path[0].pending, 2);
    come_back(desk, 1);
    come_back(desk, 2);
    cr_assert_eq(second.calls, 1);
    desk_close(desk);
}

Test(verbs_work, a_path_that_has_ended_begins_nothing) {
    desk_t *desk = desk_open(4, 8, 8);
    test_transfer_t test = {.transfer = {.bytes = 1, .over = on_over}};
    bkv_error_t error = {.message = ""};
    desk->path[0].until_ms = 5;
    cr_assert_eq(bkv_verbs_begin(&desk->path[0], &test.transfer, &error), BKV_FAILED_PRECONDITION);
    cr_assert_str_eq(error.message, "subject: its RDMA link has ended; remedy");
    desk->path[0].until_ms = 0;
    bkv_fail(&desk->path[0].broken, BKV_FAILED_PRECONDITION, "why");
    cr_assert_eq(bkv_verbs_begin(&desk->path[0], &test.transfer, &error), BKV_FAILED_PRECONDITION);
    cr_assert_str_eq(error.message, "why");
    cr_assert_eq(test.calls, 0);
    cr_assert_eq(desk->count, 0);
    desk_close(desk);
}

// ---- transfers that are cut short ----

static void cancel(desk_t *desk, test_transfer_t *test) {
    bkv_verbs_cancel(&test->transfer);
    bkv_verbs_tell(&desk->verbs);
}

Test(verbs_work, a_transfer_that_waits_is_cancelled_at_once) {
    desk_t *desk = desk_open(2, 8, 8);
    test_transfer_t first, second, third;
    begin(desk, 0, &first, true, 2 * PIECE);
    begin(desk, 0, &second, true, PIECE);
    begin(desk, 0, &third, true, PIECE);
    cancel(desk, &second);
    cr_assert_eq(second.calls, 1);
    cr_assert_eq(second.error.status, BKV_CANCELLED);
    all_come_back(desk, 0);
    cr_assert_eq(desk->count, 3, "of the second nothing was posted");
    cr_assert_eq(first.error.status, BKV_OK);
    cr_assert_eq(third.calls, 1);
    cr_assert_eq(third.error.status, BKV_OK);
    desk_close(desk);
}

Test(verbs_work, what_has_been_posted_of_a_cancelled_transfer_is_waited_for) {
    desk_t *desk = desk_open(64, 2, 8);
    test_transfer_t first, second;
    begin(desk, 0, &first, true, 5 * PIECE);
    begin(desk, 0, &second, true, PIECE);
    cancel(desk, &first);
    cr_assert_eq(first.calls, 0);
    come_back(desk, 0);
    cr_assert_eq(first.calls, 0);
    come_back(desk, 1);
    cr_assert_eq(first.calls, 1);
    cr_assert_eq(first.error.status, BKV_CANCELLED);
    all_come_back(desk, 2);
    cr_assert_eq(desk->count, 3);
    cr_assert_eq(second.error.status, BKV_OK);
    desk_close(desk);
}

Test(verbs_work, a_transfer_may_be_cancelled_between_its_end_and_its_being_told) {
    desk_t *desk = desk_open(64, 8, 8);
    test_transfer_t test;
    begin(desk, 0, &test, true, 2 * PIECE);
    bkv_verbs_cancel(&test.transfer);
    const struct ibv_wc completion[] = {{.wr_id = desk->posted[0].wr_id}, {.wr_id = desk->posted[1].wr_id}};
    pthread_mutex_lock(&desk->verbs.lock);
    bkv_verbs_returned(&desk->verbs, &completion[0]);
    bkv_verbs_returned(&desk->verbs, &completion[1]);
    pthread_mutex_unlock(&desk->verbs.lock);
    cancel(desk, &test);
    cr_assert_eq(test.calls, 1);
    cr_assert_eq(test.error.status, BKV_OK);
    desk_close(desk);
}

Test(verbs_work, a_transfer_that_is_whole_when_it_is_cancelled_is_fine) {
    desk_t *desk = desk_open(64, 8, 8);
    test_transfer_t test;
    begin(desk, 0, &test, true, 2 * PIECE);
    cancel(desk, &test);
    cr_assert_eq(test.calls, 0);
    all_come_back(desk, 0);
    cr_assert_eq(test.calls, 1);
    cr_assert_eq(test.error.status, BKV_OK);
    desk_close(desk);
}

Test(verbs_work, a_path_whose_turn_has_been_cut_away_posts_nothing) {
    desk_t *desk = desk_open(1, 8, 8);
    test_transfer_t first, waiting;
    begin(desk, 0, &first, true, PIECE);
    begin(desk, 1, &waiting, true, PIECE); // has the next turn, and there is no room
    cancel(desk, &waiting);
    cr_assert_eq(waiting.calls, 1);
    all_come_back(desk, 0);
    cr_assert_eq(desk->count, 1);
    begin(desk, 1, &waiting, true, PIECE);
    all_come_back(desk, 1);
    cr_assert_eq(waiting.error.status, BKV_OK);
    desk_close(desk);
}
