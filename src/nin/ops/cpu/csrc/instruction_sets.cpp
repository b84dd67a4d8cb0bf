// The instruction sets of the library, and which of them this machine runs.
#include <cstring>

#include "c_api.hpp"
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

// The processor has tile registers, the system saves them, and this process may use them.
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

// Whether a GEMM of small integers, 32 × 40 by 40 × 32, is exact. These kernels have been tested on emulated tile
// registers only: if the real ones deviate, the next instruction set serves.
bool gemm_is_exact() {
  constexpr int pixels = 32, steps = 20, columns = 32;
  const auto to_bf16 = [](int value) {
    const float number = float(value);
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    return uint16_t(bits >> 16);
  };
  alignas(64) uint16_t a[pixels][2 * steps], b[steps][columns][2];
  alignas(64) float got[pixels][columns];
  for (int k = 0; k < 2 * steps; ++k) {
    for (int i = 0; i < pixels; ++i) a[i][k] = to_bf16((i * 3 + k) % 7 - 3);
    for (int j = 0; j < columns; ++j) b[k / 2][j][k % 2] = to_bf16((j + 5 * k) % 9 - 4);
  }
  const int64_t tap = 0;
  GemmArguments args;
  args.a = a, args.a_row_stride = sizeof a[0];
  args.tap_offsets = &tap, args.tap_count = 1, args.k_steps = steps;
  args.panel = b, args.prefetch = b;
  args.columns = columns;
  args.epilogue.out = got, args.epilogue.out_row_stride = sizeof got[0];
  alignas(64) char state[64];
  avx512_amx_kernels.enter(state);
  avx512_amx_kernels.gemm(args, pixels, max_vectors);
  avx512_amx_kernels.leave(state);
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

struct InstructionSet {
  const char* name;
  const Kernels* f32;
  const Kernels* bf16;
  bool (*runs)();
};

const InstructionSet instruction_sets[] = {
#if NIN_X86
    // these two have dot products of bfloat16 alone: float32 takes the AVX-512 kernels
    {"avx512_amx", &avx512_kernels, &avx512_amx_kernels,
     [] {
       static const bool right = has_avx512_bf16() && has_tile_registers() && gemm_is_exact();
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

int64_t nin_interface() { return 10; }

const void* nin_find_kernels(const char* name, int64_t type) {
  for (const nin::InstructionSet& set : nin::instruction_sets) {
    if (std::strcmp(set.name, name) == 0) {
      return !set.runs() ? nullptr : nin::DataType(type) == nin::DataType::bf16 ? set.bf16 : set.f32;
    }
  }
  return nullptr;
}
