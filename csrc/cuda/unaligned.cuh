// Rows that do not begin at a multiple of 16 bytes, moved in aligned packets all the same.
//
// Such a row begins `shift` elements into an aligned packet. Columns belong to threads as in an aligned row,
// so that a sum has the same bits wherever the row lies: a thread joins its columns out of two packets. What
// needs no such order, the writing, follows the packets instead: those of the result lie as those of x.
#pragma once

#include <climits>

#include "packet.cuh"

namespace jax_rmsnorm {

// The elements shift, ..., shift + kSize - 1 of two packets in a row; 0 <= shift < kSize. By powers of two,
// so that registers are never indexed.
template <typename T, int kSize>
__device__ __forceinline__ Packet<T, kSize> Join(const Packet<T, kSize>& low, const Packet<T, kSize>& high,
                                                 int shift) {
  constexpr int kRegisters = Packet<T, kSize>::kRegisters;
  constexpr int kPerRegister = 4 / static_cast<int>(sizeof(T));
  uint32_t both[2 * kRegisters];
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    both[i] = low.registers[i];
    both[kRegisters + i] = high.registers[i];
  }
#pragma unroll
  for (int step = kRegisters / 2; step > 0; step /= 2) {
    const bool take = (shift / kPerRegister & step) != 0;
#pragma unroll
    for (int i = 0; i < 2 * kRegisters; ++i) {
      if (i + step < 2 * kRegisters) both[i] = take ? both[i + step] : both[i];
    }
  }
  Packet<T, kSize> joined;
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    joined.registers[i] = kPerRegister == 1
                              ? both[i]
                              : __funnelshift_r(both[i], both[i + 1], shift % kPerRegister * 8 * sizeof(T));
  }
  return joined;
}

// f(shift), 0 <= shift < kRegisters * kPerRegister; where a whole warp has the same shift, in a branch that
// knows how many whole registers it is, so that the compiler renames those instead of moving them.
template <int kRegisters, int kPerRegister, bool kUniform, int kFirst = 0, typename F>
__device__ __forceinline__ void WithShift(int shift, F&& f) {
  if constexpr (!kUniform) {
    f(shift);
  } else if constexpr (kRegisters == 1) {
    f(kFirst * kPerRegister + shift % kPerRegister);
  } else if (shift < (kFirst + kRegisters / 2) * kPerRegister) {
    WithShift<kRegisters / 2, kPerRegister, true, kFirst>(shift, f);
  } else {
    WithShift<kRegisters / 2, kPerRegister, true, kFirst + kRegisters / 2>(shift, f);
  }
}

// A row, or any run of columns, through the aligned packets that hold it: the first one begins `shift`
// elements before it.
template <typename T, int kSize>
class Window {
 public:
  // From element `start` of `tensor` on, -kSize < start; the tensor has `total` elements, and others read as
  // zero.
  __device__ Window(const T* tensor, int64_t start, int64_t total)
      : shift(static_cast<int>(start & (kSize - 1))),
        base_(tensor + (start - shift)),
        begin_(start < 0 ? kSize : 0),
        end_(static_cast<int>(min(total - (start - shift), int64_t{INT_MAX - kSize}))) {}

  // The packet `at` elements from the window's first, a multiple of kSize.
  __device__ __forceinline__ Packet<T, kSize> Load(int at) const {
    Packet<T, kSize> packet;
    if (at >= begin_ && at + kSize <= end_) {
      packet.Load(base_ + at);
      return packet;
    }
    packet.SetZero();
    if (at < begin_) return packet;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (at + i >= end_) continue;
      Packet<T, 1> element;
      element.Load(base_ + at + i);
      constexpr int kPerRegister = 4 / static_cast<int>(sizeof(T));
      packet.registers[i / kPerRegister] |= element.registers[0] << (i % kPerRegister * 16);
    }
    return packet;
  }

  // The columns from `column` on, a multiple of kSize.
  __device__ __forceinline__ Packet<T, kSize> LoadColumns(int column) const {
    return Join(Load(column), Load(column + kSize), shift);
  }

  const int shift;

 private:
  const T* base_;
  int begin_, end_;
};

// Pairs of packets in a row: those that begin at(k) elements after `from`, and the ones behind them. `from`
// is a multiple of kSize, and may be negative; the tensor has `total` elements. Only what begins less than
// `stop` elements after `from` is read, and nothing outside the tensor: such elements are zero. The one
// packet that the tensor's end may cut off is read by all threads, which spares each the search for it.
template <typename T, int kSize, int kPackets, typename At>
__device__ __forceinline__ void LoadPairs(const T* tensor, int64_t total, int64_t from, int stop,
                                          const At& at, Packet<T, kSize> (&packets)[kPackets],
                                          Packet<T, kSize> (&next)[kPackets]) {
  const T* base = tensor + from;
  const int begin = from < 0 ? kSize : 0;
  const int end = static_cast<int>(min(total - from, int64_t{INT_MAX - kSize}));
  const int whole = end / kSize * kSize;
  const int last = min(whole, stop);
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    packets[k].Load(base + at(k), at(k) >= begin && at(k) < last);
    next[k].Load(base + at(k) + kSize, at(k) + kSize < last);
  }
  if (whole >= stop || whole == end) return;
  Packet<T, kSize> cut;
  cut.SetZero();
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    Packet<T, 1> element;
    element.Load(base + whole + i, whole + i < end);
    constexpr int kPerRegister = 4 / static_cast<int>(sizeof(T));
    cut.registers[i / kPerRegister] |= element.registers[0] << (i % kPerRegister * 16);
  }
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    if (at(k) == whole) packets[k] = cut;
    if (at(k) + kSize == whole) next[k] = cut;
  }
}

// The elements from `start` on of a tensor of `total` ones; beyond its end they are zero.
template <int kSize, typename T>
__device__ __forceinline__ Packet<T, kSize> LoadJoined(const T* tensor, int64_t total, int64_t start) {
  const int shift = static_cast<int>(start & (kSize - 1));
  Packet<T, kSize> packet[1], next[1];
  LoadPairs(tensor, total, start - shift, kSize + shift, [](int) { return 0; }, packet, next);
  return Join(packet[0], next[0], shift);
}

// gamma, of type G, at the kSize columns from `column` on of a group, whose gamma begins at element `start`.
// Columns outside the row get any value; with kAligned they are not `inside`.
template <typename G, bool kAligned, typename Args, int kSize>
__device__ __forceinline__ void LoadGammaAs(const Args& args, int64_t start, int column,
                                            float (&gamma)[kSize], bool inside = true) {
  const G* from = static_cast<const G*>(args.gamma);
  Packet<G, kSize> packet;
  if constexpr (kAligned) {
    packet.Load(from + start + column, inside && from != nullptr);
  } else {
    packet.SetZero();
    const int64_t total = args.shape.groups * args.shape.hidden;
    if (from != nullptr) packet = Window<G, kSize>(from, start + column, total).LoadColumns(0);
  }
  GetGamma(packet, from != nullptr, args.arithmetic.zero_centered_gamma, gamma);
}

template <typename Args, int kSize>
__device__ __forceinline__ void LoadGamma(const Args& args, int64_t start, int column,
                                          float (&gamma)[kSize]) {
  WithType(args.gamma_dtype, [&](auto tag) { LoadGammaAs<decltype(tag), true>(args, start, column, gamma); });
}

// gamma's packets at the elements at(k) behind element `start`, which may lie a packet before gamma; zeros
// where there is no gamma. Only what begins less than `stop` elements behind it is read, and gamma.
template <typename G, typename Args, int kSize, int kPackets, typename At>
__device__ __forceinline__ void LoadGammaPackets(const Args& args, int64_t start, int stop, const At& at,
                                                 Packet<G, kSize> (&packets)[kPackets]) {
  const int shift = static_cast<int>(start & (kSize - 1));
  Packet<G, kSize> next[kPackets];
  LoadPairs(static_cast<const G*>(args.gamma), args.shape.groups * args.shape.hidden, start - shift,
            args.gamma == nullptr ? 0 : stop + shift, at, packets, next);
#pragma unroll
  for (int k = 0; k < kPackets; ++k) packets[k] = Join(packets[k], next[k], shift);
}

// gamma in shared memory, so that each thread can read the kSize columns of a packet wherever the row begins
// in it: float32 [2 * kSize][kPackets][threads], of which the first kSize are the columns before the
// thread's own, and zero outside the row. No bank conflicts, and nothing to join.
template <int kSize, int kPackets>
class GammaTable {
 public:
  __device__ GammaTable(uint32_t shared, int threads, int thread)
      : base_(shared + thread * 4), threads_(threads) {}

  // With the gamma that begins at element `start`; of packet k the thread's own columns begin at column(k).
  template <typename Args, typename Column>
  __device__ __forceinline__ void Fill(const Args& args, int64_t start, const Column& column) const {
    const int hidden = static_cast<int>(args.shape.hidden);
    WithType(args.gamma_dtype, [&](auto tag) {
      using G = decltype(tag);
#pragma unroll 1
      for (int k = 0; k < kPackets; ++k) {
#pragma unroll
        for (int i = 0; i < 2 * kSize; ++i) {
          const int from = column(k) + i - kSize;
          const bool inside = from >= 0 && from < hidden;
          Packet<G, 1> packet;
          packet.Load(static_cast<const G*>(args.gamma) + start + from, inside && args.gamma != nullptr);
          float value[1];
          GetGamma(packet, args.gamma != nullptr, args.arithmetic.zero_centered_gamma, value);
          StoreShared(At(i, k), inside ? value[0] : 0.0f);
        }
      }
    });
  }

  // The columns from `shift` before the thread's own on.
  __device__ __forceinline__ void Read(int k, int shift, float (&gamma)[kSize]) const {
    uint32_t from = At(kSize - shift, k);
#pragma unroll
    for (int i = 0; i < kSize; ++i, from += kPackets * threads_ * 4) gamma[i] = LoadShared(from);
  }

 private:
  __device__ __forceinline__ uint32_t At(int row, int k) const {
    return base_ + (row * kPackets + k) * threads_ * 4;
  }
  uint32_t base_;
  int threads_;
};

template <int kSize>
__device__ __forceinline__ void ZeroBeyond(int hidden, int column, float (&values)[kSize]) {
  if (column + kSize <= hidden) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (column + i >= hidden) values[i] = 0.0f;
  }
}

// A packet whose first element is that of column `column` of a row: only columns of this row are written.
template <typename T, int kSize>
__device__ __forceinline__ void StoreWithinRow(T* to, int hidden, int column, const float (&values)[kSize]) {
  if (column >= 0 && column + kSize <= hidden) {
    Packet<T, kSize> packet;
    packet.Set(values);
    packet.Store(to);
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (column + i >= 0 && column + i < hidden) to[i] = FromFloat<T>(values[i]);
  }
}

}  // namespace jax_rmsnorm
