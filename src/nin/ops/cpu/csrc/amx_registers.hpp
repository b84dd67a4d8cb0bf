// AMX's eight tile registers of 16 rows × 64 bytes, or with NIN_EMULATE_AMX an emulation in plain C++, for tests on
// machines that lack them. The emulation follows the operation sections of the Intel 64 manual, volume 2 (TILELOADD,
// TDPBF16PS), but for denormals, which AMX takes as zero.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace nin {
namespace {
namespace registers {

// The operand of LDTILECFG: the bytes of a row and the rows of each register.
struct alignas(64) Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64);

// Register numbers: sums by block of pixels and of columns, then pixels and weights.
constexpr int sums[2][2] = {{0, 1}, {2, 3}}, pixels[2] = {4, 5}, weights[2] = {6, 7};

// Pixels and sums of `rows` rows; weights of 16 pairs of channels.
inline Configuration configuration(int rows) {
  Configuration c{};
  c.palette = 1;
  for (int i = 0; i < 8; ++i) c.row_bytes[i] = 64, c.rows[i] = uint8_t(i < weights[0] ? rows : 16);
  return c;
}

#if NIN_EMULATE_AMX

inline thread_local Configuration current;
inline thread_local char tiles[8][16][64];

inline void configure(const Configuration& c) { current = c, memset(tiles, 0, sizeof tiles); }
inline void read_configuration(void* to) { memcpy(to, &current, sizeof current); }
inline void release() { configure({}); }

template <int T>
inline void zero() {
  memset(tiles[T], 0, sizeof tiles[T]);
}
template <int T>
inline void load(const void* from, int64_t row) {
  memset(tiles[T], 0, sizeof tiles[T]);
  for (int r = 0; r < current.rows[T]; ++r) memcpy(tiles[T][r], (const char*)from + r * row, current.row_bytes[T]);
}
template <int T>
inline void store(void* to, int64_t row) {
  for (int r = 0; r < current.rows[T]; ++r) memcpy((char*)to + r * row, tiles[T][r], current.row_bytes[T]);
}
inline float element(const char* at) {
  uint16_t half;
  memcpy(&half, at, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
template <int C, int A, int B>
inline void multiply_add() {
  for (int m = 0; m < current.rows[C]; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < current.row_bytes[A] / 4; ++k) {
      for (int n = 0; n < current.row_bytes[C] / 4; ++n) {
        even[n] += element(tiles[A][m] + 4 * k) * element(tiles[B][k] + 4 * n);
        odd[n] += element(tiles[A][m] + 4 * k + 2) * element(tiles[B][k] + 4 * n + 2);
      }
    }
    for (int n = 0; n < current.row_bytes[C] / 4; ++n) {
      float sum;
      memcpy(&sum, tiles[C][m] + 4 * n, 4);
      sum += even[n] + odd[n];
      memcpy(tiles[C][m] + 4 * n, &sum, 4);
    }
  }
}

#else

// GCC's own intrinsics lack the "memory" clobbers, so it would move stores past the loads that depend on them.
inline void configure(const Configuration& c) { __asm__ volatile("ldtilecfg %0" ::"m"(c) : "memory"); }
inline void read_configuration(void* to) { __asm__ volatile("sttilecfg %0" : "=m"(*(Configuration*)to)::"memory"); }
inline void release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int T>
inline void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void load(const void* from, int64_t row) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row), "i"(T) : "memory");
}
template <int T>
inline void store(void* to, int64_t row) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void multiply_add() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace registers
}  // namespace
}  // namespace nin
