// The forward kernel of persistent blocks: many rows that are too long to be staged, and whatever is to leave
// SMs to others.
#pragma once

#include "forward_common.cuh"
#include "ring.cuh"

namespace jax_rmsnorm {

// Grid: block (or cluster) b takes the rows b, b + blocks, ..., or runs of rows where it has several slots.
// As in the backward, a thread adds up its part of row t, hands it in, and only then asks for the sum of row
// t - 1 and writes that row. gamma stays in registers.
//
// Preconditions: as for ForwardKernel, a row of the cluster's blocks together; the same bits.
template <typename T, int kSize, int kPackets, Scope kScope, int kAhead = kRowsAhead<kScope, kPackets>>
__global__ __launch_bounds__(kMaxThreads,
                             1) void ForwardRingKernel(const __grid_constant__ ForwardParams params) {
  constexpr int kPlaces = (kAhead + 2) * kPackets;
  extern __shared__ uint4 shared[];
  __shared__ typename SplitRowSum<kScope>::Shared sum_memory;
  const ForwardArgs& args = params.args;
  const Arithmetic& arithmetic = args.arithmetic;
  const int hidden = static_cast<int>(args.shape.hidden);
  const ClusterPlace<kScope> place;
  const Slots<kScope, kScope == Scope::kCluster> slots(params.threads_per_row);
  const int threads = slots.threads, thread = slots.thread;
  SplitRowSum<kScope> row_sum(sum_memory, threads, slots.number, thread);
  LaunchDependents();
  WaitForPrimary();
  Pace pace(params.turn_ns, thread < 32 && place.rank == 0);
  const PacketRing<T, kSize, false> ring(SharedAddress(shared), args.x);

  int column[kPackets];
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    column[k] = PacketInRow<kScope, kPackets>(place, threads, thread, k) * kSize;
  }
  const int64_t items = args.shape.groups * params.blocks_per_group;
  unsigned turn = 0;  // counted on from item to item, for row_sum
  for (int64_t item = blockIdx.x / place.blocks; item < items; item += gridDim.x / place.blocks) {
    const Turns<> turns(args.shape, params.blocks_per_group, item, slots.count, slots.number);
    const int64_t row_step = turns.step * hidden;
    int64_t row = turns.row;
    int64_t start = row * hidden;
    // Copies packet k of the row at element `begin` to the ring's row that starts at place `at`.
    const auto copy = [&](int at, int k, int64_t begin, bool inside) {
      ring.Copy(at + k, begin + column[k], inside && column[k] < hidden);
      CommitCopies();
    };
#pragma unroll
    for (int t = 0; t < kAhead; ++t) {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) copy(t * kPackets, k, start + t * row_step, turns.Has(t));
    }
    if (item < gridDim.x / place.blocks) row_sum.Start();
    const int all = turns.All(), own = turns.Own();

    float gamma[kPackets][kSize];
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) gamma[k][i] = 0.0f;
      if (column[k] < hidden) LoadGamma(args, turns.group * hidden, column[k], gamma[k]);
    }

    // The ring's places of the rows of this turn and of the last one, and of the row to be copied.
    int from = 0, last_from = 0, to = kAhead * kPackets;
#pragma unroll 1
    for (int t = 0; t <= all; ++t) {
      if (t < all) {
        pace.Wait();
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          WaitCopies<kAhead * kPackets - 1>();
          copy(to, k, start + kAhead * row_step, t + kAhead < own);
          float x[kSize];
          ring.Read(from + k).Get(x);
          sum += SumOfSquares(x);
        }
        row_sum.Post(turn + t, sum);
      }
      if (t > 0) {
        const float rrms = rsqrtf(row_sum.Wait(turn + t - 1) * params.inverse_hidden + arithmetic.eps);
        if (t <= own) {
          if (args.rrms != nullptr && thread == 0 && place.rank == 0) args.rrms[row - turns.step] = rrms;
          const int64_t last_start = start - row_step;
#pragma unroll
          for (int k = 0; k < kPackets; ++k) {
            if (column[k] >= hidden) continue;
            float x[kSize], y[kSize];
            ring.Read(last_from + k).Get(x);
            Normalize<T>(x, rrms, gamma[k], arithmetic.round_before_gamma, y);
            StoreAs<T>(args.y_dtype, args.y, last_start + column[k], y);
          }
        }
      }
      row += turns.step;
      start += row_step;
      last_from = from;
      from = from + kPackets == kPlaces ? 0 : from + kPackets;
      to = to + kPackets == kPlaces ? 0 : to + kPackets;
    }
    turn += all;
    WaitCopies<0>();
  }
}

}  // namespace jax_rmsnorm
