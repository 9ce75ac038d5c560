// What the forward kernels share.
#pragma once

#include <cstdint>

#include "launch.h"
#include "packet.cuh"
#include "reduce.cuh"
#include "unaligned.cuh"

namespace jax_rmsnorm {

struct ForwardParams {
  ForwardArgs args;
  float inverse_hidden;
  int threads_per_row;
  int64_t items;             // of ForwardKernel: rows, or runs of rows where a block takes several
  int64_t blocks_per_group;  // of ForwardRingKernel
};

template <int kSize>
__device__ __forceinline__ float SumOfSquares(const float (&values)[kSize]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum += values[i] * values[i];
  return sum;
}

// y = x * rrms * gamma.
template <typename T, int kSize>
__device__ __forceinline__ void Normalize(const float (&x)[kSize], float rrms, const float (&gamma)[kSize],
                                          bool round_before_gamma, float (&y)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) y[i] = x[i] * rrms;
  if (round_before_gamma) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) y[i] = ToFloat(FromFloat<T>(y[i]));
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) y[i] *= gamma[i];
}

__device__ __forceinline__ int64_t GammaRow(const Shape& shape, int64_t row) {
  return shape.groups == 1 ? 0 : row / shape.rows;
}

}  // namespace jax_rmsnorm
