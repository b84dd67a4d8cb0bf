// AVX-512 with dot products of bfloat16 pairs, summed in float (vdpbf16ps).
#define NIN_ISA avx512_bf16
#define NIN_LANES 16
#define NIN_ROWS 14
#define NIN_DOT 1
#define NIN_AMX 0
#define NIN_FLOATS avx512
#include "kernels.inc"
