// The forward kernel of rows that do not begin at multiples of 16 bytes, and that the registers of a block,
// or of a cluster of blocks, hold.
#pragma once

#include "forward_common.cuh"

namespace jax_rmsnorm {

// Grid: as of ForwardKernel. A row lies in aligned packets, its windows, the first of which begins `shift`
// elements before it. A thread has a few of them, each with the next one, out of which it joins the columns
// that it adds up: the sum does not depend on where the row lies. What it writes are its windows.
//
// Preconditions: the tensors are aligned to 16 bytes; the row fits wherever it begins, hidden + kSize - 1 <=
// kSize * kPackets * threads_per_row * blocks of the cluster.
template <typename T, typename G, int kPackets, Scope kScope>
__global__ __launch_bounds__(
    kScope == Scope::kLanes ? 128 : kMaxThreads,
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
  WholeRowSum<kScope> row_sum(threads, thread);
  LaunchDependents();
  WaitForPrimary();

  // Where this thread's windows begin, from the row's first one on.
  const auto at = [&](int k) { return ((k * place.blocks + place.rank) * threads + thread) * kSize; };
  const float gamma_offset = args.gamma == nullptr || arithmetic.zero_centered_gamma ? 1.0f : -0.0f;

  int64_t item = blockIdx.x / place.blocks;
  do {
    const int64_t row = item * slots + slot;
    const bool live = row < rows;  // the others take part in the sums only
    const int64_t start = row * hidden;
    const int shift = static_cast<int>(start & (kSize - 1));
    const int stop = live ? shift + hidden : 0;

    Packet<T, kSize> windows[kPackets], next[kPackets];
    LoadPairs(static_cast<const T*>(args.x), rows * hidden, start - shift, stop, at, windows, next);

    Packet<G, kSize> gammas[kPackets];
    const auto load_gammas = [&] {
      LoadGammaPackets(args, GammaRow(args.shape, row) * hidden - shift, stop, at, gammas);
    };
    if constexpr (kEarlyGamma) load_gammas();

    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      float values[kSize];
      Join(windows[k], next[k], shift).Get(values);
      ZeroBeyond(hidden, at(k), values);
      sum += SumOfSquares(values);
    }
    sum = row_sum(sum);
    if (!live) continue;
    const float rrms = rsqrtf(sum * params.inverse_hidden + arithmetic.eps);
    if (args.rrms != nullptr && thread == 0 && place.rank == 0) args.rrms[row] = rrms;

    if constexpr (!kEarlyGamma) load_gammas();
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
        const int column = at(k) - shift;
        StoreWithinRow(static_cast<Y*>(args.y) + start + column, hidden, column, y);
      }
    });
  } while ((item += gridDim.x / place.blocks) < params.items);
}

}  // namespace jax_rmsnorm
