// Sums over the threads that share a row. Every thread gets the same bits, in an order fixed by the thread
// count.
#pragma once

#include <cooperative_groups.h>

#include "config.h"

namespace jax_rmsnorm {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxWarps = 32;
constexpr int kMaxCluster = 16;

// Over aligned runs of `lanes` lanes, a power of two. All 32 lanes of the warp must take part.
__device__ __forceinline__ float SumLanes(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

// One sum after another over a row's threads. Successive sums alternate between two buffers, so that one
// barrier a sum is enough: a buffer is written again only after the barrier that follows its last reading.
template <Scope kScope>
class RowSum {
 public:
  __device__ explicit RowSum(int threads_per_row) : threads_(threads_per_row) {
#if __CUDA_ARCH__ >= 900
    // A block's shared memory may be written from afar only once the block has started.
    if constexpr (kScope == Scope::kCluster) cooperative_groups::this_cluster().sync();
#endif
  }

  __device__ __forceinline__ float operator()(float value) {
    if constexpr (kScope == Scope::kLanes) {
      return SumLanes(value, threads_);
    } else {
      constexpr int kSlots = kScope == Scope::kCluster ? kMaxWarps * kMaxCluster : kMaxWarps;
      __shared__ float buffers[2][kSlots];
      float* buffer = buffers[phase_];
      phase_ ^= 1;
      const int lane = threadIdx.x % 32;
      const int warp = threadIdx.x / 32;
      const int warps = threads_ / 32;
      value = SumLanes(value, 32);
      int slots = warps;
      if constexpr (kScope == Scope::kCluster) {
#if __CUDA_ARCH__ >= 900
        // Lane r hands this warp's sum to block r of the cluster; one barrier makes all of them visible.
        const auto cluster = cooperative_groups::this_cluster();
        const int blocks = static_cast<int>(cluster.num_blocks());
        slots = warps * blocks;
        if (lane < blocks) {
          cluster.map_shared_rank(buffer, lane)[cluster.block_rank() * warps + warp] = value;
        }
        cluster.sync();
#endif
      } else {
        if (lane == 0) buffer[warp] = value;
        __syncthreads();
      }
      value = 0.0f;
      for (int slot = lane; slot < slots; slot += 32) value += buffer[slot];
      return SumLanes(value, 32);
    }
  }

 private:
  int threads_;
  int phase_ = 0;
};

}  // namespace jax_rmsnorm
