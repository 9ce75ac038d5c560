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
  // Starts the copies of the windows of the row that begins at element `begin`, into one of the places of two
  // rows.
  const auto copy = [&](int to, int64_t begin, int shift, bool live) {
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      CopyWindow(strip, to, k, begin, shift, hidden, live, elements, ring);
    }
    CommitCopies();
  };
  const auto shift_of = [](int64_t begin) { return static_cast<int>(begin & (kSize - 1)); };

  // Every so many-th row of a slot lies as the first does: these come first, then those that lie as the
  // second one does, and so on. Rows beyond the last take part in the sums only.
  const int turned = shift_of(step * hidden);
  const int ways = turned == 0 ? 1 : kSize >> (__ffs(turned) - 1);
  const int64_t rows_on = ways * step, elements_on = rows_on * hidden;
  int way = 0;
  int64_t row = first + slots.number, start = row * hidden;
  int shift = shift_of(start);
  Packet<G, kSize> gammas[kPackets];
  int64_t gamma_row = -1;  // of gammas, which lie as the row does
  int at = 0;
  copy(at, start, shift, row < rows);
#pragma unroll 1
  while (row - slots.number < rows) {
    int64_t next = row + rows_on, next_start = start + elements_on;
    int next_shift = shift;
    if (next - slots.number >= rows && ++way < ways) {
      next = first + way * step + slots.number;
      next_start = next * hidden;
      next_shift = shift_of(next_start);
    }
    copy(kPackets - at, next_start, next_shift, next < rows);
    const bool live = kTail || row < rows;
    const int tail_column = strip.At(kPackets) - shift;
    const bool has_tail = kTail && tail_column < hidden;
    // Window k, of which other rows' elements are zero, but for those before the row.
    const auto window = [&](int from, int k) {
      const int column = strip.At(k) - shift;
      return FirstOf(k == kPackets ? ring.ReadFurther(from) : ring.Read(from + k), hidden - column);
    };
    if (const int64_t here = GammaRow(args.shape, row); here != gamma_row) {
      gamma_row = here;
      JoinedGamma<G, kSize>(args, here * hidden - Anew(shift))
          .Load(Anew(shift) + hidden, strip.At(0), strip.Stride(), gammas);
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
      circle.template AddSquares<T>(k, values);
    }
    const float sum = row_sum.OfWarps(circle.Over(strip.lanes()));
    if (live) {
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
    if (next_shift != shift) gamma_row = -1;
    row = next;
    start = next_start;
    shift = next_shift;
    at = kPackets - at;
  }
  WaitCopies<0>();
}

}  // namespace jax_rmsnorm
