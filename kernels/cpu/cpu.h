// cpu.h - internal: which instruction sets this machine and its kernel let us use. Asked of the CPU each time: keep the answer.
#ifndef BKV_CPU_H
#define BKV_CPU_H

#include <stdbool.h>

// AVX2 with FMA and F16C.
bool bkv_cpu_avx2(void);

// AVX2 and AVX-512 F, BW, VL, DQ, VBMI and VNNI.
bool bkv_cpu_avx512(void);

// AVX-512 as above, AVX512_BF16, and AMX tiles with bfloat16 and int8. Tile registers are 8 KiB of state that Linux gives a process only
// when it asks; this asks, for all threads of the process to come.
bool bkv_cpu_amx(void);

#endif
