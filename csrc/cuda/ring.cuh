// Rows on their way to a persistent block: which ones, and a ring of packets in shared memory, filled by
// asynchronous copies.
#pragma once

#include "config.h"
#include "packet.cuh"
#include "unaligned.cuh"

namespace jax_rmsnorm {

// The rows of a persistent block (or cluster), which it takes in turns: of each group that it works on a run
// of rows, one or `kRows` for each of its slots, then the run blocks_per_group runs further, and so on. All
// slots make the same number of turns; one that has no row left only takes part in the sums.
template <int kRows = 1>
struct Turns {
  // `item`: the group and the block's number there, as one number.
  __device__ Turns(const Shape& shape, int64_t blocks_per_group, int64_t item, int slots, int slot)
      : group(item / blocks_per_group), block(item % blocks_per_group) {
    const int64_t run = static_cast<int64_t>(slots) * kRows;
    const int64_t first = block * run, mine = first + slot * kRows;
    step = blocks_per_group * run;
    all = static_cast<int>(first < shape.rows ? (shape.rows - first + step - 1) / step : 0);
    own = static_cast<int>(mine < shape.rows ? (shape.rows - mine + step - 1) / step : 0);
    row = group * shape.rows + mine;
  }

  int64_t group, block;
  int64_t row, step;  // the slot's first row, counted through all groups, and from there to its next ones
  int all, own;       // turns of the block, and those of them in which the slot has a row
};

// One operand's packets, or those of several of one shape and dtype, whose rings lie some `offset` of bytes
// behind the first one's. Each thread copies in what it will read, so that no barrier is needed, only a wait
// for its own copies. In rows that are not aligned a thread also reads the packet after each of its own: that
// of the next lane, and for the last lane of a run one that it copies in for itself alone.
//
// kCached: copied by way of the L1 cache, where short rows that share a sector of 32 bytes find it again.
// Many rings leave that no room.
template <typename T, int kSize, bool kAligned, bool kCached = false>
class PacketRing {
  using P = Packet<T, kSize>;

 public:
  // `total`: elements of the tensor.
  __device__ PacketRing(uint32_t shared, const void* tensor, int64_t total, int threads_per_row)
      : tensor_(static_cast<const T*>(tensor)), total_(total) {
    int place = threadIdx.x, places = blockDim.x;
    if constexpr (!kAligned) {
      const int run = threads_per_row < 32 ? threads_per_row : 32;
      place += threadIdx.x / run;
      places += blockDim.x / run;
      last_of_run_ = threadIdx.x % run == run - 1;
    }
    base_ = shared + place * P::kAccess;
    stride_ = places * P::kAccess;
  }

  // Starts the copy of the elements from `first` on into a place of the ring; of zeros if not `inside`.
  __device__ __forceinline__ void Copy(int place, int64_t first, bool inside) const {
    static_assert(kAligned);
    CopyTo(At(place), tensor_ + first, inside);
  }

  // Likewise of another tensor.
  __device__ __forceinline__ void CopyFrom(const void* tensor, int place, int64_t first, bool inside,
                                           uint32_t offset) const {
    static_assert(kAligned);
    CopyTo(At(place) + offset, static_cast<const T*>(tensor) + first, inside);
  }

  // Of rows that are not aligned. `whole`: all of the elements are the tensor's, and so are those of the next
  // packet.
  __device__ __forceinline__ void CopyUnaligned(int place, int64_t first, bool whole) const {
    if (whole) {
      CopyTo(At(place), tensor_ + first, true);
      if (last_of_run_) CopyTo(At(place) + P::kAccess, tensor_ + first + kSize, true);
    } else {
      CopyEnd(At(place), first);
      if (last_of_run_) CopyEnd(At(place) + P::kAccess, first + kSize);
    }
  }

  __device__ __forceinline__ P Read(int place, uint32_t offset = 0) const {
    return ReadFrom(At(place) + offset);
  }
  __device__ __forceinline__ P ReadNext(int place) const { return ReadFrom(At(place) + P::kAccess); }

  // That one place takes in a block's shared memory.
  __device__ __forceinline__ uint32_t Bytes() const { return P::kAccesses * stride_; }

 private:
  __device__ __forceinline__ uint32_t At(int place) const { return base_ + place * P::kAccesses * stride_; }

  static constexpr int kElements = P::kAccess / sizeof(T);

  __device__ __forceinline__ void CopyTo(uint32_t to, const T* from, bool inside) const {
#pragma unroll
    for (int a = 0; a < P::kAccesses; ++a) {
      CopyAsync<P::kAccess, kCached>(to + a * stride_, from + a * kElements, inside);
    }
  }

  // Where the tensor ends within the packet. Not asynchronous, which the waits for the copies do not mind.
  __device__ __forceinline__ void CopyEnd(uint32_t to, int64_t first) const {
#pragma unroll
    for (int a = 0; a < P::kAccesses; ++a) {
      const auto part = Window<T, kElements>(tensor_, first + a * kElements, total_).Load(0);
      StoreShared<P::kAccess>(to + a * stride_, part.registers);
    }
  }

  __device__ __forceinline__ P ReadFrom(uint32_t from) const {
    P packet;
#pragma unroll
    for (int a = 0; a < P::kAccesses; ++a, from += stride_) {
      LoadShared<P::kAccess>(from, packet.registers + 4 * a);
    }
    return packet;
  }

  const T* tensor_;
  int64_t total_;
  uint32_t base_, stride_;
  bool last_of_run_ = false;
};

}  // namespace jax_rmsnorm
