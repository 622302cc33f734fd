// test_cuda.c - what of bkv_cuda.h can be seen without a device: that its absence is an answer, and what a status says. The kernels
// themselves are tested by tests/gpu, on a machine that has one.
#include "cuda/bkv_cuda.h"

#include "cuda/gpu.h"

#include <criterion/criterion.h>
#include <string.h>

Test(cuda, a_device_that_is_not_there_is_refused_by_name) {
    bkv_cuda_t *cuda = NULL;
    bkv_error_t err = {0};
    uint32_t beyond = bkv_cuda_count();
    cr_assert_eq(bkv_cuda_open(beyond, &cuda, &err), BKV_UNIMPLEMENTED);
    cr_assert_null(cuda);
    cr_assert_eq(strncmp(err.message, "device: ", 8), 0, "%s", err.message);
}

Test(cuda, the_backend_is_there_only_with_a_device_and_never_chosen_by_itself) {
    cr_assert_eq(bkv_backend_get("cuda") != NULL, bkv_cuda_count() > 0);
    cr_assert_str_neq(bkv_backend_get(NULL)->name, "cuda");
    bool listed = false;
    for (const bkv_backend_t *const *list = bkv_backend_list(); *list; list++) {
        listed = listed || strcmp((*list)->name, "cuda") == 0;
    }
    cr_assert(listed);
}

Test(cuda, a_status_names_what_was_found) {
    static const struct {
        uint32_t layers, heads, layer, head, token;
        bool value, finite;
        const char *message;
    } cases[] = {
        {2, 3, 1, 2, 77, true, false, "v: NaN or infinity at layer 1, head 2, token 77"},
        {1, 1, 0, 0, 0, false, false, "k: NaN or infinity at layer 0, head 0, token 0"},
        {1024, 64, 1023, 63, (1u << 24) - 1, true, true,
         "v: a value beyond 65504 at layer 1023, head 63, token 16777215, which only codec raw can hold"},
        {64, 1024, 63, 1023, 5, false, true,
         "k: a value beyond 65504 at layer 63, head 1023, token 5, which only codec raw can hold"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        bkv_shape_t shape = {cases[i].layers, cases[i].heads, 1u << 24, 128, 128, BKV_BF16};
        uint64_t status =
            bkv_gpu_finding(cases[i].layer, cases[i].value, cases[i].heads, cases[i].head, cases[i].token, cases[i].finite);
        bkv_error_t err = {0};
        cr_assert_eq(bkv_cuda_compress_check(&shape, status, &err), BKV_INVALID_ARGUMENT);
        cr_assert_str_eq(err.message, cases[i].message);
    }
    bkv_shape_t shape = {1, 1, 1, 8, 8, BKV_BF16};
    cr_assert_eq(bkv_cuda_compress_check(&shape, BKV_GPU_CLEAN, NULL), BKV_OK);
}

// A scan goes layer by layer, keys before values, head by head, token by token, and the first finding is the smallest.
Test(cuda, findings_are_ordered_as_a_block_is_scanned) {
    uint64_t last = 0;
    for (uint32_t i = 0; i < 2 * 2 * 3 * 4 * 2; i++) {
        uint64_t status = bkv_gpu_finding(i / 48, i / 24 % 2, 3, i / 8 % 3, i / 2 % 4, i % 2);
        cr_assert(i == 0 || status > last, "%u", i);
        last = status;
    }
}
