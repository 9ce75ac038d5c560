// Sums over the threads that share a row. Every thread gets the same bits, in an order fixed by the thread
// count.
#pragma once

#include <cooperative_groups.h>

#include "config.h"
#include "packet.cuh"

namespace jax_rmsnorm {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxWarps = kMaxThreads / 32;

// Over aligned runs of `lanes` lanes, a power of two. All 32 lanes of the warp must take part.
__device__ __forceinline__ float SumLanes(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

template <int kLanes>
__device__ __forceinline__ float SumLanes(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

__device__ __forceinline__ float SumWarp(float value) { return SumLanes<32>(value); }

// Of the sums of `warps` warps at `from` in shared memory, read four at a time: behind them are zeros.
__device__ __forceinline__ float SumWarps(uint32_t from, int warps) {
  float value = 0.0f;
#pragma unroll 1
  for (int i = 0; i < warps; i += 4) {
    uint32_t four[4];
    LoadShared<16>(from + i * sizeof(float), four);
    value += (__uint_as_float(four[0]) + __uint_as_float(four[1])) +
             (__uint_as_float(four[2]) + __uint_as_float(four[3]));
  }
  return value;
}

// Of any number of sums, by all lanes of a warp together.
__device__ __forceinline__ float SumMany(uint32_t from, int count) {
  float value = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < count; i += 32) value += LoadShared(from + i * sizeof(float));
  return SumWarp(value);
}

// A sum over the kWindows windows of each lane, which lie around a circle: element i of window k of lane l is
// number (k * lanes + l) * kSize + i of it. Has the same bits however the circle is turned: numbers that lie
// half the circle apart are added first, then those a quarter apart, and so on, and the two sides of each
// addition may change places. More than four windows are added up one after another, and three count as four
// of which one is empty: there no term that is not zero may come round (kRound).
template <int kSize, int kWindows>
class CircleSum {
 public:
  static constexpr bool kRound = kWindows == 1 || kWindows == 2 || kWindows == 4;

  __device__ __forceinline__ CircleSum() {
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums_[0][i] = sums_[1][i] = 0.0f;
  }

  // Window k, in the order of k; those that are left out count as zero.
  __device__ __forceinline__ void Add(int k, const float (&terms)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sums_[k % 2][i] = k < 2 ? terms[i] : __fadd_rn(sums_[k % 2][i], terms[i]);
    }
  }

  // The same of the squares of `values`, in fewer instructions where those are exact in float32.
  template <bool kExact>
  __device__ __forceinline__ void AddSquares(int k, const float (&values)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float& sum = sums_[k % 2][i];
      sum = k < 2    ? __fmul_rn(values[i], values[i])
            : kExact ? __fmaf_rn(values[i], values[i], sum)
                     : __fadd_rn(sum, __fmul_rn(values[i], values[i]));
    }
  }

  // For threads whose warps go in pairs, of which one has the windows of even number and the other those of
  // odd number, added as windows 0, 2, ... by either: afterwards both have all. `memory`: kSize * 4 bytes for
  // each thread of the block, all of which must take part; they may be written again after the next barrier.
  __device__ __forceinline__ void Exchange(uint32_t memory) {
    static_assert(kSize % 4 == 0);
    const auto at = [memory](unsigned thread, int i) { return memory + (i / 4 * blockDim.x + thread) * 16; };
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      uint32_t four[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = __float_as_uint(sums_[0][i + j]);
      StoreShared<16>(at(threadIdx.x, i), four);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      uint32_t four[4];
      LoadShared<16>(at(threadIdx.x ^ 32, i), four);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums_[1][i + j] = __uint_as_float(four[j]);
    }
  }

  // Over aligned runs of `lanes` lanes, a power of two and at least kSize. All 32 lanes of the warp must take
  // part; each gets the sum.
  __device__ __forceinline__ float Over(int lanes) const {
    float terms[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      terms[i] = kWindows > 1 ? __fadd_rn(sums_[0][i], sums_[1][i]) : sums_[0][i];
    }
    // Each lane goes on with half of the terms, as long as it has several.
    int offset = lanes / 2;
#pragma unroll
    for (int half = kSize / 2; half > 0; half /= 2, offset /= 2) {
      const bool upper = (threadIdx.x & offset) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float kept = upper ? terms[i + half] : terms[i];
        const float given = upper ? terms[i] : terms[i + half];
        terms[i] = kept + __shfl_xor_sync(kFullMask, given, offset);
      }
    }
    float sum = terms[0];
    for (; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
    offset = lanes / 2;
#pragma unroll
    for (int half = kSize / 2; half > 0; half /= 2, offset /= 2) {
      sum += __shfl_xor_sync(kFullMask, sum, offset);
    }
    return sum;
  }

 private:
  float sums_[2][kSize];
};

// A block's slots, each of which has a row at a time: how many there are, and this thread's place in them.
// kOne: there is one in a block. Of kShare warps in a row that have the same lanes one counts.
template <Scope kScope, bool kOne = kScope != Scope::kLanes, int kShare = 1>
struct Slots {
  __device__ explicit Slots(int threads_per_row) : threads(threads_per_row / kShare) {
    const auto all = static_cast<int>(blockDim.x / kShare);
    const auto index = static_cast<int>(threadIdx.x / (32 * kShare) * 32 + threadIdx.x % 32);
    if constexpr (kOne) {
      thread = index;
    } else if constexpr (kScope == Scope::kLanes) {  // a power of two: a division would take as long as a sum
      const int shift = 31 - __clz(threads);
      count = all >> shift;
      number = index >> shift;
      thread = index & (threads - 1);
    } else {
      count = all / threads;
      number = index / threads;
      thread = index - number * threads;
    }
  }

  // Of a block with threads beyond those of `slots` slots.
  __device__ Slots(int threads_per_row, int slots) : threads(threads_per_row / kShare), count(slots) {
    const auto index = static_cast<int>(threadIdx.x / (32 * kShare) * 32 + threadIdx.x % 32);
    number = slots == 1 ? 0 : index / threads;
    thread = index - number * threads;
  }

  int threads;    // of a slot, which are numbered
  int count = 1;  // of the slots
  int number = 0;
  int thread;
};

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

// One sum after another over a row's threads: part of a warp, or those of a block's slot. Successive sums
// alternate between two buffers, so that one barrier a sum is enough: a buffer is written again only after
// the barrier that follows its last reading. Of kShare warps in a row that have the same value only the first
// hands it in, and only its threads count.
template <Scope kScope, int kShare = 1>
class RowSum {
 public:
  // `slot`: which of the block's rows this thread works on, as number `thread` of its threads there.
  __device__ RowSum(int threads_per_row, int slot, int thread)
      : threads_(threads_per_row), slot_(slot), thread_(thread) {}

  // In a block of one slot.
  __device__ explicit RowSum(int threads_per_row)
      : RowSum(threads_per_row, 0, static_cast<int>(threadIdx.x)) {}

  // All threads of the block must take part, but for those beyond the slots', and with kLanes all of the
  // warp.
  __device__ __forceinline__ float operator()(float value) {
    return OfWarps(kScope == Scope::kLanes ? SumLanes(value, threads_) : SumWarp(value));
  }

  // Likewise of values that are already summed up over the lanes of each warp that share the row.
  __device__ __forceinline__ float OfWarps(float value) {
    if constexpr (kScope == Scope::kLanes) {
      return value;
    } else {
      // Each slot has its warps' sums at a multiple of four, zeros behind them.
      __shared__ alignas(16) float buffers[2][2 * kMaxWarps];
      const int warps = threads_ / 32, padded = (warps + 3) / 4 * 4;
      float* buffer = buffers[phase_] + slot_ * padded;
      phase_ ^= 1;
      if (threadIdx.x % (32 * kShare) == 0) buffer[thread_ / 32] = value;
      if (thread_ < 4 && warps + thread_ < padded) buffer[warps + thread_] = 0.0f;
      __syncthreads();
      return SumWarps(SharedAddress(buffer), warps);
    }
  }

 private:
  int threads_, slot_, thread_;
  int phase_ = 0;
};

// The same in two halves, so that a thread can work on its next row while the others finish the last one:
// Post(turn, value) hands in this thread's part, Wait(turn) returns the sum. Turns count from 0; Post(turn +
// 1) may come before Wait(turn), and no later Post may.
//
// Each turn has one of four buffers, and its mbarrier completes when every warp that shares the row has
// handed in. A warp posts turn t + 4 only after Wait(t + 2), hence after every warp has posted t + 2, hence
// after every warp has read t: four buffers suffice.
//
// kShare: see RowSum.
template <Scope kScope, int kShare = 1>
class SplitRowSum {
  static constexpr unsigned kBuffers = 4;
  // In a block each row has its warps' sums at a multiple of four, zeros behind them.
  static constexpr int kSums = kMaxWarps * (kScope == Scope::kCluster ? kMaxCluster : 2);

 public:
  struct Shared {
    alignas(16) float sums[kBuffers][kSums];
    uint64_t barriers[kBuffers][kMaxWarps];  // one for each row of the block
  };

  // `slot`: which of the block's rows this thread works on, as number `thread` of its threads there. All
  // threads of the block (cluster) must take part.
  __device__ SplitRowSum(Shared& shared, int threads_per_row, int slot, int thread)
      : lanes_(threads_per_row) {
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
    if constexpr (kScope == Scope::kBlock) {
      for (int i = threadIdx.x; i < static_cast<int>(kBuffers) * kSums; i += blockDim.x) {
        shared.sums[i / kSums][i % kSums] = 0.0f;
      }
    }
    leader_ = thread == 0 && HandsIn();
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
      if (lane_ < blocks_ && HandsIn()) {  // lane r hands the warp's sum to block r of the cluster
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
    } else if (lane_ == 0 && HandsIn()) {
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

  static __device__ __forceinline__ bool HandsIn() { return kShare == 1 || threadIdx.x / 32 % kShare == 0; }

  static __device__ __forceinline__ void WaitBarrier(uint32_t barrier, unsigned parity) {
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
      : sum_(Make(threads_per_row, slot, thread)) {}

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
      __shared__ typename SplitRowSum<kScope, kShare>::Shared memory;
      return SplitRowSum<kScope, kShare>(memory, threads, 0, thread);
    } else {
      return RowSum<kScope, kShare>(threads, slot, thread);
    }
  }

  std::conditional_t<kCluster, SplitRowSum<kScope, kShare>, RowSum<kScope, kShare>> sum_;
  unsigned turn_ = 0;
};

}  // namespace jax_rmsnorm
