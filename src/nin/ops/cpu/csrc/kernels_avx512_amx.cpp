// AMX: products of 16 × 32 by 32 × 16 bfloat16, summed in float; AVX-512 with vdpbf16ps for the remaining channels.
#define NIN_ISA avx512_amx
#define NIN_LANES 16
#define NIN_ROWS 8
#define NIN_DOT 1
#define NIN_AMX 1
#define NIN_FLOATS avx512
#include "kernels.inc"
