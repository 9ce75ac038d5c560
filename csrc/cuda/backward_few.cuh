// The backward kernel for few rows, where latency is all: dx and dgamma each by blocks of its own, at the
// same time. What they both read comes from memory once and from the L2 cache the second time; there are no
// partial sums of dgamma, and no second kernel.
#pragma once

#include "backward_common.cuh"

namespace jax_rmsnorm {

// kMore, here and below: there is more than one gradient of y.

// dx of the rows of one block: a row for every threads_per_row threads, with the bits of BackwardKernel.
template <typename T, typename D, int kSize, int kPackets, Scope kScope, bool kMore>
__device__ __forceinline__ void DifferentiateRows(const BackwardParams& params, int64_t block) {
  const BackwardArgs& args = params.args;
  const int hidden = static_cast<int>(args.shape.hidden);
  const int threads = params.threads_per_row;
  const int slots = kScope == Scope::kLanes ? static_cast<int>(blockDim.x) / threads : 1;
  const int slot = kScope == Scope::kLanes ? static_cast<int>(threadIdx.x) / threads : 0;
  const int thread = static_cast<int>(threadIdx.x) - slot * threads;
  const int64_t row = block * slots + slot;
  const int64_t group = args.shape.groups == 1 ? 0 : row / args.shape.rows;
  const bool live = row < args.shape.groups * args.shape.rows;
  RowSum<kScope> row_sum(threads);

  Packet<T, kSize> x[kPackets];
  Packet<D, kSize> dy[kPackets];
  Packet<T, kSize> dh[kPackets];
  const auto column = [&](int k) { return (k * threads + thread) * kSize; };
  const auto inside = [&](int k) { return live && column(k) < hidden; };
  const int64_t start = row * hidden;
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    x[k].Load(static_cast<const T*>(args.x) + start + column(k), inside(k));
    dy[k].Load(static_cast<const D*>(args.dy[0]) + start + column(k), inside(k));
    dh[k].Load(static_cast<const T*>(args.dh) + start + column(k), inside(k) && args.dh != nullptr);
  }
  const float rrms = live ? args.rrms[row] : 0.0f;
  float gamma[kPackets][kSize];
  float sum = 0.0f;
  WithType(args.gamma_dtype, [&](auto tag) {
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      LoadGammaAs<decltype(tag), true>(args, group * hidden, column(k), gamma[k], inside(k));
    }
  });
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    float xs[kSize], dys[kSize], unused[kSize] = {};
    x[k].Get(xs);
    dy[k].Get(dys);
    if constexpr (kMore) AddGradients<D>(args, start + column(k), inside(k), dys);
    sum += Accumulate<T>(xs, dys, gamma[k], rrms, false, unused);
  }
  const float mean = row_sum(sum) * params.inverse_hidden;
  const float slope = Slope(rrms, mean);
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    float xs[kSize], dys[kSize], dx[kSize];
    x[k].Get(xs);
    dy[k].Get(dys);
    if constexpr (kMore) AddGradients<D>(args, start + column(k), inside(k), dys);
    Differentiate(xs, dys, gamma[k], rrms, slope, dx);
    AddPacket(dh[k], dx);
    Packet<T, kSize> packet;
    packet.Set(dx);
    packet.Store(static_cast<T*>(args.dx) + start + column(k), inside(k));
  }
}

// dgamma at the columns of one tile: eight lanes side by side, and all rows of the group dealt out to the
// block's runs of eight.
template <typename T, typename D, int kSize, bool kMore>
__device__ __forceinline__ void SumTile(const BackwardParams& params, int64_t group, int tile) {
  __shared__ float sums[kMaxThreads / 32][kTilePackets * kSize];
  const BackwardArgs& args = params.args;
  const int hidden = static_cast<int>(args.shape.hidden);
  const int packet = static_cast<int>(threadIdx.x) % kTilePackets;
  const int column = (tile * kTilePackets + packet) * kSize;
  const int warps = static_cast<int>(blockDim.x) / 32;

  float dgamma[kSize] = {};
  if (column < hidden) {
    const int64_t end = (group + 1) * args.shape.rows;
    const int step = static_cast<int>(blockDim.x) / kTilePackets;
#pragma unroll 4
    for (int64_t row = group * args.shape.rows + threadIdx.x / kTilePackets; row < end; row += step) {
      Packet<T, kSize> x;
      Packet<D, kSize> dy;
      x.Load(static_cast<const T*>(args.x) + row * hidden + column);
      dy.Load(static_cast<const D*>(args.dy[0]) + row * hidden + column);
      const float rrms = args.rrms[row];
      float xs[kSize], dys[kSize], ones[kSize];
      x.Get(xs);
      dy.Get(dys);
      if constexpr (kMore) AddGradients<D>(args, row * hidden + column, true, dys);
#pragma unroll
      for (int i = 0; i < kSize; ++i) ones[i] = 1.0f;
      Accumulate<T>(xs, dys, ones, rrms, args.arithmetic.round_before_gamma, dgamma);
    }
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
#pragma unroll
    for (int offset = kTilePackets; offset < 32; offset *= 2) {
      dgamma[i] += __shfl_xor_sync(kFullMask, dgamma[i], offset);
    }
    if (threadIdx.x % 32 < kTilePackets) sums[threadIdx.x / 32][packet * kSize + i] = dgamma[i];
  }
  __syncthreads();
  const int at = tile * kTilePackets * kSize + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kTilePackets * kSize || at >= hidden) return;
  float total[1] = {0.0f};
  for (int warp = 0; warp < warps; ++warp) total[0] += sums[warp][threadIdx.x];
  StoreAs<float>(args.gamma_dtype, args.dgamma, group * hidden + at, total);
}

// Grid: the tiles of dgamma, group by group, then blocks of rows for dx. Preconditions: all rows are aligned
// to 16 bytes; the row fits, hidden <= kSize * kPackets * threads_per_row; a block has kTilePackets * kSize
// threads or more.
template <typename T, typename D, int kSize, int kPackets, Scope kScope>
__global__ __launch_bounds__(kScope == Scope::kLanes ? kFewThreads : kMaxThreads,
                             2) void BackwardFewKernel(const __grid_constant__ BackwardParams params) {
  LaunchDependents();
  WaitForPrimary();
  const auto run = [&](auto more) {
    constexpr bool kMore = decltype(more)::value;
    const int64_t tile = blockIdx.x, tiles = params.tiles * params.args.shape.groups;
    if (tile < tiles) {
      SumTile<T, D, kSize, kMore>(params, tile / params.tiles, static_cast<int>(tile % params.tiles));
    } else {
      DifferentiateRows<T, D, kSize, kPackets, kScope, kMore>(params, tile - tiles);
    }
  };
  // Once for the whole kernel: a branch within a loop would keep its loads apart.
  if (params.args.gradients == 1) {
    run(std::false_type{});
  } else {
    run(std::true_type{});
  }
}

}  // namespace jax_rmsnorm
