// Rows on their way to a persistent block: which ones, when, and a ring of packets in shared memory, filled
// by asynchronous copies.
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
      : group(shape.groups == 1 ? 0 : item / blocks_per_group), block(item - group * blocks_per_group) {
    const int64_t run = static_cast<int64_t>(slots) * kRows;
    const int64_t first = block * run, mine = first + slot * kRows;
    step = blocks_per_group * run;
    row = group * shape.rows + mine;
    left_ = shape.rows - mine;
    left_of_block_ = shape.rows - first;
  }

  __device__ __forceinline__ int64_t After(int64_t of) const { return of + step; }

  // Whether the slot has a row in a turn.
  __device__ __forceinline__ bool Has(int turn) const { return turn * step < left_; }

  // Turns of the block, and those of them in which the slot has a row: divisions, which are best done while
  // the first copies are under way.
  __device__ __forceinline__ int All() const { return Count(left_of_block_); }
  __device__ __forceinline__ int Own() const { return Count(left_); }

  int64_t group, block;
  int64_t row, step;  // the slot's first row, counted through all groups, and from there to its next ones

 private:
  __device__ __forceinline__ int Count(int64_t left) const {
    return static_cast<int>(left > 0 ? (left + step - 1) / step : 0);
  }

  int64_t left_, left_of_block_;
};

// The same for a cluster, where rows of a group lie differently in packets of kSize elements: sorted by how
// they do, a run of as many as another cluster has.
template <int kSize>
struct TurnsAlike {
  __device__ TurnsAlike(const Shape& shape, int64_t blocks_per_group, int64_t item)
      : group(item / blocks_per_group), block(item % blocks_per_group) {
    const int turned = static_cast<int>(shape.hidden & (kSize - 1));
    alike = turned == 0 ? 1 : kSize >> (__ffs(turned) - 1);
    const int64_t first = block * shape.rows / blocks_per_group;
    count_ = static_cast<int>((block + 1) * shape.rows / blocks_per_group - first);
    // The first `more` sorts have a row more than the others.
    const int64_t of_sort = shape.rows / alike, more = shape.rows % alike, in_more = more * (of_sort + 1);
    const int64_t sort =
        first < in_more ? first / (of_sort + 1) : more + (first - in_more) / max(of_sort, int64_t{1});
    row = group * shape.rows + sort + alike * (first - sort * of_sort - min(sort, more));
    begin = group * shape.rows;
    end = begin + shape.rows;
  }

  __device__ __forceinline__ int64_t After(int64_t of) const {
    return of + alike < end ? of + alike : begin + ((of - begin) & (alike - 1)) + 1;
  }

  __device__ __forceinline__ bool Has(int turn) const { return turn < count_; }
  __device__ __forceinline__ int All() const { return count_; }
  __device__ __forceinline__ int Own() const { return count_; }

  int64_t group, block;
  int64_t row;         // the first, counted through all groups
  int alike;           // every so many-th row lies alike: a power of two
  int64_t begin, end;  // of the group's rows

 private:
  int count_;
};

// Holds a persistent block back to its share of what the memory can give. Blocks that ask for more get more
// than others, a third more for half of the SMs, and the last ones are waited for.
class Pace {
 public:
  // `turn_ns`: that a turn takes at the least. `asks`: whether this thread's warp asks for the time. One of a
  // row's warps does, for whose sums the others wait.
  __device__ Pace(uint32_t turn_ns, bool asks) : turn_ns_(asks ? turn_ns : 0) {
    if (turn_ns_ > 0) begin_ = Now();
  }

  // At the beginning of each turn: returns when it may begin. One that is late does not ask.
  __device__ __forceinline__ void Wait() {
    constexpr int kMostPolls = 1000;  // should time stand still
    for (int polls = 0; seen_ < due_ && polls < kMostPolls; ++polls) seen_ = Now() - begin_;
    due_ += turn_ns_;
  }

 private:
  // In nanoseconds, modulo 2^32.
  static __device__ __forceinline__ uint32_t Now() {
    uint32_t now;
    asm volatile("mov.u32 %0, %globaltimer_lo;" : "=r"(now));
    return now;
  }

  uint32_t turn_ns_, begin_ = 0;
  uint32_t seen_ = 0, due_ = 0;  // since it began: when it last asked, and when the next turn may begin
};

// One operand's packets, or those of several of one shape and dtype, whose rings lie some `offset` of bytes
// behind the first one's. Each thread copies in what it will read, so that no barrier is needed, only a wait
// for its own copies. With kTail the first lane of each warp has a further packet.
//
// kCached: copied by way of the L1 cache, where short rows that share a sector of 32 bytes find it again.
// Many rings leave that no room.
template <typename T, int kSize, bool kTail, bool kCached = false>
class PacketRing {
  using P = Packet<T, kSize>;

 public:
  __device__ PacketRing(uint32_t shared, const void* tensor) : tensor_(static_cast<const T*>(tensor)) {
    const int place = threadIdx.x + (kTail ? threadIdx.x / 32 : 0);
    base_ = shared + place * P::kAccess;
    stride_ = (blockDim.x + (kTail ? blockDim.x / 32 : 0)) * P::kAccess;
  }

  // Starts the copy of the elements from `first`, or `from`, on into a place of the ring; of zeros if not
  // `inside`.
  __device__ __forceinline__ void Copy(int place, int64_t first, bool inside) const {
    CopyElements(place, tensor_ + first, inside);
  }
  __device__ __forceinline__ void CopyElements(int place, const T* from, bool inside) const {
    CopyTo(At(place), from, inside);
  }

  // Likewise of another tensor.
  __device__ __forceinline__ void CopyFrom(const void* tensor, int place, int64_t first, bool inside,
                                           uint32_t offset) const {
    CopyTo(At(place) + offset, static_cast<const T*>(tensor) + first, inside);
  }

  // Into the further packet.
  __device__ __forceinline__ void CopyFurther(int place, int64_t first) const {
    CopyTo(At(place) + kToFurther, tensor_ + first, true);
  }

  // Of elements within which the tensor may end, which has `elements` of them; into a place or its further
  // packet. Not asynchronous, which the waits for the copies do not mind.
  __device__ __forceinline__ void CopyLast(int place, bool further, int64_t first, int64_t elements) const {
    uint32_t to = At(place) + (further ? kToFurther : 0);
    const auto count = static_cast<int>(min(elements - first, int64_t{kSize}));
    const P part = LoadPart<kSize>(tensor_ + first, count);
#pragma unroll
    for (int a = 0; a < P::kAccesses; ++a, to += stride_) {
      StoreShared<P::kAccess>(to, part.registers + 4 * a);
    }
  }

  __device__ __forceinline__ P Read(int place, uint32_t offset = 0) const {
    return ReadFrom(At(place) + offset);
  }
  __device__ __forceinline__ P ReadFurther(int place) const { return ReadFrom(At(place) + kToFurther); }

  // That one place takes in a block's shared memory.
  __device__ __forceinline__ uint32_t Bytes() const { return P::kAccesses * stride_; }

 private:
  __device__ __forceinline__ uint32_t At(int place) const { return base_ + place * P::kAccesses * stride_; }

  static constexpr int kToFurther = 32 * P::kAccess;  // from the place of the warp's first lane
  static constexpr int kElements = P::kAccess / sizeof(T);

  __device__ __forceinline__ void CopyTo(uint32_t to, const T* from, bool inside) const {
#pragma unroll
    for (int a = 0; a < P::kAccesses; ++a) {
      CopyAsync<P::kAccess, kCached>(to + a * stride_, from + a * kElements, inside);
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
  uint32_t base_, stride_;
};

// Starts the copies of window k of a strip of the row that begins at element `begin` of `elements`, and
// `shift` elements into its first window, into place `to` + k of each of the rings, and, with the first one,
// those of the tail. Of a row that is not `live` zeros are copied; beyond the tensors' ends nothing is read.
template <int kSize, int kPackets, bool kTail, typename... Rings>
__device__ __forceinline__ void CopyWindow(const Strip<kSize, kPackets, kTail>& strip, int to, int k,
                                           int64_t begin, int shift, int hidden, bool live, int64_t elements,
                                           const Rings&... rings) {
  const int column = strip.At(k) - shift;
  const bool copied = live && column < hidden;
  const bool whole = begin + hidden + kSize <= elements;
  if (!copied || whole) {
    (rings.Copy(to + k, begin + column, copied), ...);
  } else {  // the last rows of the tensors
    (rings.CopyLast(to + k, false, begin + column, elements), ...);
  }
  if (!kTail || k > 0) return;
  const int tail_column = strip.At(kPackets) - shift;
  if (!live || tail_column >= hidden) return;
  if (whole) {
    (rings.CopyFurther(to, begin + tail_column), ...);
  } else {
    (rings.CopyLast(to, true, begin + tail_column, elements), ...);
  }
}

}  // namespace jax_rmsnorm
