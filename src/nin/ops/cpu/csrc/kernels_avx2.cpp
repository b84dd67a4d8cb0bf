// AVX2 with FMA: 6 × 2 sums, two columns and a pixel fill 15 of 16 registers.
#define NIN_ISA avx2
#define NIN_LANES 8
#define NIN_ROWS 6
#define NIN_DOT 0
#define NIN_AMX 0
#include "kernels.inc"
