// The yardstick of the benchmark: plain elementwise kernels that move the bytes of a norm and do nothing
// else.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_rmsnorm {

// Launch shapes that LaunchRoof knows; which one is the fastest differs between sizes and GPUs.
constexpr int kRoofVariants = 8;

// out = a, or a xor b where b is not null; `bytes` of each, a multiple of 16.
cudaError_t LaunchRoof(const void* a, const void* b, void* out, int64_t bytes, int variant,
                       cudaStream_t stream);

}  // namespace jax_rmsnorm
