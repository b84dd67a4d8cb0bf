// AVX2 with FMA: a register tile of 6 × 2; with two columns and a pixel it fills 15 of 16 registers.
#define NIN_ISA avx2
#define NIN_LANES 8
#define NIN_ROWS 6
#define NIN_DOT 0
#define NIN_AMX 0
#include "kernels.inc"
