// Rows that do not begin at multiples of 16 bytes, brought into shared memory by bulk copies.
//
// Such copies move whole granules of 16 bytes only, from and to multiples of that. What they bring lies in
// shared memory as it does in the tensor, at the same place of a line of 128 bytes, and is read from there in
// words of four bytes of the narrowest operand. A word has kUnit elements, one or two, and begins at a
// multiple of that many: rows of odd parity begin with the second half of one.
#pragma once

#include "circle_sum.cuh"
#include "packet.cuh"
#include "split_sum.cuh"
#include "unaligned.cuh"

namespace jax_rmsnorm {

// A ring of places in shared memory that one thread, the producer, fills, and all other warps of its block
// read. Both go from place to place alike, each with a BulkRing of its own.
class BulkRing {
 public:
  struct Shared {
    uint64_t full[kMostPlaces], empty[kMostPlaces];
  };

  __device__ BulkRing(Shared& shared, int places, uint32_t place_bytes)
      : full_(Anew(SharedAddress(shared.full))), places_(places), place_bytes_(place_bytes) {}

  // By one thread, before a barrier of all: `warps` of them read.
  __device__ __forceinline__ void Start(int warps) const {
    for (int i = 0; i < places_; ++i) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(full_ + i * 8) : "memory");
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(full_ + kToEmpty + i * 8), "r"(warps)
                   : "memory");
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  // By how many bytes the place lies behind the first one.
  __device__ __forceinline__ uint32_t Offset() const { return place_ * place_bytes_; }

  __device__ __forceinline__ void Next() {
    if (++place_ == places_) {
      place_ = 0;
      phase_ ^= 1;
    }
  }

  // Until the place is filled.
  __device__ __forceinline__ void WaitFull() const { WaitBarrier(Full(), phase_); }

  // By each warp that reads: that it is done with the place that was this one `back` times ago.
  __device__ __forceinline__ void Release(int back, int lane) const {
    const int place = place_ >= back ? place_ - back : place_ - back + places_;
    __syncwarp();
    if (lane == 0) {
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(full_ + kToEmpty + place * 8) : "memory");
    }
  }

  // By the producer: until all are done with the place, and how many bytes are to come into it.
  __device__ __forceinline__ void WaitEmpty() const { WaitBarrier(Full() + kToEmpty, phase_ ^ 1); }
  __device__ __forceinline__ void Expect(uint32_t bytes) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(Full()), "r"(bytes) : "memory");
#endif
  }

  // The barrier of the place, which counts the bytes that have come.
  __device__ __forceinline__ uint32_t Full() const { return full_ + place_ * 8; }

 private:
  static constexpr uint32_t kToEmpty = sizeof(Shared::full);

  uint32_t full_;
  int places_;
  uint32_t place_bytes_;
  int place_ = 0;
  unsigned phase_ = 0;
};

// Bytes of a line before element `index` of a tensor of type T: where it is read, and written, in shared
// memory. The tensor begins at any multiple of 16 bytes; where that is one of 128 too, copies are fastest.
template <typename T>
__device__ __forceinline__ uint32_t InLine(uint32_t index) {
  return index * static_cast<uint32_t>(sizeof(T)) & (kLine - 1);
}

// Elements of a tensor in a row, in whole granules.
template <typename T>
class BulkSpan {
  static constexpr int kElements = kGranule / static_cast<int>(sizeof(T));  // of a granule

 public:
  // `count` elements from number `begin` on of a tensor of `total`. What lies in a granule that the tensor's
  // end cuts is not copied in bulk, nor is anything behind it read.
  __device__ __forceinline__ BulkSpan(const void* tensor, int64_t begin, int count, int64_t total)
      : from_(static_cast<const T*>(tensor) + (begin & -kElements)),
        phase_(InLine<T>(static_cast<uint32_t>(begin & -kElements))) {
    const int before = static_cast<int>(begin) & (kElements - 1);
    elements_ = (before + count + kElements - 1) & -kElements;
    if (begin - before + elements_ > total) {
      elements_ -= kElements;
      rest_ = static_cast<int>(total) & (kElements - 1);
    }
  }

  __device__ __forceinline__ uint32_t Bytes() const { return elements_ * sizeof(T); }

  // What is not copied in bulk; before the barrier is told of the bytes. `line`: of shared memory.
  __device__ __forceinline__ void CopyRest(uint32_t line) const {
#pragma unroll 1
    for (int i = 0; i < rest_; ++i) {
      Packet<T, 1> element;
      element.Load(from_ + elements_ + i);
      StoreShared<sizeof(T)>(line + phase_ + Bytes() + i * sizeof(T), element.registers);
    }
  }

  __device__ __forceinline__ void Copy(uint32_t line, uint32_t barrier) const {
#if __CUDA_ARCH__ >= 900
    if (elements_ == 0) return;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            line + phase_),
        "l"(from_), "r"(Bytes()), "r"(barrier)
        : "memory");
#endif
  }

 private:
  const T* from_;
  uint32_t phase_;  // of a line, before the first granule
  int elements_, rest_ = 0;
};

// Fetches `count` numbers to the L2 cache, in whole granules: with those in front of them in the first one,
// and without those in a last one that they do not fill, which are in front of another block's.
__device__ __forceinline__ void PrefetchBulk(const float* numbers, int count) {
#if __CUDA_ARCH__ >= 900
  constexpr uint64_t kWithin = kGranule - 1;
  const auto at = reinterpret_cast<uint64_t>(numbers);
  const uint64_t begin = at & ~kWithin, end = (at + count * sizeof(float)) & ~kWithin;
  if (begin == end) return;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(begin),
               "r"(static_cast<uint32_t>(end - begin))
               : "memory");
#endif
}

// Words of kUnit elements of T, `step` bytes apart in shared memory.
template <typename T, int kUnit, int kSize>
__device__ __forceinline__ void ReadWords(uint32_t at, uint32_t step, float (&values)[kSize]) {
  Packet<T, kUnit> words[kSize / kUnit];
#pragma unroll
  for (int j = 0; j < kSize / kUnit; ++j) {
    LoadShared<kUnit* static_cast<int>(sizeof(T))>(at + j * step, words[j].registers);
  }
#pragma unroll
  for (int j = 0; j < kSize / kUnit; ++j) {
    float of_word[kUnit];
    words[j].Get(of_word);
#pragma unroll
    for (int u = 0; u < kUnit; ++u) values[j * kUnit + u] = of_word[u];
  }
}

// Columns that a row has at the least for which so many windows are the fewest of kBulkLanes that hold it.
constexpr int LeastBulkColumns(int size, int windows) {
  int fewer = 0;
  for (const auto& [packets, lanes] : kBulkLanes) {
    if (packets * lanes < windows && packets * lanes > fewer) fewer = packets * lanes;
  }
  return fewer == 0 ? 0 : (fewer - 1) * size + 2;
}

// The words of a thread: kPackets packets of kSize elements, a packet being words of kUnit elements that lie
// kLanes words apart. With kTail all lanes of a warp have a strip of a row, else kLanes of them have a whole
// row, which has no less than a row for which fewer packets or lanes would do.
template <int kSize, int kUnit, int kPackets, int kLanes, bool kTail>
struct BulkWords {
  static constexpr int kOfPacket = kSize / kUnit, kCount = kPackets * kOfPacket;
  static constexpr int kStep = kLanes * kUnit;  // columns from one word to the next
  // Words that are the row's in all lanes.
  static constexpr int kSure = kTail ? 0 : LeastBulkColumns(kSize, kPackets* kLanes) / kStep;

  // Of a row of `hidden` columns and `parity`: with kTail the strip that begins with column `first`.
  __device__ __forceinline__ BulkWords(int hidden, int first, int parity, int lane_of_row)
      : column(first - parity + lane_of_row * kUnit),
        begun((hidden - column + kStep - 1) / kStep),
        whole((hidden - column - kUnit + kStep) / kStep) {
    constexpr int kElements = kLanes * kSize * kPackets;
    const bool ends_within = first + kElements > hidden;
    flags = Anew((!kTail || first < parity || ends_within ? kOuter : 0) |
                 (parity != 0 && !ends_within ? kFurther : 0) |
                 (parity != 0 && lane_of_row == 0 ? kTurned : 0) | (column < 0 ? kHead : 0));
  }

  __device__ __forceinline__ int Column(int word) const { return column + word * kStep; }

  // Whether not all of the warp's words are the row's.
  __device__ __forceinline__ bool IsOuter() const { return !kTail || (flags & kOuter) != 0; }
  // Whether an element behind the strip's words belongs to its sum, instead of the first one.
  __device__ __forceinline__ bool HasFurther() const { return kTail && kUnit > 1 && (flags & kFurther) != 0; }
  // Whether that first one is this thread's.
  __device__ __forceinline__ bool IsTurned() const { return kTail && kUnit > 1 && (flags & kTurned) != 0; }
  // Whether this thread's first element lies before the row.
  __device__ __forceinline__ bool HasHead() const { return kUnit > 1 && (flags & kHead) != 0; }

  // Whether the row has element u of a word, but for what lies before it.
  __device__ __forceinline__ bool Has(int word, int u) const {
    return word < kSure || word < (u == 0 ? begun : whole);
  }
  // Whether it has all of a word.
  __device__ __forceinline__ bool HasAll(int word) const {
    return Has(word, kUnit - 1) && (word > 0 || !HasHead());
  }
  // Whether it may have a part of packet k, the same for all lanes; with kTail always, as leaving out the
  // packets of one strip takes longer than having them.
  __device__ __forceinline__ bool Reaches(int k, int hidden) const {
    return kTail || k * kOfPacket < kSure || 1 - kUnit + k * kOfPacket * kStep < hidden;
  }

  int column;        // of the first word
  int begun, whole;  // words of which the first, and of which the last element is not behind the row
  int flags;

 private:
  static constexpr int kOuter = 1, kFurther = 2, kTurned = 4, kHead = 8;
};

}  // namespace jax_rmsnorm
