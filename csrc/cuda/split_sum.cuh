// Sums over the threads that share a row, in two halves, and across the blocks of a cluster.
#pragma once

#include "config.h"
#include "packet.cuh"
#include "reduce.cuh"

namespace jax_rmsnorm {

// Returns when the phase of `parity` of an mbarrier in shared memory is over.
__device__ __forceinline__ void WaitBarrier(uint32_t barrier, unsigned parity) {
  unsigned done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared.b64 done, [%1], %2;\n"
#else
        "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
#endif
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// The sum of RowSum in two halves, so that a thread can work on its next row while the others finish the last
// one: Post(turn, value) hands in this thread's part, Wait(turn) returns the sum. Turns count from 0;
// Post(turn + 1) may come before Wait(turn), and no later Post may.
//
// Each turn has one of four buffers, and its mbarrier completes when every warp that shares the row has
// handed in. A warp posts turn t + 4 only after Wait(t + 2), hence after every warp has posted t + 2, hence
// after every warp has read t: four buffers suffice.
template <Scope kScope>
class SplitRowSum {
  static constexpr unsigned kBuffers = 4;
  // In a block each row has its warps' sums at a multiple of four, zeros behind them.
  static constexpr int kSums = kMaxWarps * (kScope == Scope::kCluster ? kMaxCluster : 2);

 public:
  struct Shared {
    alignas(16) float sums[kBuffers][kSums];
    uint64_t barriers[kBuffers][kMaxWarps];  // one for each row of the block
  };

  // `slot`: which of the block's rows this thread works on, as number `thread` of its threads there.
  __device__ SplitRowSum(Shared& shared, int threads_per_row, int slot, int thread)
      : shared_(shared), lanes_(threads_per_row) {
    if constexpr (kScope == Scope::kLanes) return;
    const ClusterPlace<kScope> place;
    lane_ = threadIdx.x % 32;
    warps_ = threads_per_row / 32;
    blocks_ = place.blocks;
    across_ = kScope == Scope::kCluster && blocks_ > 1;
    barriers_ = SharedAddress(&shared.barriers[0][slot]);
    const int warp = thread / 32;
    const int first = slot * ((warps_ + 3) / 4 * 4);
    read_from_ = SharedAddress(&shared.sums[0][first]);
    write_to_ = SharedAddress(&shared.sums[0][first + place.rank * warps_ + warp]);
    leader_ = thread == 0;
  }

  // Before the first Post, once; best when loads are under way. All threads of the block (cluster) must take
  // part.
  __device__ __forceinline__ void Start() {
    if constexpr (kScope == Scope::kLanes) return;
    if constexpr (kScope == Scope::kBlock) {
      for (int i = threadIdx.x; i < static_cast<int>(kBuffers) * kSums; i += blockDim.x) {
        shared_.sums[i / kSums][i % kSums] = 0.0f;
      }
    }
    if (leader_) {
      // In a cluster the sums themselves count, by their bytes.
      const unsigned count = across_ ? 1 : warps_;
      for (unsigned i = 0; i < kBuffers; ++i) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(Barrier(i)), "r"(count) : "memory");
      }
    }
    if (across_) {
#if __CUDA_ARCH__ >= 900
      // A block's shared memory may be written from afar only once the block has started. The first Post
      // waits for that, and loads can be issued until then.
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ void Post(unsigned turn, float value) {
    PostOfWarp(turn, kScope == Scope::kLanes ? SumLanes(value, lanes_) : SumWarp(value));
  }

  // A value that is already summed up over the lanes of the warp that share the row.
  __device__ __forceinline__ void PostOfWarp(unsigned turn, float value) {
    if constexpr (kScope == Scope::kLanes) {
      previous_ = current_;
      current_ = value;
      last_turn_ = turn;
      return;
    }
    const unsigned buffer = turn % kBuffers;
    const uint32_t to = write_to_ + buffer * kSums * sizeof(float);
    if (across_) {
#if __CUDA_ARCH__ >= 900
      if (turn == 0) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
      __syncwarp();  // all lanes have read before this warp hands in
      if (leader_) {
        const unsigned bytes = warps_ * blocks_ * sizeof(float);
        asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}\n" ::"r"(
                         Barrier(buffer)),
                     "r"(bytes)
                     : "memory");
      }
      if (lane_ < blocks_) {  // lane r hands the warp's sum to block r of the cluster
        asm volatile(
            "{\n"
            ".reg .b32 to, barrier;\n"
            "mapa.shared::cluster.u32 to, %0, %3;\n"
            "mapa.shared::cluster.u32 barrier, %1, %3;\n"
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %2, [barrier];\n"
            "}\n" ::"r"(to),
            "r"(Barrier(buffer)), "r"(__float_as_uint(value)), "r"(lane_)
            : "memory");
      }
#endif
    } else if (lane_ == 0) {
      asm volatile(
          "{\n"
          ".reg .b64 state;\n"
          "st.shared.f32 [%0], %1;\n"
          "mbarrier.arrive.shared.b64 state, [%2];\n"
          "}\n" ::"r"(to),
          "f"(value), "r"(Barrier(buffer))
          : "memory");
    }
  }

  __device__ __forceinline__ float Wait(unsigned turn) {
    if constexpr (kScope == Scope::kLanes) return turn == last_turn_ ? current_ : previous_;
    const unsigned buffer = turn % kBuffers;
    const uint32_t from = read_from_ + buffer * kSums * sizeof(float);
    WaitBarrier(Barrier(buffer), turn / kBuffers % 2);
    return kScope == Scope::kBlock ? SumWarps(from, warps_) : SumMany(from, warps_ * blocks_);
  }

 private:
  __device__ __forceinline__ uint32_t Barrier(unsigned buffer) const {
    return barriers_ + buffer * kMaxWarps * sizeof(uint64_t);
  }

  Shared& shared_;
  int lanes_;
  int lane_ = 0, warps_ = 1, blocks_ = 1;
  bool leader_ = false;
  bool across_ = false;  // the row has more than one block
  uint32_t barriers_ = 0, read_from_ = 0, write_to_ = 0;
  float current_ = 0, previous_ = 0;  // kLanes: the last two sums
  unsigned last_turn_ = 0;
};

// One sum after another, in one piece, in any scope. kShare: see RowSum.
template <Scope kScope, int kShare = 1>
class WholeRowSum {
  static constexpr bool kCluster = kScope == Scope::kCluster;

 public:
  // See RowSum. In a cluster a block has one slot.
  __device__ WholeRowSum(int threads_per_row, int slot, int thread)
      : sum_(Make(threads_per_row, slot, thread)) {
    if constexpr (kCluster) sum_.Start();
  }

  __device__ __forceinline__ float operator()(float value) {
    if constexpr (kCluster) {
      sum_.Post(turn_, value);
      return sum_.Wait(turn_++);
    } else {
      return sum_(value);
    }
  }

  // See RowSum.
  __device__ __forceinline__ float OfWarps(float value) {
    if constexpr (kCluster) {
      sum_.PostOfWarp(turn_, value);
      return sum_.Wait(turn_++);
    } else {
      return sum_.OfWarps(value);
    }
  }

 private:
  static __device__ auto Make(int threads, int slot, int thread) {
    if constexpr (kCluster) {
      static_assert(kShare == 1);
      __shared__ typename SplitRowSum<kScope>::Shared memory;
      return SplitRowSum<kScope>(memory, threads, 0, thread);
    } else {
      return RowSum<kScope, kShare>(threads, slot, thread);
    }
  }

  std::conditional_t<kCluster, SplitRowSum<kScope>, RowSum<kScope, kShare>> sum_;
  unsigned turn_ = 0;
};

}  // namespace jax_rmsnorm
