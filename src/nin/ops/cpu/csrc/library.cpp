// Which kernels this machine can run.
#include "library.hpp"

#include <cstring>
#if NIN_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.hpp"

namespace nin {
namespace {

#if NIN_X86
bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}

// The processor has the tile registers, the system saves them, and this process may use them.
bool has_tile_registers() {
#if NIN_EMULATE_AMX
  return true;
#elif defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, osxsave = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile)) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned configuration_and_data = 3u << 17;
  if ((low & configuration_and_data) != configuration_and_data) return false;
  constexpr long ask_for_state = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, ask_for_state, tile_data) == 0;
#else
  return false;
#endif
}

// Whether a product comes out right: 32 × 40 by 40 × 32 small whole numbers, which no rounding touches. These kernels
// have been tested on emulated tile registers only; where the real ones gave anything else, the next set serves.
bool multiplies_right() {
  constexpr int pixels = 32, steps = 20, columns = 32;
  const auto half = [](int value) {
    const float number = float(value);
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    return uint16_t(bits >> 16);
  };
  alignas(64) uint16_t a[pixels][2 * steps], b[steps][columns][2];
  alignas(64) float got[pixels][columns];
  for (int k = 0; k < 2 * steps; ++k) {
    for (int i = 0; i < pixels; ++i) a[i][k] = half((i * 3 + k) % 7 - 3);
    for (int j = 0; j < columns; ++j) b[k / 2][j][k % 2] = half((j + 5 * k) % 9 - 4);
  }
  const int64_t tap = 0;
  Product p;
  p.a = a, p.a_row = sizeof a[0];
  p.taps = &tap, p.tap_count = 1, p.steps = steps;
  p.panel = b, p.next = b;
  p.columns = columns;
  p.finish.out = got, p.finish.out_row = sizeof got[0];
  alignas(64) char state[64];
  avx512_amx_kernels.begin(state);
  avx512_amx_kernels.multiply(p, pixels, max_vectors);
  avx512_amx_kernels.end(state);
  for (int i = 0; i < pixels; ++i) {
    for (int j = 0; j < columns; ++j) {
      int sum = 0;
      for (int k = 0; k < 2 * steps; ++k) sum += ((i * 3 + k) % 7 - 3) * ((j + 5 * k) % 9 - 4);
      if (got[i][j] != float(sum)) return false;
    }
  }
  return true;
}
#endif

struct Set {
  const char* name;
  const Kernels* f32;
  const Kernels* bf16;
  bool (*runs)();
};

const Set sets[] = {
#if NIN_X86
    // these two multiply bfloat16 alone: float32 takes the AVX-512 kernels
    {"avx512_amx", &avx512_kernels, &avx512_amx_kernels,
     [] {
       static const bool right = has_avx512_bf16() && has_tile_registers() && multiplies_right();
       return right;
     }},
    {"avx512_bf16", &avx512_kernels, &avx512_bf16_kernels, has_avx512_bf16},
    {"avx512", &avx512_kernels, &avx512_kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", &avx2_kernels, &avx2_kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", &portable_kernels, &portable_kernels, [] { return true; }},
};

}  // namespace
}  // namespace nin

const char* nin_version() { return NIN_VERSION; }

const void* nin_find_kernels(const char* name, int64_t type) {
  for (const nin::Set& set : nin::sets) {
    if (std::strcmp(set.name, name) == 0) {
      return !set.runs() ? nullptr : nin::Type(type) == nin::Type::bf16 ? set.bf16 : set.f32;
    }
  }
  return nullptr;
}
