// The forward kernel of many rows that do not begin at multiples of 16 bytes, and that a small block, or a
// cluster of such blocks, holds.
#pragma once

#include "forward_common.cuh"
#include "ring.cuh"

namespace jax_rmsnorm {

// Grid: as of ForwardKernel. A thread reads, and writes, the windows of a strip of the row, and takes one
// after another of its rows that lie alike in their windows, so that it reads gamma's once. It copies the
// next row's into shared memory while it works on one.
//
// Preconditions: the tensors are aligned to 16 bytes; the row fits wherever it begins, hidden + kSize - 1 <=
// kSize * kPackets * threads_per_row * blocks of the cluster; kSize <= threads_per_row.
template <typename T, typename G, int kPackets, Scope kScope,
          int kPerSM = WindowsPerSM(sizeof(G) > sizeof(T), kPackets)>
__global__ __launch_bounds__(
    kWindowRingThreads<kScope>,
    kPerSM / kWindowRingThreads<kScope>) void ForwardWindowRingKernel(const __grid_constant__ ForwardParams
                                                                          params) {
  constexpr int kSize = 16 / sizeof(T);
  constexpr bool kTail = kScope != Scope::kLanes;
  const ForwardArgs& args = params.args;
  const Arithmetic& arithmetic = args.arithmetic;
  const int hidden = static_cast<int>(args.shape.hidden);
  const int64_t rows = args.shape.groups * args.shape.rows;
  const Slots<kScope> slots(params.threads_per_row);
  const int threads = slots.threads, thread = slots.thread;
  const ClusterPlace<kScope> place;
  const auto strip = StripOf<kSize, kPackets, kScope>(threads, thread, place);
  extern __shared__ uint4 shared[];
  const PacketRing<T, kSize, kTail, true> ring(SharedAddress(shared), args.x);
  WholeRowSum<kScope> row_sum(threads, slots.number, thread);
  LaunchDependents();
  WaitForPrimary();

  const int64_t elements = rows * hidden;
  const float gamma_offset = args.gamma == nullptr || arithmetic.zero_centered_gamma ? 1.0f : -0.0f;
  const int64_t first = static_cast<int64_t>(blockIdx.x / place.blocks) * slots.count;
  const int64_t step = static_cast<int64_t>(gridDim.x / place.blocks) * slots.count;
  // Every so many-th row of a slot lies as the first does: these come first, then those that lie as the
  // second one does, and so on.
  const int turn = static_cast<int>(step * hidden & (kSize - 1));
  const int ways = turn == 0 ? 1 : kSize >> (__ffs(turn) - 1);
  int way = 0;
  const auto after = [&](int64_t row) {
    row += ways * step;
    if (row >= rows) row = ++way < ways ? first + way * step : rows;
    return row;
  };

  // Starts the copies of a row's windows, into every other place. `row`: that of slot 0; rows beyond the last
  // take part in the sums only.
  const auto copy = [&](int to, int64_t row) {
    const bool live = row + slots.number < rows;
    const int64_t begin = (row + slots.number) * hidden;
    const int shift = static_cast<int>(begin & (kSize - 1));
    const bool whole = begin + hidden + kSize <= elements;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      const int column = strip.At(k) - shift;
      const bool copied = live && column < hidden;
      if (!copied || whole) {
        ring.Copy(to + k, begin + column, copied);
      } else {  // the last rows of the tensor, beyond which nothing is read
        ring.CopyLast(to + k, false, begin + column, elements);
      }
    }
    const int tail_column = strip.At(kPackets) - shift;
    if (kTail && live && tail_column < hidden) {
      if (whole) {
        ring.CopyFurther(to, begin + tail_column);
      } else {
        ring.CopyLast(to, true, begin + tail_column, elements);
      }
    }
    CommitCopies();
  };

  Packet<G, kSize> gammas[kPackets];
  int64_t gamma_start = INT64_MIN;  // of gammas, in its tensor
  int at = 0;
  copy(at, first);
#pragma unroll 1
  for (int64_t lead = first, next; lead < rows; lead = next, at = kPackets - at) {
    next = after(lead);
    copy(kPackets - at, next);
    const int64_t row = lead + slots.number, start = row * hidden;
    const bool live = kTail || row < rows;
    const int shift = static_cast<int>(start & (kSize - 1));
    const int tail_column = strip.At(kPackets) - shift;
    const bool has_tail = kTail && tail_column < hidden;
    // Window k, of which other rows' elements are zero, but for those before the row.
    const auto window = [&](int from, int k) {
      const int column = strip.At(k) - shift;
      return FirstOf(k == kPackets ? ring.ReadFurther(from) : ring.Read(from + k), hidden - column);
    };
    if (const int64_t here = GammaRow(args.shape, row) * hidden - shift; here != gamma_start) {
      gamma_start = here;
      JoinedGamma<G, kSize>(args, here).Load(Anew(shift) + hidden, strip.At(0), strip.Stride(), gammas);
    }
    WaitCopies<1>();

    CircleSum<kSize, kPackets> circle;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      if (kTail && k > 0 && !strip.Reaches(k, shift + hidden)) break;
      Packet<T, kSize> packet = window(at, k);
      if (k == 0) {
        Packet<T, kSize> tail;
        tail.SetZero();
        if (has_tail) tail = window(at, kPackets);
        ReplaceHead(strip.Head(shift), tail, &packet);
      }
      float values[kSize];
      packet.Get(values);
      circle.template AddSquares<sizeof(T) == 2>(k, values);
    }
    const float sum = row_sum.OfWarps(circle.Over(strip.lanes()));
    if (!live) continue;
    const float rrms = rsqrtf(sum * params.inverse_hidden + arithmetic.eps);
    if (args.rrms != nullptr && thread == 0 && place.rank == 0) args.rrms[row] = rrms;

    WithTypeBeside<T>(args.y_dtype, [&](auto tag) {
      using Y = decltype(tag);
      Y* y_at = static_cast<Y*>(args.y) + start + (strip.At(0) - shift);
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        if (kTail && k > 0 && !strip.Reaches(k, shift + hidden)) break;
        float values[kSize], scale[kSize], y[kSize];
        ring.Read(at + k).Get(values);
        gammas[k].Get(scale);
#pragma unroll
        for (int i = 0; i < kSize; ++i) scale[i] += gamma_offset;
        Normalize<T>(values, rrms, scale, arithmetic.round_before_gamma, y);
        StoreWithinRow(y_at + (strip.At(k) - strip.At(0)), hidden, strip.At(k) - shift, y);
      }
    });
  }
  WaitCopies<0>();
}

}  // namespace jax_rmsnorm
