// The backward kernel of a query or key norm with its rotary embedding: short rows, one for part of a warp.
#pragma once

#include "backward_common.cuh"
#include "ring.cuh"

namespace jax_rmsnorm {

// Grid: as for BackwardKernel, but a slot takes kRows rows of one position at a time, which share cosines and
// sines. dy is rotated back as it comes out of the ring; a row is done with in one turn, since the sum of its
// lanes makes nobody wait.
//
// Preconditions: all rows, and those of cos and sin, are aligned to their packets; fewer than 2^31 rows, and
// heads a multiple of kRows; the row fits, hidden <= 2 * kSize * threads_per_row. In halves: width = 2 *
// kSize * threads_per_row; else width is a multiple of kSize.
template <typename T, typename D, int kSize, int kRows, bool kInterleaved>
__global__ __launch_bounds__(kLanesThreads,
                             1) void BackwardRotaryKernel(const __grid_constant__ BackwardParams params) {
  constexpr int kPackets = 2;
  constexpr int kTurn = kRows * kPackets;  // packets of a thread
  constexpr int kAhead = kRotaryAhead[kRows];
  constexpr int kPlaces = (kAhead + 2) * kTurn;
  constexpr int kAngles = kInterleaved ? kSize / 2 : kSize;  // of a packet
  constexpr int kAngled = kInterleaved ? kPackets : 1;       // packets with angles of their own
  extern __shared__ uint4 shared[];
  const BackwardArgs& args = params.args;
  const Rotary& rotary = args.rotary;
  const int hidden = static_cast<int>(args.shape.hidden);
  const int width = static_cast<int>(rotary.width);
  const Slots<Scope::kLanes> slots(params.threads_per_row);
  const int threads = slots.threads, thread = slots.thread;
  LaunchDependents();
  WaitForPrimary();
  Pace pace(params.turn_ns, true);
  const uint32_t ring_memory = SharedAddress(shared);
  const PacketRing<T, kSize, false> x_ring(ring_memory, args.x);
  const PacketRing<D, kSize, false> dy_ring(ring_memory + kPlaces * x_ring.Bytes(), args.dy[0]);
  const int column[kPackets] = {thread * kSize, (threads + thread) * kSize};

  const int64_t items = args.shape.groups * params.blocks_per_group;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Turns<kRows> turns(args.shape, params.blocks_per_group, item, slots.count, slots.number);
    const int64_t row_step = turns.step * hidden;
    int64_t row = turns.row;
    int64_t start = row * hidden;
    // Copies the rows from element `begin` on to the ring's places from `at` on.
    const auto copy = [&](int at, int64_t begin, bool inside) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          const bool copied = inside && column[k] < hidden;
          x_ring.Copy(at + r * kPackets + k, begin + r * hidden + column[k], copied);
          dy_ring.Copy(at + r * kPackets + k, begin + r * hidden + column[k], copied);
        }
      }
      CommitCopies();
    };
#pragma unroll
    for (int t = 0; t < kAhead; ++t) copy(t * kTurn, start + t * row_step, turns.Has(t));
    const int all = turns.All(), own = turns.Own();

    float gamma[kPackets][kSize], dgamma[kPackets][kSize];
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) gamma[k][i] = dgamma[k][i] = 0.0f;
      if (column[k] < hidden) LoadGamma(args, turns.group * hidden, column[k], gamma[k]);
    }

    // Angles and reciprocal RMS come while the rows before are worked on.
    float next_cos[kAngled][kAngles] = {}, next_sin[kAngled][kAngles] = {}, next_rrms[kRows] = {};
    const auto prefetch = [&](int64_t next) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) next_rrms[r] = args.rrms[next + r];
      const int64_t angles = params.places.Start(next);
#pragma unroll
      for (int k = 0; k < kAngled; ++k) {
        if (column[k] >= width) continue;
        const int64_t at = angles + (kInterleaved ? column[k] / 2 : column[k]);
        LoadAngles(rotary.cos, rotary.dtype, at, next_cos[k]);
        LoadAngles(rotary.sin, rotary.dtype, at, next_sin[k]);
      }
    };
    if (own > 0) prefetch(row);

    int from = 0, to = kAhead * kTurn;
#pragma unroll 1
    for (int t = 0; t < all; ++t) {
      const bool live = t < own;
      pace.Wait();
      float cos[kAngled][kAngles], sin[kAngled][kAngles], rrms[kRows];
#pragma unroll
      for (int k = 0; k < kAngled; ++k) {
#pragma unroll
        for (int i = 0; i < kAngles; ++i) {
          cos[k][i] = next_cos[k][i];
          sin[k][i] = next_sin[k][i];
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) rrms[r] = next_rrms[r];
      if (t + 1 < own) prefetch(row + turns.step);
      WaitCopies<kAhead - 1>();
      copy(to, start + kAhead * row_step, t + kAhead < own);

#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float x[kPackets][kSize], dy[kPackets][kSize];
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          x_ring.Read(from + r * kPackets + k).Get(x[k]);
          dy_ring.Read(from + r * kPackets + k).Get(dy[k]);
          if constexpr (kInterleaved) {
            if (column[k] < width) RotateNeighbours<true>(cos[k], sin[k], dy[k]);
          }
        }
        if constexpr (!kInterleaved) {
          RotateHalves(cos[0], sin[0], dy[1], dy[0]);  // back: the other way round
        }
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          sum += Accumulate<T>(x[k], dy[k], gamma[k], rrms[r], args.arithmetic.round_before_gamma, dgamma[k]);
        }
        const float slope = Slope(rrms[r], SumLanes(sum, threads) * params.inverse_hidden);
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          float dx[kSize];
          Differentiate(x[k], dy[k], gamma[k], rrms[r], slope, dx);
          Packet<T, kSize> packet;
          packet.Set(dx);
          packet.Store(static_cast<T*>(args.dx) + start + r * hidden + column[k], live && column[k] < hidden);
        }
      }
      row += turns.step;
      start += row_step;
      from = from + kTurn == kPlaces ? 0 : from + kTurn;
      to = to + kTurn == kPlaces ? 0 : to + kTurn;
    }
    WaitCopies<0>();
    if (args.dgamma == nullptr) continue;
    StoreBlockDgamma<true>(params, turns.group, turns.block, slots.count, slots.number, column, dgamma,
                           reinterpret_cast<float*>(shared));
  }
}

template <typename T, typename D, int kSize>
auto FindBackwardRotary(const LaunchConfig& config, bool interleaved) -> void (*)(BackwardParams) {
  if (interleaved) return BackwardRotaryKernel<T, D, kSize, 1, true>;
  return config.rows == 2 ? BackwardRotaryKernel<T, D, kSize, 2, false>
                          : BackwardRotaryKernel<T, D, kSize, 1, false>;
}

}  // namespace jax_rmsnorm
