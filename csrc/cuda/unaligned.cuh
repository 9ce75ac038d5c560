// Rows that do not begin at a multiple of 16 bytes, moved in aligned packets all the same.
//
// Such a row lies in windows: the aligned packets that hold it, the first of which begins `shift` elements
// before the row. A thread reads, computes and writes windows as it does the packets of an aligned row; what
// they have of other rows counts as zero, and is not written.
//
// A column's thread then depends on where the row lies, and the row's sum must not. Hence strips: windows in
// a row for the lanes of one warp, whose elements are numbered around a circle, and added up in an order that
// turning the circle does not change (CircleSum).
#pragma once

#include <climits>

#include "packet.cuh"
#include "reduce.cuh"

namespace jax_rmsnorm {

// The value itself, which the compiler takes for another each time: what is computed from it, where few get
// to it, does not take registers all along.
__device__ __forceinline__ int Anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The first `count` elements of a packet, 0 < count; the others are zero.
template <int kSize, typename T>
__device__ __forceinline__ Packet<T, kSize> LoadPart(const T* from, int count) {
  constexpr int kPerRegister = 4 / static_cast<int>(sizeof(T));
  Packet<T, kSize> packet;
  packet.SetZero();
  count = Anew(count);
  Packet<T, 1> odd;  // in a register of its own: two loads into one wait for each other
  odd.Load(from + count - 1, count % kPerRegister != 0);
#pragma unroll
  for (int i = 0; i < kSize; i += kPerRegister) {
    LoadGlobal<4>(from + i, packet.registers + i / kPerRegister, i + kPerRegister <= count);
  }
#pragma unroll
  for (int i = 0; i < kSize; i += kPerRegister) {
    if (kPerRegister > 1 && i + 1 == count) packet.registers[i / kPerRegister] = odd.registers[0];
  }
  return packet;
}

// Its first `count` elements are replaced by those of `by`.
template <typename T, int kSize>
__device__ __forceinline__ void ReplaceHead(int count, const Packet<T, kSize>& by, Packet<T, kSize>* packet) {
  constexpr int kRegisters = Packet<T, kSize>::kRegisters;
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    // A shift of 32 bits or more leaves nothing.
    const int bits = max(count * static_cast<int>(8 * sizeof(T)) - 32 * r, 0);
    uint32_t kept;
    asm("shl.b32 %0, 0xffffffff, %1;" : "=r"(kept) : "r"(bits));
    packet->registers[r] = (packet->registers[r] & kept) | (by.registers[r] & ~kept);
  }
}

// Its first `count` elements, the others zero.
template <typename T, int kSize>
__device__ __forceinline__ Packet<T, kSize> FirstOf(const Packet<T, kSize>& packet, int count) {
  Packet<T, kSize> first;
  first.SetZero();
  ReplaceHead(max(Anew(count), 0), packet, &first);
  return first;
}

// The windows of a warp, or of those of its lanes that have a whole row: number first / kSize and the next
// kPackets * lanes ones. Its columns are the first, ... of the row, as many as windows have elements; what
// `shift` pushes out of the last window lies in the tail, the window behind it, which its first lane reads
// too. A row for part of a warp fits into its windows wherever it begins, and has no tail.
template <int kSize, int kPackets, bool kTail>
class Strip {
 public:
  static constexpr int kWindows = kPackets + (kTail ? 1 : 0);

  // `lanes`: 32 with kTail.
  __device__ __forceinline__ Strip(int first, int lanes, int lane)
      : first_(first), lane_(lane), step_((kTail ? 32 : lanes) * kSize) {}

  // Where window k of this lane begins, from the row's first window on; the tail is number kPackets.
  __device__ __forceinline__ int At(int k) const {
    if (k == kPackets) return lane_ == 0 ? first_ + kPackets * Step() : INT_MAX - kSize;
    return first_ + lane_ * kSize + k * Step();
  }

  // How many elements of the lane's first window are the strip's before, and for the sum give way to the
  // tail.
  __device__ __forceinline__ int Head(int shift) const { return lane_ == 0 ? shift : 0; }

  __device__ __forceinline__ int lanes() const { return Step() / kSize; }

  // Whether any lane has a part of window k that begins less than `stop` elements behind the row's first one.
  __device__ __forceinline__ bool Reaches(int k, int stop) const { return first_ + k * Step() < stop; }

  // Loads the windows of the row whose first one is at `from`, and which ends `stop` elements behind that;
  // nothing beyond is read. Returns the one that the row's end cuts, for SetEnd, which waits for the loads.
  template <typename T>
  __device__ __forceinline__ Packet<T, kSize> Load(const T* from, int stop,
                                                   Packet<T, kSize> (&windows)[kWindows]) const {
    const int whole = stop & -kSize;
    const T* mine = from + At(0);
#pragma unroll
    for (int k = 0; k < kPackets; ++k) windows[k].Load(mine + k * Step(), At(k) < whole);
    if (kTail) windows[kWindows - 1].Load(from + first_ + kPackets * Step(), At(kPackets) < whole);
    // All lanes read it, which spares each the search for it.
    Packet<T, kSize> end;
    end.SetZero();
    if (HasEnd(stop)) end = LoadPart<kSize>(from + whole, stop - whole);
    return end;
  }

  template <typename T>
  __device__ __forceinline__ void SetEnd(int stop, const Packet<T, kSize>& end,
                                         Packet<T, kSize> (&windows)[kWindows]) const {
    if (!HasEnd(stop)) return;
    const int whole = Anew(stop & -kSize);
#pragma unroll
    for (int k = 0; k < kWindows; ++k) {
      if (At(k) == whole) windows[k] = end;
    }
  }

 private:
  __device__ __forceinline__ int Step() const { return kTail ? 32 * kSize : step_; }

  // Whether the row's end cuts one of the windows.
  __device__ __forceinline__ bool HasEnd(int stop) const {
    const int whole = stop & -kSize;
    return whole < stop && whole >= first_ && whole <= first_ + kPackets * Step();
  }

  int first_;  // column, and element from the row's first window on
  int lane_, step_;
};

// That of this thread, one of `threads` of the block with this row.
template <int kSize, int kPackets, Scope kScope>
__device__ __forceinline__ auto StripOf(int threads, int thread, const ClusterPlace<kScope>& place) {
  constexpr bool kTail = kScope != Scope::kLanes;
  const int warp = kTail ? place.rank * (threads / 32) + thread / 32 : 0;
  return Strip<kSize, kPackets, kTail>(warp * kPackets * 32 * kSize, threads, kTail ? thread % 32 : thread);
}

// Packets of a tensor that begin anywhere, joined out of aligned pieces. Nothing outside the tensor is read;
// what is missing is zero.
template <typename T, int kSize>
class Joined {
  using P = Packet<T, kSize>;
  static constexpr int kPiece = P::kAccess / static_cast<int>(sizeof(T));
  static constexpr int kPieces = P::kAccesses + 1;
  static constexpr int kWords = P::kAccess / 4;
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

 public:
  // Those that a packet is joined out of.
  using Pieces = Packet<T, kPiece>[kPieces];

  // Of a tensor of `total` elements, from its element `start` on, -kSize < start.
  __device__ __forceinline__ Joined(const T* tensor, int64_t total, int64_t start)
      : shift_(static_cast<int>(start & (kPiece - 1))), base_(tensor + (start - shift_)) {
    begin_ = start < shift_ ? static_cast<int>(shift_ - start) : 0;
    end_ = static_cast<int>(min(total - (start - shift_), int64_t{INT_MAX - 2 * kPiece}));
  }

  // Those of packets[k]: the elements from number at(k) on, a multiple of kSize, if that is less than `stop`.
  template <int kPackets, typename At>
  __device__ __forceinline__ void LoadPieces(int stop, const At& at, Pieces (&packets)[kPackets]) const {
    bool cut = false;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      const bool wanted = at(k) < stop;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int place = at(k) + i * kPiece;
        packets[k][i].Load(base_ + place, wanted && place >= begin_ && place + kPiece <= end_);
      }
      cut = cut || (wanted && at(k) + kPieces * kPiece > end_);
    }
    if (!cut) return;
    const int whole = Anew(end_ & -kPiece);
    const Packet<T, kPiece> last = LoadPart<kPiece>(base_ + whole, end_ - whole);
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (at(k) + i * kPiece == whole) packets[k][i] = last;
      }
    }
  }

  __device__ __forceinline__ P Join(const Pieces& pieces) const {
    uint32_t words[kPieces * kWords];
#pragma unroll
    for (int i = 0; i < kPieces * kWords; ++i) words[i] = pieces[i / kWords].registers[i % kWords];
    // By powers of two, so that registers are never indexed.
#pragma unroll
    for (int step = kWords / 2; step > 0; step /= 2) {
      const bool take = (shift_ / kPerWord & step) != 0;
#pragma unroll
      for (int i = 0; i < kPieces * kWords; ++i) {
        if (i + step < kPieces * kWords) words[i] = take ? words[i + step] : words[i];
      }
    }
    P packet;
#pragma unroll
    for (int i = 0; i < P::kRegisters; ++i) {
      packet.registers[i] = kPerWord == 1
                                ? words[i]
                                : __funnelshift_r(words[i], words[i + 1], shift_ % kPerWord * 8 * sizeof(T));
    }
    return packet;
  }

  template <int kPackets, typename At>
  __device__ __forceinline__ void Load(int stop, const At& at, P (&packets)[kPackets]) const {
    Pieces pieces[kPackets];
    LoadPieces(stop, at, pieces);
#pragma unroll
    for (int k = 0; k < kPackets; ++k) packets[k] = Join(pieces[k]);
  }

  // One of them.
  __device__ __forceinline__ P LoadOne(int at, int stop) const {
    P packet[1];
    Load(stop, [at](int) { return at; }, packet);
    return packet[0];
  }

 private:
  int shift_;
  const T* base_;
  int begin_, end_;  // of the tensor, behind base_
};

// gamma, of type G, from its element `start` on, which may lie before it; zeros where there is none.
template <typename G, int kSize, typename Args>
__device__ __forceinline__ Joined<G, kSize> JoinedGamma(const Args& args, int64_t start) {
  const int64_t total = args.gamma == nullptr ? 0 : args.shape.groups * args.shape.hidden;
  return {static_cast<const G*>(args.gamma), total, start};
}

template <int kSize>
__device__ __forceinline__ void ZeroOutside(int hidden, int column, float (&values)[kSize]) {
  if (column >= 0 && column + kSize <= hidden) return;
  column = Anew(column);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (column + i < 0 || column + i >= hidden) values[i] = 0.0f;
  }
}

// A window whose first element is that of column `column` of a row: only columns of this row are written.
template <typename T, int kSize>
__device__ __forceinline__ void StoreWithinRow(T* to, int hidden, int column, const float (&values)[kSize]) {
  if (column >= 0 && column + kSize <= hidden) {
    Packet<T, kSize> packet;
    packet.Set(values);
    packet.Store(to);
    return;
  }
  column = Anew(column);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (column + i >= 0 && column + i < hidden) to[i] = FromFloat<T>(values[i]);
  }
}

}  // namespace jax_rmsnorm
