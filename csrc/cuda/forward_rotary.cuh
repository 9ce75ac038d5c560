// The forward kernel of a query or key norm with its rotary embedding: short rows, one for part of a warp.
#pragma once

#include "forward_common.cuh"
#include "rotary.cuh"

namespace jax_rmsnorm {

// gamma, of type G, of a thread's packets: from element `at` on, and `step` elements further for each, as far
// as they are inside(k). Where 1 is not to be added -0 is, with which any number stays as it is.
template <typename G, int kSize, int kPackets, typename Inside>
__device__ __forceinline__ void LoadGammas(const ForwardArgs& args, int64_t at, int step,
                                           const Inside& inside, float (&gamma)[kPackets][kSize]) {
  const bool present = args.gamma != nullptr;
  const float added = present && !args.arithmetic.zero_centered_gamma ? -0.0f : 1.0f;
  const G* from = static_cast<const G*>(args.gamma) + at;
  Packet<G, kSize> packets[kPackets];
#pragma unroll
  for (int k = 0; k < kPackets; ++k) packets[k].Load(from + k * step, present && inside(k));
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    packets[k].Get(gamma[k]);
#pragma unroll
    for (int i = 0; i < kSize; ++i) gamma[k][i] += added;
  }
}

// All values of several packets.
template <int kPackets, int kSize>
__device__ __forceinline__ auto Flat(float (&values)[kPackets][kSize]) -> float (&)[kPackets * kSize] {
  return reinterpret_cast<float (&)[kPackets * kSize]>(values);
}

// Grid: as for ForwardKernel, but a slot takes kRows rows of one position at a time, which share gammas,
// cosines and sines: these come while x does. In halves, packet 0 of a thread is rotated with its packet 1.
//
// Preconditions: all rows, and those of cos and sin, are aligned to their packets; fewer than 2^31 rows, and
// heads a multiple of kRows; the row fits, hidden <= kSize * kPackets * threads_per_row. In halves: width =
// 2 * kSize * threads_per_row, and with two packets a thread hidden too; else width is a multiple of kSize.
template <typename T, typename G, int kRows, int kPackets, bool kInterleaved>
__global__ __launch_bounds__(kFusedThreads, kPackets == 2 ? 3 : 2) void ForwardRotaryKernel(
    const __grid_constant__ ForwardParams params) {
  constexpr int kSize = 16 / sizeof(T);
  constexpr int kAngles = kInterleaved ? kSize / 2 : kSize;  // of a packet
  constexpr int kAngled = kInterleaved ? kPackets : 1;       // packets with angles of their own
  constexpr bool kWhole = !kInterleaved && kPackets == 2;    // no thread has packets beyond the row
  const ForwardArgs& args = params.args;
  const Rotary& rotary = args.rotary;
  const int hidden = static_cast<int>(args.shape.hidden);
  const int width = static_cast<int>(rotary.width);
  const auto rows = static_cast<uint32_t>(args.shape.groups * args.shape.rows);
  const Slots<Scope::kLanes> slots(params.threads_per_row);
  const int threads = slots.threads, thread = slots.thread;
  LaunchDependents();
  WaitForPrimary();

  const int step = Anew(threads * kSize);  // from a thread's packet to its next one
  const auto column = [&](int k) { return (k * threads + thread) * kSize; };
  const auto inside = [&](int k) { return kWhole || column(k) < hidden; };

  for (uint32_t item = blockIdx.x; item < static_cast<uint32_t>(params.items); item += gridDim.x) {
    const uint32_t own = (item * slots.count + slots.number) * kRows;
    const bool live = own < rows;                    // the others take part in the sums only,
    const uint32_t row = live ? own : rows - kRows;  // for which they read the last rows
    const int64_t start = static_cast<int64_t>(row) * hidden + column(0);

    Packet<T, kSize> packets[kRows][kPackets];
    const T* x = Anew(static_cast<const T*>(args.x) + start);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) packets[r][k].Load(x + (r * hidden + k * step), inside(k));
    }
    float cos[kAngled][kAngles], sin[kAngled][kAngles], gamma[kPackets][kSize];
    const int64_t angles = params.places.Start(row);
#pragma unroll
    for (int k = 0; k < kAngled; ++k) {
      if (kInterleaved && column(k) >= width) continue;
      const int64_t at = angles + (kInterleaved ? column(k) / 2 : column(k));
      LoadAngles(rotary, at, cos[k], sin[k]);
    }
    const int64_t gamma_start = GammaRow(args.shape, row) * hidden;
    LoadGammas<G>(args, gamma_start + column(0), step, inside, gamma);

    float rrms[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      rrms[r] = 0.0f;
#pragma unroll
      for (int k = 0; k < kPackets; ++k) {
        float values[kSize];
        packets[r][k].Get(values);
        rrms[r] += SumOfSquares(values);
      }
    }
    SumLanes(rrms, threads);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      rrms[r] = rsqrtf(rrms[r] * params.inverse_hidden + args.arithmetic.eps);
    }
    if (!live) continue;

    if (args.rrms != nullptr && thread == 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) args.rrms[row + r] = rrms[r];
    }
    WithTypeBeside<T>(args.y_dtype, [&](auto tag) {
      using Y = decltype(tag);
      Y* to = Anew(static_cast<Y*>(args.y) + start);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float y[kPackets][kSize];
#pragma unroll
        for (int k = 0; k < kPackets; ++k) packets[r][k].Get(y[k]);
        Normalize<T>(Flat(y), rrms[r], Flat(gamma), args.arithmetic.round_before_gamma, Flat(y));
        if constexpr (!kInterleaved) RotateHalves(cos[0], sin[0], y[0], y[1]);
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          if constexpr (kInterleaved) {
            if (column(k) < width) RotateNeighbours<false>(cos[k], sin[k], y[k]);
          }
          Packet<Y, kSize> packet;
          packet.Set(y[k]);
          packet.Store(to + (r * hidden + k * step), inside(k));
        }
      }
    });
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
