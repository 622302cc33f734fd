// unit_link.c - proto/verbs_*.c on a real RDMA device: two ends of a connection in one process, one that posts and one that
// answers. test_unit.py runs it in a guest. Where there is no device it fails: whoever starts it has one.
#include "proto/verbs_link.h"

#include <criterion/criterion.h>
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define BYTES    (256u << 10)
#define WORK     4
#define PATIENCE 5.0 // seconds; a dead end has to be noticed within it

typedef struct end {
    bkv_verbs_device_t *device;
    uint8_t *memory; // BYTES
    struct ibv_mr *region;
    struct ibv_cq *completions; // of the end that posts
    bkv_verbs_link_t link;
    bkv_verbs_end_t shown;
} end_t;

static void end_open(end_t *end, bool answers) {
    bkv_error_t error = {.message = ""};
    bkv_verbs_choice_t choice;
    *end = (end_t){0};
    cr_assert_eq(bkv_verbs_choose("auto", &choice, &error), BKV_OK);
    cr_assert_eq(bkv_verbs_open(&choice, &end->device, &error), BKV_OK, "%s", error.message);
    end->memory = aligned_alloc(4096, BYTES);
    cr_assert_eq(
        bkv_verbs_register(end->device, end->memory, BYTES, answers ? BKV_VERBS_WRITE : BKV_VERBS_OWN, &end->region, &error),
        BKV_OK, "%s", error.message);
    if (!answers) {
        end->completions = ibv_create_cq(end->device->context, 2 * WORK, NULL, NULL, 0);
        cr_assert_not_null(end->completions);
    }
}

static void end_link(end_t *end, bool answers) {
    bkv_error_t error = {.message = ""};
    cr_assert_eq(
        bkv_verbs_link_init(&end->link, end->device, end->completions, WORK, answers ? BKV_VERBS_WRITE : BKV_VERBS_OWN, &error),
        BKV_OK, "%s", error.message);
    bkv_verbs_link_describe(&end->link, answers ? end->region : NULL, &end->shown);
}

static void end_close(end_t *end) {
    bkv_verbs_link_deinit(&end->link);
    if (end->completions != NULL) {
        cr_assert_eq(ibv_destroy_cq(end->completions), 0);
    }
    bkv_verbs_unregister(end->region);
    bkv_verbs_close(end->device);
    free(end->memory);
}

static void connect_ends(end_t *a, end_t *b) {
    bkv_error_t error = {.message = ""};
    cr_assert_eq(bkv_verbs_link_connect(&a->link, &b->shown, &error), BKV_OK, "%s", error.message);
    cr_assert_eq(bkv_verbs_link_connect(&b->link, &a->shown, &error), BKV_OK, "%s", error.message);
}

static void open_both(end_t *daemon, end_t *client) {
    end_open(daemon, false);
    end_open(client, true);
    end_link(daemon, false);
    end_link(client, true);
    connect_ends(daemon, client);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void post(end_t *end, bool read, uint64_t address, uint32_t key, uint32_t bytes) {
    struct ibv_sge part = {.addr = (uintptr_t)end->memory, .length = bytes, .lkey = end->region->lkey};
    struct ibv_send_wr *refused, request = {
                                     .sg_list = &part,
                                     .num_sge = 1,
                                     .opcode = read ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE,
                                     .send_flags = IBV_SEND_SIGNALED,
                                     .wr.rdma = {.remote_addr = address, .rkey = key},
                                 };
    cr_assert_eq(ibv_post_send(end->link.pair, &request, &refused), 0);
}

static enum ibv_wc_status wait_for(end_t *end) {
    struct ibv_wc completion;
    double until = seconds() + PATIENCE;
    int count;
    while ((count = ibv_poll_cq(end->completions, 1, &completion)) == 0) {
        cr_assert_lt(seconds(), until, "no completion within %.0f s", PATIENCE);
        usleep(1000);
    }
    cr_assert_eq(count, 1);
    return completion.status;
}

static enum ibv_wc_status move(end_t *end, const end_t *other, bool read) {
    post(end, read, other->shown.address, other->shown.key, BYTES);
    return wait_for(end);
}

static void fill(uint8_t *memory, unsigned seed) {
    for (size_t i = 0; i < BYTES; i++) {
        memory[i] = (uint8_t)(i * 31 + (i >> 8) + seed);
    }
}

// ---- bytes ----

Test(link, reads_and_writes_the_other_ends_memory) {
    end_t daemon, client;
    open_both(&daemon, &client);
    fill(client.memory, 1);
    memset(daemon.memory, 0, BYTES);
    cr_assert_eq(move(&daemon, &client, true), IBV_WC_SUCCESS);
    cr_assert_eq(memcmp(daemon.memory, client.memory, BYTES), 0);
    fill(daemon.memory, 2);
    cr_assert_eq(move(&daemon, &client, false), IBV_WC_SUCCESS);
    cr_assert_eq(memcmp(daemon.memory, client.memory, BYTES), 0);
    cr_assert_leq(daemon.link.reads, client.shown.reads);
    end_close(&daemon);
    end_close(&client);
}

Test(link, the_end_that_does_not_answer_is_not_reached) {
    end_t daemon, client;
    open_both(&daemon, &client);
    end_t *poster = &client; // the wrong way round: the client posts
    struct ibv_cq *completions = client.link.own;
    cr_assert_not_null(completions);
    fill(daemon.memory, 3);
    memset(client.memory, 0, BYTES);
    poster->completions = completions;
    post(poster, false, (uintptr_t)daemon.memory, daemon.region->rkey, 64);
    cr_assert_neq(wait_for(poster), IBV_WC_SUCCESS);
    cr_assert_eq(daemon.memory[0], 3);
    poster->completions = NULL; // the link's own
    end_close(&daemon);
    end_close(&client);
}

// ---- faults ----

static void assert_fails_alone(uint64_t offset, uint32_t key_change, uint32_t bytes) {
    end_t daemon, client, other_daemon, other;
    open_both(&daemon, &client);
    open_both(&other_daemon, &other);
    post(&daemon, true, client.shown.address + offset, client.shown.key + key_change, bytes);
    cr_assert_eq(wait_for(&daemon), IBV_WC_REM_ACCESS_ERR);
    cr_assert_eq(move(&daemon, &client, false), IBV_WC_WR_FLUSH_ERR); // this link is of no more use
    fill(other.memory, 4);
    cr_assert_eq(move(&other_daemon, &other, true), IBV_WC_SUCCESS);
    cr_assert_eq(memcmp(other_daemon.memory, other.memory, BYTES), 0);
    end_close(&daemon);
    end_close(&client);
    end_close(&other_daemon);
    end_close(&other);
}

Test(link, a_wrong_key_fails_this_link_alone) {
    assert_fails_alone(0, 1, 64);
}

Test(link, past_the_windows_end_fails_this_link_alone) {
    assert_fails_alone(BYTES - 64, 0, 128);
}

Test(link, memory_that_was_unregistered_is_not_reached) {
    end_t daemon, client;
    open_both(&daemon, &client);
    bkv_verbs_unregister(client.region);
    client.region = NULL;
    cr_assert_eq(move(&daemon, &client, true), IBV_WC_REM_ACCESS_ERR);
    end_close(&daemon);
    end_close(&client);
}

Test(link, an_end_that_is_gone_is_noticed_and_another_can_be_connected_to) {
    end_t daemon, client;
    open_both(&daemon, &client);
    bkv_verbs_link_deinit(&client.link);
    double begin = seconds();
    cr_assert_eq(move(&daemon, &client, true), IBV_WC_RETRY_EXC_ERR);
    cr_log_info("an end that is gone was noticed after %.2f s", seconds() - begin);
    bkv_verbs_link_deinit(&daemon.link);
    end_link(&daemon, false);
    end_link(&client, true);
    connect_ends(&daemon, &client);
    fill(client.memory, 5);
    cr_assert_eq(move(&daemon, &client, true), IBV_WC_SUCCESS);
    cr_assert_eq(memcmp(daemon.memory, client.memory, BYTES), 0);
    end_close(&daemon);
    end_close(&client);
}

Test(link, a_stopped_link_returns_its_work) {
    end_t daemon, client;
    open_both(&daemon, &client);
    bkv_verbs_link_deinit(&client.link); // so that nothing completes by itself
    for (int i = 0; i < WORK; i++) {
        post(&daemon, false, client.shown.address, client.shown.key, BYTES);
    }
    double begin = seconds();
    bkv_verbs_link_stop(&daemon.link);
    bkv_verbs_link_stop(&daemon.link);
    for (int i = 0; i < WORK; i++) {
        cr_assert_neq(wait_for(&daemon), IBV_WC_SUCCESS);
    }
    cr_assert_lt(seconds() - begin, 0.4, "stopping did not hurry it");
    end_close(&daemon);
    end_close(&client);
}

// ---- what there is not ----

static void assert_not_to_be_had(const char *text, const char *why) {
    bkv_error_t error = {.message = ""};
    bkv_verbs_choice_t choice;
    bkv_verbs_device_t *device = NULL;
    cr_assert_eq(bkv_verbs_choose(text, &choice, &error), BKV_OK);
    cr_assert_eq(bkv_verbs_open(&choice, &device, &error), BKV_UNIMPLEMENTED);
    cr_assert_null(device);
    cr_assert_not_null(strstr(error.message, why), "%s", error.message);
}

Test(link, devices_ports_and_gids_that_are_not_there_are_named) {
    assert_not_to_be_had("mlx5_77", "no RDMA device is to be had: there is none named mlx5_77");
    assert_not_to_be_had("rxe0:7", "rxe0: port 7 is not there");
    assert_not_to_be_had("rxe0:1:200", "rxe0: port 1 has no GID with index 200");
}

Test(link, the_best_gid_is_that_of_an_ipv4_address) {
    end_t end;
    end_open(&end, true);
    end_link(&end, true);
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
    cr_assert_eq(memcmp(end.shown.gid, mapped, sizeof(mapped)), 0);
    cr_assert_eq(end.shown.lid, 0);
    cr_assert_eq(end.shown.bytes, BYTES);
    cr_assert_eq(end.shown.address, (uintptr_t)end.memory);
    end_close(&end);
}

Test(link, an_address_that_nobody_has_is_an_error_in_time) {
    end_t daemon, client;
    bkv_error_t error = {.message = ""};
    end_open(&daemon, false);
    end_open(&client, true);
    end_link(&daemon, false);
    end_link(&client, true);
    client.shown.gid[12] = 10; // 10.77.0.99: of this network, and nobody's
    client.shown.gid[13] = 77;
    client.shown.gid[14] = 0;
    client.shown.gid[15] = 99;
    double begin = seconds();
    cr_assert_eq(bkv_verbs_link_connect(&daemon.link, &client.shown, &error), BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(error.message, "verbs.gid: there is no way to it"), "%s", error.message);
    cr_log_info("nobody's address was given up after %.2f s", seconds() - begin);
    cr_assert_lt(seconds() - begin, PATIENCE);
    end_close(&daemon);
    end_close(&client);
}

Test(link, gpu_memory_is_refused_clearly_where_the_device_cannot) {
    end_t end;
    bkv_error_t error = {.message = ""};
    struct ibv_mr *region = NULL;
    end_open(&end, true);
    int no_dmabuf = memfd_create("no-dmabuf", MFD_CLOEXEC);
    cr_assert_eq(bkv_verbs_register_gpu(end.device, no_dmabuf, 0, 4096, 4096, BKV_VERBS_WRITE, &region, &error),
                 BKV_UNIMPLEMENTED, "%s", error.message);
    cr_assert_not_null(strstr(error.message, "cannot register GPU memory through dma-buf"), "%s", error.message);
    cr_assert_null(region);
    close(no_dmabuf);
    end_close(&end);
}
