// Which kernels this machine can run.
#include "library.hpp"

#include <cstring>

#include "kernels.hpp"

namespace nin {
namespace {

struct Set {
  const char* name;
  const Kernels* f32;
  const Kernels* bf16;
  bool (*runs)();
};

const Set sets[] = {
#if NIN_X86
    // vdpbf16ps multiplies bfloat16 alone: float32 takes the AVX-512 kernels
    {"avx512_bf16", &avx512_kernels, &avx512_bf16_kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bf16");
     }},
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
