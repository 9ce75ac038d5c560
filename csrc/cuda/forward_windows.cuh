// The forward kernel of few rows that do not begin at multiples of 16 bytes, and that the registers of a
// block, or of a cluster of blocks, hold.
#pragma once

#include "forward_common.cuh"

namespace jax_rmsnorm {

// Grid: as of ForwardKernel. A row lies in aligned packets, its windows. A thread reads a few of them, each
// with the next one, and adds up the columns that it joins out of the two, which takes no shared memory and
// no more loads than can be under way at once; what it writes are its windows.
//
// Preconditions: the tensors are aligned to 16 bytes; the row fits wherever it begins, hidden + kSize - 1 <=
// kSize * kPackets * threads_per_row * blocks of the cluster; kSize <= threads_per_row.
template <typename T, typename G, int kPackets, Scope kScope>
__global__ __launch_bounds__(
    kWindowsThreads<kScope>,
    kScope == Scope::kLanes ? 4 : 1) void ForwardWindowsKernel(const __grid_constant__ ForwardParams params) {
  constexpr int kSize = 16 / sizeof(T);
  constexpr bool kEarlyGamma = kPackets * Packet<G, kSize>::kRegisters <= 16;
  const ForwardArgs& args = params.args;
  const Arithmetic& arithmetic = args.arithmetic;
  const int hidden = static_cast<int>(args.shape.hidden);
  const int64_t rows = args.shape.groups * args.shape.rows;
  const int threads = params.threads_per_row;
  const int slots = kScope == Scope::kLanes ? static_cast<int>(blockDim.x) / threads : 1;
  const int slot = kScope == Scope::kLanes ? static_cast<int>(threadIdx.x) / threads : 0;
  const int thread = static_cast<int>(threadIdx.x) - slot * threads;
  const ClusterPlace<kScope> place;
  const auto strip = StripOf<kSize, kPackets, kScope>(threads, thread, place);
  WholeRowSum<kScope> row_sum(threads, thread);
  LaunchDependents();
  WaitForPrimary();

  const auto at = [&](int k) { return strip.At(k); };
  const float gamma_offset = args.gamma == nullptr || arithmetic.zero_centered_gamma ? 1.0f : -0.0f;

  int64_t item = blockIdx.x / place.blocks;
  do {
    const int64_t row = item * slots + slot;
    const bool live = row < rows;  // the others take part in the sums only
    const int64_t start = row * hidden;
    const int shift = static_cast<int>(start & (kSize - 1));
    const int stop = live ? shift + hidden : 0;

    const Joined<T, kSize> columns(static_cast<const T*>(args.x), rows * hidden, start);
    typename Joined<T, kSize>::Pieces windows[kPackets];
    columns.LoadPieces(stop, at, windows);

    const Joined<G, kSize> joined_gamma =
        JoinedGamma<G, kSize>(args, GammaRow(args.shape, row) * hidden - shift);
    Packet<G, kSize> gammas[kPackets];
    if constexpr (kEarlyGamma) joined_gamma.Load(stop, at, gammas);

    CircleSum<kSize, kPackets> circle;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      float values[kSize];
      columns.Join(windows[k]).Get(values);
      ZeroOutside(live ? hidden : 0, at(k), values);
      circle.template AddSquares<sizeof(T) == 2>(k, values);
    }
    const float sum = row_sum.OfWarps(circle.Over(strip.lanes()));
    if (!live) continue;
    const float rrms = rsqrtf(sum * params.inverse_hidden + arithmetic.eps);
    if (args.rrms != nullptr && thread == 0 && place.rank == 0) args.rrms[row] = rrms;

    if constexpr (!kEarlyGamma) joined_gamma.Load(stop, at, gammas);
    WithTypeBeside<T>(args.y_dtype, [&](auto tag) {
      using Y = decltype(tag);
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        float values[kSize], scale[kSize], y[kSize];
        windows[k][0].Get(values);
        gammas[k].Get(scale);
#pragma unroll
        for (int i = 0; i < kSize; ++i) scale[i] += gamma_offset;
        Normalize<T>(values, rrms, scale, arithmetic.round_before_gamma, y);
        const int column = at(k) - shift;
        StoreWithinRow(static_cast<Y*>(args.y) + start + column, hidden, column, y);
      }
    });
  } while ((item += gridDim.x / place.blocks) < params.items);
}

}  // namespace jax_rmsnorm
