// AVX-512 (F, BW, DQ, VL): a register tile of 14 × 2; with two columns and a pixel it fills 31 of 32 registers.
#define NIN_ISA avx512
#define NIN_LANES 16
#define NIN_ROWS 14
#define NIN_DOT 0
#define NIN_AMX 0
#include "kernels.inc"
