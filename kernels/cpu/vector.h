// vector.h - internal: the inner loops of the reference kernels. Sums run in 16 fixed lanes, which the compiler may keep in
// whatever registers it has: the result does not depend on it.
#ifndef BKV_VECTOR_H
#define BKV_VECTOR_H

#include <stddef.h>
#include <stdint.h>

#define BKV_LANES 16

// Inner product; n is a multiple of 8.
static inline float bkv_dot(const float *restrict a, const float *restrict b, uint32_t n) {
    float lane[BKV_LANES] = {0};
    uint32_t i = 0;
    for (; i + BKV_LANES <= n; i += BKV_LANES) {
        for (uint32_t j = 0; j < BKV_LANES; j++) {
            lane[j] += a[i + j] * b[i + j];
        }
    }
    if (i < n) {
        for (uint32_t j = 0; j < BKV_LANES / 2; j++) {
            lane[j] += a[i + j] * b[i + j];
        }
    }
    for (uint32_t width = BKV_LANES / 2; width > 0; width /= 2) {
        for (uint32_t j = 0; j < width; j++) {
            lane[j] += lane[j + width];
        }
    }
    return lane[0];
}

// y += a * x
static inline void bkv_axpy(float a, const float *restrict x, uint32_t n, float *restrict y) {
    for (uint32_t i = 0; i < n; i++) {
        y[i] += a * x[i];
    }
}

#endif
