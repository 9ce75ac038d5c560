// The CPU kernels, one set for each instruction set that the library was compiled for.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace jax_rmsnorm {

struct CpuKernels {
  const char* name;
  // Rows [first, last) of all groups' rows, counted through.
  void (*forward)(const ForwardArgs& args, int64_t first, int64_t last);
  // Rows [first, last) of one group: writes their dx, and their part of dgamma to `partial` (null: not
  // wanted).
  void (*backward)(const BackwardArgs& args, int64_t group, int64_t first, int64_t last, float* partial);
  // dgamma of one group at columns [first, last): the sum of the first `count` partial rows.
  void (*finish)(const BackwardArgs& args, int64_t group, int64_t count, int64_t first, int64_t last);
};

namespace baseline {
extern const CpuKernels kKernels;
}
namespace avx2 {
extern const CpuKernels kKernels;
}
namespace avx512 {
extern const CpuKernels kKernels;
}

// What this machine can run, best first; ends with a null pointer.
const CpuKernels* const* AvailableKernels();

// The set in use: the best one, or the one that the environment variable JAX_RMSNORM_CPU_ISA names.
const CpuKernels& ActiveKernels();

}  // namespace jax_rmsnorm
