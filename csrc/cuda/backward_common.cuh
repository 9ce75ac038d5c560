// What the backward kernels share.
#pragma once

#include <cstdint>

#include "launch.h"
#include "packet.cuh"
#include "reduce.cuh"

namespace jax_rmsnorm {

struct BackwardParams {
  BackwardArgs args;
  int threads_per_row;
  int stages;
  int64_t blocks_per_group;
};

template <int kSize>
__device__ __forceinline__ void LoadGamma(const BackwardArgs& args, int64_t offset, float (&gamma)[kSize]) {
  LoadGamma(args.gamma, args.gamma_dtype, args.arithmetic.zero_centered_gamma, offset, gamma);
}

// A block's part of dgamma at kSize columns: into its partial row, or into dgamma itself where the group has
// no other block. `group` and `block` count from 0.
template <int kSize>
__device__ __forceinline__ void StoreDgamma(const BackwardParams& params, int64_t group, int64_t block,
                                            int64_t column, const float (&values)[kSize]) {
  const BackwardArgs& args = params.args;
  const int64_t hidden = args.shape.hidden;
  if (params.blocks_per_group == 1) {
    StoreAs(args.gamma_dtype, args.dgamma, group * hidden + column, values);
  } else {
    Packet<float, kSize> packet;
    packet.Set(values);
    packet.Store(args.partials + (group * args.partial_rows + block) * hidden + column);
  }
}

// Adds up the slots' shares of dgamma, one after another, in shared memory [slots, hidden], and stores the
// sums. Each thread hands in its share through fill(columns of its slot). All threads of the block must take
// part.
template <typename Fill>
__device__ __forceinline__ void StoreSlots(const BackwardParams& params, float* shared, int slots, int slot,
                                           int64_t group, int64_t block, Fill&& fill) {
  const int64_t hidden = params.args.shape.hidden;
  __syncthreads();
  fill(shared + slot * hidden);
  __syncthreads();
  for (int64_t column = threadIdx.x; column < hidden; column += blockDim.x) {
    float total[1] = {0.0f};
    for (int s = 0; s < slots; ++s) total[0] += shared[s * hidden + column];
    StoreDgamma(params, group, block, column, total);
  }
  __syncthreads();
}

}  // namespace jax_rmsnorm
