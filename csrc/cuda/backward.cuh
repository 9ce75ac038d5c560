// The backward kernels: dx, and one partial row of dgamma for each persistent block (or cluster).
#pragma once

#include <iterator>

#include "backward_bulk.cuh"
#include "backward_common.cuh"
#include "backward_few.cuh"
#include "backward_loop.cuh"
#include "backward_rotary.cuh"
#include "backward_windows.cuh"
#include "ring.cuh"

namespace jax_rmsnorm {

// Grid: block (or cluster) b of the blocks_per_group that share group g takes the group's rows b, b +
// blocks_per_group, ... A block has several slots where threads_per_row leaves room, and then takes runs of
// rows, one a slot. It keeps its share of dgamma in registers. kSize elements a packet, kPackets packets a
// thread.
//
// In each turn a thread adds up its part of row t, hands it in, and only then asks for the sum of row t - 1
// and writes that row's dx: nobody waits for the slowest thread of the row. Both rows are in the ring, and
// behind them the packets in flight, as many as the memory likes best. Where part of a warp has a row, the
// sum of its lanes makes nobody wait, and row t is done with in turn t.
//
// A row's reciprocal RMS is loaded a turn ahead. Where the compiler places that load behind the turn's copies
// it comes after them, for loads and copies are answered in order, and the wait for it keeps a block with
// much under way from asking for more than its share. One with little (kEager) must not wait: it has had the
// value fetched to the L2 cache some turns before, which also keeps the load in front of the copies.
//
// Preconditions: all tensors and rows are aligned to 16 bytes; the row fits, hidden <=
// kSize * kPackets * threads_per_row * blocks of the cluster. Gradients beyond the first dy need kAdd.
template <typename T, typename D, int kSize, int kPackets, Scope kScope, Fusion kFusion, bool kEager = false>
__global__ __launch_bounds__(kScope == Scope::kLanes ? kLanesThreads : kMaxThreads,
                             1) void BackwardKernel(const __grid_constant__ BackwardParams params) {
  constexpr bool kAdd = kFusion == Fusion::kAdd;
  constexpr int kAhead = kRowsAhead<kScope, kPackets, kAdd>;
  constexpr int kPlaces = (kAhead + 2) * kPackets;
  constexpr int kBehind = kScope == Scope::kLanes ? 0 : 1;  // turns from a row's sum to its dx
  // Of the packets ahead, those that may still be in flight when the next is copied: all but the one that is
  // read, and with three packets all but two, which the memory likes better.
  constexpr int kInFlight = kAhead * kPackets - (kPackets == 3 && !kAdd && kScope == Scope::kCluster ? 2 : 1);
  constexpr int kPrefetch = 3;  // turns from when a reciprocal RMS is fetched to when it is loaded
  extern __shared__ uint4 shared[];
  __shared__ typename SplitRowSum<kScope>::Shared sum_memory;
  const BackwardArgs& args = params.args;
  const int hidden = static_cast<int>(args.shape.hidden);
  const bool round = args.arithmetic.round_before_gamma;
  const ClusterPlace<kScope> place;
  const Slots<kScope, kScope == Scope::kCluster> slots(params.threads_per_row);
  const int threads = slots.threads, thread = slots.thread;
  SplitRowSum<kScope> row_sum(sum_memory, threads, slots.number, thread);
  LaunchDependents();
  WaitForPrimary();
  Pace pace(params.turn_ns, thread < 32 && place.rank == 0);
  const uint32_t ring_memory = SharedAddress(shared);
  const PacketRing<T, kSize, false, !kAdd> x_ring(ring_memory, args.x);
  const PacketRing<D, kSize, false, !kAdd> dy_ring(ring_memory + kPlaces * x_ring.Bytes(), args.dy[0]);
  // Behind these two rings, with kAdd: the ring of dh, and one for each further gradient.
  const uint32_t behind = ring_memory + kPlaces * (x_ring.Bytes() + dy_ring.Bytes());
  const PacketRing<T, kSize, false, !kAdd> dh_ring(behind, args.dh);
  // How far behind dy's ring that of its gradient g is.
  const auto gradient = [&](int g) {
    return kPlaces * (dh_ring.Bytes() + static_cast<uint32_t>(g) * dy_ring.Bytes());
  };
  // dy, the sum of its gradients, from a place of their rings.
  const auto read_dy = [&](int at, float (&dy)[kSize]) {
    dy_ring.Read(at).Get(dy);
    if constexpr (kAdd) {
#pragma unroll
      for (int g = 1; g < kMostGradients; ++g) {
        if (g >= args.gradients) break;
        AddPacket(dy_ring.Read(at, gradient(g)), dy);
      }
    }
  };

  int column[kPackets];
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    column[k] = ((k * place.blocks + place.rank) * threads + thread) * kSize;
  }

  const int64_t items = args.shape.groups * params.blocks_per_group;
  unsigned turn = 0;  // counted on from item to item, for row_sum
  for (int64_t item = blockIdx.x / place.blocks; item < items; item += gridDim.x / place.blocks) {
    const Turns<> turns(args.shape, params.blocks_per_group, item, slots.count, slots.number);
    const bool first_item = item < gridDim.x / place.blocks;
    const int64_t row_step = turns.step * hidden;
    int64_t start = turns.row * hidden;
    // Copies packet k of the row at element `begin` to the ring's row at place `to`.
    const auto copy = [&](int to, int k, int64_t begin, bool inside) {
      const int64_t first = begin + column[k];
      const bool copied = inside && column[k] < hidden;
      x_ring.Copy(to + k, first, copied);
      dy_ring.Copy(to + k, first, copied);
      if constexpr (kAdd) {
        if (args.dh != nullptr) dh_ring.Copy(to + k, first, copied);
#pragma unroll
        for (int g = 1; g < kMostGradients; ++g) {
          if (g >= args.gradients) break;
          dy_ring.CopyFrom(args.dy[g], to + k, first, copied, gradient(g));
        }
      }
      CommitCopies();
    };
#pragma unroll
    for (int t = 0; t < kAhead; ++t) {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) copy(t * kPackets, k, start + t * row_step, turns.Has(t));
    }

    const float* rrms_of = args.rrms + turns.row;
    float next_rrms = turns.Has(0) ? *rrms_of : 0.0f;
    if (first_item) row_sum.Start();
    const int all = turns.All(), own = turns.Own();

    const int64_t gamma_start = turns.group * hidden;
    float gamma[kPackets][kSize], dgamma[kPackets][kSize];
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) gamma[k][i] = dgamma[k][i] = 0.0f;
      if (column[k] < hidden) LoadGamma(args, gamma_start, column[k], gamma[k]);
    }

    float rrms = 0.0f;
    // The ring's places of the rows of this turn and of the last one, and of the row to be copied.
    int from = 0, last_from = 0, to = kAhead * kPackets;
#pragma unroll 1
    for (int t = 0; t < all + kBehind; ++t) {
      const float last_rrms = rrms;
      if (t < all) {
        pace.Wait();
        rrms = next_rrms;
        rrms_of += turns.step;
        next_rrms = t + 1 < own ? *rrms_of : 0.0f;
        if constexpr (kEager) {
          if (thread == 0 && t + 1 + kPrefetch < own) PrefetchToL2(rrms_of + kPrefetch * turns.step);
        }
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          WaitCopies<kInFlight>();
          copy(to, k, start + kAhead * row_step, t + kAhead < own);
          float x[kSize], dy[kSize];
          x_ring.Read(from + k).Get(x);
          read_dy(from + k, dy);
          sum += Accumulate<T>(x, dy, gamma[k], rrms, round, dgamma[k]);
        }
        row_sum.Post(turn + t, sum);
      }
      if (t >= kBehind) {
        const float mean = row_sum.Wait(turn + t - kBehind) * params.inverse_hidden;
        const float of_row = kBehind == 0 ? rrms : last_rrms;
        const float slope = Slope(of_row, mean);
        if (t - kBehind < own) {
          const int64_t begin = start - kBehind * row_step;
          const int at = kBehind == 0 ? from : last_from;
#pragma unroll
          for (int k = 0; k < kPackets; ++k) {
            float x[kSize], dy[kSize], dx[kSize];
            x_ring.Read(at + k).Get(x);
            read_dy(at + k, dy);
            Differentiate(x, dy, gamma[k], of_row, slope, dx);
            if constexpr (kAdd) {
              if (args.dh != nullptr) AddPacket(dh_ring.Read(at + k), dx);
            }
            Packet<T, kSize> packet;
            packet.Set(dx);
            packet.Store(static_cast<T*>(args.dx) + begin + column[k], column[k] < hidden);
          }
        }
      }
      start += row_step;
      last_from = from;
      from = from + kPackets == kPlaces ? 0 : from + kPackets;
      to = to + kPackets == kPlaces ? 0 : to + kPackets;
    }
    turn += all;
    WaitCopies<0>();
    if (args.dgamma == nullptr) continue;

    StoreBlockDgamma<true>(params, turns.group, turns.block, slots.count, slots.number, column, dgamma,
                           reinterpret_cast<float*>(shared));
  }
}

template <typename T, typename D, int kSize, Fusion kFusion>
auto FindBackwardAligned(const LaunchConfig& config) -> void (*)(BackwardParams) {
  constexpr bool kMayBeEager = kFusion == Fusion::kNone;
  if (config.scope == Scope::kLanes) {
    return config.packets == 1   ? BackwardKernel<T, D, kSize, 1, Scope::kLanes, kFusion, kMayBeEager>
           : config.packets == 2 ? BackwardKernel<T, D, kSize, 2, Scope::kLanes, kFusion, kMayBeEager>
                                 : BackwardKernel<T, D, kSize, 3, Scope::kLanes, kFusion>;
  }
  if (config.scope == Scope::kBlock) {
    return config.eager ? BackwardKernel<T, D, kSize, 2, Scope::kBlock, kFusion, kMayBeEager>
                        : BackwardKernel<T, D, kSize, 2, Scope::kBlock, kFusion>;
  }
  return config.packets == 2 ? BackwardKernel<T, D, kSize, 2, Scope::kCluster, kFusion>
                             : BackwardKernel<T, D, kSize, 3, Scope::kCluster, kFusion>;
}

template <typename T, typename D>
auto FindBackwardWindows(const LaunchConfig& config) -> void (*)(BackwardParams) {
  if (config.scope == Scope::kCluster) return BackwardWindowsKernel<T, D, 3, Scope::kCluster>;
  if (config.scope == Scope::kBlock) {
    return config.packets == 2   ? BackwardWindowsKernel<T, D, 2, Scope::kBlock>
           : config.packets == 3 ? BackwardWindowsKernel<T, D, 3, Scope::kBlock>
                                 : BackwardWindowsKernel<T, D, 4, Scope::kBlock>;
  }
  return config.packets == 1   ? BackwardWindowsKernel<T, D, 1, Scope::kLanes>
         : config.packets == 2 ? BackwardWindowsKernel<T, D, 2, Scope::kLanes>
         : config.packets == 3 ? BackwardWindowsKernel<T, D, 3, Scope::kLanes>
                               : BackwardWindowsKernel<T, D, 4, Scope::kLanes>;
}

template <typename T, typename D, size_t kChoice = 0>
auto FindBackwardBulkLanes(const LaunchConfig& config) -> void (*)(BackwardParams) {
  constexpr int kPackets = kBulkLanes[kChoice][0], kLanes = kBulkLanes[kChoice][1];
  if constexpr (kChoice + 1 < std::size(kBulkLanes)) {
    if (config.packets != kPackets || config.threads_per_row != kLanes) {
      return FindBackwardBulkLanes<T, D, kChoice + 1>(config);
    }
  }
  return BackwardBulkKernel<T, D, kPackets, kLanes, Scope::kLanes>;
}

template <typename T, typename D>
auto FindBackwardBulk(const LaunchConfig& config) -> void (*)(BackwardParams) {
  if (config.scope == Scope::kCluster) return BackwardBulkKernel<T, D, 3, 32, Scope::kCluster>;
  if (config.scope == Scope::kLanes) return FindBackwardBulkLanes<T, D>(config);
  return config.packets == 2 ? BackwardBulkKernel<T, D, 2, 32, Scope::kBlock>
                             : BackwardBulkKernel<T, D, 3, 32, Scope::kBlock>;
}

// Few aligned rows, of which a thread has kPackets packets of kSize elements.
template <typename T, typename D, int kSize, int kPackets>
auto FindBackwardFew(const LaunchConfig& config) -> void (*)(BackwardParams) {
  switch (config.scope) {
    case Scope::kLanes:
      return BackwardFewKernel<T, D, kSize, kPackets, Scope::kLanes, true>;
    case Scope::kBlock:
      return config.block <= kFewThreads
                 ? BackwardFewKernel<T, D, kSize, kPackets, Scope::kBlock, true, 1, kFewThreads>
                 : BackwardFewKernel<T, D, kSize, kPackets, Scope::kBlock, true>;
    default:
      return BackwardFewKernel<T, D, kSize, kPackets, Scope::kCluster, true>;
  }
}

// Few rows that are not: those that ShareWindows in layout.h hands out.
template <typename T, typename D, int kSize>
auto FindBackwardFewWindows(const LaunchConfig& config) -> void (*)(BackwardParams) {
  if (config.scope == Scope::kCluster) return BackwardFewKernel<T, D, kSize, 3, Scope::kCluster, false>;
  if (config.scope == Scope::kBlock) {
    if (config.share == 2) {
      return config.packets == 1 ? BackwardFewKernel<T, D, kSize, 1, Scope::kBlock, false, 2>
                                 : BackwardFewKernel<T, D, kSize, 2, Scope::kBlock, false, 2>;
    }
    return config.packets == 2 ? BackwardFewKernel<T, D, kSize, 2, Scope::kBlock, false>
                               : BackwardFewKernel<T, D, kSize, 3, Scope::kBlock, false>;
  }
  return config.share == 1     ? BackwardFewKernel<T, D, kSize, 1, Scope::kLanes, false>
         : config.packets == 1 ? BackwardFewKernel<T, D, kSize, 1, Scope::kLanes, false, 2>
                               : BackwardFewKernel<T, D, kSize, 2, Scope::kLanes, false, 2>;
}

// The kernel that `config` asks for; the packet counts are those that ConfigureBackward hands out.
template <typename T, typename D>
auto FindBackward(const LaunchConfig& config, const BackwardArgs& args) -> void (*)(BackwardParams) {
  constexpr int kSize = 16 / (sizeof(T) < sizeof(D) ? sizeof(T) : sizeof(D));
  if (config.scope == Scope::kLoop) {
    return config.aligned ? BackwardLoopKernel<T, D, kSize> : BackwardLoopKernel<T, D, 1>;
  }
  if (FusionOf(args) == Fusion::kRotary)
    return FindBackwardRotary<T, D, kSize>(config, args.rotary.interleaved);
  const bool few = config.method == Method::kFew;
  if (config.method == Method::kBulk) return FindBackwardBulk<T, D>(config);
  if (!config.aligned) {
    return few ? FindBackwardFewWindows<T, D, kSize>(config) : FindBackwardWindows<T, D>(config);
  }
  if (few) {
    return config.packets == 1             ? BackwardFewKernel<T, D, kSize, 1, Scope::kLanes, true>
           : config.packets == 2           ? FindBackwardFew<T, D, kSize, 2>(config)
           : config.scope == Scope::kLanes ? BackwardFewKernel<T, D, kSize, 3, Scope::kLanes, true>
                                           : BackwardFewKernel<T, D, kSize, 3, Scope::kCluster, true>;
  }
  return FusionOf(args) == Fusion::kAdd ? FindBackwardAligned<T, D, kSize, Fusion::kAdd>(config)
                                        : FindBackwardAligned<T, D, kSize, Fusion::kNone>(config);
}

template <typename T, typename D>
cudaError_t LaunchBackwardAs(const BackwardArgs& args, const LaunchConfig& config, cudaStream_t stream) {
  const BackwardParams params{args,
                              1.0f / static_cast<float>(args.shape.hidden),
                              config.threads_per_row,
                              config.slots,
                              config.places,
                              static_cast<uint32_t>(config.place_bytes),
                              static_cast<uint32_t>(config.x_bytes),
                              config.blocks_per_group,
                              config.tiles,
                              config.tile_packets,
                              config.turn_ns,
                              RotaryPlaces(args.rotary)};
  return LaunchKernel(FindBackward<T, D>(config, args), params, config, stream);
}

}  // namespace jax_rmsnorm
