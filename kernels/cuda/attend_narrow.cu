// attend_narrow.cu - attend_fast.cuh for the usual dims of up to 128 channels. attend_launch.cuh lists them.
#include "attend_launch.cuh"
#include "attend_run.cuh"

int attend_narrow(const bkv_gpu_attend_t *job, cudaStream_t stream) {
    bool four = job->columns == 4;
    switch (job->key_dim) {
    case 64:
        return four ? fast_launch<64, 64, 4, NARROW_WARPS>(job, stream) : fast_launch<64, 64, 8, NARROW_WARPS>(job, stream);
    case 96:
        return four ? fast_launch<96, 96, 4, NARROW_WARPS>(job, stream) : fast_launch<96, 96, 8, NARROW_WARPS>(job, stream);
    default:
        return four ? fast_launch<128, 128, 4, NARROW_WARPS>(job, stream) : fast_launch<128, 128, 8, NARROW_WARPS>(job, stream);
    }
}
