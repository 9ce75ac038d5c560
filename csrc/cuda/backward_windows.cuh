// The backward kernel of many rows that do not begin at multiples of 16 bytes.
#pragma once

#include "backward_common.cuh"
#include "ring.cuh"

namespace jax_rmsnorm {

// Grid, and what is done in a turn: as BackwardKernel, on windows instead of packets. Rows of one shift come
// one after another, so that a thread has gamma and dgamma at its windows' columns in registers: those of
// every so many-th turn of a cluster, and then those of another shift, for which its dgamma is added to what
// it has stored. The slots of a block have rows of one shift only.
//
// Preconditions: all tensors are aligned to 16 bytes; the row fits wherever it begins, hidden + kSize - 1 <=
// kSize * kPackets * threads_per_row * blocks of the cluster; kSize <= threads_per_row; but for clusters, of
// which a group has several, all rows of a slot and group begin equally far behind a multiple of kSize
// elements.
template <typename T, typename D, int kPackets, Scope kScope>
__global__ __launch_bounds__(kScope == Scope::kCluster ? kMaxThreads : kLanesThreads,
                             1) void BackwardWindowsKernel(const __grid_constant__ BackwardParams params) {
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
    const Turns<> turns(args.shape, params.blocks_per_group, item, slots.count, slots.number);
    // Every `stride`-th turn has rows that lie alike.
    const int turned = kScope == Scope::kCluster ? static_cast<int>(turns.step * hidden & (kSize - 1)) : 0;
    const int stride = turned == 0 ? 1 : kSize >> (__ffs(turned) - 1);
    const int ways = min(stride, max(turns.all, 1));
    const auto after = [&](int turn) {
      const int next = turn + stride, way = (turn & (stride - 1)) + 1;
      return turn >= turns.all || next < turns.all ? next : way < ways ? way : turns.all;
    };
    const auto start_of = [&](int turn) { return (turns.row + turn * turns.step) * hidden; };
    const int64_t start_step = turns.step * hidden;
    const auto advance = [&](int* turn, int64_t* start) {
      *turn = after(*turn);
      *start = kScope == Scope::kCluster ? start_of(*turn) : *start + start_step;
    };

    // Copies window k of a turn's row, at element `begin`, to the ring's row at place `to`.
    const auto copy = [&](int to, int k, int turn, int64_t begin) {
      const bool inside = turn < turns.own;
      const int shift = static_cast<int>(begin & (kSize - 1));
      const int column = strip.At(k) - shift, tail_column = strip.At(kPackets) - shift;
      const bool copied = inside && column < hidden;
      const bool tail = kTail && k == 0 && inside && tail_column < hidden;
      if (!copied || begin + hidden + kSize <= elements) {
        x_ring.Copy(to + k, begin + column, copied);
        dy_ring.Copy(to + k, begin + column, copied);
        if (tail) {
          x_ring.CopyFurther(to, begin + tail_column);
          dy_ring.CopyFurther(to, begin + tail_column);
        }
      } else {  // the last rows of the tensors, beyond which nothing is read
        x_ring.CopyLast(to + k, false, begin + column, elements);
        dy_ring.CopyLast(to + k, false, begin + column, elements);
        if (tail) {
          x_ring.CopyLast(to, true, begin + tail_column, elements);
          dy_ring.CopyLast(to, true, begin + tail_column, elements);
        }
      }
      CommitCopies();
    };
    const auto rrms_of = [&](int turn) {
      return turn < turns.own ? args.rrms[turns.row + turn * turns.step] : 0.0f;
    };

    int ahead = 0;  // the turn whose row is copied next
    int64_t ahead_start = start_of(0);
#pragma unroll
    for (int t = 0; t < kAhead; ++t, advance(&ahead, &ahead_start)) {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) copy(t * kPackets, k, ahead, ahead_start);
    }
    float next_rrms = rrms_of(0);
    // The ring's places of the rows of this turn and of the last one, and of the row to be copied.
    int from = 0, last_from = 0, to = kAhead * kPackets;

#pragma unroll 1
    for (int way = 0; way < ways; ++way) {
      const int shift = static_cast<int>(start_of(way) & (kSize - 1));
      int column[kPackets];
#pragma unroll
      for (int k = 0; k < kPackets; ++k) column[k] = strip.At(k) - shift;
      float gamma[kPackets][kSize], tail_gamma[kSize], dgamma[kPackets][kSize] = {};
      LoadGammaOfStrip(args, turns.group * hidden, shift, strip, gamma, tail_gamma);

      float rrms = 0.0f;
#pragma unroll 1
      for (int turn = way, last = -1;; turn += stride) {
        const bool more = turn < turns.all;
        const float last_rrms = rrms;
        if (more) {
          rrms = next_rrms;
          next_rrms = rrms_of(after(turn));
          const auto circle = SumOfStrip(
              strip, shift, shift + hidden,
              [&](int k, float (&terms)[kSize]) {
                WaitCopies<kInFlight>();
                copy(to, k, ahead, ahead_start);
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
          advance(&ahead, &ahead_start);
        }
        if (last >= 0) {
          const float mean = row_sum.Wait(sums - (more ? 2 : 1)) * params.inverse_hidden;
          const float slope = Slope(last_rrms, mean);
          if (last < turns.own) {
            T* dx_row = static_cast<T*>(args.dx) + start_of(last);
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
        last = turn;
        last_from = from;
        from = from + kPackets == kPlaces ? 0 : from + kPackets;
        to = to + kPackets == kPlaces ? 0 : to + kPackets;
      }
      if (way == ways - 1) WaitCopies<0>();
      if (args.dgamma == nullptr) continue;
      StoreBlockDgamma<false>(params, turns.group, turns.block, slots.count, slots.number, column, dgamma,
                              reinterpret_cast<float*>(shared), way > 0);
    }
  }
}

}  // namespace jax_rmsnorm
