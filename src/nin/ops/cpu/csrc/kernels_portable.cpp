// Vectors of 16 bytes, which every machine has (SSE2, NEON): a register tile of 6 × 2 in 16 registers.
#define NIN_ISA portable
#define NIN_LANES 4
#define NIN_ROWS 6
#define NIN_DOT 0
#define NIN_AMX 0
#include "kernels.inc"
