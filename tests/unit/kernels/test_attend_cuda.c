// test_attend_cuda.c - what bkv_cuda_attend says and needs before any device is asked; tests/gpu/test_attend.c has the rest.
#include "cuda/attend_gpu.h"
#include "cuda/device.h"

#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

// A device that need not be there.
static const bkv_cuda_t some_device = {
    .traits = {.processors = 10, .shared_memory = 100000, .capability = 80},
};

static bkv_cuda_attend_args_t good_args(void) {
    return (bkv_cuda_attend_args_t){.q_dtype = BKV_BF16,
                                    .out_dtype = BKV_FP32,
                                    .dtype = BKV_BF16,
                                    .batch = 3,
                                    .max_records = 50,
                                    .layer = 4,
                                    .heads = 2,
                                    .query_heads = 8,
                                    .queries = 1,
                                    .key_dim = 128,
                                    .value_dim = 128};
}

static void expect_refused(const bkv_cuda_attend_args_t *args, const char *field) {
    bkv_error_t err = {0};
    cr_expect_eq(bkv_cuda_attend_workspace(&some_device, args), 0, "%s", field);
    cr_expect_eq(bkv_cuda_attend(&some_device, args, NULL, NULL, &err), BKV_INVALID_ARGUMENT, "%s", field);
    cr_expect(strncmp(err.message, field, strlen(field)) == 0, "%s: %s", field, err.message);
}

Test(attend_cuda, refuses_what_cannot_be) {
    bkv_cuda_attend_args_t args = good_args();
    args.query_heads = 7;
    expect_refused(&args, "query_heads");
    args = good_args();
    args.query_heads = 0;
    expect_refused(&args, "query_heads");
    args = good_args();
    args.key_dim = 100;
    expect_refused(&args, "key_dim");
    args = good_args();
    args.value_dim = BKV_MAX_DIM + BKV_DIM_STEP;
    expect_refused(&args, "value_dim");
    args = good_args();
    args.dtype = (bkv_dtype_t)0;
    expect_refused(&args, "dtype");
    args = good_args();
    args.out_dtype = (bkv_dtype_t)7;
    expect_refused(&args, "q_dtype, out_dtype");
    args = good_args();
    args.batch = 0;
    expect_refused(&args, "batch");
    args = good_args();
    args.batch = UINT32_MAX;
    expect_refused(&args, "batch");
    args = good_args();
    args.queries = 0;
    expect_refused(&args, "queries");
    args = good_args();
    args.queries = UINT32_MAX;
    expect_refused(&args, "queries");
    args = good_args();
    args.layer = BKV_MAX_LAYERS;
    expect_refused(&args, "layer");
    args = good_args();
    args.heads = 0;
    expect_refused(&args, "heads");
    args = good_args();
    args.scale = INFINITY;
    expect_refused(&args, "scale");
    args = good_args();
    bkv_error_t err = {0};
    cr_expect_eq(bkv_cuda_attend(&some_device, &args, NULL, NULL, &err), BKV_INVALID_ARGUMENT, "no workspace");
    cr_expect(strncmp(err.message, "q, workspace", 12) == 0, "%s", err.message);
}

Test(attend_cuda, workspace_holds_every_section) {
    bkv_cuda_attend_args_t args = good_args();
    size_t few = bkv_cuda_attend_workspace(&some_device, &args);
    args.max_records += 1000;
    size_t many = bkv_cuda_attend_workspace(&some_device, &args);
    cr_expect_geq(many - few, 1000 * args.heads * sizeof(bkv_gpu_section_t));
    // and a partial result for each sequence and head, of all its queries
    args.batch += 100;
    cr_expect_geq(bkv_cuda_attend_workspace(&some_device, &args) - many,
                  100 * args.query_heads * args.value_dim * sizeof(float));
}

// The shortest tile of every kind fits its stage, and all stages fit the device, whatever it has.
Test(attend_cuda, tiles_fit_the_shared_memory) {
    static const uint32_t dims[][2] = {{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};
    for (uint32_t shared = 49152; shared <= 232448; shared += 4096) {
        for (size_t i = 0; i < 2 * sizeof(dims) / sizeof(dims[0]); i++) {
            const uint32_t *dim = dims[i / 2];
            bkv_gpu_attend_t job = {.key_dim = dim[0], .value_dim = dim[1], .rows = i % 2 ? 4 : 8, .dtype = BKV_BF16};
            if (!bkv_gpu_attend_shape(&job, shared)) {
                cr_skip_test("no CUDA in this build");
            }
            uint32_t warps = job.thread_block_warps, each = job.key_stage + job.value_stage;
            cr_expect(warps >= 1 && warps <= 16, "%u warps", warps);
            cr_expect_leq(16 * warps, BKV_GPU_BARRIERS_ROOM, "two barriers a warp");
            cr_expect_leq(BKV_GPU_BARRIERS_ROOM + warps * each, shared);
            cr_expect_geq(each, 32 * 8, "room for the sums of share_find");
            for (uint32_t kind = 0; kind < BKV_GPU_FP32; kind++) {
                cr_expect_leq(bkv_gpu_key_room(kind, dim[0], BKV_GPU_TILE_STEP), job.key_stage, "%u: keys of %u, %u shared",
                              kind, dim[0], shared);
                cr_expect_leq(bkv_gpu_value_room(kind, dim[1], BKV_GPU_TILE_STEP), job.value_stage,
                              "%u: values of %u, %u shared", kind, dim[1], shared);
            }
        }
    }
}
