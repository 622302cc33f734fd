// attend_wide.cu - attend_fast.cuh for keys of more than 128 channels, which need more registers and more shared
// memory a warp. attend_launch.cuh lists them.
#include "attend_launch.cuh"
#include "attend_run.cuh"

int attend_wide(const bkv_gpu_attend_t *job, cudaStream_t stream) {
    if (job->key_dim == 192) {
        return job->columns == 4 ? fast_launch<192, 128, 4, WIDE_WARPS>(job, stream)
                                 : fast_launch<192, 128, 8, WIDE_WARPS>(job, stream);
    }
    return fast_launch<256, 256, 4, WIDE_WARPS>(job, stream);
}
