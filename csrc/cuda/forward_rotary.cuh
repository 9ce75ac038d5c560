// The forward kernel of a query or key norm with its rotary embedding: short rows, one for part of a warp.
#pragma once

#include "forward_common.cuh"
#include "rotary.cuh"

namespace jax_rmsnorm {

// Grid: as for ForwardKernel, but a slot takes kRows rows of one position at a time, which share cosines and
// sines: these come while the sums are taken. In halves, packet 0 of a thread is rotated with its packet 1.
//
// Preconditions: all rows, and those of cos and sin, are aligned to their packets; fewer than 2^31 rows, and
// heads a multiple of kRows; the row fits, hidden <= kSize * kPackets * threads_per_row. In halves: width =
// 2 * kSize * threads_per_row; else width is a multiple of kSize.
template <typename T, typename G, int kRows, int kPackets, bool kInterleaved>
__global__ __launch_bounds__(kFusedThreads, kPackets == 2 ? 3 : 2) void ForwardRotaryKernel(
    const __grid_constant__ ForwardParams params) {
  constexpr int kSize = 16 / sizeof(T);
  constexpr int kAngles = kInterleaved ? kSize / 2 : kSize;  // of a packet
  constexpr int kAngled = kInterleaved ? kPackets : 1;       // packets with angles of their own
  const ForwardArgs& args = params.args;
  const Arithmetic& arithmetic = args.arithmetic;
  const Rotary& rotary = args.rotary;
  const G* gamma = static_cast<const G*>(args.gamma);
  const int hidden = static_cast<int>(args.shape.hidden);
  const int width = static_cast<int>(rotary.width);
  const int64_t rows = args.shape.groups * args.shape.rows;
  const Slots<Scope::kLanes> slots(params.threads_per_row);
  const int threads = slots.threads, thread = slots.thread;
  RowSum<Scope::kLanes> row_sum(threads);
  LaunchDependents();
  WaitForPrimary();

  const auto column = [&](int k) { return (k * threads + thread) * kSize; };

  for (int64_t item = blockIdx.x; item < params.items; item += gridDim.x) {
    const int64_t row = (item * slots.count + slots.number) * kRows;
    const bool live = row < rows;  // the others take part in the sums only
    const int64_t start = row * hidden;

    Packet<T, kSize> packets[kRows][kPackets];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        packets[r][k].SetZero();
        if (!live || column(k) >= hidden) continue;
        packets[r][k].Load(static_cast<const T*>(args.x) + start + r * hidden + column(k));
      }
    }
    float cos[kAngled][kAngles], sin[kAngled][kAngles];
    Packet<G, kSize> gammas[kPackets];
    if (live) {
      const int64_t angles = params.places.Start(row);
      const int64_t gamma_start = GammaRow(args.shape, row) * hidden;
#pragma unroll
      for (int k = 0; k < kAngled; ++k) {
        if (column(k) >= width) continue;
        const int64_t at = angles + (kInterleaved ? column(k) / 2 : column(k));
        LoadAngles(rotary.cos, rotary.dtype, at, cos[k]);
        LoadAngles(rotary.sin, rotary.dtype, at, sin[k]);
      }
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        if (gamma != nullptr && column(k) < hidden) gammas[k].Load(gamma + gamma_start + column(k));
      }
    }

    float rrms[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        float values[kSize];
        packets[r][k].Get(values);
        sum += SumOfSquares(values);
      }
      rrms[r] = rsqrtf(row_sum(sum) * params.inverse_hidden + arithmetic.eps);
    }
    if (!live) continue;

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (args.rrms != nullptr && thread == 0) args.rrms[row + r] = rrms[r];
      const auto normalize = [&](int k, float (&y)[kSize]) {
        float values[kSize], scale[kSize];
        GetGamma(gammas[k], gamma != nullptr, arithmetic.zero_centered_gamma, scale);
        packets[r][k].Get(values);
        Normalize<T>(values, rrms[r], scale, arithmetic.round_before_gamma, y);
      };
      const int64_t to = start + r * hidden;
      if constexpr (!kInterleaved) {
        float a[kSize], b[kSize];
        normalize(0, a);
        normalize(1, b);
        RotateHalves(cos[0], sin[0], a, b);
        StoreAs<T>(args.y_dtype, args.y, to + column(0), a);
        StoreAs<T>(args.y_dtype, args.y, to + column(1), b);
      }
#pragma unroll
      for (int k = kInterleaved ? 0 : 2; k < kPackets; ++k) {
        if (column(k) >= hidden) continue;
        float y[kSize];
        normalize(k, y);
        if constexpr (kInterleaved) {
          if (column(k) < width) RotateNeighbours<false>(cos[k], sin[k], y);
        }
        StoreAs<T>(args.y_dtype, args.y, to + column(k), y);
      }
    }
  }
}

template <typename T, typename G>
auto FindForwardRotary(const LaunchConfig& config, bool interleaved) -> void (*)(ForwardParams) {
  if (interleaved) return ForwardRotaryKernel<T, G, 1, 2, true>;
  if (config.rows == 2) return ForwardRotaryKernel<T, G, 2, 2, false>;
  return config.packets == 2 ? ForwardRotaryKernel<T, G, 1, 2, false>
                             : ForwardRotaryKernel<T, G, 1, 4, false>;
}

}  // namespace jax_rmsnorm
