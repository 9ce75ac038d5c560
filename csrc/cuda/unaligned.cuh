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

// The value itself, which the compiler takes for another each time: what is computed from it is computed
// where it is used, and does not take registers all along.
template <typename T>
__device__ __forceinline__ T Anew(T value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
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

// Stores elements `first` and up to `last`, not included, of a packet whose first one belongs at `to`, at
// least one of them.
template <typename T, int kSize>
__device__ __forceinline__ void StorePart(T* to, const Packet<T, kSize>& packet, int first, int last) {
  constexpr int kPerRegister = 4 / static_cast<int>(sizeof(T));
  first = Anew(max(first, 0));
  last = min(last, kSize);
#pragma unroll
  for (int i = 0; i < kSize; i += kPerRegister) {
    StoreGlobal<4>(to + i, packet.registers + i / kPerRegister, i >= first && i + kPerRegister <= last);
  }
  if constexpr (kPerRegister == 2) {
    // Halves of words, one at either end.
    uint32_t upper = 0, lower = 0;
#pragma unroll
    for (int r = 0; r < kSize / 2; ++r) {
      if (2 * r + 1 == first) upper = packet.registers[r] >> 16;
      if (2 * r + 1 == last) lower = packet.registers[r];
    }
    StoreGlobal<2>(to + first, &upper, first % 2 != 0);
    StoreGlobal<2>(to + last - 1, &lower, last % 2 != 0);
  }
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

// Its first `count` elements, if it has more; the others are zero.
template <typename T, int kSize>
__device__ __forceinline__ Packet<T, kSize> FirstOf(const Packet<T, kSize>& packet, int count) {
  if (count >= kSize) return packet;
  Packet<T, kSize> first;
  first.SetZero();
  ReplaceHead(max(Anew(count), 0), packet, &first);
  return first;
}

// How many elements the tensors have from number `first` on, as far as an int can tell.
__device__ __forceinline__ int ElementsFrom(const Shape& shape, int64_t first) {
  return static_cast<int>(min(shape.groups * shape.rows * shape.hidden - first, int64_t{INT_MAX / 2}));
}

// The windows of a warp, or of those of its lanes that have a whole row: number first / kSize and the next
// kPackets * lanes ones; with kShare of two warps, one of which has every other window of a lane. Its columns
// are the first, ... of the row, as many as windows have elements; what `shift` pushes out of the last window
// lies in the tail, the window behind it, which its first lane reads too. A row for part of a warp fits into
// its windows wherever it begins, and has no tail.
template <int kSize, int kPackets, bool kTail, int kShare = 1>
class Strip {
 public:
  static constexpr int kWindows = kPackets + (kTail ? 1 : 0);

  // `lanes`: 32 with kTail. `part`: which of the kShare warps this one is.
  __device__ __forceinline__ Strip(int first, int lanes, int lane, int part)
      : first_(first), lane_(lane), part_(part), lanes_(lanes) {}

  // Where window k of this thread begins, from the row's first window on; the tail is number kPackets.
  __device__ __forceinline__ int At(int k) const {
    if (k == kPackets) return IsFirst() ? first_ + kPackets * Stride() : INT_MAX - kSize;
    return first_ + lane_ * kSize + Part() * lanes() * kSize + k * Stride();
  }

  // From one window of a thread to its next.
  __device__ __forceinline__ int Stride() const { return kShare * lanes() * kSize; }

  // The tail, if there is one.
  template <typename T>
  __device__ __forceinline__ static Packet<T, kSize> Tail(const Packet<T, kSize> (&windows)[kWindows]) {
    Packet<T, kSize> none;
    none.SetZero();
    return kTail ? windows[kWindows - 1] : none;
  }

  // How many elements of the thread's first window are the strip's before, and for the sum give way to the
  // tail.
  __device__ __forceinline__ int Head(int shift) const { return IsFirst() ? shift : 0; }

  __device__ __forceinline__ int lanes() const { return kTail ? 32 : lanes_; }

  // Whether any lane has a part of window k that begins less than `stop` elements behind the row's first one.
  __device__ __forceinline__ bool Reaches(int k, int stop) const { return first_ + k * Stride() < stop; }

  // Loads the windows of the row whose first one is at `from`, and which ends `stop` elements behind that.
  // The tensor ends `total` elements behind `from`, and nothing beyond is read. Returns the window that its
  // end cuts, for SetEnd, which waits for the loads.
  template <typename T>
  __device__ __forceinline__ Packet<T, kSize> Load(const T* from, int stop, int total,
                                                   Packet<T, kSize> (&windows)[kWindows]) const {
    const int whole = total & -kSize, limit = min(stop, whole);
    const T* mine = from + At(0);
#pragma unroll
    for (int k = 0; k < kPackets; ++k) windows[k].Load(mine + k * Stride(), At(k) < limit);
    if (kTail) windows[kWindows - 1].Load(from + first_ + kPackets * Stride(), At(kPackets) < limit);
    // All lanes read it, which spares each the search for it.
    Packet<T, kSize> end;
    end.SetZero();
    if (HasEnd(stop) && whole < stop) end = LoadPart<kSize>(from + whole, total - whole);
    return end;
  }

  // Puts it in its place, and takes what lies behind the row out of the windows.
  template <typename T>
  __device__ __forceinline__ void SetEnd(int stop, int total, const Packet<T, kSize>& end,
                                         Packet<T, kSize> (&windows)[kWindows]) const {
    if (!HasEnd(stop)) return;
    const int whole = Anew(stop & -kSize);
    Packet<T, kSize> cut = end;
#pragma unroll
    for (int k = 0; k < kWindows; ++k) {
      if (At(k) == whole && (total & -kSize) >= stop) cut = windows[k];
    }
    cut = FirstOf(cut, stop - whole);
#pragma unroll
    for (int k = 0; k < kWindows; ++k) {
      if (At(k) == whole) windows[k] = cut;
    }
  }

 private:
  __device__ __forceinline__ int Part() const { return kShare == 1 ? 0 : part_; }
  __device__ __forceinline__ bool IsFirst() const { return lane_ == 0 && Part() == 0; }

  // Whether the row's end cuts one of the windows.
  __device__ __forceinline__ bool HasEnd(int stop) const {
    const int whole = stop & -kSize;
    return whole < stop && whole >= first_ && whole <= first_ + kPackets * Stride();
  }

  int first_;  // column, and element from the row's first window on
  int lane_, part_, lanes_;
};

// That of this thread, number `thread` of those of the block with this row, of which there are `threads`; of
// kShare warps that share a strip only one counts.
template <int kSize, int kPackets, Scope kScope, int kShare = 1>
__device__ __forceinline__ auto StripOf(int threads, int thread, const ClusterPlace<kScope>& place,
                                        int part = 0) {
  constexpr bool kTail = kScope != Scope::kLanes;
  const auto number = static_cast<unsigned>(thread), all = static_cast<unsigned>(threads);
  const int warp = kTail ? place.rank * static_cast<int>(all / 32) + static_cast<int>(number / 32) : 0;
  const int lane = kTail ? static_cast<int>(number % 32) : thread;
  const int first = warp * kShare * kPackets * 32 * kSize;
  return Strip<kSize, kPackets, kTail, kShare>(first, threads, lane, part);
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

  // Those of packets[k]: the elements from number at + k * step on, both multiples of kSize, as far as they
  // are less than `stop`.
  template <int kPackets>
  __device__ __forceinline__ void LoadPieces(int stop, int at, int step, Pieces (&packets)[kPackets]) const {
    const int whole = end_ & -kPiece, limit = min(whole, stop + shift_);
    const T* mine = base_ + at;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int offset = k * step + i * kPiece;
        // The tensor may begin within the first packet only.
        const bool inside = at < limit - offset && (k > 0 || at + i * kPiece >= begin_);
        packets[k][i].Load(mine + offset, inside);
      }
    }
    // The tensor's end cuts one that some thread may want.
    if (whole == end_ || whole >= stop + shift_) return;
    const auto is_cut = [&](int k, int i) { return at == whole - (k * step + i * kPiece); };
    bool cut = false;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) cut = cut || is_cut(k, i);
    }
    if (!cut) return;
    const Packet<T, kPiece> last = LoadPart<kPiece>(base_ + Anew(whole), end_ - whole);
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (is_cut(k, i)) packets[k][i] = last;
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

  template <int kPackets>
  __device__ __forceinline__ void Load(int stop, int at, int step, P (&packets)[kPackets]) const {
    Pieces pieces[kPackets];
    LoadPieces(stop, at, step, pieces);
#pragma unroll
    for (int k = 0; k < kPackets; ++k) packets[k] = Join(pieces[k]);
  }

  // One of which all pieces lie within the tensor, if there is one.
  __device__ __forceinline__ P LoadInner(int at, bool present) const {
    Pieces pieces;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i].Load(base_ + at + i * kPiece, present);
    return Join(pieces);
  }

  // One of them.
  __device__ __forceinline__ P LoadOne(int at, int stop) const {
    P packet[1];
    Load(stop, at, 0, packet);
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
  Packet<T, kSize> packet;
  packet.Set(values);
  const bool whole = column >= 0 && column + kSize <= hidden;
  packet.Store(to, whole);
  if (whole || column + kSize <= 0 || column >= hidden) return;
  StorePart(to, packet, -column, hidden - column);
}

}  // namespace jax_rmsnorm
