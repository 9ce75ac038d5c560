// The backward kernel for few rows, where latency is all: dx and dgamma each by blocks of its own, at the
// same time. What they both read comes from memory once and from the L2 cache the second time; there are no
// partial sums of dgamma, and no second kernel.
#pragma once

#include "backward_common.cuh"

namespace jax_rmsnorm {

// The row of this thread, of the block (or cluster) that is number `block` of those that compute dx: one for
// every threads_per_row threads, with kOne for the block.
template <Scope kScope, bool kOne, int kShare = 1>
struct FewRow {
  __device__ FewRow(const BackwardParams& params, int block)
      : slots(MakeSlots(params)),
        index(int64_t{block} * slots.count + slots.number),
        group(params.args.shape.groups == 1 ? 0 : index / params.args.shape.rows),
        live(index < params.args.shape.groups * params.args.shape.rows),
        sum(slots.threads, slots.number, slots.thread) {}

  static __device__ auto MakeSlots(const BackwardParams& params) {
    if constexpr (kScope == Scope::kBlock && !kOne) {
      return Slots<kScope, kOne, kShare>(params.threads_per_row, params.slots);
    } else {
      return Slots<kScope, kOne, kShare>(params.threads_per_row);
    }
  }

  // The first column of the thread's packet k, as in BackwardKernel.
  template <int kSize>
  __device__ __forceinline__ int Column(int k) const {
    return ((k * place.blocks + place.rank) * slots.threads + slots.thread) * kSize;
  }

  Slots<kScope, kOne, kShare> slots;
  int64_t index, group;  // the row's, counted through all groups, and its group's
  bool live;             // the others take part in the sums only
  ClusterPlace<kScope> place;
  WholeRowSum<kScope, kShare> sum;  // with the bits of BackwardKernel
};

// kMore, here and below: there is more than one gradient of y.

// dx of the rows of one block (or cluster).
template <typename T, typename D, int kSize, int kPackets, Scope kScope, bool kOne, bool kMore>
__device__ __forceinline__ void DifferentiateRows(const BackwardParams& params, int block) {
  const BackwardArgs& args = params.args;
  const int hidden = static_cast<int>(args.shape.hidden);
  FewRow<kScope, kOne> row(params, block);

  Packet<T, kSize> x[kPackets];
  Packet<D, kSize> dy[kPackets];
  Packet<T, kSize> dh[kPackets];
  const auto column = [&](int k) { return row.template Column<kSize>(k); };
  const auto inside = [&](int k) { return row.live && column(k) < hidden; };
  const int64_t start = row.index * hidden;
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    x[k].Load(static_cast<const T*>(args.x) + start + column(k), inside(k));
    dy[k].Load(static_cast<const D*>(args.dy[0]) + start + column(k), inside(k));
    dh[k].Load(static_cast<const T*>(args.dh) + start + column(k), inside(k) && args.dh != nullptr);
  }
  const float rrms = row.live ? args.rrms[row.index] : 0.0f;
  float gamma[kPackets][kSize];
  float sum = 0.0f;
  WithType(args.gamma_dtype, [&](auto tag) {
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      LoadGammaAs<decltype(tag)>(args, row.group * hidden, column(k), gamma[k], inside(k));
    }
  });
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    float xs[kSize], dys[kSize], unused[kSize] = {};
    x[k].Get(xs);
    dy[k].Get(dys);
    if constexpr (kMore) AddGradients<D>(args, start + column(k), inside(k), dys);
    sum += Accumulate<T>(xs, dys, gamma[k], rrms, false, unused);
  }
  const float mean = row.sum(sum) * params.inverse_hidden;
  const float slope = Slope(rrms, mean);
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    float xs[kSize], dys[kSize], dx[kSize];
    x[k].Get(xs);
    dy[k].Get(dys);
    if constexpr (kMore) AddGradients<D>(args, start + column(k), inside(k), dys);
    Differentiate(xs, dys, gamma[k], rrms, slope, dx);
    AddPacket(dh[k], dx);
    Packet<T, kSize> packet;
    packet.Set(dx);
    packet.Store(static_cast<T*>(args.dx) + start + column(k), inside(k));
  }
}

// The same of rows that do not begin at multiples of 16 bytes, with the bits of BackwardWindowsKernel. With
// kShare two warps share a strip, as in ForwardWindowsKernel, and exchange sums by way of `memory`.
template <typename T, typename D, int kSize, int kPackets, Scope kScope, bool kOne, int kShare>
__device__ __forceinline__ void DifferentiateWindows(const BackwardParams& params, int block,
                                                     uint32_t memory) {
  const BackwardArgs& args = params.args;
  const int hidden = static_cast<int>(args.shape.hidden);
  FewRow<kScope, kOne, kShare> row(params, block);
  const auto strip = StripOf<kSize, kPackets, kScope, kShare>(row.slots.threads, row.slots.thread, row.place,
                                                              static_cast<int>(threadIdx.x / 32 % kShare));

  const int64_t start = row.index * hidden;
  const int shift = static_cast<int>(start & (kSize - 1));
  const int stop = row.live ? shift + hidden : 0;
  Packet<T, kSize> x[strip.kWindows];
  Packet<D, kSize> dy[strip.kWindows];
  const int total = ElementsFrom(args.shape, start - shift);
  const auto x_end = strip.Load(static_cast<const T*>(args.x) + start - shift, stop, total, x);
  const auto dy_end = strip.Load(static_cast<const D*>(args.dy[0]) + start - shift, stop, total, dy);
  const float rrms = row.live ? args.rrms[row.index] : 0.0f;
  float gamma[kPackets][kSize], tail_gamma[kSize];
  LoadGammaOfStrip(args, row.group * hidden, shift, strip, gamma, tail_gamma);
  strip.SetEnd(stop, total, x_end, x);
  strip.SetEnd(stop, total, dy_end, dy);
  const auto products = [&](const Packet<T, kSize>& x_packet, const Packet<D, kSize>& dy_packet,
                            const float (&gammas)[kSize], float (&terms)[kSize]) {
    float xs[kSize], dys[kSize], unused[kSize] = {};
    x_packet.Get(xs);
    dy_packet.Get(dys);
    AccumulateWindow<T>(xs, dys, gammas, rrms, false, unused, terms);
  };
  auto circle = SumOfStrip(
      strip, shift, stop, [&](int k, float (&terms)[kSize]) { products(x[k], dy[k], gamma[k], terms); },
      [&](float (&terms)[kSize]) {
        products(x[strip.kWindows - 1], dy[strip.kWindows - 1], tail_gamma, terms);
      });
  if constexpr (kShare == 2) circle.Exchange(memory);
  const float mean = row.sum.OfWarps(circle.Over(strip.lanes())) * params.inverse_hidden;
  if (!row.live) return;
  const float slope = Slope(rrms, mean);
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    float xs[kSize], dys[kSize], dx[kSize];
    x[k].Get(xs);
    dy[k].Get(dys);
    Differentiate(xs, dys, gamma[k], rrms, slope, dx);
    const int column = strip.At(k) - shift;
    StoreWithinRow(static_cast<T*>(args.dx) + start + column, hidden, column, dx);
  }
}

// dgamma at the columns of one tile: tile_packets lanes side by side, and all rows of the group dealt out to
// the block's runs of so many lanes.
template <typename T, typename D, int kSize, bool kAligned, bool kMore, int kWarps>
__device__ __forceinline__ void SumTile(const BackwardParams& params, int64_t group, int tile,
                                        float (&sums)[kWarps][kMostTilePackets * kSize]) {
  const BackwardArgs& args = params.args;
  const int hidden = static_cast<int>(args.shape.hidden);
  const int packets = params.tile_packets, shift = 31 - __clz(packets);  // a power of two
  const int packet = static_cast<int>(threadIdx.x) & (packets - 1);
  const int column = (tile * packets + packet) * kSize;
  const int warps = static_cast<int>(blockDim.x) / 32;
  [[maybe_unused]] const int64_t elements = args.shape.groups * args.shape.rows * hidden;

  float dgamma[kSize] = {};
  if (column < hidden) {
    const int64_t end = (group + 1) * args.shape.rows;
    const int step = static_cast<int>(blockDim.x) >> shift;
#pragma unroll 4
    for (int64_t row = group * args.shape.rows + (threadIdx.x >> shift); row < end; row += step) {
      Packet<T, kSize> x;
      Packet<D, kSize> dy;
      const int64_t start = row * hidden + column;
      if constexpr (kAligned) {
        x.Load(static_cast<const T*>(args.x) + start);
        dy.Load(static_cast<const D*>(args.dy[0]) + start);
      } else {
        x = Joined<T, kSize>(static_cast<const T*>(args.x), elements, start).LoadOne(0, kSize);
        dy = Joined<D, kSize>(static_cast<const D*>(args.dy[0]), elements, start).LoadOne(0, kSize);
      }
      const float rrms = args.rrms[row];
      float xs[kSize], dys[kSize], ones[kSize];
      x.Get(xs);
      dy.Get(dys);
      if constexpr (kMore) AddGradients<D>(args, start, true, dys);
#pragma unroll
      for (int i = 0; i < kSize; ++i) ones[i] = 1.0f;
      Accumulate<T>(xs, dys, ones, rrms, args.arithmetic.round_before_gamma, dgamma);
    }
  }
  for (int offset = packets; offset < 32; offset *= 2) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) dgamma[i] += __shfl_xor_sync(kFullMask, dgamma[i], offset);
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (threadIdx.x % 32 < packets) sums[threadIdx.x / 32][packet * kSize + i] = dgamma[i];
  }
  __syncthreads();
  const int first = tile * packets * kSize;
  const int columns = min(packets * kSize, hidden - first);
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    float total[1] = {0.0f};
    for (int warp = 0; warp < warps; ++warp) total[0] += sums[warp][i];
    StoreAs<float>(args.gamma_dtype, args.dgamma, group * hidden + first + i, total);
  }
}

// Threads of a block at the most; with kShare two warps share what one has where rows are many.
template <Scope kScope, int kShare>
constexpr int kFewMostThreads = kScope == Scope::kLanes ? kFewThreads
                                : kShare == 1           ? kMaxThreads
                                                        : kShare * kLanesThreads;

// Blocks an SM for which the compiler keeps registers: two, unless a thread has so much of a row that it
// would spill.
template <int kElements, int kThreads, int kShare>
constexpr int kFewBlocks =
    kThreads == kFewThreads || (kThreads == kMaxThreads && kShare == 1 && kElements <= 16) ? 2 : 1;

// Grid: the tiles of dgamma, group by group, then blocks (or clusters) of rows for dx. Preconditions: the row
// fits, hidden <= kSize * kPackets * threads_per_row * blocks of the cluster; with kAligned all rows are
// aligned to their packets, without it tensors are, to packets of 16 bytes, and the row fits wherever it
// begins. Only rows aligned to 16 bytes come with a dh or with gradients beyond the first.
template <typename T, typename D, int kSize, int kPackets, Scope kScope, bool kAligned, int kShare = 1,
          int kThreads = kFewMostThreads<kScope, kShare>>
__global__ __launch_bounds__(kThreads, kFewBlocks<kSize * kPackets, kThreads, kShare>) void BackwardFewKernel(
    const __grid_constant__ BackwardParams params) {
  // A block with more threads than few rows take has one that needs them.
  constexpr bool kOne =
      kScope == Scope::kCluster || (kScope == Scope::kBlock && kAligned && kThreads > kFewThreads);
  constexpr bool kMayAdd = kAligned;
  LaunchDependents();
  WaitForPrimary();
  // A tile's sums, a warp each, or what warps that share a strip exchange.
  constexpr int kWarpBytes = 32 * kSize * 4;
  __shared__ alignas(16) float memory[kThreads / 32][kMostTilePackets * kSize];
  static_assert(sizeof(memory) >= kThreads / 32 * kWarpBytes);
  const auto run = [&](auto more) {
    constexpr bool kMore = decltype(more)::value;
    // A cluster is either for tiles, of which it may have none to do, or for a row.
    const ClusterPlace<kScope> place;
    const auto tile = static_cast<int>(blockIdx.x), blocks = place.blocks;
    const auto tiles = static_cast<int>(params.tiles * params.args.shape.groups);
    const int cluster = tile / blocks - (tiles + blocks - 1) / blocks;
    if (cluster < 0) {
      if (tile >= tiles) return;
      const int group = params.args.shape.groups == 1 ? 0 : tile / static_cast<int>(params.tiles);
      SumTile<T, D, kSize, kAligned, kMore>(params, group, tile - group * static_cast<int>(params.tiles),
                                            memory);
      return;
    }
    if (kScope == Scope::kBlock && static_cast<int>(threadIdx.x) >= params.slots * params.threads_per_row) {
      return;  // for tiles alone
    }
    if constexpr (!kAligned) {
      DifferentiateWindows<T, D, kSize, kPackets, kScope, kOne, kShare>(params, cluster,
                                                                        SharedAddress(memory));
    } else {
      DifferentiateRows<T, D, kSize, kPackets, kScope, kOne, kMore>(params, cluster);
    }
  };
  // Once for the whole kernel: a branch within a loop would keep its loads apart.
  if (!kMayAdd || params.args.gradients == 1) {
    run(std::false_type{});
  } else {
    run(std::bool_constant<kMayAdd>{});
  }
}

}  // namespace jax_rmsnorm
