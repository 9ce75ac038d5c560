// Sums over the threads that share a row. Every thread gets the same bits, in an order fixed by the thread
// count.
#pragma once

#include <cooperative_groups.h>

#include "config.h"
#include "packet.cuh"

namespace jax_rmsnorm {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxWarps = kMaxThreads / 32;

// Of several values, each in its place, over aligned runs of `lanes` lanes, a power of two. All 32 lanes of
// the warp must take part.
template <int kCount>
__device__ __forceinline__ void SumLanes(float (&values)[kCount], int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kFullMask, values[i], offset);
  }
}

// Of one value.
__device__ __forceinline__ float SumLanes(float value, int lanes) {
  float values[1] = {value};
  SumLanes(values, lanes);
  return values[0];
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

// A block's slots, each of which has a row at a time: how many there are, and this thread's place in them.
// kOne: there is one in a block. Of kShare warps in a row that have the same lanes one counts.
template <Scope kScope, bool kOne = kScope != Scope::kLanes, int kShare = 1>
struct Slots {
  __device__ explicit Slots(int threads_per_row) : threads(threads_per_row / kShare) {
    const auto all = static_cast<int>(blockDim.x / kShare);
    const int index = Index();
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
    const int index = Index();
    number = slots == 1 ? 0 : index / threads;
    thread = index - number * threads;
  }

  int threads;    // of a slot, which are numbered
  int count = 1;  // of the slots
  int number = 0;
  int thread;

 private:
  // This thread's number among those of the block that count.
  static __device__ __forceinline__ int Index() {
    return static_cast<int>(threadIdx.x / (32 * kShare) * 32 + threadIdx.x % 32);
  }
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

// Which packet of a forward's row a thread's packet k is. Long rows (kCluster) lie in strips, of 32 *
// kPackets packets in a row, one for each warp: the order in which they are added up is the same for any
// number of warps and blocks.
template <Scope kScope, int kPackets>
__device__ __forceinline__ int PacketInRow(const ClusterPlace<kScope>& place, int threads, int thread,
                                           int k) {
  if constexpr (kScope == Scope::kCluster) {
    const int strip = place.rank * (threads / 32) + thread / 32;
    return (strip * kPackets + k) * 32 + thread % 32;
  } else {
    return k * threads + thread;
  }
}

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

}  // namespace jax_rmsnorm
