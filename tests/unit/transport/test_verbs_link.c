// test_verbs_link.c - what can be said of an RDMA connection without a device: how devices are named, what the other end may
// say of itself, and what is heard where there is no device. The rest is tests/rdma/unit_link.c.
#include "proto/verbs_link.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

// ---- names ----

static void assert_choice(const char *text, const char *device, uint32_t port, int32_t gid) {
    bkv_error_t error = {.message = ""};
    bkv_verbs_choice_t choice;
    cr_assert_eq(bkv_verbs_choose(text, &choice, &error), BKV_OK, "%s: %s", text, error.message);
    cr_assert_str_eq(choice.device, device);
    cr_assert_eq(choice.port, port, "%s", text);
    cr_assert_eq(choice.gid, gid, "%s", text);
}

Test(verbs_link, devices_are_chosen_by_name_port_and_gid) {
    assert_choice(NULL, "", 0, -1);
    assert_choice("", "", 0, -1);
    assert_choice("auto", "", 0, -1);
    assert_choice("mlx5_0", "mlx5_0", 0, -1);
    assert_choice("mlx5_0:2", "mlx5_0", 2, -1);
    assert_choice("mlx5_0:1:3", "mlx5_0", 1, 3);
    assert_choice("rxe0:255:0", "rxe0", 255, 0);
    assert_choice("automatic", "automatic", 0, -1);
}

Test(verbs_link, what_is_no_name_is_refused_and_changes_nothing) {
    static const char *const wrong[] = {":",         ":1",         "rxe0:",   "rxe0:0",    "rxe0:256",
                                        "rxe0:-1",   "rxe0: 1",    "rxe0:x",  "rxe0:1:",   "rxe0:1:256",
                                        "rxe0:1:-1", "rxe0:1:2:3", "rxe0:1x", "rxe0:1:2 ", "rxe0:99999999999999999999"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        bkv_error_t error = {.message = ""};
        bkv_verbs_choice_t choice = {.device = "kept", .port = 9, .gid = 8};
        cr_assert_eq(bkv_verbs_choose(wrong[i], &choice, &error), BKV_INVALID_ARGUMENT, "%s", wrong[i]);
        cr_assert_not_null(strstr(error.message, wrong[i]), "%s", error.message);
        cr_assert_str_eq(choice.device, "kept");
        cr_assert_eq(choice.port, 9);
        cr_assert_eq(choice.gid, 8);
    }
}

Test(verbs_link, a_name_has_at_most_63_characters) {
    char text[BKV_VERBS_NAME + 8];
    bkv_error_t error;
    bkv_verbs_choice_t choice;
    memset(text, 'a', sizeof(text));
    text[BKV_VERBS_NAME - 1] = '\0';
    cr_assert_eq(bkv_verbs_choose(text, &choice, &error), BKV_OK);
    cr_assert_str_eq(choice.device, text);
    text[BKV_VERBS_NAME - 1] = 'a';
    text[BKV_VERBS_NAME] = '\0';
    cr_assert_eq(bkv_verbs_choose(text, &choice, &error), BKV_INVALID_ARGUMENT);
}

// ---- the other end ----

static const bkv_verbs_port_t roce = {.number = 1, .ethernet = true, .mtu = 4096};
static const bkv_verbs_port_t infiniband = {.number = 1, .lid = 5, .mtu = 4096};

static bkv_verbs_end_t sound_end(void) {
    return (bkv_verbs_end_t){.queue_pair = 17,
                             .packet = 0xabcdef,
                             .mtu = 1024,
                             .reads = 16,
                             .key = 1,
                             .gid = {[10] = 0xff, 0xff, 10, 77, 0, 2},
                             .address = 0x7f0000000000,
                             .bytes = 1 << 20};
}

static void assert_end(const bkv_verbs_port_t *port, const bkv_verbs_end_t *end, const char *field) {
    bkv_error_t error = {.message = ""};
    bkv_status_t status = bkv_verbs_end_check(port, end, &error);
    if (field == NULL) {
        cr_assert_eq(status, BKV_OK, "%s", error.message);
        return;
    }
    cr_assert_eq(status, BKV_INVALID_ARGUMENT, "verbs.%s was accepted", field);
    char start[64];
    snprintf(start, sizeof(start), "verbs.%s: ", field);
    cr_assert_eq(strncmp(error.message, start, strlen(start)), 0, "%s", error.message);
}

#define ASSERT_REFUSED(port, field, ...)                                                                                       \
    do {                                                                                                                       \
        bkv_verbs_end_t end = sound_end();                                                                                     \
        __VA_ARGS__;                                                                                                           \
        assert_end(port, &end, field);                                                                                         \
    } while (0)

Test(verbs_link, a_sound_end_is_accepted) {
    bkv_verbs_end_t end = sound_end();
    assert_end(&roce, &end, NULL);
    end.lid = 1;
    assert_end(&infiniband, &end, NULL);
    end.queue_pair = 0xffffff;
    end.packet = 0;
    end.mtu = 4096;
    end.reads = 0;
    end.address = end.bytes = 0; // no window: whoever needs one asks for it
    assert_end(&infiniband, &end, NULL);
    end.address = UINT64_MAX - 10;
    end.bytes = 10;
    assert_end(&infiniband, &end, NULL);
}

Test(verbs_link, each_field_of_the_other_end_is_checked) {
    ASSERT_REFUSED(&roce, "queue_pair", end.queue_pair = 0);
    ASSERT_REFUSED(&roce, "queue_pair", end.queue_pair = 1);
    ASSERT_REFUSED(&roce, "queue_pair", end.queue_pair = 0x1000000);
    ASSERT_REFUSED(&roce, "packet", end.packet = 0x1000000);
    ASSERT_REFUSED(&roce, "mtu", end.mtu = 0);
    ASSERT_REFUSED(&roce, "mtu", end.mtu = 128);
    ASSERT_REFUSED(&roce, "mtu", end.mtu = 1500);
    ASSERT_REFUSED(&roce, "mtu", end.mtu = 8192);
    ASSERT_REFUSED(&roce, "mtu", end.mtu = UINT32_MAX);
    ASSERT_REFUSED(&roce, "reads", end.reads = 256);
    ASSERT_REFUSED(&roce, "bytes", end.address = UINT64_MAX - 10, end.bytes = 11);
    ASSERT_REFUSED(&roce, "bytes", end.bytes = UINT64_MAX);
}

Test(verbs_link, the_other_end_has_an_address_of_the_same_fabric) {
    ASSERT_REFUSED(&roce, "gid", memset(end.gid, 0, sizeof(end.gid)));
    ASSERT_REFUSED(&roce, "gid", end.gid[0] = 0xff); // a group
    ASSERT_REFUSED(&roce, "lid", end.lid = 5);
    ASSERT_REFUSED(&infiniband, "lid", end.lid = 0);
    ASSERT_REFUSED(&infiniband, "lid", end.lid = 0xc000); // a group
    ASSERT_REFUSED(&infiniband, "lid", end.lid = 0x10001);
}

// ---- no device ----

Test(verbs_link, a_device_that_is_not_there_is_an_error_that_says_so) {
    bkv_error_t error = {.message = ""};
    bkv_verbs_choice_t choice;
    bkv_verbs_device_t *device = NULL;
    cr_assert_eq(bkv_verbs_choose("no_such_device", &choice, &error), BKV_OK);
    cr_assert_eq(bkv_verbs_open(&choice, &device, &error), BKV_UNIMPLEMENTED);
    cr_assert_eq(strncmp(error.message, "no RDMA device is to be had: ", 29), 0, "%s", error.message);
    cr_assert_null(device);
    bkv_verbs_close(NULL);
    bkv_verbs_unregister(NULL);
    bkv_verbs_link_t none = {0};
    bkv_verbs_link_stop(&none);
    bkv_verbs_link_deinit(&none);
}
