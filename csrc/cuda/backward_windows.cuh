// The backward kernel of many rows that do not begin at multiples of 16 bytes, where there are no bulk
// copies.
#pragma once

#include "backward_common.cuh"
#include "ring.cuh"

namespace jax_rmsnorm {

// Grid, and what is done in a turn: as BackwardKernel, on windows instead of packets. A thread has gamma and
// dgamma at its windows' columns in registers: the slots of a block have rows of one shift only, and a
// cluster has those of one shift after another. Before those of another it adds its dgamma to what it has
// stored.
//
// Preconditions: all tensors are aligned to 16 bytes; the row fits wherever it begins, hidden + kSize - 1 <=
// kSize * kPackets * threads_per_row * blocks of the cluster; kSize <= threads_per_row; a group has several
// clusters, or all rows of a slot and group begin equally far behind a multiple of kSize elements.
template <typename T, typename D, int kPackets, Scope kScope>
__global__ __launch_bounds__(kScope == Scope::kLanes || kPackets == 4 ? kLanesThreads : kMaxThreads,
                             1) void BackwardWindowsKernel(const __grid_constant__ BackwardParams params) {
#if __CUDA_ARCH__ < 900
  constexpr int kSize = 16 / (sizeof(T) < sizeof(D) ? sizeof(T) : sizeof(D));
  constexpr bool kTail = kScope != Scope::kLanes;
  constexpr int kAhead = kRowsAhead<kScope, kPackets>;
  constexpr int kPlaces = (kAhead + 2) * kPackets;
  // As in BackwardKernel.
  constexpr int kInFlight = kAhead * kPackets - (kPackets == 3 && kScope == Scope::kCluster ? 2 : 1);
  extern __shared__ uint4 shared[];
  __shared__ typename SplitRowSum<kScope>::Shared sum_memory;
  const BackwardArgs& args = params.args;
  const int hidden = static_cast<int>(args.shape.hidden);
  const bool round = args.arithmetic.round_before_gamma;
  const ClusterPlace<kScope> place;
  const Slots<kScope, kScope == Scope::kCluster> slots(params.threads_per_row);
  const auto strip = StripOf<kSize, kPackets, kScope>(slots.threads, slots.thread, place);
  SplitRowSum<kScope> row_sum(sum_memory, slots.threads, slots.number, slots.thread);
  LaunchDependents();
  WaitForPrimary();
  const uint32_t ring_memory = SharedAddress(shared);
  const PacketRing<T, kSize, kTail, true> x_ring(ring_memory, args.x);
  const PacketRing<D, kSize, kTail, true> dy_ring(ring_memory + kPlaces * x_ring.Bytes(), args.dy[0]);
  const int64_t elements = args.shape.groups * args.shape.rows * hidden;

  const int64_t items = args.shape.groups * params.blocks_per_group;
  unsigned sums = 0;  // rows that were handed in to row_sum
  for (int64_t item = blockIdx.x / place.blocks; item < items; item += gridDim.x / place.blocks) {
    const auto turns = [&] {
      if constexpr (kScope == Scope::kCluster) {
        return TurnsAlike<kSize>(args.shape, params.blocks_per_group, item);
      } else {
        return Turns<>(args.shape, params.blocks_per_group, item, slots.count, slots.number);
      }
    }();
    const auto shift_of = [](int64_t start) { return static_cast<int>(start & (kSize - 1)); };

    // Copies window k of a row to the ring's row at place `to`.
    const auto copy = [&](int to, int k, int64_t row, bool inside) {
      const int64_t begin = row * hidden;
      CopyWindow(strip, to, k, begin, shift_of(begin), hidden, inside, elements, x_ring, dy_ring);
      CommitCopies();
    };
    int turn = 0, ahead = 0;  // the turn whose row is copied next
    int64_t row = turns.row, ahead_row = turns.row;
#pragma unroll
    for (int t = 0; t < kAhead; ++t, ++ahead, ahead_row = turns.After(ahead_row)) {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) copy(t * kPackets, k, ahead_row, turns.Has(ahead));
    }
    if (item < gridDim.x / place.blocks) row_sum.Start();
    const int all = turns.All(), own = turns.Own();
    float next_rrms = own > 0 ? args.rrms[row] : 0.0f;
    // The ring's places of the rows of this turn and of the last one, and of the row to be copied.
    int from = 0, last_from = 0, to = kAhead * kPackets;

#pragma unroll 1
    do {
      const int first_turn = turn, shift = shift_of(row * hidden);
      int column[kPackets];
#pragma unroll
      for (int k = 0; k < kPackets; ++k) column[k] = strip.At(k) - shift;
      float gamma[kPackets][kSize], tail_gamma[kSize], dgamma[kPackets][kSize] = {};
      LoadGammaOfStrip(args, turns.group * hidden, shift, strip, gamma, tail_gamma);

      float rrms = 0.0f;
      int64_t last_row = row;
#pragma unroll 1
      while (true) {
        const bool more = turn < all && (kScope != Scope::kCluster || shift_of(row * hidden) == shift);
        const float last_rrms = rrms;
        if (more) {
          rrms = next_rrms;
          next_rrms = turn + 1 < own ? args.rrms[turns.After(row)] : 0.0f;
          const auto circle = SumOfStrip(
              strip, shift, shift + hidden,
              [&](int k, float (&terms)[kSize]) {
                WaitCopies<kInFlight>();
                copy(to, k, ahead_row, ahead < own);
                float x[kSize], dy[kSize];
                x_ring.Read(from + k).Get(x);
                dy_ring.Read(from + k).Get(dy);
                AccumulateWindow<T>(x, dy, gamma[k], rrms, round, dgamma[k], terms);
                ZeroOutside(hidden, column[k], terms);
              },
              [&](float (&terms)[kSize]) {
                float x[kSize], dy[kSize], unused[kSize] = {};
                x_ring.ReadFurther(from).Get(x);
                dy_ring.ReadFurther(from).Get(dy);
                AccumulateWindow<T>(x, dy, tail_gamma, rrms, false, unused, terms);
                ZeroOutside(hidden, strip.At(kPackets) - shift, terms);
              });
          row_sum.PostOfWarp(sums++, circle.Over(strip.lanes()));
          ++ahead;
          ahead_row = turns.After(ahead_row);
        }
        if (turn > first_turn) {
          const float mean = row_sum.Wait(sums - (more ? 2 : 1)) * params.inverse_hidden;
          const float slope = Slope(last_rrms, mean);
          if (turn <= own) {
            T* dx_row = static_cast<T*>(args.dx) + last_row * hidden;
#pragma unroll
            for (int k = 0; k < kPackets; ++k) {
              if (column[k] >= hidden) continue;
              float x[kSize], dy[kSize], dx[kSize];
              x_ring.Read(last_from + k).Get(x);
              dy_ring.Read(last_from + k).Get(dy);
              Differentiate(x, dy, gamma[k], last_rrms, slope, dx);
              StoreWithinRow(dx_row + column[k], hidden, column[k], dx);
            }
          }
        }
        if (!more) break;
        ++turn;
        last_row = row;
        row = turns.After(row);
        last_from = from;
        from = from + kPackets == kPlaces ? 0 : from + kPackets;
        to = to + kPackets == kPlaces ? 0 : to + kPackets;
      }
      if (turn >= all) WaitCopies<0>();
      if (args.dgamma == nullptr) continue;
      // Rows of another shift have other threads at a column, which have handed in a row's sum in between.
      if (first_turn > 0) __threadfence();
      StoreBlockDgamma<false>(params, turns.group, turns.block, slots.count, slots.number, column, dgamma,
                              reinterpret_cast<float*>(shared), first_turn > 0);
      if (turn < all) __threadfence();
    } while (turn < all);
  }
#endif
}

}  // namespace jax_rmsnorm
