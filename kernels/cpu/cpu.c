// cpu.c - see cpu.h. An instruction set counts when the CPU has it and the operating system saves its registers.
#include "cpu.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BIT(n) (1u << (n))

// Bits of XCR0: what the operating system saves.
#define STATE_AVX    (BIT(1) | BIT(2))
#define STATE_AVX512 (STATE_AVX | BIT(5) | BIT(6) | BIT(7))
#define STATE_AMX    (STATE_AVX512 | BIT(17) | BIT(18))

// arch_prctl's request for a part of the extended state, and the number of the tile registers (linux/arch/x86).
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA  18

static bool saves(uint32_t state) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) {
        return false;
    }
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & state) == state;
}

bool bkv_cpu_avx2(void) {
    uint32_t a, b, c, d;
    const uint32_t basic = BIT(12) | BIT(28) | BIT(29); // FMA, AVX, F16C
    return saves(STATE_AVX) && __get_cpuid(1, &a, &b, &c, &d) && (c & basic) == basic &&
           __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & BIT(5));
}

bool bkv_cpu_avx512(void) {
    uint32_t a, b, c, d;
    const uint32_t wide = BIT(16) | BIT(17) | BIT(30) | BIT(31); // F, DQ, BW, VL
    return bkv_cpu_avx2() && saves(STATE_AVX512) && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & wide) == wide &&
           (c & BIT(1)) && (c & BIT(11)); // VBMI, VNNI
}

bool bkv_cpu_amx(void) {
    uint32_t a, b, c, d;
    if (!bkv_cpu_avx512() || !saves(STATE_AMX) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        return false;
    }
    bool tiles = (d & BIT(22)) && (d & BIT(24));                               // AMX-BF16, AMX-TILE
    if (!tiles || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & BIT(5))) { // AVX512_BF16
        return false;
    }
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

#else

bool bkv_cpu_avx2(void) {
    return false;
}

bool bkv_cpu_avx512(void) {
    return false;
}

bool bkv_cpu_amx(void) {
    return false;
}

#endif
