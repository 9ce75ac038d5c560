// Forward kernels: y and the reciprocal RMS of each row.
#pragma once

#include <cstdint>

#include "launch.h"
#include "packet.cuh"
#include "reduce.cuh"

namespace jax_rmsnorm {

struct ForwardParams {
  ForwardArgs args;
  int threads_per_row;
  int64_t items;  // rows, or runs of rows where a block takes several
};

template <typename T, bool kRound, int kSize>
__device__ __forceinline__ void WriteRow(const ForwardArgs& args, const float (&x)[kSize], float rrms,
                                         int64_t offset, int64_t gamma_offset) {
  const Arithmetic& arithmetic = args.arithmetic;
  float gamma[kSize];
  LoadGamma(args.gamma, args.gamma_dtype, arithmetic.zero_centered_gamma, gamma_offset, gamma);
  float y[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    float normalized = x[i] * rrms;
    if constexpr (kRound) normalized = ToFloat(FromFloat<T>(normalized));
    y[i] = normalized * gamma[i];
  }
  StoreAs(args.y_dtype, args.y, offset, y);
}

__device__ __forceinline__ int64_t GammaRow(const Shape& shape, int64_t row) {
  return shape.groups == 1 ? 0 : row / shape.rows;
}

// Grid: each item is one row (kLanes: one row for every `threads_per_row` threads of the block; kCluster: one
// row for each cluster); items are dealt out with the grid as stride. kSize elements a packet, kPackets
// packets a thread, held in registers between the sum and the write. Precondition: the row fits, hidden <=
// kSize * kPackets * threads_per_row * blocks of the cluster.
template <typename T, int kSize, int kPackets, bool kRound, Scope kScope>
__global__ __launch_bounds__(kScope == Scope::kLanes ? 128 : 1024,
                             kScope != Scope::kLanes ? 1
                             : kSize * kPackets <= 16
                                 ? 10
                                 : 8) void ForwardKernel(const __grid_constant__ ForwardParams params) {
  const ForwardArgs& args = params.args;
  const int64_t hidden = args.shape.hidden;
  const int64_t rows = args.shape.groups * args.shape.rows;
  const int threads = params.threads_per_row;
  RowSum<kScope> row_sum(threads);

  const ClusterPlace<kScope> place;
  const int slots = kScope == Scope::kLanes ? static_cast<int>(blockDim.x) / threads : 1;
  const int slot = kScope == Scope::kLanes ? static_cast<int>(threadIdx.x) / threads : 0;
  const int thread = kScope == Scope::kLanes ? static_cast<int>(threadIdx.x) % threads : threadIdx.x;

  for (int64_t item = blockIdx.x / place.blocks; item < params.items; item += gridDim.x / place.blocks) {
    const int64_t row = item * slots + slot;
    const bool live = row < rows;  // the others take part in the shuffles only
    const T* x_row = static_cast<const T*>(args.x) + row * hidden;
    const auto column = [&](int k) {
      return (static_cast<int64_t>(k * place.blocks + place.rank) * threads + thread) * kSize;
    };

    Packet<T, kSize> x[kPackets];
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      if (live && column(k) < hidden) {
        x[k].Load(x_row + column(k));
      } else {
        x[k].SetZero();
      }
    }

    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      float values[kSize];
      x[k].Get(values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum += values[i] * values[i];
    }
    sum = row_sum(sum);
    if (!live) continue;
    const float rrms = rsqrtf(sum / static_cast<float>(hidden) + args.arithmetic.eps);
    if (args.rrms != nullptr && thread == 0 && place.rank == 0) args.rrms[row] = rrms;

    const int64_t gamma_row = GammaRow(args.shape, row) * hidden;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      if (column(k) >= hidden) continue;
      float values[kSize];
      x[k].Get(values);
      WriteRow<T, kRound>(args, values, rrms, row * hidden + column(k), gamma_row + column(k));
    }
  }
}

// Grid: a block a row, rows dealt out with the grid as stride. Any hidden size: reads the row twice.
template <typename T, int kSize, bool kRound>
__global__ __launch_bounds__(1024) void ForwardLoopKernel(const __grid_constant__ ForwardParams params) {
  const ForwardArgs& args = params.args;
  const int64_t hidden = args.shape.hidden;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kSize;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kSize;
  RowSum<Scope::kLoop> row_sum(blockDim.x);

  for (int64_t row = blockIdx.x; row < params.items; row += gridDim.x) {
    const T* x_row = static_cast<const T*>(args.x) + row * hidden;
    Packet<T, kSize> x;
    float values[kSize];
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t column = first; column < hidden; column += step) {
      x.Load(x_row + column);
      x.Get(values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum += values[i] * values[i];
    }
    const float rrms = rsqrtf(row_sum(sum) / static_cast<float>(hidden) + args.arithmetic.eps);
    if (args.rrms != nullptr && threadIdx.x == 0) args.rrms[row] = rrms;

    const int64_t gamma_row = GammaRow(args.shape, row) * hidden;
#pragma unroll 2
    for (int64_t column = first; column < hidden; column += step) {
      x.Load(x_row + column);
      x.Get(values);
      WriteRow<T, kRound>(args, values, rrms, row * hidden + column, gamma_row + column);
    }
  }
}

// The kernel that `config` asks for; the packet counts are those that ConfigureForward hands out.
template <typename T, bool kRound>
auto FindForward(const LaunchConfig& config) -> void (*)(ForwardParams) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = config.width > 1;
  switch (config.scope) {
    case Scope::kLanes:
      if (!wide) {
        return config.packets == 4 ? ForwardKernel<T, 1, 4, kRound, Scope::kLanes>
                                   : ForwardKernel<T, 1, 16, kRound, Scope::kLanes>;
      }
      return config.packets == 1   ? ForwardKernel<T, kWide, 1, kRound, Scope::kLanes>
             : config.packets == 2 ? ForwardKernel<T, kWide, 2, kRound, Scope::kLanes>
                                   : ForwardKernel<T, kWide, 4, kRound, Scope::kLanes>;
    case Scope::kBlock:
      if (!wide) return ForwardKernel<T, 1, 16, kRound, Scope::kBlock>;
      return config.packets == 4 ? ForwardKernel<T, kWide, 4, kRound, Scope::kBlock>
                                 : ForwardKernel<T, kWide, 8, kRound, Scope::kBlock>;
    case Scope::kCluster:
      return wide ? ForwardKernel<T, kWide, 4, kRound, Scope::kCluster>
                  : ForwardKernel<T, 1, 16, kRound, Scope::kCluster>;
    case Scope::kLoop:
      return wide ? ForwardLoopKernel<T, kWide, kRound> : ForwardLoopKernel<T, 1, kRound>;
  }
  return nullptr;
}

template <typename T>
cudaError_t LaunchForwardAs(const ForwardArgs& args, const LaunchConfig& config, cudaStream_t stream) {
  const int64_t slots = config.block / config.threads_per_row;
  const int64_t rows = args.shape.groups * args.shape.rows;
  const ForwardParams params{args, config.threads_per_row, (rows + slots - 1) / slots};
  constexpr bool kCanRound = !std::is_same_v<T, float>;  // rounding to float32 is none
  const auto kernel = kCanRound && args.arithmetic.round_before_gamma ? FindForward<T, kCanRound>(config)
                                                                      : FindForward<T, false>(config);
  return LaunchKernel(kernel, params, config, stream);
}

}  // namespace jax_rmsnorm
