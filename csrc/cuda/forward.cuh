// Forward kernels: y and the reciprocal RMS of each row.
#pragma once

#include <cstdint>

#include "forward_common.cuh"
#include "forward_ring.cuh"
#include "forward_rotary.cuh"
#include "forward_staged.cuh"
#include "forward_window_ring.cuh"
#include "forward_windows.cuh"

namespace jax_rmsnorm {

// Blocks an SM for which the compiler keeps registers.
template <typename G, typename A, Scope kScope, bool kMoreRegisters>
constexpr int kForwardBlocks = kMoreRegisters                              ? 1
                               : !std::is_void_v<A>                        ? 3
                               : kScope == Scope::kLanes && sizeof(G) == 4 ? 1
                                                                           : 2;

// Grid: each item is one row for every `threads_per_row` threads of the block (or for the cluster); items are
// dealt out with the grid as stride. kSize elements a packet, kPackets packets a thread, held in registers
// between the sum and the write; gamma, of type G, is loaded before the sum where there are registers for it:
// with kMoreRegisters always.
//
// Preconditions: hidden is a multiple of kSize and all rows are aligned to packets, of 16 bytes at the most;
// the row fits, hidden <= kSize * kPackets * threads_per_row * blocks of the cluster.
template <typename T, typename G, typename A, int kSize, int kPackets, Scope kScope,
          bool kMoreRegisters = false>
__global__ __launch_bounds__(
    std::is_void_v<A> ? kMaxThreads : kFusedThreads,
    kForwardBlocks<G, A, kScope, kMoreRegisters>) void ForwardKernel(const __grid_constant__ ForwardParams
                                                                         params) {
  constexpr bool kEarlyGamma = kMoreRegisters || kPackets * Packet<G, kSize>::kRegisters <= 16;
  const ForwardArgs& args = params.args;
  const Arithmetic& arithmetic = args.arithmetic;
  const T* x = static_cast<const T*>(args.x);
  const G* gamma = static_cast<const G*>(args.gamma);
  const int hidden = static_cast<int>(args.shape.hidden);
  const int64_t rows = args.shape.groups * args.shape.rows;
  const ClusterPlace<kScope> place;
  const Slots<kScope> slots(params.threads_per_row);
  const int threads = slots.threads, thread = slots.thread;
  WholeRowSum<kScope> row_sum(threads, slots.number, thread);
  LaunchDependents();
  WaitForPrimary();

  const auto column = [&](int k) { return PacketInRow<kScope, kPackets>(place, threads, thread, k) * kSize; };
  // What gamma's packets lack: one if it is zero-centered, or if there is none, whose packets are zero; else
  // -0, which changes the bits of no number. Branches would cost a kernel for few rows a tenth of its time.
  const float gamma_offset = gamma == nullptr || arithmetic.zero_centered_gamma ? 1.0f : -0.0f;

  int64_t item = blockIdx.x / place.blocks;
  do {
    const int64_t row = item * slots.count + slots.number;
    const bool live = row < rows;  // the others take part in the sums only
    const int64_t start = row * hidden;
    const int64_t gamma_start = GammaRow(args.shape, row) * hidden;

    Packet<T, kSize> packets[kPackets];
    Packet<G, kSize> gammas[kPackets];
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      packets[k].Load(x + start + column(k), live && column(k) < hidden);
    }
    if constexpr (!std::is_void_v<A>) {
      if (live) AddAddends<A>(args, start, hidden, column, packets);
    }
    if constexpr (kEarlyGamma) {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        const bool inside = live && gamma != nullptr && column(k) < hidden;
        gammas[k].Load(gamma + gamma_start + column(k), inside);
      }
    }

    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      float values[kSize];
      packets[k].Get(values);
      sum += SumOfSquares(values);
    }

    sum = row_sum(sum);
    if (!live) continue;
    const float rrms = rsqrtf(sum * params.inverse_hidden + arithmetic.eps);
    if (args.rrms != nullptr && thread == 0 && place.rank == 0) args.rrms[row] = rrms;

    float factor = rrms;
    if (arithmetic.round_before_gamma) {  // to T, as the packets are
      factor = 1.0f;
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        float values[kSize];
        packets[k].Get(values);
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[i] *= rrms;
        packets[k].Set(values);
      }
    }
    WithTypeBeside<T>(args.y_dtype, [&](auto tag) {
      using Y = decltype(tag);
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        const bool inside = column(k) < hidden;
        if (!kEarlyGamma) gammas[k].Load(gamma + gamma_start + column(k), inside && gamma != nullptr);
        float values[kSize], scale[kSize];
        packets[k].Get(values);
        gammas[k].Get(scale);
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[i] = values[i] * factor * (scale[i] + gamma_offset);
        Packet<Y, kSize> y;
        y.Set(values);
        y.Store(static_cast<Y*>(args.y) + start + column(k), inside);
      }
    });
  } while ((item += gridDim.x / place.blocks) < params.items);
}

// Grid: a block a row, rows dealt out with the grid as stride. Any hidden size: reads the row twice. kSize =
// 1: any alignment.
template <typename T, typename G, int kSize>
__global__ __launch_bounds__(kMaxThreads) void ForwardLoopKernel(
    const __grid_constant__ ForwardParams params) {
  const ForwardArgs& args = params.args;
  const int64_t hidden = args.shape.hidden;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kSize;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kSize;
  RowSum<Scope::kLoop> row_sum(blockDim.x);
  LaunchDependents();
  WaitForPrimary();

  for (int64_t row = blockIdx.x; row < params.items; row += gridDim.x) {
    const T* x_row = static_cast<const T*>(args.x) + row * hidden;
    const G* gamma_row = args.gamma == nullptr
                             ? nullptr
                             : static_cast<const G*>(args.gamma) + GammaRow(args.shape, row) * hidden;
    Packet<T, kSize> packet;
    float values[kSize];
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t column = first; column < hidden; column += step) {
      packet.Load(x_row + column);
      if (args.addend != nullptr) AddAddend(args, row * hidden + column, &packet);
      packet.Get(values);
      sum += SumOfSquares(values);
    }
    const float rrms = rsqrtf(row_sum(sum) * params.inverse_hidden + args.arithmetic.eps);
    if (args.rrms != nullptr && threadIdx.x == 0) args.rrms[row] = rrms;

    // A thread reads again what it has read or written itself.
    const T* again = args.addend == nullptr ? x_row : static_cast<const T*>(args.h) + row * hidden;
#pragma unroll 2
    for (int64_t column = first; column < hidden; column += step) {
      Packet<G, kSize> gamma;
      gamma.Load(gamma_row + column, gamma_row != nullptr);
      packet.Load(again + column);
      float scale[kSize], y[kSize];
      GetGamma(gamma, gamma_row != nullptr, args.arithmetic.zero_centered_gamma, scale);
      packet.Get(values);
      Normalize<T>(values, rrms, scale, args.arithmetic.round_before_gamma, y);
      StoreAs<T>(args.y_dtype, args.y, row * hidden + column, y);
    }
  }
}

// Packets of kSize elements, the widest that all rows are aligned to; an addend of type A, if not void.
template <typename T, typename G, typename A, int kSize>
auto FindForwardPlain(const LaunchConfig& config) -> void (*)(ForwardParams) {
  constexpr int kBytes = kSize * static_cast<int>(sizeof(T));
  constexpr int kMany = ForwardPackets(kSize, sizeof(T));
  if constexpr (kBytes == 16 && std::is_void_v<A>) {
    if (config.scope == Scope::kCluster) {
      return config.more_registers ? ForwardKernel<T, G, A, kSize, 4, Scope::kCluster, true>
                                   : ForwardKernel<T, G, A, kSize, 4, Scope::kCluster>;
    }
    if (config.more_registers && config.packets == 4) {
      return config.scope == Scope::kBlock ? ForwardKernel<T, G, A, kSize, 4, Scope::kBlock, true>
                                           : ForwardKernel<T, G, A, kSize, 4, Scope::kLanes, true>;
    }
  }
  if constexpr (kBytes == 16) {
    if (config.packets == 1) return ForwardKernel<T, G, A, kSize, 1, Scope::kLanes>;
    if (config.packets == 2) return ForwardKernel<T, G, A, kSize, 2, Scope::kLanes>;
    if (config.packets == 3) return ForwardKernel<T, G, A, kSize, 3, Scope::kLanes>;
  }
  if (config.scope == Scope::kBlock) return ForwardKernel<T, G, A, kSize, kMany, Scope::kBlock>;
  return config.packets == 4 ? ForwardKernel<T, G, A, kSize, 4, Scope::kLanes>
                             : ForwardKernel<T, G, A, kSize, kMany, Scope::kLanes>;
}

template <typename T, typename G>
auto FindForwardAdd(const LaunchConfig& config, DType addend) -> void (*)(ForwardParams) {
  constexpr int kSize = 16 / sizeof(T);
  if (addend == DType::kF32) return FindForwardPlain<T, G, float, kSize>(config);
  if constexpr (sizeof(T) == 2) {
    return FindForwardPlain<T, G, T, kSize>(config);
  } else {
    return addend == DType::kF16 ? FindForwardPlain<T, G, __half, kSize>(config)
                                 : FindForwardPlain<T, G, __nv_bfloat16, kSize>(config);
  }
}

template <typename T, typename G>
auto FindForwardStaged(const LaunchConfig& config) -> void (*)(ForwardParams) {
  return config.aligned ? ForwardStagedKernel<T, G, true> : ForwardStagedKernel<T, G, false>;
}

// Those that ShareWindows in layout.h hands out.
template <typename T, typename G>
auto FindForwardWindows(const LaunchConfig& config) -> void (*)(ForwardParams) {
  if (config.scope == Scope::kCluster) return ForwardWindowsKernel<T, G, kStripWindows, Scope::kCluster, 1>;
  if (config.scope == Scope::kBlock) return ForwardWindowsKernel<T, G, kStripWindows / 2, Scope::kBlock, 2>;
  if (config.share == 1) return ForwardWindowsKernel<T, G, 1, Scope::kLanes, 1>;
  return config.packets == 1   ? ForwardWindowsKernel<T, G, 1, Scope::kLanes, 2>
         : config.packets == 2 ? ForwardWindowsKernel<T, G, 2, Scope::kLanes, 2>
                               : ForwardWindowsKernel<T, G, kLaneWindows / 2, Scope::kLanes, 2>;
}

// With lanes those that WindowLanes in layout.h hands out.
template <typename T, typename G>
auto FindForwardWindowRing(const LaunchConfig& config) -> void (*)(ForwardParams) {
  if (config.scope == Scope::kCluster) return ForwardWindowRingKernel<T, G, kStripWindows, Scope::kCluster>;
  if (config.scope == Scope::kBlock) return ForwardWindowRingKernel<T, G, kStripWindows, Scope::kBlock>;
  return config.packets == 1   ? ForwardWindowRingKernel<T, G, 1, Scope::kLanes>
         : config.packets == 2 ? ForwardWindowRingKernel<T, G, 2, Scope::kLanes>
         : config.packets == 3 ? ForwardWindowRingKernel<T, G, 3, Scope::kLanes>
         : config.packets == 4 ? ForwardWindowRingKernel<T, G, 4, Scope::kLanes>
                               : ForwardWindowRingKernel<T, G, kLaneWindows, Scope::kLanes>;
}

template <typename T>
auto FindForwardRing(const LaunchConfig& config) -> void (*)(ForwardParams) {
  constexpr int kSize = 16 / sizeof(T);
  if (config.scope == Scope::kCluster) {
    return config.ahead == 2 ? ForwardRingKernel<T, kSize, 4, Scope::kCluster, 2>
                             : ForwardRingKernel<T, kSize, 4, Scope::kCluster>;
  }
  if (config.scope == Scope::kBlock) return ForwardRingKernel<T, kSize, 4, Scope::kBlock>;
  return config.packets == 1   ? ForwardRingKernel<T, kSize, 1, Scope::kLanes>
         : config.packets == 2 ? ForwardRingKernel<T, kSize, 2, Scope::kLanes>
         : config.packets == 3 ? ForwardRingKernel<T, kSize, 3, Scope::kLanes>
                               : ForwardRingKernel<T, kSize, 4, Scope::kLanes>;
}

// The kernel that `config` asks for; the packet counts are those that ConfigureForward hands out.
template <typename T, typename G>
auto FindForward(const LaunchConfig& config, const ForwardArgs& args) -> void (*)(ForwardParams) {
  constexpr int kSize = 16 / sizeof(T);
  if (config.scope == Scope::kLoop) {
    return config.aligned ? ForwardLoopKernel<T, G, kSize> : ForwardLoopKernel<T, G, 1>;
  }
  if (config.method == Method::kRing) {
    return config.aligned ? FindForwardRing<T>(config) : FindForwardWindowRing<T, G>(config);
  }
  if (config.method == Method::kWindows) return FindForwardWindows<T, G>(config);
  if (config.method == Method::kStaged) return FindForwardStaged<T, G>(config);
  if (FusionOf(args) == Fusion::kRotary) return FindForwardRotary<T, G>(config, args.rotary.interleaved);
  if (FusionOf(args) == Fusion::kAdd) return FindForwardAdd<T, G>(config, args.addend_dtype);
  if (config.width == kSize) return FindForwardPlain<T, G, void, kSize>(config);
  if (config.width == kSize / 2) return FindForwardPlain<T, G, void, kSize / 2>(config);
  return FindForwardPlain<T, G, void, 2>(config);
}

template <typename T>
cudaError_t LaunchForwardAs(const ForwardArgs& args, const LaunchConfig& config, cudaStream_t stream) {
  const int64_t slots = config.block / config.threads_per_row * config.rows;
  const int64_t rows = args.shape.groups * args.shape.rows;
  const ForwardParams params{args,
                             1.0f / static_cast<float>(args.shape.hidden),
                             config.threads_per_row,
                             (rows + slots - 1) / slots,
                             config.blocks_per_group,
                             config.turn_ns,
                             RotaryPlaces(args.rotary)};
  const DType gamma_dtype = args.gamma == nullptr ? args.x_dtype : args.gamma_dtype;
  return DispatchTypeBeside<T>(gamma_dtype, [&](auto gamma) {
    return LaunchKernel(FindForward<T, decltype(gamma)>(config, args), params, config, stream);
  });
}

}  // namespace jax_rmsnorm
