#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace jax_rmsnorm {
namespace {

#if defined(__x86_64__)
bool HasF16C() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16C(); }

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Available {
  const CpuKernels* sets[4] = {};

  Available() {
    int count = 0;
#if defined(__x86_64__)
    if (HasAvx512()) sets[count++] = &avx512::kKernels;
    if (HasAvx2()) sets[count++] = &avx2::kKernels;
#endif
    sets[count] = &baseline::kKernels;
  }
};

const CpuKernels& Choose() {
  const CpuKernels* const* available = AvailableKernels();
  if (const char* wanted = std::getenv("JAX_RMSNORM_CPU_ISA")) {
    for (int i = 0; available[i] != nullptr; ++i) {
      if (std::strcmp(available[i]->name, wanted) == 0) return *available[i];
    }
  }
  return *available[0];
}

}  // namespace

const CpuKernels* const* AvailableKernels() {
  static const Available available;
  return available.sets;
}

const CpuKernels& ActiveKernels() {
  static const CpuKernels& active = Choose();
  return active;
}

}  // namespace jax_rmsnorm
