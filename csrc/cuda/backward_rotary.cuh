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
// heads a multiple of kRows; the row fits, hidden <= 2 * kSize * threads_per_row. In halves: hidden = width =
// 2 * kSize * threads_per_row; else width is a multiple of kSize.
template <typename T, typename D, int kSize, int kRows, bool kInterleaved>
__global__ __launch_bounds__(kRotaryBackwardThreads[kRows],
                             1) void BackwardRotaryKernel(const __grid_constant__ BackwardParams params) {
  constexpr int kPackets = 2;
  constexpr int kTurn = kRows * kPackets;  // packets of a thread
  constexpr int kAhead = kRotaryAhead[kRows];
  constexpr int kPlaces = (kAhead + 2) * kTurn;
  constexpr int kAngles = kInterleaved ? kSize / 2 : kSize;  // of a packet
  constexpr int kAngled = kInterleaved ? kPackets : 1;       // packets with angles of their own
  extern __shared__ uint4 shared[];
  const BackwardArgs& args = params.args;
  const bool round_before_gamma = args.arithmetic.round_before_gamma;
  const int hidden = static_cast<int>(args.shape.hidden);
  const Slots<Scope::kLanes> slots(params.threads_per_row);
  const int threads = slots.threads, thread = slots.thread;
  LaunchDependents();
  WaitForPrimary();
  Pace pace(params.turn_ns, true);
  const uint32_t ring_memory = SharedAddress(shared);
  const PacketRing<T, kSize, false> x_ring(ring_memory, args.x);
  const PacketRing<D, kSize, false> dy_ring(ring_memory + kPlaces * x_ring.Bytes(), args.dy[0]);
  const int column[kPackets] = {thread * kSize, (threads + thread) * kSize};
  const int step = Anew(threads * kSize);  // from a thread's packet to its next one
  const auto inside = [&](int k) { return !kInterleaved || column[k] < hidden; };
  const auto has_angles = [&](int k) { return !kInterleaved || column[k] < args.rotary.width; };

  const int64_t items = args.shape.groups * params.blocks_per_group;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Turns<kRows> turns(args.shape, params.blocks_per_group, item, slots.count, slots.number);
    const int64_t row_step = Anew(turns.step * hidden);
    // This thread's first element in the rows that are copied next.
    int64_t next = turns.row * hidden + column[0];
    T* dx = static_cast<T*>(args.dx) + next;
    // Copies the next rows to the ring's places from `to` on.
    int to = 0;
    const auto copy = [&](bool has) {
      const T* x_from = Anew(static_cast<const T*>(args.x) + next);
      const D* dy_from = Anew(static_cast<const D*>(args.dy[0]) + next);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          const int at = to + r * kPackets + k, offset = r * hidden + k * step;
          const bool copied = has && inside(k);
          x_ring.CopyElements(at, x_from + offset, copied);
          dy_ring.CopyElements(at, dy_from + offset, copied);
        }
      }
      CommitCopies();
      next += row_step;
      to = to + kTurn == kPlaces ? 0 : to + kTurn;
    };
#pragma unroll
    for (int t = 0; t < kAhead; ++t) copy(turns.Has(t));
    const int all = turns.All(), own = turns.Own();

    float gamma[kPackets][kSize], dgamma[kPackets][kSize];
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) gamma[k][i] = dgamma[k][i] = 0.0f;
      if (inside(k)) LoadGamma(args, turns.group * hidden, column[k], gamma[k]);
    }

    // Angles and reciprocal RMS come while the rows before are worked on.
    float cos[kAngled][kAngles] = {}, sin[kAngled][kAngles] = {}, next_rrms[kRows] = {};
    // Of a row that there is, or else zeros: what a slot without a row multiplies with stays zero.
    const auto load_angles = [&](int64_t of, bool has) {
      const int64_t angles = params.places.Start(of);
#pragma unroll
      for (int k = 0; k < kAngled; ++k) {
        if (!has_angles(k)) continue;
        LoadAngles(args.rotary, angles + (kInterleaved ? column[k] / 2 : column[k]), cos[k], sin[k], has);
      }
    };
    const auto load_rrms = [&](int64_t of, bool has) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Packet<float, 1> packet;
        packet.Load(args.rrms + of + r, has);
        next_rrms[r] = __uint_as_float(packet.registers[0]);
      }
    };
    int64_t row = turns.row;
    load_angles(row, own > 0);
    load_rrms(row, own > 0);

    int from = 0;
#pragma unroll 1
    for (int t = 0; t < all; ++t) {
      const bool live = t < own;
      pace.Wait();
      float rrms[kRows], sums[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) rrms[r] = next_rrms[r];
      row += turns.step;
      WaitCopies<kAhead - 1>();
      copy(t + kAhead < own);

      Packet<T, kSize> x[kRows][kPackets];
      float dy[kRows][kPackets][kSize];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          x[r][k] = x_ring.Read(from + r * kPackets + k);
          dy_ring.Read(from + r * kPackets + k).Get(dy[r][k]);
          if constexpr (kInterleaved) {
            if (has_angles(k)) RotateNeighbours<true>(cos[k], sin[k], dy[r][k]);
          }
        }
        if constexpr (!kInterleaved)
          RotateHalves(cos[0], sin[0], dy[r][1], dy[r][0]);  // back: the other way round
      }
      load_rrms(row, t + 1 < own);
      load_angles(row, t + 1 < own);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums[r] = 0.0f;
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          float values[kSize];
          x[r][k].Get(values);
          sums[r] += Accumulate<T>(values, dy[r][k], gamma[k], rrms[r], round_before_gamma, dgamma[k]);
        }
      }
      SumLanes(sums, threads);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float slope = Slope(rrms[r], sums[r] * params.inverse_hidden);
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          float values[kSize], of_packet[kSize];
          x[r][k].Get(values);
          Differentiate(values, dy[r][k], gamma[k], rrms[r], slope, of_packet);
          Packet<T, kSize> packet;
          packet.Set(of_packet);
          packet.Store(dx + (r * hidden + k * step), live && inside(k));
        }
      }
      dx += row_step;
      from = from + kTurn == kPlaces ? 0 : from + kTurn;
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
