// Sums over the threads that share a row. Every thread gets the same bits, in an order fixed by the thread count.
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

__device__ __forceinline__ float SumWarp(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

// Where a thread's slice of a row lies: the block's rank in its cluster, and the cluster's size.
template <Scope kScope>
struct ClusterPlace {
  int rank = 0;
  int blocks = 1;

  __device__ ClusterPlace() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kScope == Scope::kCluster) {
      rank = static_cast<int>(cooperative_groups::this_cluster().block_rank());
      blocks = static_cast<int>(cooperative_groups::this_cluster().num_blocks());
    }
#endif
  }
};

// One sum after another over a row's threads: part of a warp, a whole block, or a cluster. Successive sums alternate
// between two buffers, so that one barrier a sum is enough: a buffer is written again only after the barrier that
// follows its last reading.
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
      value = SumWarp(value);
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
      return SumWarp(value);
    }
  }

 private:
  int threads_;
  int phase_ = 0;
};

// The same in two halves, so that a thread can work on its next row while the others finish the last one: Post(turn,
// value) hands in this thread's part, Wait(turn) returns the sum. Turns count from 0, Post(turn + 1) may come before
// Wait(turn), and no later Post may.
//
// Each turn has one of four buffers and its mbarrier, on which every warp that shares the row arrives. A warp posts turn t + 4 only
// after Wait(t + 2), hence after every warp has posted t + 2, hence after every warp has read t: four buffers suffice.
template <Scope kScope>
class SplitRowSum {
  static constexpr int kBuffers = 4;
  static constexpr int kBlockWarps = 16;
  static constexpr int kSlots = kScope == Scope::kCluster ? kBlockWarps * kMaxCluster : kBlockWarps;

 public:
  struct Shared {
    uint64_t barriers[kBuffers][kScope == Scope::kCluster ? 1 : kBlockWarps];  // one for each row of the block
    float sums[kBuffers][kSlots];
  };

  // `slot`: which of the block's rows this thread works on. All threads of the block (cluster) must take part.
  __device__ SplitRowSum(Shared& shared, int threads_per_row, int slot)
      : shared_(shared), lanes_(threads_per_row), slot_(slot) {
    if constexpr (kScope == Scope::kLanes) return;
    lane_ = threadIdx.x % 32;
    warps_ = threads_per_row / 32;
    first_warp_ = slot * warps_;
    const ClusterPlace<kScope> place;
    rank_ = place.rank;
    blocks_ = place.blocks;
    if (threadIdx.x == static_cast<unsigned>(slot * threads_per_row)) {
      for (int i = 0; i < kBuffers; ++i) {
        const auto count = static_cast<unsigned>(warps_ * blocks_);
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(Barrier(i)), "r"(count) : "memory");
      }
    }
    if constexpr (kScope == Scope::kCluster) {
#if __CUDA_ARCH__ >= 900
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      cooperative_groups::this_cluster().sync();
#endif
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ void Post(int turn, float value) {
    if constexpr (kScope == Scope::kLanes) {
      previous_ = current_;
      current_ = SumLanes(value, lanes_);
      last_turn_ = turn;
      return;
    }
    const int buffer = turn % kBuffers;
    const int warp = threadIdx.x / 32;
    value = SumWarp(value);
    if constexpr (kScope == Scope::kCluster) {
#if __CUDA_ARCH__ >= 900
      if (lane_ < blocks_) {
        const uint32_t sum = SharedAddress(&shared_.sums[buffer][rank_ * warps_ + warp]);
        asm volatile(
            "{\n"
            ".reg .b32 sum, barrier;\n"
            "mapa.shared::cluster.u32 sum, %0, %3;\n"
            "mapa.shared::cluster.u32 barrier, %1, %3;\n"
            "st.shared::cluster.f32 [sum], %2;\n"
            "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [barrier];\n"
            "}\n" ::"r"(sum),
            "r"(Barrier(buffer)), "f"(value), "r"(lane_)
            : "memory");
      }
#endif
    } else if (lane_ == 0) {
      shared_.sums[buffer][warp] = value;
      asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(Barrier(buffer))
                   : "memory");
    }
  }

  __device__ __forceinline__ float Wait(int turn) {
    if constexpr (kScope == Scope::kLanes) return turn == last_turn_ ? current_ : previous_;
    const int buffer = turn % kBuffers;
    const unsigned parity = turn / kBuffers % 2;
    WaitBarrier(Barrier(buffer), parity);
    float value = 0.0f;
    const int slots = warps_ * blocks_;
    for (int i = lane_; i < slots; i += 32) value += shared_.sums[buffer][first_warp_ + i];
    return SumWarp(value);
  }

  // Before the block ends, or reuses the barriers' memory: the others may still write to it until then.
  __device__ void Finish() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kScope == Scope::kCluster) cooperative_groups::this_cluster().sync();
#endif
  }

 private:
  static __device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  }

  __device__ __forceinline__ uint32_t Barrier(int buffer) const {
    return SharedAddress(&shared_.barriers[buffer][kScope == Scope::kCluster ? 0 : slot_]);
  }

  static __device__ __forceinline__ void WaitBarrier(uint32_t barrier, unsigned parity) {
    unsigned done = 0;
    while (done == 0) {
#if __CUDA_ARCH__ >= 900
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}\n"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
#else
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}\n"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
#endif
    }
  }

  Shared& shared_;
  int lanes_;
  int slot_;
  int lane_ = 0, warps_ = 1, first_warp_ = 0, rank_ = 0, blocks_ = 1;
  float current_ = 0, previous_ = 0;  // kLanes: the last two sums
  int last_turn_ = 0;
};

}  // namespace jax_rmsnorm
