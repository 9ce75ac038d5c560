// The forward kernel of few rows that do not begin at multiples of 16 bytes, and that the registers of a
// block, or of a cluster of blocks, hold.
#pragma once

#include "forward_common.cuh"

namespace jax_rmsnorm {

// Grid: as of ForwardKernel. A thread reads, and writes, the windows of a strip of the row, all at once. With
// kShare two warps share a strip, every other window each: a lone warp takes its time over each instruction.
//
// Preconditions: the tensors are aligned to 16 bytes; the row fits wherever it begins, hidden + kSize - 1 <=
// kSize * kPackets * threads_per_row * blocks of the cluster; kSize * kShare <= threads_per_row.
template <typename T, typename G, int kPackets, Scope kScope, int kShare>
__global__ __launch_bounds__(
    kWindowsThreads<kScope>,
    kScope == Scope::kLanes ? 4 : 1) void ForwardWindowsKernel(const __grid_constant__ ForwardParams params) {
  constexpr int kSize = 16 / sizeof(T);
  constexpr bool kEarlyGamma = kPackets * Packet<G, kSize>::kRegisters <= 24;
  extern __shared__ uint4 shared[];
  const ForwardArgs& args = params.args;
  const Arithmetic& arithmetic = args.arithmetic;
  const int hidden = static_cast<int>(args.shape.hidden);
  const int64_t rows = args.shape.groups * args.shape.rows;
  const Slots<kScope, kScope != Scope::kLanes, kShare> slots(params.threads_per_row);
  const int threads = slots.threads, thread = slots.thread;
  const auto part = static_cast<int>(threadIdx.x / 32 % kShare);
  const ClusterPlace<kScope> place;
  const auto strip = StripOf<kSize, kPackets, kScope, kShare>(threads, thread, place, part);
  WholeRowSum<kScope, kShare> row_sum(threads, slots.number, thread);
  LaunchDependents();
  WaitForPrimary();

  const float gamma_offset = args.gamma == nullptr || arithmetic.zero_centered_gamma ? 1.0f : -0.0f;
  int phase = 0;  // of the memory for exchanges, of which successive rows have one half and the other

  int64_t item = blockIdx.x / place.blocks;
  do {
    const int64_t row = item * slots.count + slots.number;
    const bool live = row < rows;  // the others take part in the sums only
    const int64_t start = row * hidden;
    const int shift = static_cast<int>(start & (kSize - 1));
    const int stop = live ? shift + hidden : 0, total = ElementsFrom(args.shape, start - shift);
    Packet<T, kSize> windows[strip.kWindows];
    const auto end = strip.Load(static_cast<const T*>(args.x) + start - shift, stop, total, windows);

    const Joined<G, kSize> joined_gamma =
        JoinedGamma<G, kSize>(args, GammaRow(args.shape, row) * hidden - shift);
    Packet<G, kSize> gammas[kPackets];
    if constexpr (kEarlyGamma) joined_gamma.Load(stop, strip.At(0), strip.Stride(), gammas);
    strip.SetEnd(stop, total, end, windows);

    CircleSum<kSize, kPackets * kShare> circle;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      Packet<T, kSize> packet = windows[k];
      if (k == 0) ReplaceHead(strip.Head(shift), strip.Tail(windows), &packet);
      float values[kSize];
      packet.Get(values);
      circle.template AddSquares<T>(k * kShare, values);
    }
    if constexpr (kShare == 2) {
      circle.Exchange(SharedAddress(shared) + phase * blockDim.x * kSize * 4);
      phase ^= 1;
    }
    const float sum = row_sum.OfWarps(circle.Over(strip.lanes()));
    if (!live) continue;
    const float rrms = rsqrtf(sum * params.inverse_hidden + arithmetic.eps);
    if (args.rrms != nullptr && thread == 0 && part == 0 && place.rank == 0) args.rrms[row] = rrms;

    if constexpr (!kEarlyGamma) joined_gamma.Load(stop, strip.At(0), strip.Stride(), gammas);
    WithTypeBeside<T>(args.y_dtype, [&](auto tag) {
      using Y = decltype(tag);
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        float values[kSize], scale[kSize], y[kSize];
        windows[k].Get(values);
        gammas[k].Get(scale);
#pragma unroll
        for (int i = 0; i < kSize; ++i) scale[i] += gamma_offset;
        Normalize<T>(values, rrms, scale, arithmetic.round_before_gamma, y);
        const int column = strip.At(k) - shift;
        StoreWithinRow(static_cast<Y*>(args.y) + start + column, hidden, column, y);
      }
    });
  } while ((item += gridDim.x / place.blocks) < params.items);
}

}  // namespace jax_rmsnorm
